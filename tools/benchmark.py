#!/usr/bin/env python3
"""Measure speed and mIoU at several batch sizes by running the guide's own commands, and print one table.

   MODEL_PREFIX_bs${bs}.om (Ascend, by ais_bench) or MODEL_PREFIX.onnx (any host, by tools/infer.py)
   --input SAVE_DIR, --data DATA_DIR
-> result/result_bs${bs}/           logits of all frames, with --input
   result/metrics_bs${bs}.json      metrics, with --data
   perf/bs${bs}_summary.json        speed alone, --loop runs on zeros
   a table on stdout, and with --markdown in a file

   $ python3 tools/benchmark.py intraDA_deeplabv2 --input prep --data /data/cityscapes
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from intrada_postprocess import InputError, at_least_one, first_five, is_there, list_folder, run_script

BATCH_SIZES = 1, 4, 8, 16, 32, 64
# Frames/s on 310P3. Source: Huawei's ModelZoo-PyTorch, ACL_PyTorch/contrib/cv/segmentation/IntraDA.
PUBLISHED_FPS = {1: 47.52, 4: 43.64, 8: 43.35, 16: 43.41, 32: 42.09, 64: 20.39}
TOOLS = Path(sys.argv[0]).parent
PERF, RESULT = Path("perf"), Path("result")
COLUMNS = "batch size", "frames", "mIoU %", "frames/s", "mean ms", "p99 ms", "end to end", "on 310P3", ""


class StepError(Exception):
    """Why a batch size has no figures; the other batch sizes still run."""


# ---------------------------------------------------------------------------------------------------- the commands


def plan_commands(args: argparse.Namespace, batch_size: int) -> dict[str, list[str]]:
    """Write out a batch size's commands: `infer` with --input, `score` with --data, `speed` always.

    ais_bench for an `.om` and tools/infer.py for an `.onnx` take the same options.
    """
    if is_onnx(args):
        start = [sys.executable, str(TOOLS / "infer.py"), "--model", args.model, "--provider", args.provider]
    else:
        start = [sys.executable, "-m", "ais_bench", "--model", model_path(args.model, batch_size)]
        if "," in args.device and "--divide_input" in read_ais_bench_help():  # or each device would infer all frames
            start += ["--divide_input", "1"]
    start += ["--device", args.device, "--batchsize", str(batch_size)]
    result = RESULT / f"result_bs{batch_size}"
    commands = {}
    if args.input:  # first, since it refuses what does not fit
        commands["infer"] = [*start, "--input", args.input, "--output", str(RESULT), "--output_dirname", result.name]
    if args.data:
        commands["score"] = [sys.executable, str(TOOLS.parent / "intrada_postprocess.py"), args.data, str(result)]
        commands["score"] += ["--json", str(metrics_path(batch_size))]
    commands["speed"] = [*start, "--loop", str(args.loop), "--output", str(PERF), "--output_dirname", f"bs{batch_size}"]
    return commands


def read_ais_bench_help() -> str:
    command = [sys.executable, "-m", "ais_bench", "--help"]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout.decode(errors="replace")


def metrics_path(batch_size: int) -> Path:
    return RESULT / f"metrics_bs{batch_size}.json"


def is_onnx(args: argparse.Namespace) -> bool:
    return args.model.endswith(".onnx")


def model_path(model: str, batch_size: int) -> str:
    return model if model.endswith(".onnx") else f"{model}_bs{batch_size}.om"


def format_command(command: list[str]) -> str:
    return " ".join(map(shlex.quote, command))


def run_command(command: list[str]) -> float:
    """Run a command, its output on stderr, and return its seconds.

    Raises:
        StepError: its exit status is not 0.
    """
    print("+", format_command(command), flush=True)
    start = time.perf_counter()
    status = subprocess.run(command, stdout=sys.stderr).returncode
    if status:
        name = command[2] if command[1] == "-m" else Path(command[1]).name
        raise StepError(f"{name} ended with status {status}; see its messages above")
    return time.perf_counter() - start


def check_before_run(args: argparse.Namespace) -> list[str]:
    """Check that everything needed is there.

    Returns:
        The stems of the input files.

    Raises:
        InputError: something is missing.
    """
    models = dict.fromkeys(model_path(args.model, batch_size) for batch_size in args.batch_sizes)
    missing = [path for path in models if not Path(path).is_file()]
    if missing:
        maker = "intrada_pth2onnx.py" if is_onnx(args) else "atc_convert.sh"
        raise InputError(f"{first_five(missing)}: no such file; make it with {maker}")
    if not is_onnx(args) and not importlib.util.find_spec("ais_bench"):
        raise InputError(f"{sys.executable} has no ais_bench; docs/reference.md says how to install it")
    if args.data and not Path(args.data, "gtFine").is_dir():
        raise InputError(f"{args.data}: no gtFine/; --data is the Cityscapes folder")
    inputs = list_folder(Path(args.input)) if args.input else []
    stems = [path.name.split(".")[0] for path in inputs if path.suffix == ".bin"]
    if args.input and not stems:
        raise InputError(f"{args.input}: no .bin; --input is what intrada_preprocess.py wrote")
    return sorted(stems)


# ---------------------------------------------------------------------------------------------------- measuring


def measure(batch_size: int, commands: dict[str, list[str]], stems: list[str], args: argparse.Namespace) -> dict:
    """Run a batch size's commands and read what they leave.

    Returns:
        A table row: figures by column, and where something went wrong `failure`.
    """
    row = {"batch size": batch_size, "on 310P3": PUBLISHED_FPS.get(batch_size)}
    result, perf = RESULT / f"result_bs{batch_size}", PERF / f"bs{batch_size}"
    try:
        if "infer" in commands:
            if not is_onnx(args):  # tools/infer.py itself removes what is outdated
                remove_results(result, stems)
            seconds = run_command(commands["infer"])
            check_results(result, stems)
            row["frames"] = len(stems)
            row["end to end"] = len(stems) / seconds
        if "score" in commands:
            run_command(commands["score"])
            row["mIoU %"] = 100 * json.loads(metrics_path(batch_size).read_text(encoding="utf-8"))["miou"]
        remove_summaries(perf)
        run_command(commands["speed"])
        row.update(read_speed(perf, devices=len(args.device.split(","))))
    except StepError as error:
        row["failure"] = str(error)
    return row


def find_results(folder: Path, stems: list[str]) -> list[Path]:
    """List the files of both outputs of the frames, those in ais_bench's device folders too."""
    expected = {f"{stem}_{output}" for stem in stems for output in (0, 1)}
    entries = list_folder(folder) if is_there(folder) else []
    entries += [path for device in entries if device.name.startswith("device") for path in list_folder(device)]
    return [path for path in entries if path.stem in expected and path.suffix == ".bin"]


