#!/usr/bin/env python3
"""Measure speed and mIoU at several batch sizes and lay them out in one table, by running the guide's own commands.

   MODEL_PREFIX_bs${bs}.om (Ascend, by ais_bench) or MODEL_PREFIX.onnx (any host, by intrada_infer.py)
   --input SAVE_DIR, --data DATA_DIR
-> perf/bs${bs}_summary.json        speed alone, --loop runs on zeros
   result/result_bs${bs}/           logits of all frames, with --input
   result/metrics_bs${bs}.json      metrics, with --data
   a table on stdout, and with --markdown in a file

   $ python3 intrada_benchmark.py intraDA_deeplabv2 --input prep --data /data/cityscapes
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

BATCH_SIZES = 1, 4, 8, 16, 32, 64
# Frames/s on 310P3. Source: Huawei's ModelZoo-PyTorch, ACL_PyTorch/contrib/cv/segmentation/IntraDA.
PUBLISHED_FPS = {1: 47.52, 4: 43.64, 8: 43.35, 16: 43.41, 32: 42.09, 64: 20.39}
PERF, RESULT = Path("perf"), Path("result")
RESULT_BYTES = 2 * 4 * 19 * 65 * 129  # both outputs of a frame, float32
COLUMNS = "batch size", "frames", "mIoU %", "frames/s", "mean ms", "p99 ms", "end to end", "on 310P3", ""


class InputError(Exception):
    """What the user can mend; told in one line, without a traceback."""


class StepError(Exception):
    """Why a batch size has no figures; told in its row."""


class Row(NamedTuple):
    """What was measured at a batch size; None where it was not asked for, and `failure` where something went wrong."""

    batch_size: int
    frames: int | None = None
    miou: float | None = None
    fps: float | None = None
    mean_ms: float | None = None
    p99_ms: float | None = None
    end_to_end_fps: float | None = None
    failure: str = ""


# ---------------------------------------------------------------------------------------------------- the commands


def infer_command(args: argparse.Namespace, batch_size: int) -> list[str]:
    """Begin ais_bench's command for an `.om`, intrada_infer.py's for an `.onnx`; both take the same options."""
    if is_onnx(args):
        start = [python(), sibling("intrada_infer.py"), "--model", args.model, "--provider", args.provider]
    else:
        start = [python(), "-m", "ais_bench", "--model", model_path(args, batch_size)]
    return [*start, "--device", args.device, "--batchsize", str(batch_size)]


def plan_commands(args: argparse.Namespace, batch_size: int) -> dict[str, list[str]]:
    """Write out a batch size's commands: `speed` always, `infer` with --input, `score` with --data."""
    start = infer_command(args, batch_size)
    result, metrics = f"result/result_bs{batch_size}", f"result/metrics_bs{batch_size}.json"
    commands = {"speed": [*start, "--loop", str(args.loop), "--output", "perf", "--output_dirname", f"bs{batch_size}"]}
    if args.input:
        into = ["--output", "result", "--output_dirname", f"result_bs{batch_size}"]
        commands["infer"] = [*start, "--input", args.input, *into]
    if args.data:
        commands["score"] = [python(), sibling("intrada_postprocess.py"), args.data, result, "--json", metrics]
    return commands


def is_onnx(args: argparse.Namespace) -> bool:
    return args.model.endswith(".onnx")


def model_path(args: argparse.Namespace, batch_size: int) -> str:
    return args.model if is_onnx(args) else f"{args.model}_bs{batch_size}.om"


def model_paths(args: argparse.Namespace) -> list[str]:
    """List the models of all batch sizes, each once."""
    return list(dict.fromkeys(model_path(args, batch_size) for batch_size in args.batch_sizes))


def python() -> str:
    """Name the running interpreter as a user would type it."""
    found, here = shutil.which("python3"), Path(sys.executable)
    # a virtual environment's is a link to the one outside of it, so that the folder must be the same too
    same = found and Path(found).samefile(here) and Path(found).parent.samefile(here.parent)
    return "python3" if same else sys.executable


def sibling(script: str) -> str:
    """Name a script beside this one; its command runs, nothing of it is imported."""
    return str(Path(sys.argv[0]).with_name(script))


