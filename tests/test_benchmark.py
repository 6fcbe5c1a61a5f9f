"""tools/benchmark.py over ONNX Runtime and over the stand-in for ais_bench, in all its forms."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import intrada_postprocess
import tools.benchmark as tool
from support import OWN_GROUP, ROOT, add_frame, ascend_environment, refusal, run, save_frames, save_small_model

SCRIPT = "tools/benchmark.py"
FRAMES = [f"ulm_000000_{n:06}" for n in range(5)]
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


def miou_of(result: str, *options: str) -> str:
    intrada_postprocess.main(["data", result, "--json", "m.json", *options])
    return f"{100 * json.loads(Path('m.json').read_text())['miou']:.2f}"


def test_the_table_of_an_ascend_host_and_the_report_s_command_below_it(folder):
    Path("link.py").symlink_to(ROOT / SCRIPT)
    done = run(Path("link.py").absolute(), "x", 1, 4, *SCORED, env=ascend_environment())
    one, four = rows_of(done)
    assert one[:6] == ["1", "5", miou_of("bench/x/bs1"), "1.00", "1000.00", "1100.00"]
    assert four[:6] == ["4", "5", one[2], "4.00", "1000.00", "1100.00"]
    assert (one[7:], four[7:]) == (["47.52"], ["43.64"])
    assert commands_of(done) == benchmark("x", *SCORED, 1, 4, "--dry_run").stdout.splitlines()
    tools = [re.search("ais_bench.* --(input|loop)|intrada_postprocess", command)[0] for command in commands_of(done)]
    assert [tool.split()[-1] for tool in tools] == ["--input", "intrada_postprocess"] * 2
    assert {command.split()[0] for command in commands_of(done)} == {sys.executable}
    assert oct(Path("bench/x").stat().st_mode & 0o777) == "0o750"
    assert "class" not in done.stdout + done.stderr and "sidewalk" in Path("bench/x/bs4.log").read_text()
    subprocess.run(done.stdout.splitlines()[-2], shell=True, check=True, env=ascend_environment())
    page = Path("bench/x/report.html").read_text()
    assert "<h3>bs1_metrics</h3>" in page and "x_bs4.om" in page


@pytest.mark.parametrize("form", ["old", "new"])
def test_earlier_builds_give_the_same_table(folder, form):
    start = time.perf_counter()
    (row,) = rows_of(benchmark("x", 4, "--input", "prep", form=form))
    assert [*row[:6], *row[7:]] == ["4", "5", "-", "4.00", "1000.00", "1100.00", "43.64"]
    assert float(row[6]) > 5 / (time.perf_counter() - start)  # frames/s of the whole run, which is a part of this


def test_the_same_table_without_an_npu_and_its_published_figures(folder):
    as_a_rank = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    one, four = rows_of(benchmark("x.onnx", 1, 4, *SCORED, **as_a_rank))
    assert one[:3] == ["1", "5", miou_of("bench/x.onnx/bs1")]
    assert four[:3] == ["4", "5", one[2]]
    summary = json.loads(Path("bench/x.onnx/bs4_summary.json").read_text())
    assert summary["NPU_compute_time"]["count"] == 2  # measured in the inference of the frames
    assert four[3] == f"{summary['throughput']:.2f}"
    assert one[7:] == four[7:] == []


def test_the_first_frames_of_another_split_are_scored(folder):
    Path("data/gtFine/val").rename("data/gtFine/train")
    for frame in FRAMES[2:]:
        Path(f"prep/{frame}_leftImg8bit.bin").unlink()
    (row,) = rows_of(benchmark("x", 1, *SCORED, "--split", "train", "--limit", 2))
    assert row[1:3] == ["2", miou_of("bench/x/bs1", "--split", "train", "--limit", "2")]


def test_speed_alone_is_that_of_runs_on_zeros(folder):
    done = benchmark("x.onnx", 1, "--loop", 3)
    summary = json.loads(Path("bench/x.onnx/bs1_summary.json").read_text())
    assert summary["NPU_compute_time"]["count"] == 3
    assert rows_of(done)[0][:4] == ["1", "-", "-", f"{summary['throughput']:.2f}"]
    assert "frames/s: of 3 runs on zeros" in done.stdout
    assert rows_of(benchmark("x", 1)) == [["1", "-", "-", "1.00", "1000.00", "1100.00", "-", "47.52"]]


def contents() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def test_nothing_is_removed_or_overwritten_and_the_tables_add_up(folder):
    """Also where OUTPUT has results of something else under benchmark's names."""
    save_small_model(Path("y.onnx"), seed=1)
    run("tools/infer.py", "--model", "y.onnx", "--input", "prep", "--output", "out", "--output_dirname", "bs1")
    Path("out/bs4").mkdir()
    Path("out/bs4/notes.txt").write_text("the user's")
    Path("out/table.md").write_text("an earlier table\n\n")
    before = contents()
    for command in (("x.onnx", 4, 1), ("x.onnx", 1, *SCORED)):
        message = refusal(tool, *command, "--output", "out")
        assert message.startswith("out: has bs1, bs1_summary.json; pass another --output, ")
        assert contents() == before
    done = benchmark("x.onnx", 4, *SCORED, "--output", "out")
    assert before.items() - {(Path("out/table.md"), before[Path("out/table.md")])} <= contents().items()
    assert Path("out/table.md").read_text() == f"an earlier table\n\n{done.stdout}"
    assert re.fullmatch(r"## \d{4}-\d\d-\d\d \d\d:\d\d, x.onnx", done.stdout.splitlines()[0])
    message = refusal(tool, "y.onnx", 4, "--output", "out")
    assert message.startswith("out: has bs4, bs4_summary.json, bs4_metrics.json; ")
    with Path("out/table.md").open("a") as file:
        file.write("a later table\n")
    benchmark("x.onnx", 8, 16, "--loop", 1, "--output", "out")
    tables = Path("out/table.md").read_text()
    assert [tables.count(text) for text in ("an earlier", "\n## ", "a later table\n## ")] == [1, 2, 1]


