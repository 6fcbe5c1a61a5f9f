"""tools/benchmark.py over ONNX Runtime and over the stand-in for ais_bench, in all its forms."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import intrada_postprocess
import tools.benchmark as tool
from support import OWN_GROUP, add_frame, ascend_environment, error_of, refusal, run, save_frames, save_small_model

SCRIPT = "tools/benchmark.py"
FRAMES = [f"ulm_000000_{n:06}" for n in range(5)]
NAMES = sorted(f"{frame}_leftImg8bit_{i}.bin" for frame in FRAMES for i in (0, 1))
SCORED = "--input", "prep", "--data", "data"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> None:
    """The current folder: x.onnx, x_bs1.om, x_bs4.om; prep/ and data/ of 5 frames."""
    monkeypatch.chdir(tmp_path)
    save_small_model(Path("x.onnx"))
    for batch in (1, 4):
        about = {"onnx": "x.onnx", "batch": batch, "frame_shape": [3, 512, 1024]}
        Path(f"x_bs{batch}.om").write_text(json.dumps(about))
    save_frames(Path("prep"), FRAMES)
    for frame, label in zip(FRAMES, np.random.default_rng(0).integers(0, 19, (5, 65, 129))):
        add_frame(Path("data"), frame, label, label)


def benchmark(*args: object, status: int = 0, form: str = "newest", **settings: str) -> subprocess.CompletedProcess:
    return run(SCRIPT, *args, status=status, env=ascend_environment(FAKE_AIS_BENCH=form, **settings))


def rows_of(done: subprocess.CompletedProcess) -> list[list[str]]:
    """Read the cells of the table's rows."""
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def commands_of(done: subprocess.CompletedProcess) -> list[str]:
    return [line[2:] for line in done.stderr.splitlines() if line.startswith("+")]


def miou_of(result: str) -> str:
    intrada_postprocess.main(["data", result, "--json", "m.json"])
    return f"{100 * json.loads(Path('m.json').read_text())['miou']:.2f}"


def test_the_table_of_an_ascend_host(folder):
    done = benchmark("x", 1, 4, *SCORED)
    one, four = rows_of(done)
    assert one[:6] == ["1", "5", miou_of("bench/x/bs1"), "1.00", "1000.00", "1100.00"]
    assert four[:6] == ["4", "5", one[2], "4.00", "1000.00", "1100.00"]
    assert (one[7:], four[7:]) == (["47.52", ""], ["43.64", "best"])
    assert float(one[6]) > 0
    assert Path("bench/x/table.md").read_text() == done.stdout
    assert commands_of(done) == benchmark("x", *SCORED, 1, 4, "--dry_run").stdout.splitlines()
    tools = [re.search("ais_bench.* --(input|loop)|intrada_postprocess", command)[0] for command in commands_of(done)]
    assert [tool.split()[-1] for tool in tools] == ["--input", "intrada_postprocess", "--loop"] * 2
    assert {command.split()[0] for command in commands_of(done)} == {sys.executable}
    assert oct(Path("bench/x").stat().st_mode & 0o777) == "0o750"
    assert "class" not in done.stdout + done.stderr and "sidewalk" in Path("bench/x/bs4.log").read_text()


def test_the_report_s_command_below_the_table_can_be_pasted(folder):
    done = benchmark("x", 1, 4, *SCORED)
    assert "bench/x/bs1_summary.json" in done.stdout.splitlines()[-1]
    subprocess.run(done.stdout.splitlines()[-1], shell=True, check=True, env=ascend_environment())
    assert "x_bs4.om, batch 4, Ascend, ais_bench" in Path("report.html").read_text()


@pytest.mark.parametrize("form", ["old", "new"])
def test_earlier_builds_give_the_same_table(folder, form):
    (row,) = rows_of(benchmark("x", 4, "--input", "prep", form=form))
    assert [*row[:6], *row[7:]] == ["4", "5", "-", "4.00", "1000.00", "1100.00", "43.64", "best"]


def test_the_same_table_without_an_npu_and_its_published_figures(folder):
    one, four = rows_of(benchmark("x.onnx", 1, 4, *SCORED, "--loop", 2))
    assert one[:3] == ["1", "5", miou_of("bench/x.onnx/bs1")]
    assert four[:3] == ["4", "5", one[2]]
    summary = json.loads(Path("bench/x.onnx/bs4_speed_summary.json").read_text())
    assert summary["NPU_compute_time"]["count"] == 2
    assert four[3] == f"{summary['throughput']:.2f}"
    assert sorted(row[7:] for row in (one, four)) == [[""], ["best"]]


def test_several_models_have_a_folder_each_and_results_elsewhere_are_not_touched(folder):
    run("tools/infer.py", "--model", "x.onnx", "--input", "prep", "--output", "result", "--output_dirname", "bs1")
    untouched = {path: path.stat().st_mtime_ns for path in Path("result").rglob("*")}
    save_small_model(Path("y.onnx"), seed=1)
    tables = {}
    for model in ("x.onnx", "y.onnx", "x", "x.onnx"):  # the first one once more
        rows = rows_of(benchmark(model, 1, *SCORED, "--loop", 1))
        assert rows[0][2] == tables.setdefault(model, rows[0][2]) == miou_of(f"bench/{model}/bs1")
    assert tables["x.onnx"] == tables["x"] != tables["y.onnx"]
    assert {path: path.stat().st_mtime_ns for path in Path("result").rglob("*")} == untouched


