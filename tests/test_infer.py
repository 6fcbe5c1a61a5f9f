"""tools/infer.py against ais_bench's rules, with models small enough to compute by hand."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

import tools.infer as tool
from support import ROOT, error_of, refusal, run, save_two_channel_model, shift_mtime

SCRIPT = "tools/infer.py"


@pytest.fixture
def model(tmp_path, monkeypatch) -> Iterator[Path]:
    """x.onnx in the current folder, where new files are writable by the group."""
    monkeypatch.chdir(tmp_path)
    umask = os.umask(0o002)
    save_two_channel_model(tmp_path / "x.onnx")
    yield tmp_path / "x.onnx"
    os.umask(umask)


def infer(*args: object) -> str:
    """Infer prep into result/r in this process; return what is printed, or the message of an InputError."""
    words = "--model", "x.onnx", "--input", "prep", "--output", "result", "--output_dirname", "r", *args
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            tool.main([str(word) for word in words])
        return printed.getvalue()
    except tool.InputError as error:
        return str(error)
    finally:  # unlock the folder as the end of a process does
        for descriptor in list(Path("/proc/self/fd").iterdir()):
            if descriptor.exists() and descriptor.resolve() == Path("result/r").resolve():
                os.close(int(descriptor.name))


def save_frames(count: int, seed: int = 0) -> list[np.ndarray]:
    """Save prep/frame_0.bin, frame_1.bin, ... and return their contents, each (3, 4, 6) float32."""
    Path("prep").mkdir(exist_ok=True)
    images = list(np.random.default_rng(seed).integers(-9, 9, (count, 3, 4, 6)).astype(np.float32))
    for n, image in enumerate(images):
        image.tofile(f"prep/frame_{n}.bin")
    return images


def results() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path("result/r").iterdir() if path.is_file()}


def read_json(what: str) -> dict:
    return json.loads(Path(f"result/r_{what}.json").read_text())


def expected(weights: np.ndarray, images: list[np.ndarray]) -> dict[str, bytes]:
    return {
        f"frame_{n}_{i}.bin": np.tensordot(weights[i], image, 1).astype("<f4").tobytes()
        for n, image in enumerate(images)
        for i in (0, 1)
    }


@pytest.mark.parametrize("count", [1, 6])
@pytest.mark.parametrize("outfmt", ["BIN", "NPY"])
def test_every_frame_gets_its_own_outputs_at_a_fixed_batch_of_4(model, count, outfmt):
    weights = save_two_channel_model(model, batch=4)  # as an .om has
    images = save_frames(count)
    assert "--batchsize 4" in infer()
    infer("--batchsize", 4, "--outfmt", outfmt)
    found = results()
    if outfmt == "NPY":
        found = {f"{Path(name).stem}.bin": np.load(f"result/r/{name}").tobytes() for name in found}
    assert found == expected(weights, images)


def test_the_summary_has_ais_bench_s_keys_and_what_ran_and_the_note_the_digests(model):
    images = save_frames(11)
    start = time.perf_counter()
    printed = infer("--batchsize", 4)
    wall_s = time.perf_counter() - start
    summary = read_json("summary")
    infiles = [Path(name).stem for group in summary["filesinfo"].values() for name in group["infiles"]]
    assert infiles == [f"frame_{n}" for n in range(11)]  # 2 before 10
    assert [len(group["infiles"]) for group in summary["filesinfo"].values()] == [4, 4, 3]
    outfiles = [f"result/r/frame_{n}_{i}.bin" for n in (8, 9, 10) for i in (0, 1)]
    assert summary["filesinfo"]["2"]["outfiles"] == outfiles
    for times in ("NPU_compute_time", "H2D_latency", "D2H_latency"):
        assert list(summary[times]) == ["min", "max", "mean", "median", "percentile(99%)", "count"]
        assert summary[times]["count"] == 3
    assert summary["NPU_compute_time"]["mean"] == pytest.approx(np.mean(summary["npu_compute_time_list"]))
    assert summary["throughput"] == pytest.approx(4000 / summary["NPU_compute_time"]["mean"])
    assert 11 / summary["end_to_end_throughput"] <= wall_s
    assert summary["end_to_end_throughput"] < summary["throughput"]
    assert summary["model_sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", summary["date"])
    ran = [summary[key] for key in ("model", "provider", "batchsize", "device")]
    assert ran == [str(model), "cpu", 4, [0]]
    assert summary["versions"]["onnxruntime"] == onnxruntime.__version__
    assert "frames: 11 (11 inferred, 0 kept), " in printed
    assert read_json("model") == {
        "model": str(model),
        "provider": "cpu",
        "batchsize": 4,
        "model_sha256": summary["model_sha256"],
        "inputs": {f"frame_{n}": hashlib.sha256(image.tobytes()).hexdigest() for n, image in enumerate(images)},
    }


def test_files_are_readable_by_all_and_writable_by_one_whatever_the_umask(model):
    save_frames(1)
    infer()
    made = "result", "result/r", "result/r_summary.json", "result/r/frame_0_1.bin"
    assert [oct(Path(path).stat().st_mode & 0o777) for path in made] == ["0o750", "0o750", "0o644", "0o644"]


def test_npy_inputs_are_inferred_like_bin_ones(model):
    images = save_frames(2)
    infer()
    from_bin = results()
    for n, image in enumerate(images):
        Path(f"prep/frame_{n}.bin").unlink()
        np.save(f"prep/frame_{n}.npy", image[None] if n else image)
    assert "(2 inferred, 0 kept)" in infer()
    assert results() == from_bin


def test_what_exists_in_its_full_size_is_kept_whatever_its_time(model):
    save_frames(5)
    infer("--batchsize", 2)
    first, summary = results(), read_json("summary")
    for path in Path("result/r").iterdir():
        shift_mtime(path, -3600)
    assert "(0 inferred, 5 kept)" in infer("--batchsize", 2)
    assert read_json("summary") == summary

    Path("result/r/frame_3_0.bin").unlink()
    os.truncate("result/r/frame_1_1.bin", 100)
    assert "(2 inferred, 3 kept)" in infer("--batchsize", 2)
    assert len(read_json("summary")["filesinfo"]["0"]["infiles"]) == 2
    assert results() == first
    assert "(5 inferred, 0 kept)" in infer("--batchsize", 2, "--overwrite")


def test_a_run_killed_before_its_summary_gets_one_when_restarted(model):
    save_frames(5)
    infer()
    first = results()
    Path("result/r_summary.json").unlink()
    assert "(1 inferred, 4 kept)" in infer()
    assert read_json("summary")["throughput"] > 0
    assert results() == first


def test_a_speed_test_does_not_replace_the_summary_of_results(model):
    save_frames(2)
    infer()
    summary = read_json("summary")
    message = refusal(tool, "--model", model, "--output", "result", "--output_dirname", "r")
    assert message.startswith("result/r: holds results")
    assert read_json("summary") == summary


def test_only_frames_whose_input_has_changed_are_inferred_again(model):
    save_frames(5)
    infer()
    prep, other = Path("prep"), Path("other")
    shutil.copytree(prep, other)
    changed = np.ones((3, 4, 6), "<f4")
    changed.tofile(other / "frame_2.bin")
    shift_mtime(other / "frame_2.bin", -3600)
    assert "(1 inferred, 4 kept)" in infer("--input", other)
    weights = save_two_channel_model(model)
    assert results()["frame_2_1.bin"] == np.tensordot(weights[1], changed, 1).tobytes()
    shutil.copy2(prep / "frame_2.bin", other)  # cp -p
    assert "(1 inferred, 4 kept)" in infer("--input", other)


@pytest.mark.parametrize("what", ["model", "input"])
def test_an_interrupted_run_leaves_no_results_of_the_old_model_or_input(model, what):
    """The third frame cannot be written, which leaves the folder as a kill at that moment does."""
    images = save_frames(4)
    weights = save_two_channel_model(model)
    infer()
    if what == "model":
        weights = save_two_channel_model(model, offset=9)
        shift_mtime(model, -3600)
    else:
        images = save_frames(4, seed=1)
    full = expected(weights, images)
    obstacle = Path("result/r/frame_2_0.bin.part")
    obstacle.mkdir()
    assert "frame_2_0.bin: cannot be written" in infer()
    assert results() == {name: full[name] for name in full if name < "frame_2"}
    assert not Path("result/r_summary.json").exists()
    obstacle.rmdir()
    assert "(2 inferred, 2 kept)" in infer()
    assert results() == full


def test_the_note_is_rewritten_only_after_all_old_results_are_removed(model):
    save_frames(2)
    infer()
    note = read_json("model")
    save_two_channel_model(model, offset=9)
    Path("result/r/frame_1_1.bin").unlink()
    Path("result/r/frame_1_1.bin").mkdir()  # cannot be removed
    with pytest.raises(OSError, match="frame_1_1"):
        infer()
    assert read_json("model") == note


@pytest.mark.parametrize(
    ("what", "change", "words"),
    [
        ("model", {"model": "/y.onnx"}, "/y.onnx"),
        ("model", {"provider": "cuda"}, "provider cuda"),
        ("model", {"batchsize": 2}, "batchsize 2"),
        ("model", "{", "unknown"),
        ("model", "[]", "unknown"),
        ("summary", '{"throughput": 1.0}', "unknown"),  # ais_bench's, which has written over the results
    ],
)
def test_results_of_other_settings_or_of_unknown_origin_need_overwrite(model, what, change, words):
    save_frames(2)
    infer()
    text = json.dumps({**read_json("model"), **change}) if isinstance(change, dict) else change
    Path(f"result/r_{what}.json").write_text(text)
    message = infer()
    assert words in message
    assert "--overwrite" in message
    assert Path(f"result/r_{what}.json").read_text() == text
    assert "(2 inferred, 0 kept)" in infer("--overwrite")
    assert "(0 inferred, 2 kept)" in infer()


def test_unexpected_results_are_refused_by_name(model):
    save_frames(2)
    infer()
    message = infer("--outfmt", "NPY")
    assert all(name in message for name in results())
    Path("result/r/unexpected_1.bin").write_bytes(b"")
    message = infer("--overwrite")
    assert "unexpected_1.bin" in message
    assert "frame" not in message.partition("--outfmt")[2]


def test_two_runs_do_not_write_to_one_folder(model):
    save_frames(1)
    folder = Path("result/r")
    folder.mkdir(parents=True)
    held = os.open(folder, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    args = "--model", "x.onnx", "--input", "prep", "--output", "result", "--output_dirname", "r"
    assert error_of(SCRIPT, *args).startswith("result/r: another run")
    os.close(held)
    assert "(1 inferred, 0 kept)" in infer()


def test_the_last_group_is_padded_with_its_first_frame(model):
    """By a model whose output is the mean over the batch."""
    nodes = [helper.make_node("ReduceMean", ["image"], ["output_0"], axes=[0], keepdims=1),
             helper.make_node("Add", ["image", "output_0"], ["output_1"])]  # fmt: skip
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 3, 4, 6]) for n in ("image", "output_1")]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=6), model)
    images = save_frames(6)
    infer("--batchsize", 4, "--loop", 3)
    found = np.fromfile("result/r/frame_5_0.bin", "<f4").reshape(3, 4, 6)
    np.testing.assert_allclose(found, images[5] + (3 * images[4] + images[5]) / 4, atol=1e-5)
    assert read_json("summary")["NPU_compute_time"]["count"] == 2 * 3


def test_zeros_are_timed_as_often_as_loop_requires_and_their_logits_are_not_saved(model, capsys):
    for loop in (5, 2):  # never kept
        args = ["--model", "x.onnx", "--output", "perf", "--output_dirname", "bs4", "--batchsize", "4"]
        tool.main([*args, "--loop", str(loop)])
        assert f"runs on zeros: {loop}, " in capsys.readouterr().out
        assert [path.name for path in Path("perf").iterdir()] == ["bs4_summary.json"]
        summary = json.loads(Path("perf/bs4_summary.json").read_text())
        assert summary["NPU_compute_time"]["count"] == loop
        assert summary["filesinfo"]["0"]["infiles"] == ["pure_infer_data"]


def test_without_output_nothing_is_saved_and_without_a_name_the_folder_is_dated(model):
    save_frames(1)
    before = sorted(Path().rglob("*"))
    tool.main(["--model", "x.onnx", "--input", "prep"])
    assert sorted(Path().rglob("*")) == before
    tool.main(["--model", "x.onnx", "--input", "prep", "--output", "result"])
    folder, note, summary = sorted(Path("result").iterdir())
    assert re.fullmatch(r"\d{4}_\d\d_\d\d-\d\d_\d\d_\d\d", folder.name)
    assert (note.name, summary.name) == (f"{folder.name}_model.json", f"{folder.name}_summary.json")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--model", "none.onnx"], "none.onnx: no such file"),
        (["--model", "prep/frame_0.bin"], "prep/frame_0.bin: --provider cpu cannot run it: "),
        (["--input", "none"], "none: no such folder"),
        (["--input", "empty"], "empty: no .bin or .npy"),
        (["--input", "wrong"], "wrong: 5 of 6 files are not float32 (3, 4, 6), 288 bytes: "
         "cut.bin, double.npy, hwc.npy, text.npy, zip.npy"),
        (["--input", "same"], "same/a.x.bin and same/a.y.bin"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name_before_anything_is_written(model, args, words):
    save_frames(1)
    for folder in ("empty", "wrong", "same"):
        Path(folder).mkdir()
    for path in ("wrong/right.bin", "same/a.x.bin", "same/a.y.bin"):
        Path(path).write_bytes(bytes(288))
    for path, content in {"cut.bin": b"1234", "text.npy": b"no npy", "zip.npy": b"PK no npy"}.items():
        Path("wrong", path).write_bytes(content)
    np.save("wrong/double.npy", np.zeros((3, 4, 6)))
    np.save("wrong/hwc.npy", np.zeros((4, 6, 3), np.float32))
    assert words in infer(*args)
    assert not Path("result").exists()


@pytest.mark.skipif(
    "AzureExecutionProvider" not in onnxruntime.get_available_providers(),
    reason="needs an onnxruntime with a provider that leaves this model to the CPU",
)
def test_a_provider_that_leaves_the_work_to_the_cpu_is_refused(model):
    save_frames(1)
    assert "--provider azure cannot run it" in infer("--provider", "azure")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "required: --model"),
        (["--model", "x.onnx", "--batchsize", "0"], "--batchsize: must be an integer, 1 or more"),
        (["--model", "x.onnx", "--warmup_count", "-1"], "--warmup_count: must be an integer, 0 or more"),
        (["--model", "x.onnx", "--outfmt", "TXT"], "--outfmt"),
        (["--model", "x.onnx", "--output_dirname", "r"], "--output_dirname needs --output"),
        (["--model", "x.onnx", "--output", "o", "--output_dirname", ".."], "--output_dirname"),
        (["--model", "x.onnx", "--device", "1"], "--device needs a --provider"),
        (["--provider", "none", "--help"], "--provider: this onnxruntime has "),
    ],
)
def test_wrong_usage_exits_2(capsys, args, words):
    with pytest.raises(SystemExit, match="2"):
        tool.main(args)
    assert words in capsys.readouterr().err


def test_onnxruntime_records_no_telemetry(model):
    """It would keep below HOME what it sends to Microsoft."""
    Path("home").mkdir()
    settings = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    run(SCRIPT, "--model", model, env={**settings, "HOME": str(model.parent / "home")})
    assert list(Path("home").rglob("*")) == []


def test_telemetry_is_off_wherever_onnxruntime_is_imported():
    paths = [*ROOT.glob("*.py"), *ROOT.glob("t*/**/*.py")]
    importing = {path for path in paths if re.search(r"^\s*import onnxruntime$", path.read_text(), re.MULTILINE)}
    assert ROOT / SCRIPT in importing
    for path in importing:
        before = re.split(r"^\s*import onnxruntime$", path.read_text(), flags=re.MULTILINE)[0]
        # conftest.py has set it for the tests
        assert "ORT_DISABLE_TELEMETRY" in before or path.name.startswith("test_"), path