def run_command(command: list[str]) -> float:
    """Run a command, its output on stderr, and return its seconds.

    Raises:
        StepError: it ends with another status than 0.
    """
    print("+", shlex.join(command), flush=True)
    start = time.perf_counter()
    status = subprocess.run(command, stdout=sys.stderr).returncode
    if status:
        name = command[2] if command[1] == "-m" else Path(command[1]).name
        raise StepError(f"{name} ended with status {status}; its messages stand above")
    return time.perf_counter() - start


# ---------------------------------------------------------------------------------------------------- checks before


def check(args: argparse.Namespace) -> list[Path]:
    """Check all that can be checked before the first run.

    Returns:
        The input files.

    Raises:
        InputError: something would fail later.
    """
    check_models(args)
    inputs = find_inputs(args)
    check_space(len(inputs), args)
    if not is_onnx(args):
        read = [*map(Path, model_paths(args)), *([Path(args.input)] if args.input else []), *inputs]
        check_permissions(read, [folder for folder in (PERF, RESULT) if folder.exists()])
    return inputs


def check_models(args: argparse.Namespace) -> None:
    """Check that all models are there, and for `.om` that ais_bench is.

    Raises:
        InputError: one is missing.
    """
    missing = [path for path in model_paths(args) if not Path(path).is_file()]
    if missing:
        maker = "intrada_pth2onnx.py" if is_onnx(args) else "atc_convert.sh"
        raise InputError(f"{len(missing)} models are missing, make them with {maker}: {first_five(missing)}")
    if not is_onnx(args):
        probe = subprocess.run([python(), "-c", "import aclruntime, ais_bench"], capture_output=True, text=True)
        if probe.returncode:
            reason = (probe.stderr.strip().splitlines() or [f"status {probe.returncode}"])[-1]
            raise InputError(f"{python()} cannot import ais_bench ({reason}); see README.md, The Ascend host")


def find_inputs(args: argparse.Namespace) -> list[Path]:
    """List the input files of --input.

    Raises:
        InputError: there are none.
    """
    if not args.input:
        return []
    if args.data and not Path(args.data, "gtFine").is_dir():
        raise InputError(f"{args.data}: no gtFine/ here; --data is Cityscapes' folder")
    inputs = sorted(path for path in Path(args.input).glob("*") if path.suffix.lower() in (".bin", ".npy"))
    if not inputs:
        raise InputError(f"{args.input}: no .bin or .npy here; --input is what intrada_preprocess.py wrote")
    return inputs


def check_permissions(read: list[Path], written: list[Path]) -> None:
    """Check what ais_bench since 2023-09 refuses: links, other owners, open permissions, path characters.

    What it reads may be 0755 at most, a folder that it writes to 0750.

    Raises:
        InputError: names the paths and the command that mends them.
    """
    paths = read + written
    faults = {
        "are symbolic links; copy them with what they point to by cp -rL and give the copy:": [
            path for path in paths if path.is_symlink()
        ],
        "belong to another user: sudo chown -R $USER": [path for path in paths if path.lstat().st_uid != os.getuid()],
        "are writable by group or others: chmod -R go-w": [path for path in read if path.lstat().st_mode & 0o022],
        "are open to others, where it is to write: chmod 750": [
            path for path in written if path.lstat().st_mode & 0o027
        ],
        "hold characters other than letters, digits and _ - . /: mv": [
            path for path in paths if re.search(r"[^\w./-]", str(path.absolute()), re.ASCII)
        ],
    }
    for fault, faulty in faults.items():
        if faulty:
            named = faulty if len(faulty) <= 5 else sorted({path.parent for path in faulty})
            raise InputError(f"newer ais_bench refuses {len(faulty)} paths that {fault} {shlex.join(map(str, named))}")


def check_space(frames: int, args: argparse.Namespace) -> None:
    """Check that the results fit on the disk; of several devices each may write all.

    Raises:
        InputError: they do not.
    """
    needed = RESULT_BYTES * frames * len(args.batch_sizes) * count_devices(args)
    free = shutil.disk_usage(RESULT if RESULT.is_dir() else ".").free
    for batch_size in args.batch_sizes:  # whose results are written over
        free += sum(path.stat().st_size for path in RESULT.glob(f"result_bs{batch_size}/**/*_[01].bin"))
    if needed > free:
        raise InputError(
            f"{RESULT}/ needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; give fewer batch sizes"
        )


