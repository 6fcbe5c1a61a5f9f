#!/usr/bin/env python3
"""Infer with ONNX Runtime on any host, with ais_bench's options, file names and summary.

    --model X.onnx                        input image (batch, 3, 512, 1024) float32
    --input SAVE_DIR/<stem>.bin           float32, little-endian, one frame; or .npy; naturally sorted
 -> OUTPUT/DIRNAME/<stem>_<i>.bin         float32, little-endian, output i of the model: (19, 65, 129), 637 260 bytes
    OUTPUT/DIRNAME_summary.json           times in ms, throughput in frames/s, which file became which, what ran
    OUTPUT/DIRNAME_model.json             what the results belong to: model, provider, batch size, digests of the inputs

The last group is padded to the batch size with its first frame, and the padding's outputs are dropped. Interrupted and
restarted, it resumes: results of the same model and input are kept. Without --input, zeros are inferred --loop times
for the speed alone.

    $ python3 tools/infer.py --model X.onnx --input prep --output result --output_dirname result_bs1 --batchsize 1
    provider cpu, frames: 500 (500 inferred, 0 kept), 0.25 frames/s computing, 0.25 end to end, in result/result_bs1
"""

from __future__ import annotations

import argparse
import atexit
import fcntl
import hashlib
import io
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime 1.29 and later report to Microsoft otherwise

import numpy as np
import onnxruntime
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from intrada_postprocess import InputError, first_five

NPY_HEADER = 128  # bytes

# Set by torchrun; without it this is the only process.
TORCHRUN = os.environ if os.environ.keys() >= {"TORCHELASTIC_RUN_ID", "WORLD_SIZE"} else {}
RANK, WORLD_SIZE = int(TORCHRUN.get("RANK", 0)), int(TORCHRUN.get("WORLD_SIZE", 1))
LOCAL_RANK, LOCAL_WORLD_SIZE = int(TORCHRUN.get("LOCAL_RANK", 0)), int(TORCHRUN.get("LOCAL_WORLD_SIZE", 1))


class Model(NamedTuple):
    """A loaded model: its digest, the shape of one frame, and those of its outputs."""

    session: onnxruntime.InferenceSession
    sha256: str
    frame_shape: tuple[int, ...]
    output_shapes: list[tuple[int, ...]]


class Frame(NamedTuple):
    """A file to infer, and the files of its outputs; none if they are not saved."""

    stem: str
    source: Path
    targets: list[Path]


class Run(NamedTuple):
    """What one rank did."""

    groups: list[list[Frame]]
    compute_ms: list[float]  # of each session.run
    elapsed_s: float  # from the first read to the last write
    device: int


# ---------------------------------------------------------------------------------------------------- the model


def load_model(args: argparse.Namespace) -> Model:
    """Load a model into an execution provider; one that would leave part of it to the CPU is refused.

    Raises:
        InputError: the model cannot be read or is not one of intrada_pth2onnx.py's, or the provider would leave work to
            the CPU.
    """
    names = available_providers()
    if not args.model.is_file():
        raise InputError(f"{args.model}: no such file; --model is what intrada_pth2onnx.py wrote")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = args.threads or count_cpus()
    options.log_severity_level = 4  # errors are reported by the exception
    if args.provider != "cpu":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    settings = {"device_id": str(args.device)} if args.device and args.provider != "cpu" else {}
    sha256 = digest(args.model)
    try:
        session = onnxruntime.InferenceSession(str(args.model), options, providers=[(names[args.provider], settings)])
    except Exception as error:  # onnxruntime's own exceptions share no other base
        raise InputError(f"{args.model}: --provider {args.provider} cannot run it: {one_line(error)}") from None
    if session.get_providers()[0] != names[args.provider]:
        raise InputError(f"--provider {args.provider}: onnxruntime took {session.get_providers()[0]} instead")
    if digest(args.model) != sha256:
        raise InputError(f"{args.model}: was replaced while it was loaded; run this again")
    return Model(session, sha256, *read_shapes(session, args.batchsize))


