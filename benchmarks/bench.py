#!/usr/bin/env python3
"""Time each stage beside the plain way of doing it and beside its physical bound, and print one Markdown table.

Every way is a process of its own, timed from its start to its end, imports included. The ways of a stage take turns,
and the medians over the rounds are told. This process imports neither numpy nor torch: Linux counts the memory of the
process that starts another one into the other's peak.

    $ python3 benchmarks/bench.py
"""

from __future__ import annotations

import argparse
import datetime
import filecmp
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
PACKAGES = "numpy", "pillow", "numba", "onnxruntime", "onnx", "torch"
FLOP_PER_FRAME = 759e9  # of the network, multiply and add counted apart
CHECKED_FRAMES = 8  # as many pictures differ


class BenchmarkError(Exception):
    """A child failed, or two ways came to different results; told in one line, without a traceback."""


class Run(NamedTuple):
    """One child process: seconds from start to end, its peak resident memory in MB, what it printed."""

    seconds: float
    peak_mb: float
    printed: str


# ---------------------------------------------------------------------------------------------------- running


def script(name: str, *arguments: object) -> list[str]:
    return [sys.executable, str(HERE.parent / name), *map(str, arguments)]


def way(name: str, *arguments: object) -> list[str]:
    return script("benchmarks/ways.py", name, *arguments)


def run(command: list[str]) -> Run:
    """Run a child to its end, with the disk at rest before.

    Raises:
        BenchmarkError: it failed.
    """
    os.sync()
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    printed = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    child.stdout.close()
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise BenchmarkError(f"{' '.join(command)}: exit status {child.returncode}: {printed.strip()[-500:]}")
    return Run(seconds, usage.ru_maxrss * 1024 / 1e6, printed)


def run_in_turns(
    stage: str, ways: dict[str, list[str]], rounds: int, made: dict[str, Path] | None = None
) -> dict[str, list[Run]]:
    """Run the ways of a stage one after the other, round after round.

    The first way runs once more, before, uncounted: numba compiles then, and the caches of the disk fill.

    Args:
        made: the folder that a way makes; it is removed before each run, so that every run is a first one.
    """
    run(next(iter(ways.values())))
    runs = {name: [] for name in ways}
    for n in range(1, rounds + 1):
        for name, command in ways.items():
            if made and name in made:
                shutil.rmtree(made[name], ignore_errors=True)
            runs[name].append(run(command))
            print(f"{stage}, round {n}, {name}: {runs[name][-1].seconds:.2f} s", file=sys.stderr)
    return runs


def summarise(stage: str, frames: int, runs: dict[str, list[Run]]) -> list[dict]:
    """Make a row for each way of a stage; speeds are compared by their quotient, so that more than 1 is faster."""
    seconds = {name: median(run.seconds for run in runs[name]) for name in runs}
    return [
        {
            "stage": stage,
            "way": name,
            "frames": frames,
            "seconds": seconds[name],
            "frames_per_second": frames / seconds[name],
            "speed_by_plain": seconds["plain"] / seconds[name] if "plain" in seconds else None,
            "speed_by_bound": seconds["bound"] / seconds[name] if "bound" in seconds else None,
            "peak_mb": median(run.peak_mb for run in runs[name]),
            "seconds_of_rounds": [run.seconds for run in runs[name]],
        }
        for name in runs
    ]


# ---------------------------------------------------------------------------------------------------- the stages


def bench_preprocess(work: Path, frames: int, rounds: int) -> list[dict]:
    data, ours, plain = work / "pictures", work / "prep", work / "prep_plain"
    ways = {
        "ours": script("intrada_preprocess.py", data, ours),
        "plain": way("plain_preprocess", data, plain),
        "bound": way("bound_preprocess", data),
    }
    runs = run_in_turns("preprocess", ways, rounds, made={"ours": ours, "plain": plain})
    names = sorted(path.name for path in plain.iterdir())[:CHECKED_FRAMES]
    same, differing, missing = filecmp.cmpfiles(ours, plain, names, shallow=False)
    if differing or missing:
        raise BenchmarkError(f"preprocess: ours and plain differ in {', '.join(differing + missing)}")
    print(f"preprocess: ours and plain make the same bytes of {len(same)} frames")
    return summarise("preprocess", frames, runs)


def bench_export(work: Path, rounds: int) -> list[dict]:
    ways = {"ours": script("intrada_pth2onnx.py", work / "random.pth", work / "random.onnx", "--skip_verify")}
    return summarise("export", 1, run_in_turns("export", ways, rounds))


