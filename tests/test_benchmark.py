"""intrada_benchmark.py over ONNX Runtime and over the stand-in for ais_bench, in its old and its new form."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from support import ROOT, ascend_environment, run

SCRIPT = "intrada_benchmark.py"
FRAMES = [f"ulm_000000_{n:06}" for n in range(5)]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with x.onnx (a picture to logits of the real shape), x_bs1.om, x_bs4.om, prep/ and data/ of 5 frames."""
    save_model(tmp_path / "x.onnx")
    for batch in (1, 4):
        about = {"onnx": str(tmp_path / "x.onnx"), "batch": batch, "soc_version": "Ascend310P3"}
        (tmp_path / f"x_bs{batch}.om").write_text(json.dumps(about))
    (tmp_path / "prep").mkdir()
    labels = tmp_path / "data" / "gtFine" / "val" / "ulm"
    labels.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for frame in FRAMES:
        rng.normal(0, 50, (3, 512, 1024)).astype("<f4").tofile(tmp_path / "prep" / f"{frame}_leftImg8bit.bin")
        Image.fromarray(rng.integers(0, 34, (65, 129), dtype=np.uint8)).save(labels / f"{frame}_gtFine_labelIds.png")
    return tmp_path


def save_model(path: Path) -> None:
    """Save a model from (batch, 3, 512, 1024) to two outputs (batch, 19, 65, 129): every eighth pixel, recoloured."""
    weights = np.random.default_rng(1).normal(0, 1, (2, 19, 3, 1, 1)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["image", f"w{i}"], [f"output_{i}"], strides=[8, 8], pads=[0, 0, 1, 1]) for i in (0, 1)
    ]
    initializers = [numpy_helper.from_array(weights[i], f"w{i}") for i in (0, 1)]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 512, 1024])
    outputs = [helper.make_tensor_value_info(f"output_{i}", TensorProto.FLOAT, ["batch", 19, 65, 129]) for i in (0, 1)]
    graph = helper.make_graph(nodes, "g", [image], outputs, initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=6), path)


def benchmark(folder: Path, *args: object, status: int = 0, **settings: str) -> subprocess.CompletedProcess:
    return run(SCRIPT, *args, status=status, cwd=folder, env=ascend_environment(**settings))


def refusal(folder: Path, *args: object, **settings: str) -> str:
    stderr = benchmark(folder, *args, status=1, **settings).stderr
    assert stderr.startswith(f"{SCRIPT}: error: "), stderr
    assert stderr.count("\n") == 1, stderr
    return stderr[len(f"{SCRIPT}: error: ") : -1]


