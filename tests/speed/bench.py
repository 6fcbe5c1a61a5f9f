#!/usr/bin/env python3
"""Time each stage against a straightforward loop and a lower bound, and print one Markdown table.

Every run is a process of its own, timed from start to end, imports included. The programs of a stage alternate; the
table has the medians over the rounds. This process imports neither numpy nor torch, because Linux counts the memory of
the parent process into the peak of its child.

    $ python3 tests/speed/bench.py
"""

from __future__ import annotations

import argparse
import datetime
import filecmp
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = "numpy", "pillow", "onnxruntime", "onnx", "torch"
TINY_FRAMES = 3  # made by tests/tiny_cityscapes.py; all other frames are links to them
HEADER = """\
| stage | program | frames | seconds | frames/s | speed / straightforward | speed / lower bound | peak MB |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"""


class BenchmarkError(Exception):
    """A process failed, or two programs disagree; reported in one line, without a traceback."""


class Run(NamedTuple):
    """One process: seconds from start to end, peak resident memory in MB, its output."""

    seconds: float
    peak_mb: float
    output: str


def script(name: str, *arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / name), *map(str, arguments)]


def baseline(name: str, *arguments: object) -> list[str]:
    return script("tests/speed/baselines.py", name, *arguments)


def run(command: list[str]) -> Run:
    """Run a process to its end, with all earlier writes flushed to disk.

    Raises:
        BenchmarkError: it failed.
    """
    os.sync()
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    child.stdout.close()
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise BenchmarkError(f"{' '.join(command)}: exit status {child.returncode}: {output.strip()[-500:]}")
    return Run(seconds, usage.ru_maxrss * 1024 / 1e6, output)


def run_alternating(programs: dict[str, list[str]], out: Path, rounds: int) -> dict[str, list[Run]]:
    """Run the programs of a stage one after the other, round after round.

    The first program runs once more before, uncounted, to fill the disk cache.

    Args:
        out: OUT/<program> is removed before each run, so that every run writes to a new folder.
    """
    out.mkdir()
    run(next(iter(programs.values())))
    runs = {name: [] for name in programs}
    for n in range(1, rounds + 1):
        for name, command in programs.items():
            shutil.rmtree(out / name, ignore_errors=True)
            runs[name].append(run(command))
            print(f"{out.name}, round {n}, {name}: {runs[name][-1].seconds:.2f} s", file=sys.stderr)
    return runs


def format_rows(stage: str, frames: int, runs: dict[str, list[Run]]) -> list[str]:
    """Make a table row for each program; a quotient of speeds above 1 means faster."""
    seconds = {name: median(run.seconds for run in runs[name]) for name in runs}
    rows = []
    for name in runs:
        quotients = [
            f"{seconds[x] / seconds[name]:.2f}" if x in seconds else "-" for x in ("straightforward", "lower bound")
        ]
        figures = [f"{seconds[name]:.2f}", f"{frames / seconds[name]:.2f}", *quotients]
        peak_mb = median(run.peak_mb for run in runs[name])
        rows.append(f"| {' | '.join([stage, name, str(frames), *figures, f'{peak_mb:.0f}'])} |")
    return rows


def link_frames(sources: list[Path], folder: Path, ending: str, frames: int) -> None:
    """Fill a new folder with hard links to the sources, in turn."""
    folder.mkdir(parents=True)
    for n in range(frames):
        os.link(sources[n % len(sources)], folder / f"tiny_000000_{n:06d}{ending}")


def bench_preprocess(work: Path, frames: int, rounds: int) -> list[str]:
    data, out = work / "images", work / "preprocess"
    images = sorted(work.glob("cityscapes/leftImg8bit/val/*/*.png"))
    link_frames(images, data / "leftImg8bit/val/tiny", "_leftImg8bit.png", frames)
    programs = {
        "this project": script("intrada_preprocess.py", data, out / "this project"),
        "straightforward": baseline("straightforward_preprocess", data, out / "straightforward"),
        "lower bound": baseline("lower_bound_preprocess", data),
    }
    runs = run_alternating(programs, out, rounds)
    names = sorted(path.name for path in (out / "straightforward").iterdir())[:TINY_FRAMES]
    same, differing, missing = filecmp.cmpfiles(out / "this project", out / "straightforward", names, shallow=False)
    if differing or missing:
        raise BenchmarkError(
            f"preprocess: this project and the straightforward loop differ in {', '.join(differing + missing)}"
        )
    print(f"preprocess: this project and the straightforward loop wrote the same bytes, distinct frames: {len(same)}")
    return format_rows("preprocess", frames, runs)