def bench_infer(work: Path, frames: int, rounds: int) -> tuple[list[dict], dict[str, float]]:
    """Infer some of the preprocessed frames.

    Returns:
        The rows, and the FLOP/s of session.run, of a matrix product, and their quotient, of the last round.
    """
    model, inputs, results = work / "random.onnx", work / "prep_infer", work / "result"
    inputs.mkdir()
    made = sorted((work / "prep").glob("*.bin"))
    for n in range(frames):
        os.link(made[n % len(made)], inputs / f"{n:06d}.bin")
    files = "--model", model, "--input", inputs, "--output", results, "--output_dirname", "ours"
    ways = {
        "ours": script("intrada_infer.py", *files, "--batchsize", 1, "--warmup_count", 0, "--overwrite"),
        "plain": way("plain_infer", model, inputs, results / "plain"),
        "bound": way("bound_infer", model, inputs),
        "matrix product": way("matrix_product"),
    }
    runs = run_in_turns("infer", ways, rounds)
    product = float(runs.pop("matrix product")[-1].printed)
    network = FLOP_PER_FRAME * json.loads((results / "ours_summary.json").read_text(encoding="utf-8"))["throughput"]
    return summarise("infer", frames, runs), {"network": network, "matrix_product": product, "share": network / product}


def bench_postprocess(work: Path, frames: int, rounds: int) -> list[dict]:
    folders = work / "labels", work / "logits"
    ways = {
        "ours": script("intrada_postprocess.py", *folders),
        "plain": way("plain_postprocess", *folders),
        "bound": way("bound_postprocess", *folders),
    }
    runs = run_in_turns("postprocess", ways, rounds)
    ours, plain = (runs[name][-1].printed.splitlines()[-1] for name in ("ours", "plain"))
    print(f"postprocess: {ours} of ours, {plain} of plain")
    if ours != plain:
        raise BenchmarkError(f"postprocess: ours comes to {ours}, plain to {plain}")
    return summarise("postprocess", frames, runs)


# ---------------------------------------------------------------------------------------------------- reporting


def describe_host() -> dict:
    """Tell the date, the processor and the versions, without which no time means anything."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text(encoding="utf-8")) if info.exists() else None
    return {
        "date": datetime.date.today().isoformat(),
        "processor": model[1] if model else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": {
            "Python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
    }


def format_report(report: dict) -> str:
    """Lay the report out as Markdown."""
    host, flops = report["host"], report["flops"]
    versions = ", ".join(f"{name} {version}" for name, version in host["versions"].items())
    lines = [
        f"{host['date']}, {host['processor']}, {host['cores']} cores; {versions}; rounds: {report['rounds']}\n",
        "| stage | way | frames | seconds | frames/s | speed / plain | speed / bound | peak MB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in report["rows"]:
        by_plain, by_bound = (f"{q:.2f}" if q else "-" for q in (row["speed_by_plain"], row["speed_by_bound"]))
        lines.append(
            f"| {row['stage']} | {row['way']} | {row['frames']} | {row['seconds']:.2f} | "
            f"{row['frames_per_second']:.2f} | {by_plain} | {by_bound} | {row['peak_mb']:.0f} |"
        )
    lines.append(
        f"\ninfer: {flops['network'] / 1e9:.0f} GFLOP/s in session.run, {100 * flops['share']:.0f} % of the "
        f"{flops['matrix_product'] / 1e9:.0f} GFLOP/s of a 4096 x 4096 float32 matrix product"
    )
    return "\n".join(lines)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time each stage beside the plain way and beside its physical bound.")
    add = parser.add_argument
    add("--frames_preprocess", metavar="N", type=positive, default=96, help="pictures (default: %(default)s)")
    add("--frames_postprocess", metavar="N", type=positive, default=240, help="labels (default: %(default)s)")
    add("--frames_infer", metavar="N", type=positive, default=4, help="frames to infer (default: %(default)s)")
    add("--rounds", metavar="N", type=positive, default=3, help="runs of each way (default: %(default)s)")
    add("--work", metavar="DIR", type=Path, help="new folder to work in and to keep (default: one that is removed)")
    add("--json", metavar="FILE", type=Path, help="write the table here too, with the seconds of every round")
    return parser.parse_args(argv)


def bench(work: Path, args: argparse.Namespace) -> dict:
    """Make the input and time all stages."""
    os.environ["NUMBA_CACHE_DIR"] = str(work / "numba")  # beside the script it may be another environment's
    print(run(script("benchmarks/make_data.py", work, args.frames_preprocess, args.frames_postprocess)).printed, end="")
    rows = bench_preprocess(work, args.frames_preprocess, args.rounds)
    rows += bench_export(work, args.rounds)
    infer_rows, flops = bench_infer(work, args.frames_infer, args.rounds)
    rows += infer_rows + bench_postprocess(work, args.frames_postprocess, args.rounds)
    return {"host": describe_host(), "rounds": args.rounds, "rows": rows, "flops": flops}


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.work:
        args.work.mkdir(parents=True)
        report = bench(args.work, args)
    else:
        with tempfile.TemporaryDirectory() as work:
            report = bench(Path(work), args)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"\n{format_report(report)}")
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except (BenchmarkError, OSError) as error:
        raise SystemExit(f"{Path(__file__).name}: error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