def rows_of(stdout: str) -> list[list[str]]:
    """Read the cells of the table's rows."""
    lines = [line for line in stdout.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def miou_of(folder: Path, *args: object) -> str:
    printed = run("intrada_postprocess.py", folder / "data", *args).stdout
    return re.search(r"^mIoU = (.*)$", printed, re.MULTILINE)[1]


@pytest.mark.parametrize("form", ["old", "new"])
def test_the_table_of_an_ascend_host(folder, form):
    done = benchmark(folder, "x", 1, 4, "--input", "prep", "--data", "data", "--markdown", "t.md", FAKE_AIS_BENCH=form)
    miou = miou_of(folder, folder / "result" / "result_bs1")
    one, four = rows_of(done.stdout)
    assert one[:6] == ["1", "5", miou, "1.00", "1000.00", "1100.00"]
    assert four[:6] == ["4", "5", miou, "4.00", "1000.00", "1100.00"]
    assert (one[7:], four[7:]) == (["47.52", ""], ["43.64", "best"])
    assert float(one[6]) > 0
    assert (folder / "t.md").read_text() == done.stdout[done.stdout.index("| batch") :]
    assert [line for line in done.stdout.splitlines() if line.startswith("+")] == [
        f"+ {line}" for line in benchmark(
            folder, "x", 1, 4, "--input", "prep", "--data", "data", "--dry_run"
        ).stdout.splitlines()
    ]  # fmt: skip


def test_the_same_table_without_an_npu(folder):
    done = benchmark(folder, "x.onnx", 1, 4, "--input", "prep", "--data", "data", "--loop", 2)
    one, four = rows_of(done.stdout)
    assert one[:3] == ["1", "5", miou_of(folder, folder / "result" / "result_bs1")]
    assert four[:3] == ["4", "5", one[2]]
    summary = json.loads((folder / "perf" / "bs4_summary.json").read_text())
    assert summary["NPU_compute_time"]["count"] == 2
    assert four[3] == f"{summary['throughput']:.2f}"
    assert [row[-1] for row in (one, four)].count("best") == 1
    end_to_end = json.loads((folder / "result" / "result_bs4_summary.json").read_text())["end_to_end_throughput"]
    assert four[6] == f"{end_to_end:.2f}"


@pytest.mark.parametrize("form", ["old", "new"])
@pytest.mark.parametrize("batch", [1, 4])
def test_ais_bench_and_its_twin_leave_the_same_files(folder, form, batch):
    benchmark(folder, "x", batch, "--input", "prep", FAKE_AIS_BENCH=form)
    twin = folder / "twin"
    run("intrada_infer.py", "--model", folder / "x.onnx", "--input", folder / "prep", "--output", twin,
        "--output_dirname", f"result_bs{batch}", "--batchsize", batch)  # fmt: skip
    result = folder / "result"
    by_ais_bench, by_twin = (sorted(p.name for p in (f / f"result_bs{batch}").iterdir()) for f in (result, twin))
    assert by_ais_bench == by_twin == sorted(f"{frame}_leftImg8bit_{i}.bin" for frame in FRAMES for i in (0, 1))
    for name in by_twin:
        ours, theirs = ((f / f"result_bs{batch}" / name).read_bytes() for f in (twin, result))
        assert len(ours) == len(theirs) == 637260
        np.testing.assert_allclose(np.frombuffer(ours, "<f4"), np.frombuffer(theirs, "<f4"), rtol=1e-5, atol=1e-4)
    ours, theirs = (json.loads((f / f"result_bs{batch}_summary.json").read_text()) for f in (twin, result))
    assert theirs.keys() <= ours.keys()
    assert theirs["NPU_compute_time"].keys() == ours["NPU_compute_time"].keys()
    assert [[Path(name).name for name in group["outfiles"]] for group in theirs["filesinfo"].values()] == [
        [Path(name).name for name in group["outfiles"]] for group in ours["filesinfo"].values()
    ]


@pytest.mark.parametrize("form", ["old", "new"])
def test_several_devices_are_passed_on_and_add_up(folder, form):
    done = benchmark(folder, "x", 1, "--device", "0,1", "--input", "prep", "--data", "data", FAKE_AIS_BENCH=form)
    (row,) = rows_of(done.stdout)
    assert row[:4] == ["1", "5", row[2], "2.00"]
    assert "--device 0,1" in done.stdout
    assert row[2] != "-"


def test_what_the_preprocessing_writes_passes_the_newer_checks_whatever_the_umask(tmp_path):
    run(
        "intrada_preprocess.py",
        ROOT / "tests" / "data" / "cityscapes",
        tmp_path / "prep",
        preexec_fn=lambda: os.umask(0),
    )
    save_model(tmp_path / "x.onnx")
    about = {"onnx": str(tmp_path / "x.onnx"), "batch": 1, "soc_version": "Ascend310P3"}
    (tmp_path / "x_bs1.om").write_text(json.dumps(about))
    benchmark(tmp_path, "x", 1, "--input", "prep")


def test_speed_alone_needs_no_frames(folder):
    (row,) = rows_of(benchmark(folder, "x", 1).stdout)
    assert row == ["1", "-", "-", "1.00", "1000.00", "1100.00", "-", "47.52", "best"]
    assert not list((folder / "result").iterdir())


def test_a_batch_size_that_fails_is_a_row_and_the_others_go_on(folder):
    (folder / "x_bs4.om").write_text("no model")
    done = benchmark(folder, "x", 4, 1, "--input", "prep", status=1)
    four, one = rows_of(done.stdout)
    assert four[-1] == "FAILED: ais_bench ended with status 1; its messages stand above"
    assert (one[0], one[1], one[-1]) == ("1", "5", "best")


def test_frames_that_the_earliest_builds_drop_fail_their_row_even_if_old_results_lie_there(folder):
    missing = f"FAILED: 1 of 5 frames lack an output: {FRAMES[4]}_leftImg8bit"
    done = benchmark(folder, "x", 4, "--input", "prep", status=1, FAKE_AIS_BENCH="earliest")
    assert rows_of(done.stdout) == [["4", "-", "-", "4.00", "1000.00", "1100.00", "-", "43.64", missing]]
    benchmark(folder, "x", 4, "--input", "prep")
    for path in (folder / "result" / "result_bs4").iterdir():
        os.utime(path, (1, 1))
    done = benchmark(folder, "x", 4, "--input", "prep", status=1, FAKE_AIS_BENCH="earliest")
    assert rows_of(done.stdout)[0][-1] == missing


def test_missing_models_are_named(folder):
    assert refusal(folder, "x", 1, 8, 16) == "2 models are missing, make them with atc_convert.sh: x_bs8.om, x_bs16.om"
    assert refusal(folder, "y.onnx", 1, 8) == "1 models are missing, make them with intrada_pth2onnx.py: y.onnx"


def test_missing_ais_bench_is_told(folder):
    message = refusal(folder, "x", 1, PYTHONPATH="")
    assert re.fullmatch(
        r"\S*python3 cannot import ais_bench \(ModuleNotFoundError: No module named 'aclruntime'\); "
        "see README.md, The Ascend host",
        message,
    )


def test_what_newer_ais_bench_refuses_is_told_with_the_command_that_mends_it(folder):
    frame = folder / "prep" / f"{FRAMES[0]}_leftImg8bit.bin"
    name = f"prep/{frame.name}"
    frame.chmod(0o664)
    command = f"chmod -R go-w {name}"
    assert refusal(folder, "x", 1, "--input", "prep") == (
        f"newer ais_bench refuses 1 paths that are writable by group or others: {command}"
    )
    subprocess.run(command, shell=True, cwd=folder, check=True)
    benchmark(folder, "x", 1, "--input", "prep")

    frame.rename(folder / "elsewhere.bin")
    frame.symlink_to(folder / "elsewhere.bin")
    assert refusal(folder, "x", 1, "--input", "prep") == (
        "newer ais_bench refuses 1 paths that are symbolic links; "
        f"copy them with what they point to by cp -rL and give the copy: {name}"
    )
    frame.unlink()
    (folder / "elsewhere.bin").rename(folder / "prep" / "a b.bin")
    assert refusal(folder, "x", 1, "--input", "prep").startswith(
        "newer ais_bench refuses 1 paths that hold characters other than letters, digits and _ - . /: "
    )


def test_more_than_five_faulty_files_are_mended_by_their_folder(folder):
    for n in range(2):
        (folder / "prep" / f"more_{n}.bin").write_bytes(b"")
    for path in (folder / "prep").iterdir():
        path.chmod(0o664)
    command = "chmod -R go-w prep"
    message = f"newer ais_bench refuses 7 paths that are writable by group or others: {command}"
    assert refusal(folder, "x", 1, "--input", "prep") == message
    subprocess.run(command, shell=True, cwd=folder, check=True)
    assert {path.stat().st_mode & 0o777 for path in (folder / "prep").iterdir()} == {0o644}


def test_result_folders_that_are_open_to_others_are_told_with_the_command_that_mends_them(folder):
    (folder / "result").mkdir(mode=0o755)
    message = "newer ais_bench refuses 1 paths that are open to others, where it is to write: chmod 750 result"
    assert refusal(folder, "x", 1) == message
    (folder / "result").chmod(0o750)
    benchmark(folder, "x", 1, "--input", "prep")
    assert {oct((folder / name).stat().st_mode & 0o777) for name in ("perf", "result")} == {"0o750"}


def test_a_dangling_link_is_told_as_a_link(folder):
    (folder / "prep" / "z.bin").symlink_to("nowhere")
    assert "1 paths that are symbolic links" in refusal(folder, "x", 1, "--input", "prep")


def test_figures_of_an_earlier_run_do_not_count(folder):
    assert rows_of(benchmark(folder, "x", 1).stdout)[0][3] == "1.00"
    assert rows_of(benchmark(folder, "x", 1, "--device", "0,1").stdout)[0][3] == "2.00"
    assert rows_of(benchmark(folder, "x", 1).stdout)[0][3] == "1.00"
    (folder / "x_bs1.om").write_text("no model")
    assert rows_of(benchmark(folder, "x", 1, status=1).stdout)[0][3] == "-"


def test_a_device_that_died_unnoticed_fails_its_row(folder):
    done = benchmark(folder, "x", 1, "--device", "0,1", status=1, FAKE_AIS_BENCH_DEAD="1")
    assert rows_of(done.stdout)[0][-1] == "FAILED: 1 summaries in perf of 2 devices; the messages stand above"


def test_a_summary_cut_short_fails_its_row_alone(folder):
    one, four = rows_of(benchmark(folder, "x", 1, 4, status=1, FAKE_AIS_BENCH_HALF="4").stdout)
    assert one[-1] == "best"
    assert four[-1].startswith("FAILED: perf/bs4_summary.json: not a whole summary: ")


def test_stopped_early_it_prints_what_was_measured(folder):
    done = benchmark(folder, "x", 1, 4, "--markdown", "t.md", status=130, FAKE_AIS_BENCH_STOP="4")
    assert [row[0] for row in rows_of(done.stdout)] == ["1"]
    assert (folder / "t.md").read_text() == done.stdout[done.stdout.index("| batch") :]


def test_a_model_with_one_output_fails_its_row(folder):
    model = onnx.load(folder / "x.onnx")
    del model.graph.output[1]
    onnx.save(model, folder / "x.onnx")
    done = benchmark(folder, "x", 1, "--input", "prep", status=1)
    assert rows_of(done.stdout)[0][-1].startswith("FAILED: 5 of 5 frames lack an output: ")


def test_onnx_runtime_does_not_keep_ais_bench_s_results(folder):
    benchmark(folder, "x.onnx", 1, "--loop", 1, "--input", "prep")
    benchmark(folder, "x", 1, "--input", "prep")
    done = benchmark(folder, "x.onnx", 1, "--loop", 1, "--input", "prep", status=1)
    assert "made with model unknown, now asked for" in done.stderr
    assert rows_of(done.stdout)[0][-1] == "FAILED: intrada_infer.py ended with status 1; its messages stand above"


def test_results_that_do_not_fit_on_the_disk_are_told(folder):
    for n in range(995):
        os.link(folder / "prep" / f"{FRAMES[0]}_leftImg8bit.bin", folder / "prep" / f"{n}.bin")
    message = refusal(folder, "x.onnx", *range(1, 2001), "--input", "prep")  # 2000 batch sizes of 1000 frames
    assert re.fullmatch(r"result/ needs 2549\.0 GB and \d+\.\d GB are free; give fewer batch sizes", message)


def test_the_interpreter_that_runs_it_runs_its_commands(folder):
    outside = Path(sys.base_prefix) / "bin"
    expected = "python3" if sys.prefix == sys.base_prefix else sys.executable
    printed = benchmark(folder, "x", 1, "--dry_run", PATH=f"{outside}:{os.environ['PATH']}").stdout
    assert printed.split()[0] == expected


def test_a_data_folder_that_is_none_is_told_before_anything_runs(folder):
    assert refusal(folder, "x", 1, "--input", "prep", "--data", "prep") == (
        "prep: no gtFine/ here; --data is Cityscapes' folder"
    )
    assert not (folder / "perf").exists()
    assert "no such folder" in benchmark(folder, "x", 1, "--markdown", "no/t.md", status=2).stderr


def test_an_empty_input_folder_is_told(folder):
    (folder / "empty").mkdir()
    assert refusal(folder, "x", 1, "--input", "empty").startswith("empty: no .bin or .npy here")


def test_wrong_usage_exits_2(folder):
    assert "--data goes with --input" in benchmark(folder, "x", "--data", "data", status=2).stderr
    assert "invalid positive value: '0'" in benchmark(folder, "x", 0, status=2).stderr
