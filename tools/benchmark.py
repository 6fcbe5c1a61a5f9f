#!/usr/bin/env python3
"""Measure several batch sizes by running the guide's own commands, and print one table.

    MODEL_PREFIX_bs${bs}.om (Ascend, by ais_bench) or MODEL_PREFIX.onnx (any host, by tools/infer.py)
    --input SAVE_DIR, --data DATA_DIR
 -> OUTPUT/bs${bs}/                   logits of all frames, with --input
    OUTPUT/bs${bs}_summary.json       what inferred, and how fast; without --input it ran --loop times on zeros
    OUTPUT/bs${bs}_metrics.json       the run's record, with --data
    OUTPUT/bs${bs}.log                the commands and what they printed on stdout
    OUTPUT/table.md                   the table, also on stdout, below those of earlier runs

Nothing is removed: a batch size that has results in OUTPUT is refused.

    $ python3 tools/benchmark.py intraDA_deeplabv2 --input prep --data /data/cityscapes
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
sys.path.insert(0, str(TOOLS.parent))
from intrada_postprocess import (
    PUBLISHED_FPS,
    InputError,
    at_least_one,
    find_labels,
    find_logits,
    first_five,
    is_there,
    list_folder,
    read_json,
    read_summary,
    run_script,
)

BATCH_SIZES = 1, 4, 8, 16, 32, 64
PUBLISHED = "published, 310P3"
COLUMNS = "batch size", "frames", "mIoU %", "frames/s", "ms a batch", "p99 ms", "whole run"
LAUNCHER = "RANK", "WORLD_SIZE", "LOCAL_RANK"  # with which tools/infer.py would take a part of the frames
WIDTH = 8  # of a column, at least
LAST_LINES = 5  # of a failed command


# ---------------------------------------------------------------------------------------------------- the commands


def plan_commands(batch_size: int, args: argparse.Namespace) -> dict[str, list[str]]:
    """Write out a batch size's commands: `infer`, and with --data `score`.

    ais_bench for an `.om` and tools/infer.py for an `.onnx` take the same options.
    """
    results = args.output / f"bs{batch_size}"
    tool = [str(TOOLS / "infer.py"), "--provider", args.provider] if is_onnx(args) else ["-m", "ais_bench"]
    infer = [sys.executable, *tool, "--device", str(args.device), "--model", model_path(batch_size, args)]
    infer += ["--batchsize", str(batch_size), "--output", str(args.output), "--output_dirname", results.name]
    infer += ["--input", str(args.input)] if args.input else ["--loop", str(args.loop)]
    if not args.data:
        return {"infer": infer}
    score = [sys.executable, str(TOOLS.parent / "intrada_postprocess.py"), str(args.data), str(results)]
    score += ["--split", args.split, "--json", f"{results}_metrics.json"]
    score += ["--limit", str(args.limit)] if args.limit else []
    return {"infer": infer, "score": score}


def is_onnx(args: argparse.Namespace) -> bool:
    return args.model.endswith(".onnx")


def model_path(batch_size: int, args: argparse.Namespace) -> str:
    return args.model if is_onnx(args) else f"{args.model}_bs{batch_size}.om"


def format_command(command: list[str]) -> str:
    return " ".join(map(shlex.quote, command))


def run_command(command: list[str], log: Path) -> float:
    """Run a command, its stdout added to a log, and return its seconds; InputError if it fails."""
    print("+", format_command(command), file=sys.stderr, flush=True)
    start = time.perf_counter()
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as child:
        end_with(child)
        stdout = child.stdout.read()
    seconds = time.perf_counter() - start
    with log.open("ab") as file:
        file.write(f"+ {format_command(command)}\n".encode("utf-8", "backslashreplace") + stdout)
    if child.returncode:
        sys.stderr.write("\n".join([*stdout.decode(errors="replace").splitlines()[-LAST_LINES:], ""]))
        name = command[2] if command[1] == "-m" else Path(command[1]).name
        raise InputError(f"{name} ended with status {child.returncode}; see its messages above and {log}")
    return seconds


def end_with(child: subprocess.Popen) -> None:
    """Let a signal that ends this script end a command too."""

    def end(number: int, _: object) -> None:
        child.kill()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup and a shell's background set it
            signal.signal(number, end)


def check_files(args: argparse.Namespace) -> list[str]:
    """Check that everything needed is there and nothing would be overwritten; list the stems of the input files.

    Raises:
        InputError: a file is missing, or OUTPUT has results.
    """
    models = dict.fromkeys(model_path(batch_size, args) for batch_size in args.batch_sizes)
    missing = [path for path in models if not Path(path).is_file()]
    if missing:
        maker = "intrada_pth2onnx.py" if is_onnx(args) else "atc_convert.sh"
        raise InputError(f"{first_five(missing)}: no such file; make it with {maker}")
    stems = [path.stem for path in list_folder(args.input) if path.suffix == ".bin"] if args.input else []
    if args.input and not stems:
        raise InputError(f"{args.input}: no .bin; --input is what intrada_preprocess.py wrote")
    frames = list(find_labels(args.data, args.split))[: args.limit] if args.data else []
    lacking = [frame for frame in frames if f"{frame}_leftImg8bit" not in stems]
    if lacking or (args.limit and len(stems) > args.limit):
        problem = f"frames: {len(stems)}, to score: {len(frames)}, missing: {len(lacking)}"
        raise InputError(f"{args.input}: {problem}; preprocess with the same --split and --limit")
    taken = [name for batch_size in args.batch_sizes for name in find_results(args.output / f"bs{batch_size}")]
    if taken:
        remedy = "pass another --output, or other batch sizes, or remove these"
        raise InputError(f"{args.output}: has {first_five(taken)}; {remedy}")
    return stems


def find_results(folder: Path) -> list[str]:
    """Name what an earlier run left of a batch size: logits, a summary, metrics."""
    beside = [folder.with_name(f"{folder.name}_{what}.json") for what in ("summary", "metrics")]
    logits = [folder] if is_there(folder) and find_logits(folder) else []
    return [path.name for path in [*logits, *filter(read_json, beside)]]


# ---------------------------------------------------------------------------------------------------- measuring


def measure(batch_size: int, commands: dict[str, list[str]], stems: list[str], args: argparse.Namespace) -> dict:
    """Run a batch size's commands and read what they leave.

    Returns:
        A table row: figures by column, and where something went wrong `failure`.
    """
    row = {"batch size": batch_size, PUBLISHED: PUBLISHED_FPS.get(batch_size)}
    results = args.output / f"bs{batch_size}"
    log = Path(f"{results}.log")
    try:
        seconds = run_command(commands["infer"], log)
        if stems:
            check_results(results, stems)
            row.update({"frames": len(stems), "whole run": len(stems) / seconds})
        row.update(read_speed(Path(f"{results}_summary.json")))
        if "score" in commands:
            run_command(commands["score"], log)
            metrics = json.loads(Path(f"{results}_metrics.json").read_text(encoding="utf-8"))
            row.update({"frames": metrics["frames"], "mIoU %": 100 * metrics["miou"]})
    except (InputError, OSError) as error:  # the other batch sizes still run
        row.update({"frames/s": "FAILED", "failure": str(error)})
    return row


def check_results(folder: Path, stems: list[str]) -> None:
    """Raise InputError if a frame lacks an output; ais_bench's exit status does not show it."""
    found = find_logits(folder)
    missing = [stem for stem in stems if not {f"{stem}_0", f"{stem}_1"} <= found.keys()]
    if missing:
        raise InputError(f"{len(missing)} of {len(stems)} frames lack an output: {first_five(missing)}")