def remove_results(folder: Path, stems: list[str]) -> None:
    """Remove an earlier run's results, so that those found afterwards are of this run."""
    for path in find_results(folder, stems):
        path.unlink()
    remove_summaries(folder)
    note = json_path(folder, "model")  # tools/infer.py's; it would keep what ais_bench now writes
    if note.exists():
        note.unlink()


def check_results(folder: Path, stems: list[str]) -> None:
    """Check that every frame has both outputs; ais_bench's exit status does not show it.

    Raises:
        StepError: counts and names the frames that lack one.
    """
    found = {path.stem for path in find_results(folder, stems)}
    missing = [stem for stem in stems if not {f"{stem}_0", f"{stem}_1"} <= found]
    if missing:
        raise StepError(f"{len(missing)} of {len(stems)} frames lack an output: {first_five(missing)}")


def json_path(folder: Path, what: str) -> Path:
    """Name a JSON file beside the folder, where ais_bench puts its summary."""
    return folder.with_name(f"{folder.name}_{what}.json")


def find_summaries(folder: Path) -> list[Path]:
    """List a run's summaries: beside its folder, for several devices inside it."""
    beside = json_path(folder, "summary")
    inside = [path for path in list_folder(folder) if path.name.endswith("_summary.json")] if is_there(folder) else []
    return [beside, *inside] if is_there(beside) else inside


def remove_summaries(folder: Path) -> None:
    """Remove the summaries of an earlier run, which would pass for this one's."""
    for path in find_summaries(folder):
        path.unlink()


