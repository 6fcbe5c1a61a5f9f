#!/usr/bin/env python3
"""Infer with ONNX Runtime on any host, with ais_bench's options, file names and summary.

    --model X.onnx                        input image (batch, 3, 512, 1024) float32
    --input SAVE_DIR/<stem>.bin           float32, little-endian, one frame; or .npy; naturally sorted
 -> OUTPUT/DIRNAME/<stem>_<i>.bin         float32, little-endian, output i of the model: (19, 65, 129), 637 260 bytes
    OUTPUT/DIRNAME_summary.json           times in ms, throughput in frames/s, which file became which
    OUTPUT/DIRNAME_model.json             what the results are made with: model, provider, batch size

The last group is padded to the batch size with its first frame, and the padding's outputs are dropped. Started again,
only what is missing or out of date is inferred. Without --input zeros are inferred, --loop times.

    $ python3 intrada_infer.py --model X.onnx --input prep --output result --output_dirname result_bs1 --batchsize 1
    provider cpu: 500 frames (500 inferred, 0 kept), 0.25 frames/s computing, 0.25 end to end, in result/result_bs1
"""

from __future__ import annotations

import argparse
import atexit
import fcntl
import io
import json
import os
import platform
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime 1.29 and later report to Microsoft otherwise

import numpy as np
import onnxruntime
from tqdm import tqdm

PURE_INFERENCE_STEM = "pure_infer_data"  # what ais_bench calls the outputs of zeros


# torchrun's place of this process among all, and how many run on this host; without torchrun one, and no torch.
RANK, RANKS, RANKS_HERE = (
    int(os.environ.get(name, alone)) for name, alone in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1))
)


class InputError(Exception):
    """What the user can mend; told in one line, without a traceback."""


class Frame(NamedTuple):
    """One file to infer, or None for zeros, and the files of its outputs, none if they are not saved."""

    source: Path | None
    targets: list[Path]


class Run(NamedTuple):
    """What one rank did: its groups of frames, the milliseconds of each `session.run`, the seconds of it all."""

    groups: list[list[Frame]]
    compute_ms: list[float]
    elapsed_s: float
    device: int


# ---------------------------------------------------------------------------------------------------- the model


def open_session(model: Path, provider: str, device: int, threads: int) -> onnxruntime.InferenceSession:
    """Load the model into an execution provider, whole or not at all.

    Args:
        provider: an ONNX Runtime execution provider in short: cpu, cuda, tensorrt, openvino, cann, ...

    Raises:
        InputError: the model cannot be read, or the provider is absent or would leave work to the CPU.
    """
    names = {short_name(name): name for name in onnxruntime.get_available_providers()}
    if provider not in names:
        raise InputError(f"--provider {provider}: not in this onnxruntime, which has {', '.join(names)}")
    if not model.is_file():
        raise InputError(f"{model}: no such file; --model is what intrada_pth2onnx.py wrote")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # the exception says it all
    if provider != "cpu":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    choice = (names[provider], {"device_id": str(device)} if device else {})
    try:
        session = onnxruntime.InferenceSession(str(model), options, providers=[choice])
    except Exception as error:  # onnxruntime's own exceptions share no other base
        raise InputError(
            f"{model}: --provider {provider} of {', '.join(names)} cannot run it: {one_line(error)}"
        ) from None
    if session.get_providers()[0] != names[provider]:
        used = short_name(session.get_providers()[0])
        raise InputError(f"--provider {provider}: onnxruntime took {used} instead; it has {', '.join(names)}")
    return session


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def short_name(provider: str) -> str:
    """Shorten `CUDAExecutionProvider` to `cuda`."""
    return provider[: -len("ExecutionProvider")].lower()