def test_what_a_failed_run_left_is_no_obstacle(folder):
    Path("x_bs1.om").write_text("no model")
    benchmark("x", 1, "--input", "prep", status=1)
    run("tools/infer.py", "--model", "x.onnx", "--input", "prep", "--output", "bench/y.onnx", "--output_dirname", "bs1")
    for path in [*Path("bench/y.onnx/bs1").iterdir(), Path("bench/y.onnx/bs1_summary.json")]:  # as if ended before
        path.unlink()
    save_small_model(Path("y.onnx"), seed=1)
    assert float(rows_of(benchmark("y.onnx", 1, "--loop", 1))[0][3]) > 0
    Path("bench/y.onnx/bs1_summary.json").unlink()
    assert rows_of(benchmark("y.onnx", 1, "--input", "prep"))[0][1] == "5"


def test_a_batch_size_that_fails_is_a_row_with_its_reason_below_and_the_others_go_on(folder):
    Path("x_bs4.om").write_text("no model")
    done = benchmark("x", 4, 1, "--input", "prep", status=1)
    four, one = rows_of(done)
    assert four == ["4", "-", "-", "FAILED", "-", "-", "-", "43.64"]
    assert one[:2] == ["1", "5"]
    assert re.match("batch size 4: .*ais_bench.*status 1", done.stdout.splitlines()[-2])


