#!/usr/bin/env python3
"""Measure speed and mIoU at several batch sizes by running the guide's own commands, and print one table.

    MODEL_PREFIX_bs${bs}.om (Ascend, by ais_bench) or MODEL_PREFIX.onnx (any host, by tools/infer.py)
    --input SAVE_DIR, --data DATA_DIR
 -> OUTPUT/bs${bs}/                      logits of all frames, with --input
    OUTPUT/bs${bs}_summary.json          what inferred them
    OUTPUT/bs${bs}_metrics.json          metrics, with --data
    OUTPUT/bs${bs}_speed_summary.json    speed alone, --loop runs on zeros
    OUTPUT/bs${bs}.log                   the commands and what they printed on stdout
    OUTPUT/table.md                      the table, also on stdout

Results of an earlier run in OUTPUT are removed first.

    $ python3 tools/benchmark.py intraDA_deeplabv2 --input prep --data /data/cityscapes
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

TOOLS = Path(__file__).resolve().parent
sys.path.insert(0, str(TOOLS.parent))
from intrada_postprocess import InputError, at_least_one, find_logits, first_five, list_folder, run_script

BATCH_SIZES = 1, 4, 8, 16, 32, 64
# Frames/s on 310P3. Source: Huawei's ModelZoo-PyTorch, ACL_PyTorch/contrib/cv/segmentation/IntraDA.
PUBLISHED_FPS = {1: 47.52, 4: 43.64, 8: 43.35, 16: 43.41, 32: 42.09, 64: 20.39}
COLUMNS = "batch size", "frames", "mIoU %", "frames/s", "mean ms", "p99 ms", "whole run"
LAST_LINES = 5  # of a failed command


# ---------------------------------------------------------------------------------------------------- the commands


def plan_commands(args: argparse.Namespace, batch_size: int) -> dict[str, list[str]]:
    """Write out a batch size's commands: `infer` with --input, `score` with --data, `speed` always.

    ais_bench for an `.om` and tools/infer.py for an `.onnx` take the same options.
    """
    start = [*name_tool(args), "--model", model_path(args, batch_size), "--batchsize", str(batch_size)]
    start += ["--divide_input", "1"] if args.divide_input else []
    start += ["--output", str(args.output), "--output_dirname"]
    commands = {}
    if args.input:  # first, since it refuses what does not fit
        commands["infer"] = [*start, f"bs{batch_size}", "--input", args.input]
    if args.data:
        script = str(TOOLS.parent / "intrada_postprocess.py")
        metrics = str(args.output / f"bs{batch_size}_metrics.json")
        commands["score"] = [sys.executable, script, args.data, str(args.output / f"bs{batch_size}"), "--json", metrics]
    commands["speed"] = [*start, f"bs{batch_size}_speed", "--loop", str(args.loop)]
    return commands


def name_tool(args: argparse.Namespace) -> list[str]:
    """Write out the start of the commands that infer."""
    tool = [str(TOOLS / "infer.py"), "--provider", args.provider] if is_onnx(args) else ["-m", "ais_bench"]
    return [sys.executable, *tool, "--device", args.device]


def read_help(args: argparse.Namespace) -> str:
    """Read the help of the tool that infers.

    Raises:
        InputError: it is not there, or refuses --provider or --device.
    """
    command = [*name_tool(args), "--help"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    text = done.stdout.decode(errors="replace").rstrip()
    if done.returncode or not re.search(r"--model\b", text):  # an unrelated package is called ais_bench too
        advice = "" if is_onnx(args) else "; docs/ascend.md says how to install ais_bench, the .onnx runs without it"
        raise InputError(f"{format_command(command)}: {text.splitlines()[-1] if text else 'prints nothing'}{advice}")
    return text


def is_onnx(args: argparse.Namespace) -> bool:
    return args.model.endswith(".onnx")


def model_path(args: argparse.Namespace, batch_size: int) -> str:
    return args.model if is_onnx(args) else f"{args.model}_bs{batch_size}.om"


def format_command(command: list[str]) -> str:
    return " ".join(map(shlex.quote, command))


def run_command(command: list[str], log: Path) -> float:
    """Run a command, what it prints on stdout added to a log, and return its seconds.

    Raises:
        InputError: its exit status is not 0; its last lines are shown.
    """
    print("+", format_command(command), file=sys.stderr, flush=True)
    start = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, env=child_environment())
    seconds = time.perf_counter() - start
    with log.open("ab") as file:
        file.write(f"+ {format_command(command)}\n".encode("utf-8", "backslashreplace") + done.stdout)
    if done.returncode:
        sys.stderr.write("\n".join([*done.stdout.decode(errors="replace").splitlines()[-LAST_LINES:], ""]))
        name = command[2] if command[1] == "-m" else Path(command[1]).name
        raise InputError(f"{name} ended with status {done.returncode}; see its messages above and {log}")
    return seconds


def child_environment() -> dict[str, str]:
    """Make an environment in which tools/infer.py is no rank of torchrun's."""
    return {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


def check_inputs(args: argparse.Namespace) -> list[str]:
    """Check that everything needed is there, and list the stems of the input files.

    Raises:
        InputError: something is missing.
    """
    models = dict.fromkeys(model_path(args, batch_size) for batch_size in args.batch_sizes)
    missing = [path for path in models if not Path(path).is_file()]
    if missing:
        maker = "intrada_pth2onnx.py" if is_onnx(args) else "atc_convert.sh"
        raise InputError(f"{first_five(missing)}: no such file; make it with {maker}")
    if args.data and not list_folder(Path(args.data, "gtFine")):
        raise InputError(f"{args.data}: nothing in gtFine/; --data is the Cityscapes folder")
    stems = [path.stem for path in list_folder(Path(args.input)) if path.suffix == ".bin"] if args.input else []
    if args.input and not stems:
        raise InputError(f"{args.input}: no .bin; --input is what intrada_preprocess.py wrote")
    return stems


# ---------------------------------------------------------------------------------------------------- measuring


def measure(batch_size: int, commands: dict[str, list[str]], stems: list[str], args: argparse.Namespace) -> dict:
    """Run a batch size's commands and read what they leave.

    Returns:
        A table row: figures by column, and where something went wrong `failure`.
    """
    row = {"batch size": batch_size, "published": PUBLISHED_FPS.get(batch_size)}
    results, log = args.output / f"bs{batch_size}", args.output / f"bs{batch_size}.log"
    remove_results(args.output, batch_size)  # so that those found afterwards are of this run
    try:
        if "infer" in commands:
            seconds = run_command(commands["infer"], log)
            check_results(results, stems)
            row.update({"frames": len(stems), "whole run": len(stems) / seconds})
        if "score" in commands:
            run_command(commands["score"], log)
            metrics = json.loads((args.output / f"bs{batch_size}_metrics.json").read_text(encoding="utf-8"))
            row["mIoU %"] = 100 * metrics["miou"]
        run_command(commands["speed"], log)
        row.update(read_speed(args.output / f"bs{batch_size}_speed", devices=len(args.device.split(","))))
    except (InputError, OSError) as error:  # the other batch sizes still run
        row["failure"] = (
            f"{error.filename or args.output}: {error.strerror}" if isinstance(error, OSError) else str(error)
        )
    return row


def remove_results(output: Path, batch_size: int) -> None:
    """Remove what an earlier run left of a batch size."""
    endings = ".log", "_metrics.json", "_summary.json", "_model.json", "_speed_summary.json"
    files = [f"bs{batch_size}{ending}" for ending in endings]
    for path in list_folder(output):
        if path.name in (f"bs{batch_size}", f"bs{batch_size}_speed"):
            shutil.rmtree(str(path))
        elif path.name in files:
            path.unlink()


def check_results(folder: Path, stems: list[str]) -> None:
    """Check that every frame has both outputs; ais_bench's exit status does not show it.

    Raises:
        InputError: counts and names the frames that lack one.
    """
    found = find_logits(folder)
    missing = [stem for stem in stems if not {f"{stem}_0", f"{stem}_1"} <= found.keys()]
    if missing:
        raise InputError(f"{len(missing)} of {len(stems)} frames lack an output: {first_five(missing)}")


def find_summaries(folder: Path) -> list[Path]:
    """List a run's summaries: beside its folder, for several devices inside it."""
    beside = folder.with_name(f"{folder.name}_summary.json")
    inside = list_folder(folder) if folder.is_dir() else []
    return [path for path in [beside, *inside] if path.name.endswith("_summary.json") and path.is_file()]


def read_speed(folder: Path, devices: int) -> dict[str, float]:
    """Read the summaries of a run, one per device; throughputs add up.

    Raises:
        InputError: there are not as many, or one is truncated.
    """
    paths = find_summaries(folder)
    if len(paths) != devices:
        raise InputError(f"summaries of {folder}: {len(paths)}, devices: {devices}; see the messages above")
    try:
        summaries = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        return {
            "frames/s": sum(summary["throughput"] for summary in summaries),
            "mean ms": sum(summary["NPU_compute_time"]["mean"] for summary in summaries) / len(summaries),
            "p99 ms": max(summary["NPU_compute_time"]["percentile(99%)"] for summary in summaries),
        }
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(f"{first_five(list(map(str, paths)))}: not a complete summary: {error!r}") from None


# ---------------------------------------------------------------------------------------------------- reporting


def format_table(rows: list[dict], args: argparse.Namespace) -> str:
    """Format the rows as a Markdown table, padded for a terminal; failures and the report's command follow below."""
    complete = [row for row in rows if "failure" not in row]
    fastest = max(complete, key=lambda row: row["frames/s"], default=None)
    columns = COLUMNS if is_onnx(args) else (*COLUMNS, "published")  # on another chip it is no comparison
    remarks = ["FAILED" if "failure" in row else "best" if row is fastest else "" for row in rows]
    table = [[*columns, ""], *([*map(row.get, columns), remark] for row, remark in zip(rows, remarks))]
    table = [[format_cell(value) for value in cells] for cells in table]
    widths = [max(map(len, cells)) for cells in zip(*table)]
    lines = ["| " + " | ".join(cell.rjust(width) for cell, width in zip(cells, widths)) + " |" for cells in table]
    lines.insert(1, "| " + " | ".join("-" * (max(width, 2) - 1) + ":" for width in widths) + " |")
    lines += ["", *(f"batch size {row['batch size']}: {row['failure']}" for row in rows if "failure" in row)]
    scored = [args.output / f"bs{row['batch size']}" for row in complete if "mIoU %" in row]
    if scored:
        summaries = [path for folder in scored for path in find_summaries(folder)]
        command = [
            "python3",
            str(Path(sys.argv[0]).with_name("report.py")),
            *(f"{folder}_metrics.json" for folder in scored),
            "--perf",
        ]
        lines += ["As a page:", "", "    " + format_command([*command, *map(str, summaries)])]
    return "\n".join(lines).rstrip()


def format_cell(value: object) -> str:
    """Format a figure with two digits, and a missing one as a dash."""
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure speed and mIoU at several batch sizes, by ais_bench (.om) or tools/infer.py (.onnx)."
    )
    add = parser.add_argument
    add("model", metavar="MODEL_PREFIX", help="of MODEL_PREFIX_bs1.om, _bs4.om, ...; or an .onnx")
    add("batch_sizes", metavar="BS", nargs="*", type=at_least_one, default=BATCH_SIZES,
        help=f"batch sizes (default: {' '.join(map(str, BATCH_SIZES))})")  # fmt: skip
    add("--input", metavar="SAVE_DIR", help="infer these frames too (default: speed alone)")
    add("--data", metavar="DATA_DIR", help="score them too, against the Cityscapes labels")
    add("--output", metavar="DIR", type=Path, help="folder for everything (default: bench/<file name of MODEL_PREFIX>)")
    add("--loop", metavar="N", type=at_least_one, default=50, help="runs of the speed test (default: %(default)s)")
    add("--device", metavar="ID", default="0", help="device, for ais_bench also several: 0,1 (default: %(default)s)")
    add("--provider", metavar="NAME", default="cpu", help="for an .onnx: tools/infer.py's (default: %(default)s)")
    add("--dry_run", action="store_true", help="print the commands and run none")
    args = parser.parse_intermixed_args(argv)  # batch sizes may follow the options
    if args.data and not args.input:
        parser.error("--data needs --input")
    if is_onnx(args) and "," in args.device:
        parser.error("several devices need an .om")
    args.output = args.output or Path("bench", Path(args.model).name)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    stems = [] if args.dry_run else check_inputs(args)
    # Or each device would infer all frames; older builds of ais_bench, without the option, divide them.
    tool_help = "--divide_input" if args.dry_run else read_help(args)
    args.divide_input = "," in args.device and "--divide_input" in tool_help
    plans = {batch_size: plan_commands(args, batch_size) for batch_size in args.batch_sizes}
    if args.dry_run:
        print("\n".join(format_command(command) for commands in plans.values() for command in commands.values()))
        return 0
    args.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for batch_size, commands in plans.items():
        rows.append(measure(batch_size, commands, stems, args))
        table = format_table(rows, args)  # written after every batch size, so that an interruption loses nothing
        (args.output / "table.md").write_text(f"{table}\n", encoding="utf-8", errors="backslashreplace")
    print(table)
    return int(any("failure" in row for row in rows))


if __name__ == "__main__":
    run_script(main, umask=0o027, unwind=True)  # the newest ais_bench rejects an output folder more open than 0750