def read_speed(folder: Path, devices: int) -> dict[str, float]:
    """Read the summaries of a run, one per device; throughputs add up.

    Raises:
        StepError: there are not as many, or one is truncated.
    """
    paths = find_summaries(folder)
    if len(paths) != devices:
        raise StepError(f"summaries in {folder.parent}: {len(paths)}, devices: {devices}; see the messages above")
    try:
        summaries = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        return {
            "frames/s": sum(summary["throughput"] for summary in summaries),
            "mean ms": sum(summary["NPU_compute_time"]["mean"] for summary in summaries) / len(summaries),
            "p99 ms": max(summary["NPU_compute_time"]["percentile(99%)"] for summary in summaries),
        }
    except (ValueError, KeyError, TypeError) as error:
        raise StepError(f"{first_five(list(map(str, paths)))}: not a complete summary: {error!r}") from None


# ---------------------------------------------------------------------------------------------------- reporting


def format_table(rows: list[dict]) -> str:
    """Format the rows as a Markdown table, padded so that it reads well on a terminal too; failures follow below."""
    complete = [row for row in rows if "failure" not in row]
    fastest = max(complete, key=lambda row: row["frames/s"], default=None)
    remarks = ["FAILED" if "failure" in row else "best" if row is fastest else "" for row in rows]
    table = [COLUMNS, *([*map(row.get, COLUMNS[:-1]), remark] for row, remark in zip(rows, remarks))]
    table = [[format_cell(value) for value in cells] for cells in table]
    widths = [max(len(cells[n]) for cells in table) for n in range(len(COLUMNS))]
    lines = ["| " + " | ".join(cell.rjust(width) for cell, width in zip(cells, widths)) + " |" for cells in table]
    lines.insert(1, "| " + " | ".join("-" * (max(width, 2) - 1) + ":" for width in widths) + " |")
    failures = [f"batch size {row['batch size']}: {row['failure']}" for row in rows if "failure" in row]
    return "\n".join([*lines, *([""] if failures else []), *failures])


def format_cell(value: object) -> str:
    """Format a figure with two digits, and a missing one as a dash."""
    return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure speed and mIoU at several batch sizes, by ais_bench (.om) or tools/infer.py (.onnx)."
    )
    add = parser.add_argument
    add("model", metavar="MODEL_PREFIX", help="of MODEL_PREFIX_bs1.om, _bs4.om, ...; or an .onnx")
    add("batch_sizes", metavar="BS", nargs="*", type=at_least_one, default=BATCH_SIZES,
        help=f"batch sizes (default: {' '.join(map(str, BATCH_SIZES))})")  # fmt: skip
    add("--loop", metavar="N", type=at_least_one, default=50, help="runs of the speed test (default: %(default)s)")
    add("--device", metavar="ID", default="0", help="device, for ais_bench also several: 0,1 (default: %(default)s)")
    add("--provider", metavar="NAME", default="cpu", help="for an .onnx: tools/infer.py's (default: %(default)s)")
    add("--input", metavar="SAVE_DIR", help="infer these frames too (default: speed alone)")
    add("--data", metavar="DATA_DIR", help="score them too, against the Cityscapes labels")
    add("--markdown", metavar="FILE", type=Path, help="write the table here too")
    add("--dry_run", action="store_true", help="print the commands and run none")
    args = parser.parse_args(argv)
    if args.data and not args.input:
        parser.error("--data needs --input")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    plans = {batch_size: plan_commands(args, batch_size) for batch_size in args.batch_sizes}
    if args.dry_run:
        print("\n".join(format_command(command) for commands in plans.values() for command in commands.values()))
        return 0
    stems = check_before_run(args)
    for folder in (PERF, RESULT):
        folder.mkdir(exist_ok=True)
    rows = []
    for batch_size, commands in plans.items():
        rows.append(measure(batch_size, commands, stems, args))
        if args.markdown:  # after every batch size, so that an interruption loses nothing
            args.markdown.write_text(format_table(rows) + "\n", encoding="utf-8")
    print(format_table(rows))
    return int(any("failure" in row for row in rows))


if __name__ == "__main__":
    run_script(main, umask=0o027)  # the newest ais_bench rejects an output folder more open than 0750