def read_shapes(session: onnxruntime.InferenceSession, batch: int) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Read the shape of one frame, and those of its outputs.

    Raises:
        InputError: the model is not one of intrada_pth2onnx.py's, or has another fixed batch size.
    """
    values = [*session.get_inputs(), *session.get_outputs()]
    shapes = [tuple(value.shape[1:]) for value in values]
    known = all(value.type == "tensor(float)" for value in values) and all(
        isinstance(size, int) for shape in shapes for size in shape
    )
    if len(session.get_inputs()) != 1 or not known:
        found = ", ".join(f"{value.name} {value.type} {value.shape}" for value in values)
        raise InputError(
            f"the model has {found}; expected one float input and float outputs in which only the batch is dynamic; "
            "export it with intrada_pth2onnx.py"
        )
    fixed = values[0].shape[0]
    if isinstance(fixed, int) and fixed != batch:
        raise InputError(f"the model has a fixed batch size of {fixed}; pass --batchsize {fixed}")
    return shapes[0], shapes[1:]


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def available_providers() -> dict[str, str]:
    """List the execution providers of this onnxruntime, `CUDAExecutionProvider` by its short name `cuda`."""
    return {name[: -len("ExecutionProvider")].lower(): name for name in onnxruntime.get_available_providers()}


def run_model(model: Model, images: np.ndarray) -> tuple[list[np.ndarray], float]:
    """Compute the outputs of a batch, and the milliseconds that this took.

    Raises:
        InputError: onnxruntime failed, as when memory runs out.
    """
    start = time.perf_counter()
    try:
        outputs = model.session.run(None, {model.session.get_inputs()[0].name: images})
    except Exception as error:  # onnxruntime's own exceptions share no other base
        message = f"onnxruntime failed at --batchsize {len(images)}: {one_line(error)}; try a smaller one"
        raise InputError(message) from None
    return outputs, 1000 * (time.perf_counter() - start)


# ---------------------------------------------------------------------------------------------------- the frames


def find_frames(args: argparse.Namespace, model: Model, folder: Path | None) -> list[Frame]:
    """Find the files of --input, naturally sorted (2 before 10), and name their outputs, as ais_bench does.

    Raises:
        InputError: there are none, two have the same stem, or one does not hold exactly one frame.
    """
    if not args.input.is_dir():
        raise InputError(f"{args.input}: no such folder; --input is what intrada_preprocess.py wrote")
    paths = sorted((path for path in args.input.iterdir() if path.suffix.lower() in (".bin", ".npy")), key=natural_key)
    if not paths:
        raise InputError(f"{args.input}: no .bin or .npy; --input is what intrada_preprocess.py wrote")
    endings = [f"_{i}.{args.outfmt.lower()}" for i in range(len(model.output_shapes))] if folder else []
    frames = {}
    for path in paths:
        stem = path.name.split(".")[0]  # where ais_bench truncates
        if stem in frames:
            raise InputError(f"{frames[stem].source} and {path}: their results would have the same names")
        frames[stem] = Frame(stem, path, [folder / f"{stem}{ending}" for ending in endings])
    wrong = [path.name for path in paths if not holds_frame(path, model.frame_shape)]
    if wrong:
        size = 4 * int(np.prod(model.frame_shape))
        expected = f"not float32 {model.frame_shape}, {size} bytes"
        raise InputError(f"{args.input}: {len(wrong)} of {len(paths)} files are {expected}: {first_five(wrong)}")
    return list(frames.values())


def holds_frame(path: Path, shape: tuple[int, ...]) -> bool:
    """Return, by its size or its header, whether a file holds one frame."""
    if path.suffix.lower() == ".bin":
        return path.stat().st_size == 4 * int(np.prod(shape))
    try:
        content = np.lib.format.open_memmap(path, mode="r")
    except Exception:  # numpy raises many kinds for a damaged header
        return False
    return content.dtype == np.float32 and content.shape in (shape, (1, *shape))


def natural_key(path: Path) -> list:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]


def read_group(group: list[Frame], batch: int, shape: tuple[int, ...]) -> np.ndarray:
    """Read up to `batch` frames into one array, the rest of which repeats the first."""
    images = np.empty((batch, *shape), np.float32)
    for frame, image in zip(group, images):
        npy = frame.source.suffix.lower() == ".npy"
        content = np.lib.format.open_memmap(frame.source, mode="r") if npy else np.fromfile(frame.source, "<f4")
        image[:] = content.reshape(shape)
    images[len(group) :] = images[0]
    return images


def read_ahead(groups: list[list[Frame]], batch: int, shape: tuple[int, ...]) -> Iterator:
    """Yield each group with its images, (batch, *shape) float32; the next group is read meanwhile."""
    with ThreadPoolExecutor(1) as reader:
        reads = [reader.submit(read_group, group, batch, shape) for group in groups[:1]]
        for n, group in enumerate(groups):
            images = reads.pop().result()
            reads = [reader.submit(read_group, following, batch, shape) for following in groups[n + 1 : n + 2]]
            yield group, images


# ---------------------------------------------------------------------------------------------------- the results


def prepare_folder(folder: Path, frames: list[Frame], model: Model, args: argparse.Namespace) -> None:
    """Digest the inputs, every rank its share; then rank 0 prepares the folder."""
    with ThreadPoolExecutor(count_cpus()) as pool:
        share = list(pool.map(lambda frame: digest(frame.source), frames[RANK::WORLD_SIZE]))
    shares = gather(share)
    if RANK == 0:
        make_folder(folder)
        lock_folder(folder)
        refuse_unexpected(folder, frames)
        inputs = {frame.stem: shares[n % WORLD_SIZE][n // WORLD_SIZE] for n, frame in enumerate(frames)}
        settings = {"model": str(args.model.resolve()), "provider": args.provider, "batchsize": args.batchsize}
        remove_outdated(folder, frames, {**settings, "model_sha256": model.sha256, "inputs": inputs}, args.overwrite)
        summary = json_path(folder, "summary")
        if not all(is_complete(frame, model) for frame in frames):
            remove(summary)  # until this run writes its own
        elif not summary.exists():  # killed just before writing it: with one frame to infer, this run writes its own
            frames[-1].targets[0].unlink()
    gather(None)  # wait until rank 0 has prepared the folder


def remove_outdated(folder: Path, frames: list[Frame], note: dict, overwrite: bool) -> None:
    """Remove results of another model or input, then note what the others belong to.

    In this order, so that at any moment all results in the folder belong to the note.

    Raises:
        InputError: the results are those of another model file, provider or batch size, and --overwrite is not given.
    """
    old = read_note(folder)
    if not overwrite and any(target.exists() for frame in frames for target in frame.targets):
        for key in ("model", "provider", "batchsize"):
            if old.get(key) != note[key]:
                raise InputError(
                    f"{folder}: holds results with {key} {old.get(key, 'unknown')}, now it is {note[key]}; "
                    "pass another --output_dirname, or --overwrite"
                )
    same_model = old.get("model_sha256") == note["model_sha256"]
    for frame in frames:
        if overwrite or not same_model or old["inputs"].get(frame.stem) != note["inputs"][frame.stem]:
            for target in frame.targets:
                remove(target)
    write_file(json_path(folder, "model"), json.dumps(note, indent=1).encode())


def remove(path: Path) -> None:
    if path.exists():
        path.unlink()


def json_path(folder: Path, what: str) -> Path:
    """Name a JSON file beside the folder, where ais_bench puts its summary."""
    return folder.with_name(f"{folder.name}_{what}.json")


def read_note(folder: Path) -> dict:
    """Read what the folder's results belong to; empty if it is unknown, or if ais_bench has written there since."""
    try:
        note = json.loads(json_path(folder, "model").read_text(encoding="utf-8"))
        summary = json_path(folder, "summary")
        by_ais_bench = summary.exists() and "provider" not in json.loads(summary.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return note if isinstance(note, dict) and isinstance(note.get("inputs"), dict) and not by_ais_bench else {}


def lock_folder(folder: Path) -> None:
    """Lock the folder until this process ends.

    Raises:
        InputError: another run holds it.
    """
    try:
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{folder}: another run is writing here; wait for it, or pass another folder") from None


def refuse_unexpected(folder: Path, frames: list[Frame]) -> None:
    """Refuse a folder with results that this run does not write: a metric could count them, or mix two formats.

    Raises:
        InputError: there is such a file.
    """
    expected = {target for frame in frames for target in frame.targets}
    present = {path for path in folder.glob("*") if path.suffix in (".bin", ".npy", ".txt")}
    unexpected = sorted(path.name for path in present - expected)
    if unexpected:
        raise InputError(
            f"{folder}: holds results of other frames or of another --outfmt: {first_five(unexpected)}; "
            "pass another --output_dirname or remove them"
        )


def digest(path: Path) -> str:
    """Compute a file's SHA-256."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            sha256.update(block)
    return sha256.hexdigest()


def is_complete(frame: Frame, model: Model) -> bool:
    """Return whether all outputs of a frame are there in their full size."""
    for target, shape in zip(frame.targets, model.output_shapes):
        size = 4 * int(np.prod(shape)) + (NPY_HEADER if target.suffix == ".npy" else 0)
        if not target.exists() or target.stat().st_size != size:
            return False
    return True


def encode(logits: np.ndarray, target: Path) -> bytes:
    if target.suffix == ".bin":
        return logits.astype("<f4", copy=False).tobytes()
    content = io.BytesIO()
    np.save(content, logits)
    return content.getvalue()


def write_group(group: list[Frame], outputs: list[np.ndarray]) -> None:
    """Write each frame's outputs; those of the padding are dropped."""
    for n, frame in enumerate(group):
        for target, logits in zip(frame.targets, outputs):
            write_file(target, encode(logits[n], target))


def write_file(path: Path, content: bytes) -> None:
    """Write a file that is complete whenever it has its name; 0644 whatever the umask.

    Raises:
        InputError: it cannot be written, as on a full disk.
    """
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(content)
        part.chmod(0o644)
        os.replace(str(part), str(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None


def make_folder(path: Path) -> None:
    """Make a folder and its parents, 0750 whatever the umask: the newest ais_bench rejects a more open one."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        path.chmod(0o750)


# ---------------------------------------------------------------------------------------------------- the run


def infer(model: Model, frames: list[Frame], args: argparse.Namespace) -> Run:
    """Infer frames; the next group is read and the last one written while the model runs."""
    groups = [frames[n : n + args.batchsize] for n in range(0, len(frames), args.batchsize)]
    compute_ms, write = [], None
    if not groups:
        return Run([], [], 0, args.device)
    with show_progress(args.warmup_count + len(groups) * args.loop) as bar, ThreadPoolExecutor(1) as writer:
        warm_up(model, args, bar)
        start = time.perf_counter()
        for group, images in read_ahead(groups, args.batchsize, model.frame_shape):
            for _ in range(args.loop):
                outputs, milliseconds = run_model(model, images)
                compute_ms.append(milliseconds)
                bar.update()
            if write:
                write.result()
            write = writer.submit(write_group, group, outputs)
        write.result()
    return Run(groups, compute_ms, time.perf_counter() - start, args.device)


def time_zeros(model: Model, args: argparse.Namespace) -> Run:
    """Infer zeros --loop times, for the speed alone."""
    images, compute_ms = np.zeros((args.batchsize, *model.frame_shape), np.float32), []
    with show_progress(args.warmup_count + args.loop) as bar:
        warm_up(model, args, bar)
        start = time.perf_counter()
        for _ in range(args.loop):
            compute_ms.append(run_model(model, images)[1])
            bar.update()
    return Run([], compute_ms, time.perf_counter() - start, args.device)


def warm_up(model: Model, args: argparse.Namespace, bar: tqdm) -> None:
    for _ in range(args.warmup_count):
        run_model(model, np.zeros((args.batchsize, *model.frame_shape), np.float32))
        bar.update()


def show_progress(runs: int) -> tqdm:
    return tqdm(total=runs, unit="batch", disable=True if RANK else None)


def describe(times_ms: list[float]) -> dict[str, float]:
    """Summarise times as ais_bench does."""
    return {
        "min": float(np.min(times_ms)),
        "max": float(np.max(times_ms)),
        "mean": float(np.mean(times_ms)),
        "median": float(np.median(times_ms)),
        "percentile(99%)": float(np.percentile(times_ms, 99)),
        "count": len(times_ms),
    }


def summarise(runs: list[Run], model: Model, args: argparse.Namespace) -> dict:
    """Make ais_bench's summary of what all ranks have just inferred, and add what ran.

    `throughput` counts `session.run` alone, padding included; `end_to_end_throughput` counts frames from the first read
    to the last write. ONNX Runtime moves the data to a device and back within `session.run`, so both latencies are 0.
    """
    compute_ms = [ms for run in runs for ms in run.compute_ms]
    groups = [group for run in runs for group in run.groups]
    frames = args.loop * sum(map(len, groups)) if groups else args.batchsize * len(compute_ms)
    transfer = describe([0.0] * len(compute_ms))
    return {
        "filesinfo": describe_files(groups),
        "args": sys.argv,
        "NPU_compute_time": describe(compute_ms),
        "H2D_latency": transfer,
        "D2H_latency": transfer,
        "npu_compute_time_list": compute_ms,
        "throughput": sum(1000 * args.batchsize / float(np.mean(run.compute_ms)) for run in runs),
        "end_to_end_throughput": frames / max(run.elapsed_s for run in runs),
        "pid": os.getpid(),
        "model": str(args.model.resolve()),
        "model_sha256": model.sha256,
        "date": time.strftime("%Y-%m-%d"),
        "provider": args.provider,
        "batchsize": args.batchsize,
        "device": [run.device for run in runs],
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
    }


def describe_files(groups: list[list[Frame]]) -> dict[str, dict[str, list[str]]]:
    """List which files became which, group by group, as ais_bench does; zeros are pure_infer_data there."""
    if not groups:
        return {"0": {"infiles": ["pure_infer_data"], "outfiles": []}}
    return {
        str(n): {
            "infiles": [str(frame.source) for frame in group],
            "outfiles": [str(target) for frame in group for target in frame.targets],
        }
        for n, group in enumerate(groups)
    }


def report(frames: list[Frame], runs: list[Run], summary: dict, folder: Path | None, args: argparse.Namespace) -> str:
    """Describe in one line what was done, where it ran and how fast."""
    done = sum(len(group) for run in runs for group in run.groups)
    what = (
        f"frames: {len(frames)} ({done} inferred, {len(frames) - done} kept)"
        if frames
        else f"runs on zeros: {args.loop}"
    )
    line = f"provider {args.provider}, {what}"
    if summary:
        line += f", {summary['throughput']:.2f} frames/s computing, {summary['end_to_end_throughput']:.2f} end to end"
    return line + (f", in {folder}" if folder else ", not saved") if frames else line


def join_ranks() -> None:
    """Connect with torchrun's other processes, early, so that all notice when one fails."""
    if WORLD_SIZE > 1:
        from torch import distributed

        distributed.init_process_group("gloo", timeout=timedelta(days=7))
        atexit.register(distributed.destroy_process_group)  # or gloo's threads may abort the process as it ends


def gather(value: Any) -> list:
    """Collect every rank's value, in the order of the ranks.

    Raises:
        InputError: another rank failed.
    """
    if WORLD_SIZE == 1:
        return [value]
    from torch import distributed

    values = [None] * WORLD_SIZE
    try:
        distributed.all_gather_object(values, value)
    except RuntimeError:
        raise InputError("another rank failed; see its message") from None
    return values


def count_cpus() -> int:
    """Count the CPUs this process may use, shared with the other ranks on this host."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, allowed // LOCAL_WORLD_SIZE)


def at_least(least: int) -> Callable[[str], int]:
    """Make the type of an option that is an integer."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be an integer, {least} or more")
        return int(text)

    return parse


def provider(text: str) -> str:
    """Read --provider; a missing one is refused before anything else is done."""
    if text not in available_providers():
        has = ", ".join(available_providers())
        raise argparse.ArgumentTypeError(f"this onnxruntime has {has}, not {text}; docs/reference.md names the builds")
    return text


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Infer with ONNX Runtime on any host, with ais_bench's options, file names and summary."
    )
    add = parser.add_argument
    add("--model", metavar="ONNX", type=Path, required=True, help="model written by intrada_pth2onnx.py")
    add("--input", metavar="DIR", type=Path, help="folder of .bin or .npy, one per frame (default: zeros)")
    add("--output", metavar="DIR", type=Path, help="folder for results and summary (default: nothing is saved)")
    add("--output_dirname", metavar="NAME", help="folder of the results below --output (default: date and time)")
    add("--outfmt", choices=("BIN", "NPY"), default="BIN", help="format of the results (default: %(default)s)")
    add("--batchsize", metavar="N", type=at_least(1), default=1, help="frames per run (default: %(default)s)")
    add("--loop", metavar="N", type=at_least(1), default=1, help="runs of each batch (default: %(default)s)")
    add("--warmup_count", metavar="N", type=at_least(0), help="untimed runs first (default: 1, on cpu 0)")
    add("--device", metavar="ID", type=at_least(0), default=0, help="device of the provider (default: %(default)s)")
    add(
        "--provider",
        metavar="NAME",
        type=provider,
        default="cpu",
        help="ONNX Runtime execution provider: cpu, cuda, tensorrt, openvino, cann, ... (default: %(default)s)",
    )
    add("--threads", metavar="N", type=at_least(1), help="threads per run (default: one per CPU)")
    add("--overwrite", action="store_true", help="infer every frame again, not only missing or outdated ones")
    args = parser.parse_args(argv)
    if args.output_dirname and not args.output:
        parser.error("--output_dirname needs --output")
    if args.output_dirname and (args.output_dirname in (".", "..") or "/" in args.output_dirname):
        parser.error("--output_dirname must be the name of one folder")
    if args.output and not args.output_dirname and WORLD_SIZE > 1:
        parser.error("--output_dirname is required under torchrun")
    if args.device and args.provider == "cpu":
        parser.error("--device needs a --provider other than cpu")
    args.device += LOCAL_RANK
    if args.warmup_count is None:
        args.warmup_count = int(args.provider != "cpu")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    model = load_model(args)
    folder = args.output and args.output / (args.output_dirname or time.strftime("%Y_%m_%d-%H_%M_%S"))
    frames = find_frames(args, model, folder) if args.input else []
    if folder and not frames and json_path(folder, "model").exists():
        raise InputError(f"{folder}: holds results, whose summary this would replace; pass another --output_dirname")
    join_ranks()
    if frames and folder:
        prepare_folder(folder, frames, model, args)
    todo = [frame for frame in frames[RANK::WORLD_SIZE] if not folder or not is_complete(frame, model)]
    rank_run = infer(model, todo, args) if args.input else time_zeros(model, args)
    runs = [run for run in gather(rank_run) if run.compute_ms]
    if RANK == 0:
        summary = summarise(runs, model, args) if runs else {}
        if folder and summary:
            make_folder(args.output)
            write_file(json_path(folder, "summary"), json.dumps(summary, indent=1).encode())
        print(report(frames, runs, summary, folder, args))
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except (InputError, OSError) as error:
        raise SystemExit(f"{Path(__file__).name}: error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