def test_ais_bench_and_infer_leave_the_same_files(folder):
    run("tools/infer.py", "--model", "x.onnx", "--input", "prep", "--output", "ours", "--output_dirname", "r",
        "--batchsize", 4)  # fmt: skip
    Path("theirs").mkdir(mode=0o750)
    subprocess.run([sys.executable, "-m", "ais_bench", "--model", "x_bs4.om", "--input", "prep", "--output", "theirs",
                    "--output_dirname", "r", "--batchsize", "4"], env=ascend_environment(), check=True)  # fmt: skip
    for place in ("ours", "theirs"):
        assert sorted(path.name for path in Path(place, "r").iterdir()) == NAMES
    for name in NAMES:
        assert Path("ours/r", name).read_bytes() == Path("theirs/r", name).read_bytes()
    ours, theirs = (json.loads(Path(f"{place}/r_summary.json").read_text()) for place in ("ours", "theirs"))
    assert theirs["NPU_compute_time"].keys() == ours["NPU_compute_time"].keys()


@pytest.mark.parametrize("form", ["old", "newest"])  # newer builds give each device all frames by default
def test_several_devices_share_the_frames_and_add_up(folder, form):
    done = benchmark("x", 1, "--device", "0,1", *SCORED, form=form)
    assert [row[:4] for row in rows_of(done)] == [["1", "5", miou_of("bench/x/bs1"), "2.00"]]


def test_speed_alone_needs_no_frames_and_figures_of_an_earlier_run_do_not_count(folder):
    assert rows_of(benchmark("x", 1, "--device", "0,1"))[0][3] == "2.00"
    assert rows_of(benchmark("x", 1)) == [["1", "-", "-", "1.00", "1000.00", "1100.00", "-", "47.52", "best"]]


def test_a_batch_size_that_fails_is_a_row_with_its_reason_below_and_the_others_go_on(folder):
    benchmark("x", 4)
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
        (
            ["--device", "0,1", "--input", "prep"],
            {"FAKE_AIS_BENCH_DEAD": "1"},
            f"3 of 5 frames lack an output: {FRAMES[2]}",
        ),
        (["--device", "0,1"], {"FAKE_AIS_BENCH_DEAD": "1"}, "summaries of bench/x/bs1_speed: 1, devices: 2"),
        ([], {"FAKE_AIS_BENCH_HALF": "1"}, "bench/x/bs1_speed_summary.json"),
    ],
)
def test_what_ais_bench_omits_without_a_message_fails_the_row_though_old_results_are_there(
    folder, args, settings, reason
):
    benchmark("x", 1, *args, form="old")
    done = benchmark("x", 1, *args, status=1, form="old", **settings)
    assert rows_of(done)[0][-1] == "FAILED"
    assert reason in done.stdout.splitlines()[-1]


def test_an_ais_bench_that_writes_nothing_fails_each_row_alone(folder):
    Path("ais_bench.py").write_text("print('--model')")
    done = run(SCRIPT, "x", 1, 4, "--input", "prep", status=1, env={**os.environ, "PYTHONPATH": "."})
    assert [row[-1] for row in rows_of(done)] == ["FAILED", "FAILED"]
    assert done.stdout.splitlines()[-1] == "batch size 4: bench/x/bs4: No such file or directory"


def test_ctrl_c_loses_no_row_of_the_markdown(folder):
    environment = ascend_environment(FAKE_AIS_BENCH_STOP="4")
    done = run(SCRIPT, "x", 1, 4, status=-signal.SIGINT, env=environment, **OWN_GROUP)
    assert SCRIPT not in done.stderr  # no traceback but the stand-in's
    assert [line.split()[1] for line in Path("bench/x/table.md").read_text().splitlines()[2:]] == ["1"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["x", 1, 8, 16], "x_bs8.om, x_bs16.om: no such file"),
        (["y.onnx", 1, 8], "y.onnx: no such file"),
        (["x.onnx", 1, "--input", "prep", "--data", "prep"], "prep/gtFine: No such file"),
        (["x.onnx", 1, "--input", "data"], "data: no .bin"),
        (["x.onnx", 1, "--provider", "cdua"], "argument --provider: invalid choice: 'cdua'"),
    ],
)
def test_what_is_missing_is_named_before_anything_runs(folder, args, words):
    assert words in refusal(tool, *args)
    assert not Path("bench").exists()


def test_a_missing_ais_bench_is_one_line_and_so_is_the_unrelated_package_of_that_name(folder):
    assert "No module named ais_bench; docs/ascend.md says how" in error_of(SCRIPT, "x", 1)
    Path("ais_bench.py").write_text("print('usage: ais_bench [--models MODELS]')")
    message = error_of(SCRIPT, "x", 1, env={**os.environ, "PYTHONPATH": "."})
    assert "usage: ais_bench [--models MODELS]; docs/ascend.md says how" in message


@pytest.mark.parametrize(
    ("args", "message"),
    [("x --data data", "--data needs --input"), ("x.onnx --device 0,1 --dry_run", "several devices need an .om")],
)
def test_options_that_do_not_go_together_are_wrong_usage(args, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        tool.main(args.split())
    assert message in capsys.readouterr().err


def test_the_frames_are_divided_among_devices_also_in_a_dry_run(capsys):
    tool.main(["x", "1", "--device", "0,1", "--dry_run"])
    assert "--divide_input 1" in capsys.readouterr().out
