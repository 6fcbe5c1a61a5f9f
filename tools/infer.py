#!/usr/bin/env python3
"""Infer with ONNX Runtime on any host, with ais_bench's options and file names.

    --model X.onnx                        image (batch, 3, 512, 1024) -> two outputs (batch, 19, 65, 129), float32
    --input SAVE_DIR/<stem>.bin           float32, little-endian, (3, 512, 1024), one frame
 -> OUTPUT/DIRNAME/<stem>_<i>.bin         float32, little-endian, output i of the model: (19, 65, 129), 637 260 bytes
    OUTPUT/DIRNAME_summary.json           times in ms, throughput in frames/s, what ran
    OUTPUT/DIRNAME_model.json             what the results belong to: digests of the model and the inputs, provider

The last group is padded to the batch size with its first frame, and the padding's outputs are dropped. Interrupted and
restarted, it resumes. Without --input, zeros are inferred --loop times for the speed alone. Started by torchrun, rank r
of n takes every n-th frame and writes to OUTPUT/DIRNAME/device<r>.

    $ python3 tools/infer.py --model X.onnx --input prep --output result --output_dirname result_bs1 --batchsize 1
    provider cpu, frames: 3 (3 inferred, 0 kept), 0.24 frames/s (model), 0.24 (with reading and writing), in result/...
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import sys
import time
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime 1.29 and later report to Microsoft otherwise

import numpy as np
import onnxruntime
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from intrada_postprocess import (
    LOGITS_SHAPE,
    InputError,
    at_least_one,
    count_cpus,
    first_five,
    is_there,
    list_folder,
    read_json,
    run_script,
)
from intrada_preprocess import HEIGHT, WIDTH, write

IMAGE_SHAPE = 3, HEIGHT, WIDTH
IMAGE_BYTES = 4 * 3 * HEIGHT * WIDTH
OUTPUTS = 2
ZEROS: list[Path] = []  # a group of no frames, for which read_group makes zeros
PROVIDERS = {name[: -len("ExecutionProvider")].lower(): name for name in onnxruntime.get_available_providers()}
PROVIDERS.pop("azure", None)  # calls a service
PACKAGES = {"cuda": "onnxruntime-gpu", "tensorrt": "onnxruntime-gpu", "openvino": "onnxruntime-openvino",
            "cann": "onnxruntime-cann"}  # fmt: skip
WITH_DEVICE_ID = "cuda", "tensorrt", "cann"


def load_model(path: Path, provider: str, device: int, threads: int) -> tuple[onnxruntime.InferenceSession, str]:
    """Load a model into an execution provider; one that would leave part of it to the CPU is refused.

    Returns:
        The session, and the file's SHA-256.

    Raises:
        InputError: the model is not one of intrada_pth2onnx.py's, or the provider cannot run all of it.
    """
    content = path.read_bytes()
    if b"\n\x08location" in content:  # an entry of an external tensor
        raise InputError(f"{path}: has weights in another file; export it with intrada_pth2onnx.py")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors are reported by the exception
    settings = {}
    if provider != "cpu":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    if provider in WITH_DEVICE_ID:
        settings["device_id"] = str(device)
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[(PROVIDERS[provider], settings)])
    except Exception as error:  # onnxruntime's own exceptions share no other base
        raise InputError(f"{path}: --provider {provider} cannot run it: {one_line(error)}") from None
    if session.get_providers()[0] != PROVIDERS[provider]:
        raise InputError(f"--provider {provider}: onnxruntime took {session.get_providers()[0]} instead")
    values = [*session.get_inputs(), *session.get_outputs()]
    found = [(value.name, value.type, tuple(value.shape[1:])) for value in values]
    expected = {"image": IMAGE_SHAPE, "output_0": LOGITS_SHAPE, "output_1": LOGITS_SHAPE}
    if found != [(name, "tensor(float)", shape) for name, shape in expected.items()]:
        described = ", ".join(f"{value.name} {value.type} {value.shape}" for value in values)
        raise InputError(f"{path}: has {described}; expected a model of intrada_pth2onnx.py")
    return session, hashlib.sha256(content).hexdigest()


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def find_inputs(folder: Path) -> list[Path]:
    """Find the files of --input, sorted; InputError if there are none, or one is not exactly one frame."""
    paths = [path for path in list_folder(folder) if path.suffix == ".bin"]
    if not paths:
        raise InputError(f"{folder}: no .bin; --input is what intrada_preprocess.py wrote")
    wrong = [path.name for path in paths if path.stat().st_size != IMAGE_BYTES]
    if wrong:
        counts = f"{len(wrong)} of {len(paths)} files"
        raise InputError(f"{folder}: {counts} are not {IMAGE_BYTES} bytes: {first_five(wrong)}")
    return paths


# ---------------------------------------------------------------------------------------------------- the results


def prepare_folder(inputs: list[Path], note: dict, args: argparse.Namespace) -> list[Path]:
    """Make the folder and note what its results belong to; a run on zeros has a summary beside it and no folder.

    Return the inputs whose results are missing; if only the summary is, the last group. InputError if there are results
    of another model, provider or input, or of ais_bench, and no --overwrite.
    """
    folder = args.folder
    note_path, summary_path = json_path(folder, "model"), json_path(folder, "summary")
    entries, summary = list_folder(folder) if is_there(folder) else [], read_json(summary_path)
    results = [path for path in entries if re.fullmatch(r".+_[01]\.bin", path.name)]
    if not args.input:
        if results or (summary and not args.overwrite and any(summary.get(key) != note[key] for key in note)):
            remedy = "" if results else ", or --overwrite"
            raise InputError(f"{summary_path}: of another run; pass another --output_dirname{remedy}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        return []
    folder.mkdir(parents=True, exist_ok=True)
    if (results or summary) and not args.overwrite:
        refuse_other_results(folder, results, note, summary)
    else:  # in this order, so that at any moment what is there belongs to the note
        for path in (summary_path, *results, note_path):
            if is_there(path):
                path.unlink()
        note_path.write_text(json.dumps(note, indent=1), encoding="utf-8")
    missing = [path for path in inputs if not all(is_there(target) for target in name_targets(folder, path))]
    return missing or ([] if read_json(summary_path) else inputs[-args.batchsize :])


def refuse_other_results(folder: Path, results: list[Path], note: dict, summary: dict) -> None:
    """Raise InputError if the results in a folder do not belong to the note, or ais_bench has written there since."""
    old = read_json(json_path(folder, "model"))
    kinds = {"model_sha256": "model", "provider": "provider", "inputs_sha256": "input"}
    differing = [kind for key, kind in kinds.items() if old.get(key) != note[key]]
    if differing or (summary and "model_sha256" not in summary):
        of = f"another {', '.join(differing)}" if old and differing else "ais_bench or of unknown origin"
        found = f"holds results of {of}" if results else "only a summary is here, as of a speed test"
        raise InputError(f"{folder}: {found}; pass another --output_dirname, or --overwrite")


def json_path(folder: Path, what: str) -> Path:
    """Name a JSON file beside the folder, where ais_bench puts its summary."""
    return folder.with_name(f"{folder.name}_{what}.json")


def name_targets(folder: Path, path: Path) -> list[Path]:
    """Name the files of a frame's outputs, as ais_bench does."""
    return [folder / f"{path.stem}_{i}.bin" for i in range(OUTPUTS)]


