"""METRICS.json as the record of a run: what inferred it, where its files are, how many frames were scored."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import intrada_postprocess as postprocess
import intrada_preprocess as preprocess
import tools.infer as onnx_tool
from support import GOLDEN_DATA_DIR, add_frame, ascend_environment, call, refusal, run, save_frames, save_small_model
from tools import report

FRAMES = [f"ulm_000000_{n:06}" for n in range(4)]


ARGS_7 = '{"throughput": 1, "NPU_compute_time": {"mean": 1}, "args": 7}'
NAN = '{"throughput": NaN, "NPU_compute_time": {"mean": 1}, "args": []}'
NULL = '{"throughput": 1, "NPU_compute_time": {"mean": 1, "percentile(99%)": null}, "args": []}'
ODD_FILES = '{"throughput": 1, "NPU_compute_time": {"mean": 1}, "args": [], "filesinfo": [1]}'


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder: x.onnx, x_bs1.om, prep/ and data/ of four frames."""
    monkeypatch.chdir(tmp_path)
    save_small_model(Path("x.onnx"))
    Path("x_bs1.om").write_text(json.dumps({"onnx": "x.onnx", "batch": 1, "frame_shape": [3, 512, 1024]}))
    save_frames(Path("prep"), FRAMES)
    Path("result").mkdir(0o750)
    for frame, label in zip(FRAMES, np.random.default_rng(0).integers(0, 19, (4, 65, 129))):
        add_frame(Path("data"), frame, label, label)
    return tmp_path


def infer(dirname: str, *options: object) -> None:
    call(onnx_tool, "--model", "x.onnx", "--input", "prep", "--output", "result", "--output_dirname", dirname, *options)


