"""Infer as ais_bench does, with the `.om` of the stand-in for atc.

FAKE_AIS_BENCH names the builds to follow:

    old      until 2023-08
    new      2023-09 to 2024: reject links and files of others or writable by others, chmod --output to 750
    newest   (default) also reject an --output more open than 0750

FAKE_AIS_BENCH_KNOWN is a folder of logits that ONNX Runtime has computed from the same frames, to save computing them
again; they are rounded to FP16. Zeros are never computed. Every run is reported as one second, so that nobody takes the
figures for an NPU's. FAKE_AIS_BENCH_HALF names a batch size whose summary is truncated.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import stat
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

NEW, NEWEST = 1, 2
FORM = ["old", "new", "newest"].index(os.environ.get("FAKE_AIS_BENCH", "newest"))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="ais_bench")
    for name in ("model", "input", "output", "output_dirname"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--batchsize", type=int, default=1)
    parser.add_argument("--loop", type=int, default=1)
    parser.add_argument("--device", default="0")
    if FORM >= NEW:
        parser.add_argument("--divide_input", type=int, default=0)
    return parser.parse_args()


def check_path(path: Path) -> None:
    """Reject what builds since 2023-09 reject."""
    if FORM < NEW:
        return
    if re.search(r"[^_A-Za-z0-9/.-]", str(path)):
        raise RuntimeError(f"path {path} contains special characters")
    if path.is_symlink():
        raise RuntimeError(f"path {path} is a soft link")
    if path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH) or path.stat().st_uid != os.getuid():
        raise RuntimeError(f"path {path} is writable by others or of another owner")


def natural_key(path: Path) -> list:
    return [int(word) if word.isdigit() else word for word in re.split(r"(\d+)", path.name)]


def find_inputs(folder: Path) -> list[Path]:
    check_path(folder)
    paths = [path for path in folder.iterdir() if path.suffix in (".bin", ".BIN", ".npy", ".NPY")]
    for path in paths:
        check_path(path)
    return sorted(paths, key=natural_key)


def group_inputs(paths: list[Path], model_bytes: int) -> list[list[Path]]:
    """Group the files by the size of the first one; the last group's padding is never saved."""
    size = paths[0].stat().st_size
    if model_bytes % size:
        raise RuntimeError(f"tensorsize:{model_bytes} filesize:{size} not match")
    count = model_bytes // size
    return [paths[n : n + count] for n in range(0, len(paths), count)]


@functools.lru_cache()  # Python 3.7 needs the parentheses
def load_model(path: str) -> Any:
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime  # only where something is computed

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def compute(about: dict, path: Path) -> list[np.ndarray]:
    if "FAKE_AIS_BENCH_KNOWN" in os.environ:
        known = Path(os.environ["FAKE_AIS_BENCH_KNOWN"])
        logits = [np.fromfile(known / f"{path.stem}_{i}.bin", "<f4") for i in (0, 1)]
        return [values.astype("<f2").astype("<f4") for values in logits]
    return load_model(about["onnx"]).run(None, {"image": np.fromfile(path, "<f4").reshape(1, *about["frame_shape"])})


def infer(about: dict, groups: list[list[Path]], folder: Path | None, args: argparse.Namespace) -> None:
    """Infer on one device into a folder, and write the summary beside it; zeros are one empty group."""
    filesinfo = {}
    for n, group in enumerate(groups):
        filesinfo[str(n)] = {"infiles": [str(path) for path in group] or ["pure_infer_data"], "outfiles": []}
        for path in group:
            for i, logits in enumerate(compute(about, path)):
                if folder:
                    target = folder / f"{path.name.split('.')[0]}_{i}.bin"
                    logits.tofile(target)
                    filesinfo[str(n)]["outfiles"].append(str(target))
    times = {"min": 1000.0, "max": 1000.0, "mean": 1000.0, "median": 1000.0, "percentile(99%)": 1100.0}
    times["count"] = len(groups) * args.loop
    throughput = 1000 * args.batchsize / times["mean"]
    print(f"[INFO] throughput 1000*batchsize.mean({args.batchsize})/NPU_compute_time.mean(1000.0): {throughput}")
    if folder:
        summary = {"filesinfo": filesinfo, "args": sys.argv, "throughput": throughput, "pid": os.getpid()}
        summary["npu_compute_time_list"] = [1000.0] * times["count"]
        summary.update(dict.fromkeys(("NPU_compute_time", "H2D_latency", "D2H_latency"), times))
        half = os.environ.get("FAKE_AIS_BENCH_HALF") == str(args.batchsize)
        folder.with_name(f"{folder.name}_summary.json").write_text(json.dumps(summary)[: 99 if half else None])


def make_folder(output: Path, name: str | None) -> Path:
    if output.exists():
        check_path(output)
        if FORM >= NEWEST and output.stat().st_mode & 0o027:
            raise RuntimeError(f"path {output}: permission should not be over 0o750")
    output.mkdir(exist_ok=True)
    folder = output / (name or time.strftime("%Y_%m_%d-%H_%M_%S"))
    folder.mkdir(mode=0o755, exist_ok=True)
    if FORM >= NEW:
        output.chmod(0o750)
    return folder


def main() -> None:
    args = parse_args()
    check_path(Path(args.model))
    about = json.loads(Path(args.model).read_text())
    model_bytes = 4 * about["batch"] * int(np.prod(about["frame_shape"]))
    inputs = find_inputs(Path(args.input)) if args.input else []
    folder = make_folder(Path(args.output), args.output_dirname) if args.output else None
    devices = args.device.split(",")
    for n, device in enumerate(devices):
        # several devices split the frames, in newer builds only with --divide_input 1
        share = inputs[n * len(inputs) // len(devices) : (n + 1) * len(inputs) // len(devices)]
        share = inputs if FORM >= NEW and not args.divide_input else share
        groups = group_inputs(share, model_bytes) if share else [[]]
        place = folder
        if folder and len(devices) > 1:
            place = folder / (f"device{device}_{n}" if FORM >= NEW else f"device{device}")
            place.mkdir(exist_ok=True)
        infer(about, groups, place, args)


main()