def bench_export(work: Path, rounds: int) -> list[str]:
    weights, model = work / "cityscapes/tiny_intrada.pth", work / "tiny.onnx"
    programs = {"this project": script("intrada_pth2onnx.py", weights, model, "--skip_verify")}
    return format_rows("export", 1, run_alternating(programs, work / "export", rounds))


def bench_infer(work: Path, rounds: int) -> list[str]:
    """Infer the tiny frames; the logits in WORK/infer/this project are the input of bench_postprocess."""
    model, inputs, out = work / "tiny.onnx", work / "prep", work / "infer"
    run(script("intrada_preprocess.py", work / "cityscapes", inputs))
    files = "--model", model, "--input", inputs, "--output", out, "--output_dirname", "this project"
    programs = {
        "this project": script("tools/infer.py", *files, "--batchsize", 1, "--overwrite"),
        "straightforward": baseline("straightforward_infer", model, inputs, out / "straightforward"),
        "lower bound": baseline("lower_bound_infer", model, inputs),
    }
    return format_rows("infer", TINY_FRAMES, run_alternating(programs, out, rounds))


def bench_postprocess(work: Path, frames: int, rounds: int) -> list[str]:
    data, logits = work / "labels", work / "logits"
    labels = sorted(work.glob("cityscapes/gtFine/val/*/*.png"))
    link_frames(labels, data / "gtFine/val/tiny", "_gtFine_labelIds.png", frames)
    link_frames(sorted(work.glob("infer/this project/*_1.bin")), logits, "_leftImg8bit_1.bin", frames)
    programs = {
        "this project": script("intrada_postprocess.py", data, logits),
        "straightforward": baseline("straightforward_postprocess", data, logits),
        "lower bound": baseline("lower_bound_postprocess", data, logits),
    }
    runs = run_alternating(programs, work / "postprocess", rounds)
    found, expected = (runs[name][-1].output.splitlines()[-1] for name in ("this project", "straightforward"))
    if found != expected:
        raise BenchmarkError(f"postprocess: this project reports {found}, the straightforward loop {expected}")
    print(f"postprocess: this project and the straightforward loop report {found}")
    return format_rows("postprocess", frames, runs)


def describe_host() -> str:
    """Name the date, the CPU and the versions."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return (
        f"{datetime.date.today()}, {cpu[1] if cpu else platform.machine()}, {len(os.sched_getaffinity(0))} cores; "
        f"Python {platform.python_version()}, {versions}"
    )


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time each stage against a straightforward loop and a lower bound.")
    add = parser.add_argument
    add("--frames_preprocess", metavar="N", type=int, default=96, help="images (default: %(default)s)")
    add("--frames_postprocess", metavar="N", type=int, default=240, help="labels (default: %(default)s)")
    add("--rounds", metavar="N", type=int, default=3, help="runs of each program (default: %(default)s)")
    args = parser.parse_args(argv)
    if min(vars(args).values()) < 1:
        parser.error("every N must be 1 or more")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # for the processes started here
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        run(script("tests/tiny_cityscapes.py", work / "cityscapes"))
        rows = bench_preprocess(work, args.frames_preprocess, args.rounds)
        rows += bench_export(work, args.rounds)
        rows += bench_infer(work, args.rounds)
        rows += bench_postprocess(work, args.frames_postprocess, args.rounds)
    print(f"\n{describe_host()}; rounds: {args.rounds}\n", HEADER, *rows, sep="\n")
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except (BenchmarkError, OSError) as error:
        raise SystemExit(f"{Path(__file__).name}: error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