def infer_as_rank(dirname: str, rank: int) -> None:
    options = "--model", "x.onnx", "--input", "prep", "--output", "result", "--output_dirname", dirname
    run("tools/infer.py", *options, env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0"})


def infer_on_an_npu(dirname: str, *options: str) -> None:
    command = [sys.executable, "-m", "ais_bench", "--model", "x_bs1.om", "--input", "prep", "--output", "result"]
    command += ["--output_dirname", dirname, "--batchsize", "1", *options]
    subprocess.run(command, env=ascend_environment(), check=True, stdout=subprocess.DEVNULL)


def score(result_dir: str, *options: object) -> dict:
    assert postprocess.main(["data", result_dir, "--json", "m.json", *map(str, options)]) == 0
    return json.loads(Path("m.json").read_text())


def page_of(*metrics: str) -> str:
    assert report.main(list(metrics)) == 0
    return Path("report.html").read_text()


def test_the_record_says_what_inferred_and_where_all_is(folder):
    infer("r")
    infer_on_an_npu("npu")
    summary = json.loads(Path("result/r_summary.json").read_text())
    record = score("result/r", "--save_labels", "labels")
    assert record["summaries"] == [{"file": "r_summary.json", **summary}]
    assert summary["model_sha256"] == hashlib.sha256(Path("x.onnx").read_bytes()).hexdigest()
    places = [str(folder / name) for name in ("data", "result/r", "labels")]
    assert [record[key] for key in ("data_dir", "result_dir", "label_maps")] == places
    assert "limit" not in record
    Path("latest").symlink_to("result/r")
    assert score("latest", "--save_labels", "labels") == record

    os.utime("result/npu_summary.json", (1e9, 1e9))  # 2001-09-09
    (summary,) = score("result/npu")["summaries"]
    whole = json.loads(Path("result/npu_summary.json").read_text())
    assert (summary.pop("file"), summary.pop("date")) == ("npu_summary.json", "2001-09-09")
    lists = "filesinfo", "npu_compute_time_list"
    assert summary == {key: value for key, value in whole.items() if key not in lists} and whole.keys() > set(lists)


def test_each_device_has_its_own_summary_and_a_stale_one_is_of_none(folder, capsys):
    infer("r")  # one process
    stale = Path("result/r_summary.json").read_bytes()
    shutil.rmtree("result/r")
    for rank in (0, 1):
        infer_as_rank("r", rank)
    assert Path("result/r_summary.json").read_bytes() == stale
    files = [summary["file"] for summary in score("result/r")["summaries"]]
    assert files == ["device0_summary.json", "device1_summary.json"]
    for frame in FRAMES[1::2]:
        (label,) = Path("data/gtFine/val").glob(f"*/{frame}_*")
        label.unlink()
    capsys.readouterr()
    assert [summary["file"] for summary in score("result/r/device0")["summaries"]] == ["device0_summary.json"]
    assert "_summary.json" not in capsys.readouterr().err


@pytest.mark.parametrize("form", [(), ("--divide_input", "1")])
def test_two_npus_have_two_summaries_or_give_two_results_of_a_frame(folder, form):
    infer_on_an_npu("r", "--device", "0,1", *form)
    if form:
        assert [summary["throughput"] for summary in score("result/r")["summaries"]] == [1.0, 1.0]
        assert "device 0, 1" in page_of("m.json")
    else:
        assert "results of the same frame" in refusal(postprocess, "data", "result/r")


@pytest.mark.parametrize("first", ["another x.onnx", "x_bs1.om", "y_bs1.om"])
def test_devices_of_several_models_are_refused(folder, first):
    for rank in (0, 1):
        infer_as_rank("r", rank)
        if not rank:
            save_small_model(Path("x.onnx"), seed=1 if first == "another x.onnx" else 0)
    if first != "another x.onnx":
        infer_on_an_npu("npu")
        shutil.copy("result/npu_summary.json", "result/r/device0_summary.json")
    if first == "y_bs1.om":
        summary = Path("result/npu_summary.json").read_text()
        Path("result/r/device1_summary.json").write_text(summary.replace("x_bs1.om", "y_bs1.om"))
    assert "results of several models" in refusal(postprocess, "data", "result/r")


@pytest.mark.parametrize(("devices", "place"), [("0", "r"), ("0,1", "r/device0_0")])
def test_logits_that_ais_bench_s_summary_does_not_list_are_another_run_s(folder, capsys, devices, place):
    """ais_bench keeps what is in its folder, and its next summary lists only what it wrote."""
    infer_on_an_npu("r", "--device", devices, "--divide_input", "1")
    whole = score("result/r")
    for frame in (FRAMES[1], FRAMES[3]):
        Path(f"prep/{frame}_leftImg8bit.bin").unlink()
    infer_on_an_npu("r", "--device", devices, "--divide_input", "1")
    message = refusal(postprocess, "data", "result/r")
    assert message.startswith(f"{folder}/result/{place}_summary.json: does not list {FRAMES[1]}_leftImg8bit_1.bin")
    assert message.endswith(
        ": of another run; infer into a new folder; or, if all are of one model, move the summary away"
    )
    for path in Path("result").rglob("*_summary.json"):
        path.unlink()
    assert score("result/r")["miou"] == whole["miou"]
    assert "which model inferred these logits is unknown" in capsys.readouterr().err


@pytest.mark.parametrize("devices", ["0", "0,1"])
def test_a_copy_of_results_and_summary_is_scored_as_they_are(folder, capsys, devices):
    infer_on_an_npu("r", "--device", devices, "--divide_input", "1")
    whole = score("result/r")
    Path("other").mkdir()
    subprocess.run("cp -r result/r* other && mv other/r_summary.json other/host_summary.json; mv other/r other/host",
                   shell=True, check=True)  # fmt: skip
    capsys.readouterr()
    copied = score("other/host")
    assert [copied[key] for key in ("miou", "confusion_matrix")] == [whole[key] for key in ("miou", "confusion_matrix")]
    assert len(copied["summaries"]) == len(devices.split(","))
    assert "summary" not in capsys.readouterr().err


def test_logits_much_newer_than_their_summary_are_warned_of(folder, capsys):
    """As where ais_bench crashed before it wrote a new one."""
    infer_on_an_npu("r")
    for seconds, warned in ((50, False), (70, True)):
        for path in Path("result/r").iterdir():
            os.utime(path, (1e9 + seconds, 1e9 + seconds))
        os.utime("result/r_summary.json", (1e9, 1e9))
        score("result/r")
        assert ("result/r_summary.json: older than the logits" in capsys.readouterr().err) == warned


def test_a_missing_or_damaged_summary_is_left_out_with_a_warning(folder, capsys):
    infer("r")
    path = Path("result/r_summary.json")
    path.unlink()
    for content in (None, "", "{", "[]", NAN, NULL, ODD_FILES, '{"filesinfo": {}}', ARGS_7):
        if content is not None:
            path.write_text(content)
        assert score("result/r")["summaries"] == [], content
        warning = f"warning: {folder}/result/r_summary.json: missing or damaged; "
        assert warning in capsys.readouterr().err, content
    assert "model</dt><dd>unknown" in page_of("m.json")


# ---------------------------------------------------------------------------------------------------- --limit


def test_the_first_frames_are_scored_and_the_record_says_so(folder, capsys):
    infer("r")
    whole = score("result/r")
    assert score("result/r", "--limit", 4) == whole
    warning = f"warning: labels that are not 2048 x 1024, whose mIoU is not comparable: {FRAMES[0]}, "
    assert warning in capsys.readouterr().err
    record = score("result/r", "--limit", 2)
    assert "not of this split" not in capsys.readouterr().err
    assert (record["limit"], record["frames"]) == (2, 2)
    assert record["per_frame"] == whole["per_frame"][:2]
    assert "mIoU of the first 2 frames of val" in " ".join(page_of("m.json").split())
    for path in Path("result/r").glob(f"{FRAMES[3]}*"):
        path.unlink()
    assert score("result/r", "--limit", 3)["frames"] == 3
    words = f"for 1 of 4 frames: {FRAMES[3]}; infer them first, or score fewer by --limit; pass e.g. result/result_bs1"
    assert refusal(postprocess, "data", "result/r").endswith(words)


def test_the_first_images_are_converted_and_those_of_an_earlier_run_are_warned_of(folder, capsys):
    (image,) = GOLDEN_DATA_DIR.glob("leftImg8bit/val/*/*.png")
    for city, frame in (("ulm", "ulm_0"), ("bonn", "bonn_1"), ("bonn", "bonn_0")):
        path = Path(f"d/leftImg8bit/val/{city}/{frame}_leftImg8bit.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(str(image), str(path))
    assert preprocess.main(["d", "p", "--limit", "2"]) == 0
    assert capsys.readouterr().out == "frames written to p: 2\n"
    assert sorted(path.name[:6] for path in Path("p").iterdir()) == ["bonn_0", "bonn_1"]
    assert preprocess.main(["d", "p", "--limit", "1"]) == 0
    assert "warning: p: other files, which will be inferred too: bonn_1_leftImg8bit.bin" in capsys.readouterr().err


@pytest.mark.parametrize("data_dir", ["prep", "d/leftImg8bit"])
def test_the_commonest_wrong_folders_are_told_what_data_dir_is(folder, data_dir):
    Path("d/leftImg8bit/val").mkdir(parents=True)
    words = "_leftImg8bit.png; DATA_DIR is the folder that holds leftImg8bit; other images are for tools/segment.py"
    assert refusal(preprocess, data_dir, "out").endswith(words)
    assert "DATA_DIR is the folder that holds gtFine" in refusal(postprocess, data_dir, "data/r")
    assert not Path("out").exists()