def frame_shape(session: onnxruntime.InferenceSession, batch: int) -> tuple[int, ...]:
    """Read the shape of one frame from the model's only input.

    Raises:
        InputError: the model is none of intrada_pth2onnx.py's, or takes another batch size.
    """
    inputs = session.get_inputs()
    any_batch, *shape = inputs[0].shape
    if len(inputs) != 1 or inputs[0].type != "tensor(float)" or not all(isinstance(size, int) for size in shape):
        raise InputError(
            f"the model takes {[(i.name, i.type, i.shape) for i in inputs]}; expected one float input "
            "whose batch alone is dynamic; export it with intrada_pth2onnx.py"
        )
    if isinstance(any_batch, int) and any_batch != batch:
        raise InputError(f"the model takes batches of {any_batch} alone; give --batchsize {any_batch}")
    return tuple(shape)


# ---------------------------------------------------------------------------------------------------- the frames


def find_inputs(folder: Path, shape: tuple[int, ...]) -> dict[str, Path]:
    """Find the input files of a folder, naturally sorted (2 before 10), as ais_bench does.

    Returns:
        The `.bin` or `.npy` of each stem; a stem ends at the file name's first dot.

    Raises:
        InputError: there are none, two have one stem, or one has not the size of a frame.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; --input is what intrada_preprocess.py wrote")
    paths = sorted((path for path in folder.iterdir() if path.suffix.lower() in (".bin", ".npy")), key=natural_key)
    if not paths:
        raise InputError(f"{folder}: no .bin or .npy here; --input is what intrada_preprocess.py wrote")
    inputs = {stem_of(path): path for path in paths}
    if len(inputs) < len(paths):
        twice = [path.name for path in paths if inputs[stem_of(path)] != path]
        raise InputError(f"{folder}: {len(twice)} files would write the same results as others: {first_five(twice)}")
    wrong = [path.name for path in paths if not holds_frame(path, shape)]
    if wrong:
        size = 4 * int(np.prod(shape))
        raise InputError(f"{folder}: {len(wrong)} files are not float32 {shape}, {size} bytes: {first_five(wrong)}")
    return inputs


def holds_frame(path: Path, shape: tuple[int, ...]) -> bool:
    """Tell by its size, or by its header, whether a file holds one frame."""
    if path.suffix.lower() == ".bin":
        return path.stat().st_size == 4 * int(np.prod(shape))
    try:
        content = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, EOFError):
        return False
    return content.dtype == np.float32 and content.shape in (shape, (1, *shape))


def natural_key(path: Path) -> list:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]


def stem_of(path: Path) -> str:
    return path.name.split(".")[0]


def first_five(names: list, separator: str = ", ") -> str:
    """Name the first five, so that a message stays one readable line."""
    return separator.join(map(str, names[:5])) + (f"{separator}..." if len(names) > 5 else "")


def read_group(group: list[Frame], batch: int, shape: tuple[int, ...]) -> np.ndarray:
    """Read up to `batch` frames into one array, the rest of which repeats the first."""
    images = np.zeros((batch, *shape), np.float32)
    for frame, image in zip(group, images):
        if frame.source:
            npy = frame.source.suffix.lower() == ".npy"
            content = np.lib.format.open_memmap(frame.source, mode="r") if npy else np.fromfile(frame.source, "<f4")
            image[:] = content.reshape(shape)
    images[len(group) :] = images[0]
    return images


# ---------------------------------------------------------------------------------------------------- the results


def plan_frames(inputs: dict[str, Path], folder: Path | None, outputs: int, outfmt: str) -> list[Frame]:
    """Name the files of each frame's outputs as ais_bench does; without a folder nothing is saved."""
    sources = inputs or {PURE_INFERENCE_STEM: None}
    names = [f"_{i}.{outfmt.lower()}" for i in range(outputs)] if folder else []
    return [Frame(source, [folder / f"{stem}{name}" for name in names]) for stem, source in sources.items()]


def prepare_folder(folder: Path, frames: list[Frame], args: argparse.Namespace) -> None:
    """Make the folder ready for this run and note what its results are begun with.

    The note's time is the boundary: results older than it were made with something else, or are to be made anew.

    Raises:
        InputError: the folder holds what this run would not have made, or another run is writing to it.
    """
    make_folder(folder)
    lock_folder(folder)
    refuse_strangers(folder, frames)
    note, asked = beside(folder, "model"), identity(args)
    summary = read_note(beside(folder, "summary"))
    made = read_note(note) if not summary or "provider" in summary else {}  # ais_bench has been here since
    if args.input and not args.overwrite and any(target.exists() for frame in frames for target in frame.targets):
        for key in ("model", "provider", "batchsize"):
            if made.get(key) != asked[key]:
                raise InputError(
                    f"{folder}: made with {key} {made.get(key, 'unknown')}, now asked for {asked[key]}; "
                    "give another --output_dirname, or --overwrite"
                )
    if args.overwrite or made != asked:
        write_file(note, json.dumps(asked, indent=1).encode())


