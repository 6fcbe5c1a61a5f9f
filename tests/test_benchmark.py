"""tools/benchmark.py over ONNX Runtime and over the stand-in for ais_bench, in all its forms."""

from __future__ import annotations

import fcntl
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import intrada_postprocess
import tools.benchmark as tool
from support import add_frame, ascend_environment, error_of, refusal, run, shift_mtime

SCRIPT = "tools/benchmark.py"
FRAMES = [f"ulm_000000_{n:06}" for n in range(5)]
NAMES = sorted(f"{frame}_leftImg8bit_{i}.bin" for frame in FRAMES for i in (0, 1))
SCORED = "--input", "prep", "--data", "data"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder: x.onnx (3, 65, 129) -> logits, x_bs1.om, x_bs4.om; prep/ and data/ of 5 frames."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    size, nodes, initializers = (65, 129), [], []
    for i in (0, 1):
        weights = rng.normal(0, 1, (19, 3, 1, 1)).astype(np.float32)
        nodes.append(helper.make_node("Conv", ["image", f"weights_{i}"], [f"output_{i}"]))
        initializers.append(numpy_helper.from_array(weights, f"weights_{i}"))
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, *size])
    outputs = [helper.make_tensor_value_info(f"output_{i}", TensorProto.FLOAT, ["batch", 19, *size]) for i in (0, 1)]
    graph = helper.make_graph(nodes, "g", [image], outputs, initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=6), "x.onnx")
    for batch in (1, 4):
        Path(f"x_bs{batch}.om").write_text(json.dumps({"onnx": "x.onnx", "batch": batch, "frame_shape": [3, *size]}))
    Path("prep").mkdir()
    Path("data").mkdir()
    for frame in FRAMES:
        rng.normal(0, 50, (3, *size)).astype("<f4").tofile(f"prep/{frame}_leftImg8bit.bin")
        add_frame(Path("data"), frame, rng.integers(0, 19, size), np.zeros(size))
    return tmp_path


def benchmark(*args: object, status: int = 0, form: str = "newest", **settings: str) -> subprocess.CompletedProcess:
    return run(SCRIPT, *args, status=status, env=ascend_environment(FAKE_AIS_BENCH=form, **settings))


def rows_of(done: subprocess.CompletedProcess) -> list[list[str]]:
    """Read the cells of the table's rows."""
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def commands_of(done: subprocess.CompletedProcess) -> list[str]:
    return [line[2:] for line in done.stdout.splitlines() if line.startswith("+")]


def miou_of(result: str) -> str:
    intrada_postprocess.main(["data", result, "--json", "m.json"])
    return f"{100 * json.loads(Path('m.json').read_text())['miou']:.2f}"


def test_the_table_of_an_ascend_host(folder):
    done = benchmark("x", 1, 4, *SCORED, "--markdown", "t.md")
    one, four = rows_of(done)
    assert one[:6] == ["1", "5", miou_of("result/result_bs1"), "1.00", "1000.00", "1100.00"]
    assert four[:6] == ["4", "5", one[2], "4.00", "1000.00", "1100.00"]
    assert (one[7:], four[7:]) == (["47.52", ""], ["43.64", "best"])
    assert float(one[6]) > 0
    assert Path("t.md").read_text() == done.stdout[done.stdout.index("| batch") :]
    assert commands_of(done) == benchmark("x", 1, 4, *SCORED, "--dry_run").stdout.splitlines()
    tools = [re.search("ais_bench.* --(input|loop)|intrada_postprocess", command)[0] for command in commands_of(done)]
    assert [tool.split()[-1] for tool in tools] == ["--input", "intrada_postprocess", "--loop"] * 2
    assert [oct(Path(name).stat().st_mode & 0o777) for name in ("perf", "result")] == ["0o750"] * 2


@pytest.mark.parametrize("form", ["old", "new"])
def test_earlier_builds_give_the_same_table(folder, form):
    Path("result").mkdir(mode=0o755)  # the published guide's own step
    (row,) = rows_of(benchmark("x", 4, "--input", "prep", form=form))
    assert [*row[:6], *row[7:]] == ["4", "5", "-", "4.00", "1000.00", "1100.00", "43.64", "best"]
    assert oct(Path("result").stat().st_mode & 0o777) == {"old": "0o755", "new": "0o750"}[form]