def read_speed(path: Path) -> dict[str, float]:
    """Read the figures from a summary of ais_bench or tools/infer.py; InputError if it is not complete."""
    summary = read_summary(path)
    if not summary:
        raise InputError(f"{path}: missing, or not a complete summary")
    times = summary["NPU_compute_time"]  # without p99 if ais_bench ran with --threads
    return {"frames/s": summary["throughput"], "ms a batch": times["mean"], "p99 ms": times.get("percentile(99%)")}


# ---------------------------------------------------------------------------------------------------- reporting


def format_head(columns: list[str]) -> str:
    """Format the head of the Markdown table, padded for a terminal."""
    widths = [max(len(column), WIDTH) for column in columns]
    lines = [column.rjust(width) for column, width in zip(columns, widths)], [f"{'-' * (w - 1)}:" for w in widths]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def format_row(row: dict, columns: list[str]) -> str:
    cells = [format_cell(row.get(column)).rjust(max(len(column), WIDTH)) for column in columns]
    return f"| {' | '.join(cells)} |"


def format_cell(value: object) -> str:
    """Format a figure with two digits, and a missing one as a dash."""
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def format_notes(rows: list[dict], args: argparse.Namespace) -> str:
    """Format what follows the table: how it was measured, what failed, and the report's command."""
    measured = "of this inference" if args.input else f"of {args.loop} runs on zeros"
    lines = ["", f"frames/s: {measured}" + ("" if is_onnx(args) else "; the published ones: of runs on zeros")]
    lines += [f"batch size {row['batch size']}: {row['failure']}" for row in rows if "failure" in row]
    scored = [str(args.output / f"bs{row['batch size']}_metrics.json") for row in rows if "mIoU %" in row]
    if scored:
        script = Path(sys.argv[0])
        report = script.resolve() if script.is_symlink() else script
        command = ["python3", str(report.with_name("report.py")), *scored, "--output", str(args.output / "report.html")]
        lines += ["HTML report:", "", f"    {format_command(command)}"]
    return "\n".join(lines)