def beside(folder: Path, what: str) -> Path:
    """Name a JSON file beside the folder, where ais_bench puts its summary."""
    return folder.with_name(f"{folder.name}_{what}.json")


def identity(args: argparse.Namespace) -> dict[str, str | int]:
    """Name what results must have in common to stand in one folder."""
    model = args.model.resolve()
    facts = model.stat()
    return {
        "model": str(model),
        "provider": args.provider,
        "batchsize": args.batchsize,
        "model_bytes": facts.st_size,
        "model_mtime_ns": facts.st_mtime_ns,
    }


def read_note(note: Path) -> dict:
    """Read what results were begun with; empty if nobody noted it."""
    try:
        return dict(json.loads(note.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return {}


def lock_folder(folder: Path) -> None:
    """Hold the folder until this process ends.

    Raises:
        InputError: another run holds it.
    """
    try:
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{folder}: another run is writing here; wait for it, or give another folder") from None


def choose_frames(frames: list[Frame], folder: Path | None, args: argparse.Namespace) -> list[Frame]:
    """Choose the frames whose results are missing or out of date; zeros always."""
    if not folder or not args.input:
        return frames
    begun = beside(folder, "model").stat().st_mtime_ns
    stale = [frame for frame in frames if not is_current(frame, begun)]
    if stale or beside(folder, "summary").exists():
        return stale
    return frames[-args.batchsize :]  # killed just before its summary: there is no time to report without a run


def is_current(frame: Frame, begun: int) -> bool:
    """Tell whether all outputs of a frame are there and none is older than its input or the note beside the folder."""
    try:
        made = min(target.stat().st_mtime_ns for target in frame.targets)
    except FileNotFoundError:
        return False
    return made >= max(begun, frame.source.stat().st_mtime_ns)


def refuse_strangers(folder: Path, frames: list[Frame]) -> None:
    """Refuse a folder that holds what this run does not write: a metric would count it, or mix two formats.

    Raises:
        InputError: there is such a file.
    """
    expected = {target for frame in frames for target in frame.targets}
    present = {path for path in folder.glob("*") if path.suffix in (".bin", ".npy", ".txt")}
    strangers = sorted(path.name for path in present - expected)
    if strangers:
        raise InputError(
            f"{folder}: holds {len(strangers)} results of other frames or of another --outfmt: "
            f"{first_five(strangers)}; give another --output_dirname or remove them"
        )


def write_group(group: list[Frame], outputs: list[np.ndarray]) -> None:
    """Write each frame's outputs; the padding's are dropped, and zeros give one file for the whole batch."""
    for n, frame in enumerate(group):
        for target, logits in zip(frame.targets, outputs):
            write_logits(target, logits[n] if frame.source else logits)


def write_logits(path: Path, logits: np.ndarray) -> None:
    content = io.BytesIO()
    if path.suffix == ".npy":
        np.save(content, logits)
    write_file(path, content.getvalue() or np.ascontiguousarray(logits, "<f4").data)


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Write beside, then rename, so that a name always means a whole file; 0644 whatever the umask.

    Raises:
        InputError: it cannot be written, as on a full disk.
    """
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(content)
        part.chmod(0o644)
        os.replace(part, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None


def make_folder(path: Path) -> None:
    """Make a folder and its parents, 0750 whatever the umask: newer ais_bench writes to no folder more open."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        path.chmod(0o750)


# ---------------------------------------------------------------------------------------------------- the run


def infer(session: onnxruntime.InferenceSession, groups: list[list[Frame]], args: argparse.Namespace) -> Run:
    """Infer group after group; the next one is read and the last one written while the model runs."""
    shape = frame_shape(session, args.batchsize)
    for _ in range(args.warmup_count if groups else 0):
        run_model(session, np.zeros((args.batchsize, *shape), np.float32))
    compute_ms = []
    start = time.perf_counter()
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer, progress(groups) as bar:
        upcoming = reader.submit(read_group, groups[0] if groups else [], args.batchsize, shape)
        written = writer.submit(write_group, [], [])
        for group, following in zip(groups, [*groups[1:], None]):
            images = upcoming.result()
            if following:
                upcoming = reader.submit(read_group, following, args.batchsize, shape)
            for _ in range(args.loop):
                before = time.perf_counter()
                outputs = run_model(session, images)
                compute_ms.append(1000 * (time.perf_counter() - before))
            written.result()
            written = writer.submit(write_group, group, outputs)
            bar.update(len(group))
        written.result()
    return Run(groups, compute_ms, time.perf_counter() - start, args.device)


def run_model(session: onnxruntime.InferenceSession, images: np.ndarray) -> list[np.ndarray]:
    """Compute the outputs of a batch.

    Raises:
        InputError: onnxruntime cannot, as when memory runs out.
    """
    try:
        return session.run(None, {session.get_inputs()[0].name: images})
    except Exception as error:  # onnxruntime's own exceptions share no other base
        raise InputError(
            f"onnxruntime failed at --batchsize {len(images)}: {one_line(error)}; try a smaller one"
        ) from None


def progress(groups: list[list[Frame]]) -> tqdm:
    return tqdm(total=sum(map(len, groups)), unit="frame", disable=True if RANK else None)


def statistics(times_ms: list[float]) -> dict[str, float]:
    """Describe times as ais_bench does."""
    return {
        "min": float(np.min(times_ms)),
        "max": float(np.max(times_ms)),
        "mean": float(np.mean(times_ms)),
        "median": float(np.median(times_ms)),
        "percentile(99%)": float(np.percentile(times_ms, 99)),
        "count": len(times_ms),
    }


def summarise(runs: list[Run], args: argparse.Namespace) -> dict:
    """Make ais_bench's summary of what all ranks inferred now, and say what ran.

    `throughput` counts `session.run` alone, padding included; `end_to_end_throughput` counts the frames from the first
    read to the last write. ONNX Runtime moves the data to a device and back inside `session.run`, so that both
    latencies are 0.
    """
    compute_ms = [ms for run in runs for ms in run.compute_ms]
    transfer = statistics([0.0] * len(compute_ms))
    frames = sum(len(group) if group[0].source else args.batchsize for run in runs for group in run.groups) * args.loop
    devices = [run.device for run in runs]
    return {
        "filesinfo": describe_files([group for run in runs for group in run.groups]),
        "args": sys.argv,
        "NPU_compute_time": statistics(compute_ms),
        "H2D_latency": transfer,
        "D2H_latency": transfer,
        "npu_compute_time_list": compute_ms,
        "throughput": sum(1000 * args.batchsize / float(np.mean(run.compute_ms)) for run in runs),
        "end_to_end_throughput": frames / max(run.elapsed_s for run in runs),
        "pid": os.getpid(),
        "model": str(args.model.resolve()),
        "provider": args.provider,
        "batchsize": args.batchsize,
        "device": devices if len(devices) > 1 else devices[0],
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
    }


def describe_files(groups: list[list[Frame]]) -> dict[str, dict[str, list[str]]]:
    """Say which files became which, group by group, in ais_bench's words."""
    return {
        str(n): {
            "infiles": [str(frame.source or PURE_INFERENCE_STEM) for frame in group],
            "outfiles": [str(target) for frame in group for target in frame.targets],
        }
        for n, group in enumerate(groups)
    }


def join_ranks() -> None:
    """Connect with torchrun's other processes, early, so that all notice when one ends."""
    if RANKS > 1:
        from torch import distributed

        distributed.init_process_group("gloo")
        atexit.register(distributed.destroy_process_group)  # or gloo's threads may abort the process as it ends


def gather(value: Any) -> list:
    """Collect every rank's value, in the order of the ranks.

    Raises:
        InputError: another rank has ended.
    """
    if RANKS == 1:
        return [value]
    from torch import distributed

    values = [None] * RANKS
    try:
        distributed.all_gather_object(values, value)
    except RuntimeError:
        raise InputError("another rank has ended; its message tells why") from None
    return values


def processors() -> int:
    """Count the processors that this process may use, shared with the other ranks on this host."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, allowed // RANKS_HERE)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError
    return value


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Infer with ONNX Runtime on any host, with ais_bench's options, file names and summary."
    )
    add = parser.add_argument
    add("--model", metavar="ONNX", type=Path, required=True, help="model of intrada_pth2onnx.py")
    add("--input", metavar="DIR", type=Path, help="folder of .bin or .npy, one a frame (default: zeros)")
    add("--output", metavar="DIR", type=Path, help="folder for results and summary (default: nothing is saved)")
    add("--output_dirname", metavar="NAME", help="folder of the results below --output (default: date and time)")
    add("--outfmt", choices=("BIN", "NPY"), default="BIN", help="format of the results (default: %(default)s)")
    add("--batchsize", metavar="N", type=positive, default=1, help="frames in one run (default: %(default)s)")
    add("--loop", metavar="N", type=positive, default=1, help="runs of each batch (default: %(default)s)")
    add("--warmup_count", metavar="N", type=natural, default=1, help="untimed runs before (default: %(default)s)")
    add("--device", metavar="ID", type=natural, default=0, help="device of the provider (default: %(default)s)")
    add(
        "--provider",
        metavar="NAME",
        default="cpu",
        help="ONNX Runtime execution provider: cpu, cuda, tensorrt, openvino, cann, ... (default: %(default)s)",
    )
    add("--threads", metavar="N", type=positive, help="threads of one run (default: one for each processor)")
    add("--overwrite", action="store_true", help="infer all frames anew, not only what is missing or old")
    args = parser.parse_args(argv)
    if args.output_dirname and not args.output:
        parser.error("--output_dirname goes with --output")
    if args.output_dirname and (args.output_dirname in (".", "..") or "/" in args.output_dirname):
        parser.error("--output_dirname is the name of one folder")
    if args.output and not args.output_dirname and RANKS > 1:
        parser.error("several ranks want an --output_dirname")
    if args.device and args.provider == "cpu":
        parser.error("--device is for another --provider than cpu")
    args.device += 0 if args.provider == "cpu" else int(os.environ.get("LOCAL_RANK", 0))
    return args


def report(frames: list[Frame], runs: list[Run], summary: dict, folder: Path | None, provider: str) -> str:
    """Say in one line what was done, where it ran and how fast."""
    inferred = sum(len(group) for run in runs for group in run.groups)
    line = f"provider {provider}: {len(frames)} frames ({inferred} inferred, {len(frames) - inferred} kept)"
    if summary:
        line += f", {summary['throughput']:.2f} frames/s computing, {summary['end_to_end_throughput']:.2f} end to end"
    return line + (f", in {folder}" if folder else "")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    session = open_session(args.model, args.provider, args.device, args.threads or processors())
    inputs = find_inputs(args.input, frame_shape(session, args.batchsize)) if args.input else {}
    folder = args.output and args.output / (args.output_dirname or time.strftime("%Y_%m_%d-%H_%M_%S"))
    frames = plan_frames(inputs, folder, len(session.get_outputs()), args.outfmt)
    join_ranks()
    if folder and RANK == 0:
        prepare_folder(folder, frames, args)
    gather("the folder is ready")
    todo = choose_frames(frames[RANK::RANKS], folder, args)
    groups = [todo[n : n + args.batchsize] for n in range(0, len(todo), args.batchsize)]
    runs = [run for run in gather(infer(session, groups, args)) if run.groups]
    if RANK == 0:
        summary = summarise(runs, args) if runs else {}
        if folder and summary:
            write_file(beside(folder, "summary"), json.dumps(summary, indent=1).encode())
        print(report(frames, runs, summary, folder, args.provider))
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except (InputError, OSError) as error:
        raise SystemExit(f"{Path(__file__).name}: error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