def test_the_same_table_without_an_npu(folder):
    done = benchmark("x.onnx", 1, 4, *SCORED, "--loop", 2)
    one, four = rows_of(done)
    assert one[:3] == ["1", "5", miou_of("result/result_bs1")]
    assert four[:3] == ["4", "5", one[2]]
    summary = json.loads(Path("perf/bs4_summary.json").read_text())
    assert summary["NPU_compute_time"]["count"] == 2
    assert four[3] == f"{summary['throughput']:.2f}"
    assert sorted(row[-1] for row in (one, four)) == ["", "best"]
    end_to_end = json.loads(Path("result/result_bs4_summary.json").read_text())["end_to_end_throughput"]
    assert four[6] == f"{end_to_end:.2f}"


def test_ais_bench_and_intrada_infer_leave_the_same_files(folder):
    benchmark("x", 4, "--input", "prep")
    run("tools/infer.py", "--model", "x.onnx", "--input", "prep", "--output", "ours", "--output_dirname",
        "result_bs4", "--batchsize", 4)  # fmt: skip
    for name in NAMES:
        ours, theirs = (np.fromfile(f"{place}/result_bs4/{name}", "<f4") for place in ("ours", "result"))
        assert ours.size == 19 * 65 * 129
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)
    places = Path("ours/result_bs4"), Path("result/result_bs4")
    assert [sorted(path.name for path in place.iterdir()) for place in places] == [NAMES, NAMES]
    ours, theirs = (json.loads(Path(f"{place}_summary.json").read_text()) for place in places)
    assert theirs.keys() <= ours.keys()
    assert theirs["NPU_compute_time"].keys() == ours["NPU_compute_time"].keys()
    assert [[Path(name).name for name in group["outfiles"]] for group in theirs["filesinfo"].values()] == [
        [Path(name).name for name in group["outfiles"]] for group in ours["filesinfo"].values()
    ]


@pytest.mark.parametrize("form", ["old", "newest"])
def test_several_devices_add_up(folder, form):
    done = benchmark("x", 1, "--device", "0,1", *SCORED, form=form)
    assert [row[:4] for row in rows_of(done)] == [["1", "5", miou_of("result/result_bs1"), "2.00"]]
    assert all("--device 0,1" in command for command in commands_of(done) if "ais_bench" in command)


def test_speed_alone_needs_no_frames_and_figures_of_an_earlier_run_do_not_count(folder):
    os.mkfifo("pipe")
    with os.fdopen(os.open("pipe", os.O_RDONLY | os.O_NONBLOCK)) as pipe:
        done = benchmark("x", 1, "--markdown", "pipe")
        assert pipe.read() == done.stdout[done.stdout.index("| batch") :]
    assert Path("pipe").is_fifo()
    assert rows_of(done) == [["1", "-", "-", "1.00", "1000.00", "1100.00", "-", "47.52", "best"]]
    assert rows_of(benchmark("x", 1, "--device", "0,1"))[0][3] == "2.00"
    assert rows_of(benchmark("x", 1))[0][3] == "1.00"
    Path("x_bs1.om").write_text("no model")
    assert rows_of(benchmark("x", 1, status=1))[0][3] == "-"


def test_a_batch_size_that_fails_is_a_row_with_its_reason_below_and_the_others_go_on(folder):
    Path("x_bs4.om").write_text("no model")
    done = benchmark("x", 4, 1, "--input", "prep", status=1)
    four, one = rows_of(done)
    assert four == ["4", "-", "-", "-", "-", "-", "-", "43.64", "FAILED"]
    assert (one[:2], one[-1]) == (["1", "5"], "best")
    assert re.match("batch size 4: .*ais_bench.*status 1", done.stdout.splitlines()[-1])
    assert len(commands_of(done)) == 1 + 2  # what cannot infer is not timed