def count_devices(args: argparse.Namespace) -> int:
    return len(args.device.split(","))


def make_folder(path: Path) -> None:
    """Make a folder, 0750 whatever the umask: newer ais_bench writes to no folder that is more open."""
    if not path.is_dir():
        path.mkdir()
        path.chmod(0o750)


def first_five(names: list, separator: str = ", ") -> str:
    """Name the first five, so that a message stays one readable line."""
    return separator.join(map(str, names[:5])) + (f"{separator}..." if len(names) > 5 else "")


# ---------------------------------------------------------------------------------------------------- measuring


def measure(batch_size: int, commands: dict[str, list[str]], inputs: list[Path], args: argparse.Namespace) -> Row:
    """Run a batch size's commands and read what they leave; of intrada_infer.py results of an earlier run count."""
    row, result, begun = Row(batch_size), RESULT / f"result_bs{batch_size}", time.time()
    forget(PERF / f"bs{batch_size}")
    if "infer" in commands and not is_onnx(args):
        forget(result)
        beside(result, "model").unlink(missing_ok=True)  # from now on these are not intrada_infer.py's results
    try:
        run_command(commands["speed"])
        row = row._replace(**read_speed(PERF / f"bs{batch_size}", count_devices(args)))
        if "infer" in commands:
            seconds = run_command(commands["infer"])
            check_results(result, inputs, 0 if is_onnx(args) else begun)
            end_to_end_fps = read_end_to_end(result) if is_onnx(args) else len(inputs) / seconds  # loading included
            row = row._replace(frames=len(inputs), end_to_end_fps=end_to_end_fps)
        if "score" in commands:
            run_command(commands["score"])
            row = row._replace(miou=json.loads(Path(commands["score"][-1]).read_text())["miou"])
    except StepError as error:
        return row._replace(failure=str(error))
    return row


def beside(folder: Path, what: str) -> Path:
    """Name a JSON file beside the folder, where ais_bench puts its summary."""
    return folder.with_name(f"{folder.name}_{what}.json")


def find_summaries(folder: Path) -> list[Path]:
    """List a run's summaries: beside its folder, of several devices inside it, of the first builds misspelt."""
    return [path for path in (beside(folder, "summary"), folder / "sumary.json") if path.is_file()] + sorted(
        folder.glob("*_summary.json")
    )


def forget(folder: Path) -> None:
    """Remove the summaries of an earlier run, which would pass for this one's."""
    for path in find_summaries(folder):
        path.unlink()


def read_speed(folder: Path, devices: int) -> dict[str, float]:
    """Read the summaries of a run, one for each device; throughputs add up.

    Raises:
        StepError: there are not as many, or one is not whole.
    """
    paths = find_summaries(folder)
    if len(paths) != devices:
        raise StepError(f"{len(paths)} summaries in {folder.parent} of {devices} devices; the messages stand above")
    try:
        summaries = [json.loads(path.read_text()) for path in paths]
        return {
            "fps": sum(summary["throughput"] for summary in summaries),
            "mean_ms": sum(summary["NPU_compute_time"]["mean"] for summary in summaries) / len(summaries),
            "p99_ms": max(summary["NPU_compute_time"]["percentile(99%)"] for summary in summaries),
        }
    except (ValueError, KeyError, TypeError) as error:
        raise StepError(f"{first_five(paths)}: not a whole summary: {error!r}") from None


def read_end_to_end(result: Path) -> float:
    """Read intrada_infer.py's own figure, which ais_bench's summary has not."""
    return json.loads(beside(result, "summary").read_text())["end_to_end_throughput"]