def publish(text: str, path: Path) -> None:
    """Append text to a file, and print it; in this order, since printing ends at a closed pipe."""
    with path.open("ab") as file:
        file.write(f"{text}\n".encode("utf-8", "backslashreplace"))
    print(text, flush=True)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure speed and mIoU at several batch sizes, by ais_bench (.om) or tools/infer.py (.onnx)."
    )
    add = parser.add_argument
    add("model", metavar="MODEL_PREFIX", help="prefix of MODEL_PREFIX_bs1.om, _bs4.om, ...; or an .onnx")
    add("batch_sizes", metavar="BS", nargs="*", type=at_least_one, default=BATCH_SIZES,
        help=f"batch sizes (default: {' '.join(map(str, BATCH_SIZES))})")  # fmt: skip
    add("--input", metavar="SAVE_DIR", type=Path, help="infer these frames (default: zeros)")
    add("--data", metavar="DATA_DIR", type=Path, help="score them against the Cityscapes labels")
    add("--split", default="val", help="split to score (default: %(default)s)")
    add("--limit", metavar="N", type=at_least_one, help="frames in SAVE_DIR, the first of the split (default: all)")
    add("--output", metavar="DIR", type=Path, help="folder for everything (default: bench/<file name of MODEL_PREFIX>)")
    add("--loop", metavar="N", type=at_least_one, default=50, help="runs on zeros (default: %(default)s)")
    add("--device", metavar="ID", type=int, default=0, help="device (default: %(default)s)")
    add("--provider", metavar="NAME", default="cpu", help="execution provider for an .onnx (default: %(default)s)")
    add("--dry_run", action="store_true", help="print the commands and run none")
    args = parser.parse_intermixed_args(argv)  # batch sizes may follow the options
    if (args.data or args.limit) and not args.input:
        parser.error("--data and --limit need --input")
    if args.model.endswith(".om"):
        parser.error(f"{args.model}: pass only the prefix, {re.sub(r'(_bs[0-9]+)?[.]om$', '', args.model)}")
    args.output = args.output or Path("bench", Path(args.model).name)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    plans = {batch_size: plan_commands(batch_size, args) for batch_size in args.batch_sizes}
    if args.dry_run:
        print("\n".join(format_command(command) for commands in plans.values() for command in commands.values()))
        return 0
    stems = check_files(args)
    args.output.mkdir(parents=True, exist_ok=True)
    table = args.output / "table.md"
    columns = [*COLUMNS] if is_onnx(args) else [*COLUMNS, PUBLISHED]  # on another chip it is no comparison
    rows = []
    publish(f"## {time.strftime('%Y-%m-%d %H:%M')}, {args.model}\n\n{format_head(columns)}", table)
    for batch_size, commands in plans.items():
        rows.append(measure(batch_size, commands, stems, args))
        publish(format_row(rows[-1], columns), table)
    publish(f"{format_notes(rows, args)}\n", table)
    return int(any("failure" in row for row in rows))


if __name__ == "__main__":
    run_script(main, umask=0o027)  # the newest ais_bench rejects an output folder more open than 0750