def test_a_truncated_summary_and_an_ais_bench_that_writes_nothing_fail_their_rows(folder):
    done = benchmark("x", 1, status=1, FAKE_AIS_BENCH_HALF="1")
    assert "batch size 1: bench/x/bs1_summary.json: missing, or not a complete summary" in done.stdout
    Path("ais_bench.py").write_text("print('--model')")
    done = run(SCRIPT, "x", 4, "--input", "prep", status=1, env={**os.environ, "PYTHONPATH": "."})
    assert done.stdout.splitlines()[-2] == "batch size 4: [Errno 2] No such file or directory: 'bench/x/bs4'"
    Path("x4").mkdir()
    for frame in FRAMES[1:]:
        Path(f"x4/{frame}_leftImg8bit_0.bin").touch()
        Path(f"x4/{frame}_leftImg8bit_1.bin").touch()
    Path("ais_bench.py").write_text("import os; os.renames('x4', 'bench/x/bs4')")  # without the first frame
    done = run(SCRIPT, "x", 4, "--input", "prep", status=1, env={**os.environ, "PYTHONPATH": "."})
    assert done.stdout.splitlines()[-2] == f"batch size 4: 1 of 5 frames lack an output: {FRAMES[0]}_leftImg8bit"
    Path("x_bs16.om").touch()
    Path("ais_bench.py").write_text("print(*range(9), sep='\\n'); raise SystemExit(3)")
    done = run(SCRIPT, "x", 16, status=1, env={**os.environ, "PYTHONPATH": "."})
    assert re.findall(r"^\d$", done.stderr, re.MULTILINE) == ["4", "5", "6", "7", "8"]
    Path("ais_bench.py").unlink()
    assert "No module named ais_bench" in run(SCRIPT, "x", 16, status=1).stderr


def test_a_summary_without_a_p99_has_none_in_the_table(folder):
    """As ais_bench's --threads leaves it."""
    Path("ais_bench.py").write_text(WAITS.replace(', "percentile(99%)": 1100.0', ""))
    (row,) = rows_of(run(SCRIPT, "x", 1, env={**os.environ, "PYTHONPATH": "."}))
    assert row == ["1", "-", "-", "1.00", "1000.00", "-", "-", "47.52"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_inference_too_and_loses_no_row(folder, number):
    """The table has the first batch size; the second one hangs."""
    Path("ais_bench.py").write_text(WAITS)
    command = [sys.executable, ROOT / SCRIPT, "x", "1", "4"]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": "."}, stderr=subprocess.PIPE, **OWN_GROUP)
    while not Path("pid").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == -number
    assert b"Traceback" not in stderr
    status = Path("/proc", Path("pid").read_text(), "status")
    while status.exists() and "zombie" not in status.read_text():  # until the container's first process collects it
        time.sleep(0.02)
    assert [line.split()[1] for line in Path("bench/x/table.md").read_text().splitlines()[4:5]] == ["1"]


WAITS = """import json, os, pathlib, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
if "--batchsize 4" in " ".join(sys.argv):
    pathlib.Path("pid.part").write_text(str(os.getpid()))
    pathlib.Path("pid.part").rename("pid")
    time.sleep(600)
times = {"mean": 1000.0, "percentile(99%)": 1100.0}
(folder / "bs1_summary.json").write_text(json.dumps({"args": [], "throughput": 1.0, "NPU_compute_time": times}))
"""


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["x", 1, 8, 16], "x_bs8.om, x_bs16.om: no such file"),
        (["y.onnx", 1, 8], "y.onnx: no such file"),
        (["x.onnx", 1, "--input", "prep", "--data", "prep"], "prep/gtFine/val: no <city>/"),
        (["x.onnx", 1, *SCORED, "--split", "vla"], "data/gtFine/vla: no <city>/"),
        (["x.onnx", 1, *SCORED, "--limit", 4], "prep: frames: 5, to score: 4, missing: 0; preprocess with"),
        (["x.onnx", 1, "--input", "prep", "--limit", 4], "prep: frames: 5, to score: 0"),
        (["x.onnx", 1, "--input", "other", "--data", "data"], "other: frames: 1, to score: 5, missing: 5;"),
        (["x.onnx", 1, "--input", "data"], "data: no .bin"),
        (["x.onnx", 1, "--input", "prep", "--data", ""], "gtFine/val: no <city>/"),  # a variable that is not set
    ],
)
def test_what_is_missing_is_named_before_anything_runs(folder, args, words):
    Path("other").mkdir()
    Path("other/other.bin").touch()
    assert words in refusal(tool, *args)
    assert not Path("bench").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("x --data data", "--data and --limit need --input"),
        ("models/x_bs16.om 1", "models/x_bs16.om: pass only the prefix, models/x\n"),
        ("x.om", "x.om: pass only the prefix, x\n"),
    ],
)
def test_wrong_usage_exits_2(args, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        tool.main(args.split())
    assert message in capsys.readouterr().err