def check_results(folder: Path, inputs: list[Path], begun: float) -> None:
    """Check that every frame has both outputs, made by this run.

    Raises:
        StepError: counts and names the frames that lack one.
    """
    found = {
        path.stem for path in [*folder.glob("*.*"), *folder.glob("device*/*.*")] if path.stat().st_mtime >= begun - 2
    }
    stems = [path.name.split(".")[0] for path in inputs]
    missing = [stem for stem in stems if not {f"{stem}_0", f"{stem}_1"} <= found]
    if missing:
        raise StepError(f"{len(missing)} of {len(stems)} frames lack an output: {first_five(missing)}")


# ---------------------------------------------------------------------------------------------------- reporting


def cells_of(row: Row, best: bool) -> list[str]:
    """Format a row; a dash where nothing was measured."""
    published = PUBLISHED_FPS.get(row.batch_size)
    percent = None if row.miou is None else 100 * row.miou
    figures = [percent, row.fps, row.mean_ms, row.p99_ms, row.end_to_end_fps, published]
    remark = f"FAILED: {row.failure}" if row.failure else "best" if best else ""
    return [str(row.batch_size), str(row.frames or "-"), *("-" if f is None else f"{f:.2f}" for f in figures), remark]


def format_table(rows: list[Row]) -> str:
    """Lay the rows out as a Markdown table, padded so that it reads well on a terminal too."""
    fastest = max((row.fps or 0 for row in rows if not row.failure), default=0)
    table = [list(COLUMNS), *(cells_of(row, bool(fastest) and row.fps == fastest and not row.failure) for row in rows)]
    widths = [max(len(cells[n]) for cells in table) for n in range(len(COLUMNS))]
    lines = ["| " + " | ".join(cell.rjust(width) for cell, width in zip(cells, widths)) + " |" for cells in table]
    lines.insert(1, "| " + " | ".join("-" * (max(width, 2) - 1) + ":" for width in widths) + " |")
    return "\n".join(lines)


def report(rows: list[Row], markdown: Path | None) -> None:
    """Print the table, and write it where that is asked for."""
    table = format_table(rows)
    print(table)
    if markdown:
        markdown.write_text(table + "\n", encoding="utf-8")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure speed and mIoU at several batch sizes, by ais_bench (.om) or intrada_infer.py (.onnx)."
    )
    add = parser.add_argument
    add("model", metavar="MODEL_PREFIX", help="MODEL_PREFIX_bs1.om, MODEL_PREFIX_bs4.om, ...; or an .onnx")
    add(
        "batch_sizes",
        metavar="BS",
        nargs="*",
        type=positive,
        help=f"batch sizes (default: {' '.join(map(str, BATCH_SIZES))})",
    )
    add("--loop", metavar="N", type=positive, default=50, help="runs of the speed test (default: %(default)s)")
    add("--device", metavar="ID", default="0", help="device, for ais_bench also several, as 0,1 (default: %(default)s)")
    add("--provider", metavar="NAME", default="cpu", help="for an .onnx, as intrada_infer.py's (default: %(default)s)")
    add("--input", metavar="SAVE_DIR", help="infer these frames too (default: speed alone)")
    add("--data", metavar="DATA_DIR", help="score them too, against Cityscapes' labels")
    add("--markdown", metavar="FILE", type=Path, help="write the table here too")
    add("--dry_run", action="store_true", help="print the commands and run none")
    args = parser.parse_args(argv)
    if args.data and not args.input:
        parser.error("--data goes with --input")
    if args.markdown and not args.markdown.parent.is_dir():
        parser.error(f"--markdown {args.markdown}: no such folder")
    args.batch_sizes = args.batch_sizes or list(BATCH_SIZES)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    plans = {batch_size: plan_commands(args, batch_size) for batch_size in args.batch_sizes}
    if args.dry_run:
        print("\n".join(shlex.join(command) for commands in plans.values() for command in commands.values()))
        return 0
    inputs = check(args)
    for folder in (PERF, RESULT):
        make_folder(folder)
    rows = []
    try:
        for batch_size, commands in plans.items():
            rows.append(measure(batch_size, commands, inputs, args))
    finally:  # stopped early, what was measured counts
        if rows:
            report(rows, args.markdown)
    return int(any(row.failure for row in rows))


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except (InputError, OSError) as error:
        raise SystemExit(f"{Path(__file__).name}: error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