@pytest.mark.parametrize(
    ("args", "settings", "reason"),
    [
        (["x", 1, "--device", "0,1"], {"FAKE_AIS_BENCH_DEAD": "1"}, "summaries in perf: 1, devices: 2"),
        (["x", 1], {"FAKE_AIS_BENCH_HALF": "1"}, "perf/bs1_summary.json"),
        (["x", 4, "--input", "prep"], {"form": "earliest"}, f"1 of 5 frames lack an output: {FRAMES[4]}"),
    ],
)
def test_what_ais_bench_omits_without_a_message_fails_the_row_though_old_results_are_there(
    folder, args, settings, reason
):
    benchmark(*args)
    for path in Path("result").glob("*/*"):
        shift_mtime(path, 3600)  # times in the future prove nothing
    done = benchmark(*args, status=1, **settings)
    assert rows_of(done)[0][-1] == "FAILED"
    assert reason in done.stdout.splitlines()[-1]


def test_what_newer_ais_bench_rejects_fails_the_row_with_its_own_message(folder):
    Path(f"prep/{FRAMES[2]}_leftImg8bit.bin").chmod(0o664)
    done = benchmark("x", 1, "--input", "prep", status=1, form="new")
    assert f"{FRAMES[2]}_leftImg8bit.bin is writable by others" in done.stderr
    assert rows_of(done)[0][-1] == "FAILED"


def test_a_model_with_one_output_fails_its_row(folder):
    model = onnx.load("x.onnx")
    del model.graph.output[1]
    onnx.save(model, "x.onnx")
    done = benchmark("x.onnx", 1, "--input", "prep", status=1)
    assert "5 of 5 frames lack an output" in done.stdout.splitlines()[-1]


def test_onnx_runtime_does_not_keep_ais_bench_s_results(folder):
    benchmark("x.onnx", 1, "--loop", 1, "--input", "prep")
    benchmark("x", 1, "--input", "prep")
    done = benchmark("x.onnx", 1, "--loop", 1, "--input", "prep", status=1)
    assert "model unknown" in done.stderr
    assert rows_of(done)[0][-1] == "FAILED"


def test_two_benchmarks_do_not_share_a_folder(folder):
    Path("perf").mkdir()
    lock = os.open("perf", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert refusal(tool, "x.onnx", 1).startswith("perf: another benchmark")
    os.close(lock)


def test_ctrl_c_prints_what_was_measured(folder):
    done = benchmark("x", 1, 4, "--markdown", "t.md", status=130, FAKE_AIS_BENCH_STOP="4")
    assert [row[0] for row in rows_of(done)] == ["1"]
    assert Path("t.md").read_text() == done.stdout[done.stdout.index("| batch") :]
    assert "Traceback" not in done.stderr


def test_a_full_disk_leaves_the_old_markdown_and_no_part_of_the_new(folder):
    Path("t.md").write_text("old")
    done = run(SCRIPT, "x", 1, "--markdown", "t.md", status=1, env=ascend_environment(),
               preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)))  # fmt: skip
    assert f"{Path(SCRIPT).name}: error: t.md: cannot be written" in done.stderr
    assert Path("t.md").read_text() == "old"
    assert not list(Path().glob("*.part"))
    assert len(rows_of(done)) == 1  # what was measured is not lost


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["x", 1, 8, 16], "x_bs8.om, x_bs16.om: no such file"),
        (["y.onnx", 1, 8], "y.onnx: no such file"),
        (["x.onnx", 1, "--input", "prep", "--data", "prep"], "prep: no gtFine/"),
        (["x.onnx", 1, "--input", "data"], "data: no .bin or .npy"),
    ],
)
def test_what_is_missing_is_named_before_anything_runs(folder, args, words):
    assert words in refusal(tool, *args)
    assert not Path("perf").exists()


def test_a_missing_ais_bench_is_one_line(folder):
    assert "no ais_bench" in error_of(SCRIPT, "x", 1)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--data", "data"], "--data needs --input"),
        (["0"], "1 or more"),
        (["--markdown", "no/t.md"], "--markdown no/t.md"),
        (["--markdown", "prep"], "--markdown prep"),
    ],
)
def test_wrong_usage_exits_2(folder, capsys, args, words):
    with pytest.raises(SystemExit, match="2"):
        tool.main(["x", *args])
    assert words in capsys.readouterr().err


def test_the_interpreter_that_runs_it_runs_its_commands(folder):
    outside = Path(sys.base_prefix) / "bin"
    expected = "python3" if sys.prefix == sys.base_prefix else sys.executable
    printed = run(SCRIPT, "x", 1, "--dry_run", env={**os.environ, "PATH": f"{outside}:{os.environ['PATH']}"}).stdout
    assert printed.split()[0] == expected