def digest_inputs(paths: list[Path]) -> str:
    """Compute one SHA-256 over the name and the digest of each file, in order."""
    listed = "".join(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n" for path in paths)
    return hashlib.sha256(os.fsencode(listed)).hexdigest()


def write_group(folder: Path, group: list[Path], outputs: list[np.ndarray]) -> None:
    """Write each frame's outputs; those of the padding are dropped."""
    for n, path in enumerate(group):
        for target, logits in zip(name_targets(folder, path), outputs):
            write(target, logits[n].astype("<f4", copy=False).tobytes())


# ---------------------------------------------------------------------------------------------------- the run


def read_group(group: list[Path], batch: int) -> np.ndarray:
    """Read up to `batch` frames, (batch, 3, 512, 1024) float32; the rest repeats the first, ZEROS stay zeros."""
    try:
        images = np.zeros((batch, *IMAGE_SHAPE), np.float32)
    except MemoryError:
        raise InputError(f"out of memory at --batchsize {batch}; pass a smaller one") from None
    for image, path in zip(images, group):
        image[:] = np.fromfile(str(path), "<f4").reshape(IMAGE_SHAPE)
    images[len(group) :] = images[0]
    return images


def run_model(session: onnxruntime.InferenceSession, images: np.ndarray) -> tuple[list[np.ndarray], float]:
    """Compute a batch's outputs and the milliseconds this took; InputError if onnxruntime fails."""
    start = time.perf_counter()
    try:
        outputs = session.run(None, {session.get_inputs()[0].name: images})
    except Exception as error:  # onnxruntime's own exceptions share no other base
        raise InputError(f"onnxruntime failed at --batchsize {len(images)}: {one_line(error)}") from None
    return outputs, 1000 * (time.perf_counter() - start)


def infer(
    session: onnxruntime.InferenceSession, groups: list[list[Path]], args: argparse.Namespace
) -> tuple[list[float], float]:
    """Infer groups of frames; write their outputs, if there is a folder and they are no zeros.

    Returns:
        The milliseconds of each run of the model, and the seconds from the first read to the last write.
    """
    times_ms = []
    total = args.warmup_count + len(groups) * args.loop
    with tqdm(total=total, unit="batch", disable=bool(args.rank) or None) as bar:
        for _ in range(args.warmup_count):
            run_model(session, read_group(ZEROS, args.batchsize))
            bar.update()
        start = time.perf_counter()
        for group in groups:
            images = read_group(group, args.batchsize)
            for _ in range(args.loop):
                outputs, milliseconds = run_model(session, images)
                times_ms.append(milliseconds)
                bar.update()
            if args.folder:
                write_group(args.folder, group, outputs)
        return times_ms, time.perf_counter() - start


def summarise(groups: list[list[Path]], times_ms: list[float], elapsed_s: float, args: argparse.Namespace) -> dict:
    """Make a summary of what was just inferred, with ais_bench's keys for times and throughput, and what ran.

    `throughput` counts `session.run` alone, padding included; `end_to_end_throughput` counts frames from the first read
    to the last write.
    """
    frames = args.loop * (sum(map(len, groups)) or args.batchsize)
    return {
        "args": sys.argv,
        "NPU_compute_time": {
            "min": float(np.min(times_ms)),
            "max": float(np.max(times_ms)),
            "mean": float(np.mean(times_ms)),
            "median": float(np.median(times_ms)),
            "percentile(99%)": float(np.percentile(times_ms, 99)),
            "count": len(times_ms),
        },
        "throughput": 1000 * args.batchsize / float(np.mean(times_ms)),
        "end_to_end_throughput": frames / elapsed_s,
        "model": str(args.model.resolve()),
        "batchsize": args.batchsize,
        "device": args.device,
        "date": time.strftime("%Y-%m-%d"),
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
    }


def describe_run(summary: dict, inputs: list[Path], todo: list[Path], args: argparse.Namespace) -> str:
    """Describe in one line what was done, how fast, and where the results are."""
    line = "" if args.rank is None else f"rank {args.rank} of {args.ranks}: "
    line += f"provider {args.provider}, "
    if args.input:
        line += f"frames: {len(inputs)} ({len(todo)} inferred, {len(inputs) - len(todo)} kept)"
    else:
        line += f"runs on zeros: {args.loop}"
    if summary:
        line += f", {summary['throughput']:.2f} frames/s (model)"
        line += f", {summary['end_to_end_throughput']:.2f} (with reading and writing)"
    return f"{line}, in {args.folder}" if args.folder else f"{line}, not saved"


def known_provider(name: str) -> str:
    if name not in PROVIDERS:
        remedy = f"; pip3 uninstall onnxruntime, then pip3 install {PACKAGES[name]}" if name in PACKAGES else ""
        raise argparse.ArgumentTypeError(f"this onnxruntime supports only {', '.join(PROVIDERS)}{remedy}")
    return name


def read_ranks(parser: argparse.ArgumentParser) -> tuple[int | None, int | None, int, int]:
    """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, as torchrun sets them; without the first three none."""
    settings = {name: os.environ.get(name) or "" for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    if not all(settings.values()):
        return None, None, 0, 1
    settings["LOCAL_WORLD_SIZE"] = os.environ.get("LOCAL_WORLD_SIZE") or "1"
    numbers = [int(text) if text.isdecimal() else -1 for text in settings.values()]
    if not (0 <= numbers[0] < numbers[1] and numbers[2] >= 0 and numbers[3] > 0):
        parser.error(f"no rank of a launcher: {' '.join(map('='.join, settings.items()))}")
    return tuple(numbers)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Infer with ONNX Runtime on any host, with ais_bench's options and file names."
    )
    add = parser.add_argument
    add("--model", metavar="ONNX", type=Path, required=True, help="model written by intrada_pth2onnx.py")
    add("--input", metavar="DIR", type=Path, help="folder of .bin, one per frame (default: zeros)")
    add("--output", metavar="DIR", type=Path, help="folder for results and summary (default: nothing is saved)")
    add("--output_dirname", metavar="NAME", help="folder of the results below --output (default: date and time)")
    add("--batchsize", metavar="N", type=at_least_one, default=1, help="frames per run (default: %(default)s)")
    add("--loop", metavar="N", type=at_least_one, default=1, help="runs of each batch (default: %(default)s)")
    add("--warmup_count", metavar="N", type=int, help="untimed runs first (default: 0 on cpu, otherwise 1)")
    add("--device", metavar="ID", type=int, default=0, help="device of the provider (default: %(default)s)")
    add("--provider", type=known_provider, default="cpu",
        help=f"execution provider: {', '.join(PROVIDERS)} (default: %(default)s)")  # fmt: skip
    add("--threads", metavar="N", type=at_least_one, help="threads per run (default: one per CPU)")
    add("--overwrite", action="store_true", help="remove the results in the folder and infer every frame again")
    args = parser.parse_args(argv)
    args.rank, args.ranks, local_rank, local_ranks = read_ranks(parser)
    args.device += local_rank
    args.threads = args.threads or max(1, count_cpus() // local_ranks)
    if args.output_dirname and not args.output:
        parser.error("--output_dirname needs --output")
    if args.output and not args.output_dirname:
        if args.rank is not None:
            parser.error("--output_dirname is required under torchrun")
        args.output_dirname = time.strftime("%Y_%m_%d-%H_%M_%S")
    if args.warmup_count is None:
        args.warmup_count = int(args.provider != "cpu")
    device = "" if args.rank is None else f"device{args.rank}"
    args.folder = args.output and args.output / args.output_dirname / device
    if args.input and args.folder and args.folder.resolve() == args.input.resolve():
        parser.error(f"{args.folder}: is --input; pass another --output_dirname")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    session, model_sha256 = load_model(args.model, args.provider, args.device, args.threads)
    inputs = find_inputs(args.input)[args.rank :: args.ranks] if args.input else []
    todo, note = inputs, {}
    if args.folder:
        note = {"model_sha256": model_sha256, "provider": args.provider, "inputs_sha256": digest_inputs(inputs)}
        todo = prepare_folder(inputs, note, args)
    groups = [todo[n : n + args.batchsize] for n in range(0, len(todo), args.batchsize)] if args.input else [ZEROS]
    summary = {}
    if groups:
        times_ms, elapsed_s = infer(session, groups, args)
        summary = {**summarise(groups, times_ms, elapsed_s, args), **note}
        if args.folder:
            json_path(args.folder, "summary").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    print(describe_run(summary, inputs, todo, args))
    return 0


if __name__ == "__main__":
    run_script(main, umask=0o027)  # the newest ais_bench rejects an output folder more open than 0750
