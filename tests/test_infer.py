"""intrada_infer.py against ais_bench's rules, with models small enough to compute by hand."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from support import ROOT, error_of, make_older, run, save_two_channel_model

SCRIPT = "intrada_infer.py"


@pytest.fixture
def model(tmp_path) -> Path:
    save_two_channel_model(tmp_path / "x.onnx")
    make_older(tmp_path / "x.onnx", 3600)
    return tmp_path / "x.onnx"


def save_frames(folder: Path, count: int) -> list[np.ndarray]:
    """Save frame_0.bin, frame_1.bin, ... and return their contents, each (3, 4, 6) float32."""
    folder.mkdir()
    images = list(np.random.default_rng(0).integers(-9, 9, (count, 3, 4, 6)).astype(np.float32))
    for n, image in enumerate(images):
        image.tofile(folder / f"frame_{n}.bin")
        make_older(folder / f"frame_{n}.bin", 3600)
    return images


def infer(model: Path, *args: object, **options) -> subprocess.CompletedProcess:
    """Infer tmp/prep into tmp/result/r."""
    folder = model.parent
    return run(SCRIPT, "--model", model, "--input", folder / "prep", "--output", folder / "result",
               "--output_dirname", "r", *args, **options)  # fmt: skip


def refusal(model: Path, *args: object) -> str:
    folder = model.parent
    return error_of(SCRIPT, "--model", model, "--input", folder / "prep", "--output", folder / "result",
                    "--output_dirname", "r", *args)  # fmt: skip


def summary_of(model: Path) -> dict:
    return json.loads((model.parent / "result" / "r_summary.json").read_text())


@pytest.mark.parametrize("count", [1, 4, 6])
@pytest.mark.parametrize("outfmt", ["BIN", "NPY"])
def test_every_frame_gets_its_own_outputs_at_batch_4(tmp_path, count, outfmt):
    weights = save_two_channel_model(tmp_path / "x.onnx", batch=4)  # takes 4 and nothing else, as an .om does
    images = save_frames(tmp_path / "prep", count)
    infer(tmp_path / "x.onnx", "--batchsize", 4, "--outfmt", outfmt)
    ending = outfmt.lower()
    names = {f"frame_{n}_{i}.{ending}" for n in range(count) for i in range(2)}
    assert {path.name for path in (tmp_path / "result" / "r").iterdir()} == names
    for n, image in enumerate(images):
        for i in range(2):
            path = tmp_path / "result" / "r" / f"frame_{n}_{i}.{ending}"
            found = np.load(path) if outfmt == "NPY" else np.fromfile(path, "<f4").reshape(2, 4, 6)
            np.testing.assert_array_equal(found, np.tensordot(weights[i], image, 1))


def test_the_summary_says_what_ais_bench_says_and_what_ran(model):
    save_frames(model.parent / "prep", 11)
    done = infer(model, "--batchsize", 4)
    summary, result = summary_of(model), model.parent / "result" / "r"
    infiles = [Path(name).stem for group in summary["filesinfo"].values() for name in group["infiles"]]
    assert infiles == [f"frame_{n}" for n in range(11)]  # 2 before 10
    assert [len(group["infiles"]) for group in summary["filesinfo"].values()] == [4, 4, 3]
    assert summary["filesinfo"]["2"]["outfiles"] == [
        str(result / f"frame_{n}_{i}.bin") for n in (8, 9, 10) for i in (0, 1)
    ]
    for times in ("NPU_compute_time", "H2D_latency", "D2H_latency"):
        assert list(summary[times]) == ["min", "max", "mean", "median", "percentile(99%)", "count"]
        assert summary[times]["count"] == 3
    assert len(summary["npu_compute_time_list"]) == 3
    assert summary["NPU_compute_time"]["mean"] == pytest.approx(np.mean(summary["npu_compute_time_list"]))
    assert summary["throughput"] == pytest.approx(4000 / summary["NPU_compute_time"]["mean"])
    assert 0 < summary["end_to_end_throughput"] < summary["throughput"]
    assert (summary["model"], summary["provider"], summary["batchsize"], summary["device"]) == (str(model), "cpu", 4, 0)
    assert summary["versions"]["onnxruntime"] == onnxruntime.__version__
    assert "--batchsize" in summary["args"]
    assert re.fullmatch(
        r"provider cpu: 11 frames \(11 inferred, 0 kept\), \d+\.\d\d frames/s computing, \d+\.\d\d end to end, "
        rf"in {result}\n",
        done.stdout,
    )


def test_files_are_readable_by_all_and_writable_by_one_whatever_the_umask(model):
    save_frames(model.parent / "prep", 1)
    infer(model, preexec_fn=lambda: os.umask(0o002))
    result = model.parent / "result"
    made = [result, result / "r", result / "r_summary.json", result / "r" / "frame_0_1.bin"]
    assert [oct(path.stat().st_mode & 0o777) for path in made] == ["0o750", "0o750", "0o644", "0o644"]


def test_npy_inputs_count_as_bin_ones(model):
    images = save_frames(model.parent / "prep", 2)
    infer(model)
    from_bin = (model.parent / "result" / "r" / "frame_1_1.bin").read_bytes()
    for n, image in enumerate(images):
        (model.parent / "prep" / f"frame_{n}.bin").unlink()
        np.save(model.parent / "prep" / f"frame_{n}.npy", image[None])
    infer(model, "--overwrite")
    assert (model.parent / "result" / "r" / "frame_1_1.bin").read_bytes() == from_bin


def test_a_second_run_infers_only_what_is_missing_or_old(model):
    prep, result = model.parent / "prep", model.parent / "result" / "r"
    save_frames(prep, 5)
    infer(model, "--batchsize", 2)
    first = {path.name: path.read_bytes() for path in result.iterdir()}
    summary = summary_of(model)
    assert infer(model, "--batchsize", 2).stdout == f"provider cpu: 5 frames (0 inferred, 5 kept), in {result}\n"
    assert summary_of(model) == summary

    (result / "frame_3_0.bin").unlink()
    make_older(result / "frame_1_1.bin", 7200)
    assert "(2 inferred, 3 kept)" in infer(model, "--batchsize", 2).stdout
    assert {path.name: path.read_bytes() for path in result.iterdir()} == first

    os.utime(prep / "frame_4.bin")
    assert "(1 inferred, 4 kept)" in infer(model, "--batchsize", 2).stdout
    os.utime(model)
    assert "(5 inferred, 0 kept)" in infer(model, "--batchsize", 2).stdout
    assert "(5 inferred, 0 kept)" in infer(model, "--batchsize", 2, "--overwrite").stdout
    (result.parent / "r_summary.json").unlink()
    assert "(2 inferred, 3 kept)" in infer(model, "--batchsize", 2).stdout


def test_killed_and_started_again_it_ends_with_the_same_files(model):
    prep, result = model.parent / "prep", model.parent / "result" / "r"
    save_frames(prep, 500)
    infer(model)
    undisturbed = {path.name: path.read_bytes() for path in result.iterdir()}
    for path in result.iterdir():
        path.unlink()
    command = [sys.executable, ROOT / SCRIPT, "--model", model, "--input", prep, "--output", result.parent]
    process = subprocess.Popen([*command, "--output_dirname", "r"])
    while not list(result.glob("*_1.bin")):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(list(result.glob("*_1.bin"))) < 500
    infer(model)
    assert {path.name: path.read_bytes() for path in result.iterdir()} == undisturbed


def test_a_resumed_run_never_mixes_two_models(model):
    prep, result = model.parent / "prep", model.parent / "result" / "r"
    save_frames(prep, 3)
    infer(model)
    (result.parent / "r_summary.json").unlink()  # as after a kill
    (result / "frame_1_0.bin").unlink()
    other = model.with_name("y.onnx")
    save_two_channel_model(other, offset=9)
    make_older(other, 7200)
    message = f"made with model {model}, now asked for {other}; give another --output_dirname, or --overwrite"
    assert message in refusal(other)

    first = (result / "frame_2_0.bin").read_bytes()
    shutil.copy2(other, model)  # another model of the same name, and older than the results
    assert "(3 inferred, 0 kept)" in infer(model).stdout
    assert (result / "frame_2_0.bin").read_bytes() != first


def test_results_of_unknown_origin_are_refused(model):
    save_frames(model.parent / "prep", 1)
    infer(model)
    for note in ("", "{", "[]", "[1]"):
        (model.parent / "result" / "r_model.json").write_text(note)
        assert "made with model unknown, now asked for" in refusal(model)


def test_results_that_ais_bench_has_written_over_are_not_kept(model):
    save_frames(model.parent / "prep", 1)
    infer(model)
    path = model.parent / "result" / "r_summary.json"
    summary = json.loads(path.read_text())
    path.write_text(json.dumps({key: summary[key] for key in ("args", "throughput", "NPU_compute_time")}))
    assert "made with model unknown, now asked for" in refusal(model)
    assert "(1 inferred, 0 kept)" in infer(model, "--overwrite").stdout


def test_two_runs_do_not_write_to_one_folder(model):
    save_frames(model.parent / "prep", 1)
    folder = model.parent / "result" / "r"
    folder.mkdir(parents=True)
    held = os.open(folder, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    assert refusal(model) == f"{folder}: another run is writing here; wait for it, or give another folder"
    os.close(held)
    infer(model)


def test_the_last_group_is_padded_with_its_first_frame(tmp_path):
    """By a model whose output is the mean over the batch."""
    nodes = [helper.make_node("ReduceMean", ["image"], ["output_0"], axes=[0], keepdims=1),
             helper.make_node("Add", ["image", "output_0"], ["output_1"])]  # fmt: skip
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 3, 4, 6]) for n in ("image", "output_1")]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=6), tmp_path / "x.onnx")
    images = save_frames(tmp_path / "prep", 6)
    infer(tmp_path / "x.onnx", "--batchsize", 4)
    found = np.fromfile(tmp_path / "result" / "r" / "frame_5_0.bin", "<f4").reshape(3, 4, 6)
    np.testing.assert_allclose(found, images[5] + (3 * images[4] + images[5]) / 4, atol=1e-5)


def test_with_input_each_batch_runs_as_often_as_loop_says(model):
    save_frames(model.parent / "prep", 3)
    infer(model, "--batchsize", 2, "--loop", 3)
    assert summary_of(model)["NPU_compute_time"]["count"] == 2 * 3


def test_a_model_of_a_fixed_batch_wants_that_batch(tmp_path):
    save_two_channel_model(tmp_path / "x.onnx", batch=4)
    save_frames(tmp_path / "prep", 1)
    assert refusal(tmp_path / "x.onnx") == "the model takes batches of 4 alone; give --batchsize 4"


def test_results_of_another_run_are_refused_by_name(model):
    save_frames(model.parent / "prep", 2)
    infer(model)
    folder = model.parent / "result"
    assert refusal(model, "--batchsize", 2) == (
        f"{folder}/r: made with batchsize 1, now asked for 2; give another --output_dirname, or --overwrite"
    )
    assert refusal(model, "--outfmt", "NPY") == (
        f"{folder}/r: holds 4 results of other frames or of another --outfmt: "
        "frame_0_0.bin, frame_0_1.bin, frame_1_0.bin, frame_1_1.bin; give another --output_dirname or remove them"
    )
    (folder / "r" / "stranger_1.bin").write_bytes(b"")
    assert "holds 1 results of other frames or of another --outfmt: stranger_1.bin;" in refusal(model, "--overwrite")


def test_without_input_zeros_are_inferred_as_often_as_loop_says(model):
    done = run(SCRIPT, "--model", model, "--output", model.parent / "perf", "--output_dirname", "bs4",
               "--batchsize", 4, "--loop", 5)  # fmt: skip
    summary = json.loads((model.parent / "perf" / "bs4_summary.json").read_text())
    assert summary["NPU_compute_time"]["count"] == 5
    assert summary["filesinfo"]["0"]["infiles"] == ["pure_infer_data"]
    assert np.fromfile(model.parent / "perf" / "bs4" / "pure_infer_data_1.bin", "<f4").tolist() == [0.0] * 4 * 2 * 4 * 6
    assert done.stdout.startswith("provider cpu: 1 frames (1 inferred, 0 kept), ")
    run(
        SCRIPT, "--model", model, "--output", model.parent / "perf", "--output_dirname", "bs4"
    )  # zeros always run again
    assert json.loads((model.parent / "perf" / "bs4_summary.json").read_text())["batchsize"] == 1


def test_without_output_nothing_is_saved(model):
    save_frames(model.parent / "prep", 1)
    before = sorted(model.parent.rglob("*"))
    run(SCRIPT, "--model", model, "--input", model.parent / "prep", cwd=model.parent)
    assert sorted(model.parent.rglob("*")) == before


def test_without_a_name_the_folder_is_dated(model):
    save_frames(model.parent / "prep", 1)
    run(SCRIPT, "--model", model, "--input", model.parent / "prep", "--output", model.parent / "result")
    folder, note, summary = sorted((model.parent / "result").iterdir())
    assert re.fullmatch(r"\d{4}_\d\d_\d\d-\d\d_\d\d_\d\d", folder.name)
    assert (note.name, summary.name) == (f"{folder.name}_model.json", f"{folder.name}_summary.json")


def test_a_provider_that_is_absent_is_refused(model):
    save_frames(model.parent / "prep", 1)
    message = refusal(model, "--provider", "cann")
    assert re.fullmatch(r"--provider cann: not in this onnxruntime, which has (\w+, )*cpu", message)


@pytest.mark.skipif(
    "AzureExecutionProvider" not in onnxruntime.get_available_providers(),
    reason="needs an onnxruntime with a provider that leaves this model to the CPU",
)
def test_a_provider_that_leaves_the_work_to_the_cpu_is_refused(model):
    save_frames(model.parent / "prep", 1)
    message = refusal(model, "--provider", "azure")
    assert message.startswith(f"{model}: --provider azure of azure, cpu cannot run it: ")


def test_what_is_no_model_is_refused(model):
    save_frames(model.parent / "prep", 1)
    assert refusal(model.with_name("none.onnx")).startswith(f"{model.parent}/none.onnx: no such file")
    model.write_bytes(b"<html>")
    assert refusal(model).startswith(f"{model}: --provider cpu of ")


def test_inputs_that_do_not_fit_are_refused_by_name(model):
    prep = model.parent / "prep"
    assert refusal(model) == f"{prep}: no such folder; --input is what intrada_preprocess.py wrote"
    prep.mkdir()
    assert refusal(model) == f"{prep}: no .bin or .npy here; --input is what intrada_preprocess.py wrote"
    (prep / "short.bin").write_bytes(b"1234")
    assert refusal(model) == f"{prep}: 1 files are not float32 (3, 4, 6), 288 bytes: short.bin"
    (prep / "short.bin").unlink()
    np.save(prep / "double.npy", np.zeros((3, 4, 6)))
    np.save(prep / "hwc.npy", np.zeros((4, 6, 3), np.float32))
    (prep / "text.npy").write_bytes(b"no npy")
    (prep / "zip.npy").write_bytes(b"PK no npy")
    assert refusal(model) == (
        f"{prep}: 4 files are not float32 (3, 4, 6), 288 bytes: double.npy, hwc.npy, text.npy, zip.npy"
    )
    for path in prep.iterdir():
        path.unlink()
    for name in ("a.x.bin", "a.y.bin"):
        (prep / name).write_bytes(bytes(288))
    assert refusal(model) == f"{prep}: 1 files would write the same results as others: a.x.bin"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--batchsize", 0], "argument --batchsize: invalid positive value: '0'"),
        (["--outfmt", "TXT"], "argument --outfmt: invalid choice: 'TXT'"),
        (["--output_dirname", "r"], "--output_dirname goes with --output"),
        (["--output", "o", "--output_dirname", ".."], "--output_dirname is the name of one folder"),
        (["--warmup_count", -1], "--warmup_count"),
        (["--device", 1], "--device is for another --provider than cpu"),
    ],
)
def test_wrong_usage_exits_2(args, message):
    assert message in run(SCRIPT, "--model", "x.onnx", *args, status=2).stderr


def test_onnxruntime_records_nothing_for_its_maker(model):
    """onnxruntime keeps the telemetry that it will send below HOME."""
    home = model.parent / "home"
    home.mkdir()
    settings = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    run(SCRIPT, "--model", model, env={**settings, "HOME": str(home)})
    assert list(home.rglob("*")) == []


SOURCES = [path for path in ROOT.rglob("*.py") if not path.is_relative_to(ROOT / ".venv")]


@pytest.mark.parametrize("path", [path for path in SOURCES if "import onnxruntime\n" in path.read_text()], ids=str)
def test_telemetry_is_off_before_onnxruntime_is_imported(path):
    before = path.read_text().partition("import onnxruntime\n")[0]
    assert "ORT_DISABLE_TELEMETRY" in before or path.name.startswith("test_")  # conftest.py has set it for these
