"""Infer as ais_bench does, with the `.om` of the stand-in for atc.

FAKE_AIS_BENCH=new (the default) follows the builds since 2023-09, old those before, earliest those that dropped a last
group which was not full and wrote sumary.json inside the folder. FAKE_AIS_BENCH_KNOWN is a folder of logits that ONNX
Runtime has computed of the same frames, to save computing them again. Zeros are never computed. Every run is said to
take a second, so that nobody takes its figures for an NPU's. FAKE_AIS_BENCH_DEAD names a device that dies unnoticed,
FAKE_AIS_BENCH_HALF a batch size whose summary is cut short, FAKE_AIS_BENCH_STOP one at which the user stops the run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import stat
import sys
import time
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnxruntime

FORM = os.environ.get("FAKE_AIS_BENCH", "new")
NEW, EARLIEST = FORM == "new", FORM == "earliest"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="ais_bench")
    for name in ("model", "input", "output", "output_dirname"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--outfmt", default="BIN", choices=("BIN", "NPY", "TXT"))
    parser.add_argument("--batchsize", "--batch_size", type=int, default=1)
    parser.add_argument("--loop", type=int, default=1)
    parser.add_argument("--device", default="0")
    parser.add_argument("--divide_input", type=int, default=0)
    return parser.parse_args()


def check_path(path: Path) -> None:
    """Refuse what builds since 2023-09 refuse."""
    if re.search(r"[^_A-Za-z0-9/.-]", str(path)):
        raise RuntimeError(f"path {path} contains special characters")
    if path.is_symlink():
        raise RuntimeError(f"path {path} is a soft link")
    if path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH) or path.stat().st_uid != os.getuid():
        raise RuntimeError(f"path {path} is writable by others or of another owner")


def natural_key(path: Path) -> list:
    return [int(word) if word.isdigit() else word for word in re.split(r"(\d+)", path.name)]


def find_inputs(folder: str) -> list[Path]:
    if NEW:
        check_path(Path(folder))
    paths = sorted(
        (path for path in Path(folder).iterdir() if path.suffix in (".bin", ".BIN", ".npy", ".NPY")), key=natural_key
    )
    for path in paths if NEW else []:
        check_path(path)
    return paths


def group_inputs(paths: list[Path], model_bytes: int) -> list[list[Path]]:
    """Group as many files as the first one says, and pad the last group with its first."""
    size = paths[0].stat().st_size
    if model_bytes % size:
        raise RuntimeError(f"tensorsize:{model_bytes} filesize:{size} not match")
    count = model_bytes // size
    groups = [paths[n : n + count] for n in range(0, len(paths), count)]
    if EARLIEST:
        return [group for group in groups if len(group) == count]
    return [group + group[:1] * (count - len(group)) for group in groups]


def compute(session: onnxruntime.InferenceSession, path: Path) -> list[np.ndarray]:
    known = [Path(os.environ.get("FAKE_AIS_BENCH_KNOWN", ".")) / f"{path.stem}_{i}.bin" for i in (0, 1)]
    if "FAKE_AIS_BENCH_KNOWN" in os.environ:
        return [np.fromfile(logits, "<f4") for logits in known]
    name, *_ = session.get_inputs()
    return session.run(None, {name.name: np.fromfile(path, "<f4").reshape(1, *name.shape[1:])})


def save(logits: np.ndarray, stem: Path, outfmt: str) -> str:
    path = stem.with_name(f"{stem.name}.{outfmt.lower()}")
    {"BIN": logits.tofile, "NPY": lambda p: np.save(p, logits), "TXT": lambda p: np.savetxt(p, logits.ravel())}[outfmt](
        path
    )
    return str(path)


def infer(
    session: onnxruntime.InferenceSession, about: dict, groups: list[list[Path]], prefix: Path | None, args
) -> None:
    """Infer on one device into a folder, and write the summary beside it."""
    filesinfo, seen = {}, set()
    for n, group in enumerate(groups):
        fresh = [path for path in dict.fromkeys(group) if path not in seen]
        filesinfo[str(n)] = {"infiles": [str(path) for path in fresh] or ["pure_infer_data"], "outfiles": []}
        for path in fresh:
            for i, logits in enumerate(compute(session, path)):
                if prefix:
                    filesinfo[str(n)]["outfiles"].append(
                        save(logits, prefix / f"{path.name.split('.')[0]}_{i}", args.outfmt)
                    )
        seen.update(group)
        for i, output in enumerate(session.get_outputs() if not group and prefix else []):
            zeros = np.zeros((about["batch"], *output.shape[1:]), np.float32)
            filesinfo[str(n)]["outfiles"].append(save(zeros, prefix / f"pure_infer_data_{i}", args.outfmt))
    times = [1000.0] * len(groups) * args.loop
    described = {"min": times[0], "max": times[0], "mean": times[0], "median": times[0], "percentile(99%)": 1100.0}
    throughput = 1000 * args.batchsize / times[0]
    print(f"[INFO] throughput 1000*batchsize.mean({args.batchsize})/NPU_compute_time.mean({times[0]}): {throughput}")
    if prefix:
        summary = {"filesinfo": filesinfo, "args": sys.argv, "throughput": throughput, "pid": os.getpid()}
        for name in ("NPU_compute_time", "H2D_latency", "D2H_latency"):
            summary[name] = {**described, "count": len(times)}
        path = prefix / "sumary.json" if EARLIEST else prefix.with_name(f"{prefix.name}_summary.json")
        path.write_text(
            json.dumps(summary)[: 99 if os.environ.get("FAKE_AIS_BENCH_HALF") == str(args.batchsize) else None]
        )


def main() -> None:
    args = parse_args()
    if NEW:
        check_path(Path(args.model))
    about = json.loads(Path(args.model).read_text())
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(about["onnx"], options, providers=["CPUExecutionProvider"])
    model_bytes = 4 * about["batch"] * int(np.prod(session.get_inputs()[0].shape[1:]))
    inputs = find_inputs(args.input) if args.input else []
    prefix = None
    if args.output:
        if NEW and Path(args.output).exists():
            check_path(Path(args.output))
            if Path(args.output).stat().st_mode & 0o027:
                raise RuntimeError(f"path {args.output} is to be written: permission should not be over 0o750")
        Path(args.output).mkdir(exist_ok=True)
        prefix = Path(args.output) / (args.output_dirname or time.strftime("%Y_%m_%d-%H_%M_%S"))
        prefix.mkdir(mode=0o755, exist_ok=True)
        if NEW:
            Path(args.output).chmod(0o750)
    devices = args.device.split(",")
    for n, device in enumerate(devices):
        split = len(devices) > 1 and (not NEW or args.divide_input)
        share = inputs[n * len(inputs) // len(devices) : (n + 1) * len(inputs) // len(devices)] if split else inputs
        place = prefix
        if prefix and len(devices) > 1:
            place = prefix / (f"device{device}_{n}" if NEW else f"device{device}")
            place.mkdir(exist_ok=True)
        if device == os.environ.get("FAKE_AIS_BENCH_DEAD"):
            continue
        if os.environ.get("FAKE_AIS_BENCH_STOP") == str(args.batchsize):
            os.kill(os.getppid(), signal.SIGINT)
        infer(session, about, group_inputs(share, model_bytes) if share else [[]], place, args)


main()
