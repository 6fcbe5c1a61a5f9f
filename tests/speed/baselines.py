#!/usr/bin/env python3
"""Do a stage's work by a straightforward loop, or only the part that cannot be avoided; bench.py times both.

straightforward_preprocess DATA_DIR SAVE_DIR    textbook loop, one frame after the other
lower_bound_preprocess DATA_DIR                 decode and resize in threads
straightforward_infer ONNX SAVE_DIR RESULT_DIR  read, run, write, one frame after the other
lower_bound_infer ONNX SAVE_DIR                 run on one frame in memory, once for each frame
straightforward_postprocess DATA_DIR RESULT_DIR full-size logits, argmax, bincount
lower_bound_postprocess DATA_DIR RESULT_DIR     read the logits and decode the labels in threads

$ python3 tests/speed/baselines.py straightforward_postprocess DATA_DIR RESULT_DIR
mIoU = 90.17
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime 1.29 and later report to Microsoft otherwise

# torch and onnxruntime are imported where they are used, so that a process starts with no more than it needs.

MEAN_BGR = np.array((104.00698793, 116.66876762, 122.67891434), dtype=np.float32)
LABEL_IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
IGNORED = 255
CORES = len(os.sched_getaffinity(0))


def find_images(data_dir: Path) -> list[Path]:
    return sorted(data_dir.glob("leftImg8bit/val/*/*_leftImg8bit.png"))


def find_pairs(data_dir: Path, result_dir: Path) -> list[tuple[Path, Path]]:
    """Find each frame's logits and label."""
    labels = sorted(data_dir.glob("gtFine/val/*/*_gtFine_labelIds.png"))
    return [(result_dir / label.name.replace("_gtFine_labelIds.png", "_leftImg8bit_1.bin"), label) for label in labels]


def run_in_threads(function: Callable, frames: list) -> None:
    with ThreadPoolExecutor(CORES) as pool:
        list(pool.map(function, frames))


def straightforward_preprocess(data_dir: Path, save_dir: Path) -> None:
    save_dir.mkdir()
    for path in find_images(data_dir):
        image = Image.open(path).convert("RGB").resize((1024, 512), Image.BICUBIC)
        image_hwc = np.asarray(image, np.float32)
        image_hwc = image_hwc[:, :, ::-1] - MEAN_BGR
        np.ascontiguousarray(image_hwc.transpose(2, 0, 1)).tofile(save_dir / f"{path.stem}.bin")


def lower_bound_preprocess(data_dir: Path) -> None:
    def decode_and_resize(path: Path) -> None:
        Image.open(path).resize((1024, 512), Image.BICUBIC)

    run_in_threads(decode_and_resize, find_images(data_dir))


def straightforward_infer(model: Path, save_dir: Path, result_dir: Path) -> None:
    import onnxruntime

    result_dir.mkdir()
    session = onnxruntime.InferenceSession(str(model))
    for path in sorted(save_dir.glob("*.bin")):
        image = np.fromfile(path, np.float32).reshape(1, 3, 512, 1024)
        for i, logits in enumerate(session.run(None, {"image": image})):
            logits.tofile(result_dir / f"{path.stem}_{i}.bin")


def lower_bound_infer(model: Path, save_dir: Path) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = CORES
    session = onnxruntime.InferenceSession(str(model), options)
    paths = sorted(save_dir.glob("*.bin"))
    image = np.fromfile(paths[0], np.float32).reshape(1, 3, 512, 1024)
    for _ in paths:
        session.run(None, {"image": image})


def straightforward_postprocess(data_dir: Path, result_dir: Path) -> None:
    import torch

    train_ids = np.full(256, IGNORED, np.uint8)
    train_ids[LABEL_IDS] = range(19)
    confusion = np.zeros((19, 19), np.int64)
    for logits_path, label_path in find_pairs(data_dir, result_dir):
        logits = torch.from_numpy(np.fromfile(logits_path, np.float32).reshape(1, 19, 65, 129))
        truth = train_ids[np.asarray(Image.open(label_path))]
        logits = torch.nn.functional.interpolate(logits, truth.shape, mode="bilinear", align_corners=True)
        prediction = logits.argmax(1)[0].numpy()
        counted = truth != IGNORED
        pairs = 19 * truth[counted].astype(np.int64) + prediction[counted]
        confusion += np.bincount(pairs, minlength=19 * 19).reshape(19, 19)
    hits = np.diag(confusion)
    union = confusion.sum(0) + confusion.sum(1) - hits
    print(f"mIoU = {100 * np.mean(hits[union > 0] / union[union > 0]):.2f}")


def lower_bound_postprocess(data_dir: Path, result_dir: Path) -> None:
    def read(pair: tuple[Path, Path]) -> None:
        np.fromfile(pair[0], np.float32)
        np.asarray(Image.open(pair[1]))

    run_in_threads(read, find_pairs(data_dir, result_dir))


if __name__ == "__main__":
    globals()[sys.argv[1]](*map(Path, sys.argv[2:]))
