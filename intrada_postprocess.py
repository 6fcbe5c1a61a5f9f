#!/usr/bin/env python3
"""Score logits against the Cityscapes labels: IoU of each class and their mean.

    RESULT_DIR/<frame>_leftImg8bit_1.bin (or .npy)               main logits, float32 or float16, (19, 65, 129)
    DATA_DIR/gtFine/<split>/<city>/<frame>_gtFine_labelIds.png   truth, uint8, 2048 x 1024, ids 0 to 34
 -> a table on stdout, and with --json everything that was counted
 -> DIR/<frame>_predicted_labelIds.png, with --save_labels       prediction, uint8, label ids, of the truth's size

The logits are brought to the label's size (bilinear, align_corners) and the largest one is the prediction. ais_bench's
folders for several devices (RESULT_DIR/device0, device1_1, ...) are read as well.

    $ python3 intrada_postprocess.py /data/cityscapes result/result_bs1 | tail -n 1
    mIoU = 47.01
"""

from __future__ import annotations

import argparse
import atexit
import ctypes
import filecmp
import json
import os
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
from PIL import Image

AUXILIARY, MAIN = 0, 1  # the network's outputs
LABEL_ENDING, PICTURE_ENDING = "_gtFine_labelIds.png", "_leftImg8bit.png"
LOGITS_SHAPE = 19, 65, 129
LOGITS_SIZE = 19 * 65 * 129
SIZE_WITHOUT_CEIL_MODE = 19 * 64 * 128

# Source: cityscapesScripts, helpers/labels.py: every class with a train id, in the order of the train ids.
CLASSES = (
    # labelId, name, category
    (7, "road", "flat"),
    (8, "sidewalk", "flat"),
    (11, "building", "construction"),
    (12, "wall", "construction"),
    (13, "fence", "construction"),
    (17, "pole", "object"),
    (19, "traffic light", "object"),
    (20, "traffic sign", "object"),
    (21, "vegetation", "nature"),
    (22, "terrain", "nature"),
    (23, "sky", "sky"),
    (24, "person", "human"),
    (25, "rider", "human"),
    (26, "car", "vehicle"),
    (27, "truck", "vehicle"),
    (28, "bus", "vehicle"),
    (31, "train", "vehicle"),
    (32, "motorcycle", "vehicle"),
    (33, "bicycle", "vehicle"),
)
LABEL_IDS = [label_id for label_id, _, _ in CLASSES]
LABEL_ID_OF = np.array(LABEL_IDS, np.uint8)
NAMES = [name for _, name, _ in CLASSES]
CATEGORIES = list(dict.fromkeys(category for _, _, category in CLASSES))
CATEGORY_OF = np.array([CATEGORIES.index(category) for _, _, category in CLASSES])
LARGEST_LABEL_ID = 34

# What logits must have in common with a baseline's. Source: Huawei's MindStudio 7.0.0, Model Accuracy Analyzer,
# Computation Accuracy Evaluation Indicators.
LEAST_COSINE, LARGEST_DISTANCE = 0.99, 0.05

# The golden logits reach 10; the largest float16 is 65504.
HUGE_LOGIT = 1000

# What moves the mIoU from where it is expected, how to tell, and whether it can raise it too.
CAUSES = (
    (
        "the auxiliary output, _0, stands in the place of the main one, _1",
        "score a folder in which their names change places",
        False,
    ),
    (
        "RGB instead of BGR, or another resize",
        "preprocess a picture with intrada_preprocess.py and cmp it with the .bin inferred",
        False,
    ),
    ("labelTrainIds instead of labelIds", "the label pictures hold ids up to 33, and 255 nowhere", False),
    ("FP16 overflow or a lossy conversion", "--baseline with the results of intrada_infer.py", False),
    ("another split than the results are of", "--split here and at intrada_preprocess.py", True),
    (
        "another checkpoint",
        "export cityscapes_easy2hard_intrada_with_norm.pth again, and score what intrada_infer.py makes of it",
        True,
    ),
)


# torchrun's place of this process among all, and how many run on this host; without torchrun one, and no torch.
RANK, RANKS, RANKS_HERE = (
    int(os.environ.get(name, alone)) for name, alone in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1))
)


class InputError(Exception):
    """What the user can mend; told in one line, without a traceback."""


class Frame(NamedTuple):
    """The files of a frame."""

    name: str
    truth: Path  # labelIds, or its picture if it has none
    logits: Path
    auxiliary: Path | None = None  # with --baseline the other output,
    baseline: tuple[Path, ...] = ()  # and both of the baseline
    label_map: Path | None = None  # with --save_labels where its prediction goes


class Score(NamedTuple):
    """What frames add up to, and each frame's own figures.

    The matrices are (19, 19) int64, row = truth, column = prediction; the baseline's is 0 without one.
    """

    confusion: np.ndarray
    per_frame: list[dict[str, Any]]
    baseline_confusion: np.ndarray
    compared: list[dict[str, Any]]


# ---------------------------------------------------------------------------------------------------- finding files


def find_frames(args: argparse.Namespace) -> list[Frame]:
    """Find all files of all frames of the split, in the order of the truth's paths.

    Raises:
        InputError: a file is missing.
    """
    truth = find_truth(args.data_dir, args.split, args.expect is None and (args.save_labels or args.baseline))
    logits = find_logits(args.result_dir, truth, MAIN)
    auxiliary = find_logits(args.result_dir, truth, AUXILIARY) if args.baseline else {}
    baselines = [find_logits(args.baseline, truth, output) for output in (AUXILIARY, MAIN) if args.baseline]
    label_maps = {name: args.save_labels / f"{name}_predicted_labelIds.png" for name in truth if args.save_labels}
    return [
        Frame(
            name,
            path,
            logits[name],
            auxiliary.get(name),
            tuple(paths[name] for paths in baselines),
            label_maps.get(name),
        )
        for name, path in truth.items()
    ]


def find_truth(data_dir: Path, split: str, unlabelled: bool) -> dict[str, Path]:
    """Find the split's labels; its pictures if it has none and `unlabelled` ones are of use.

    Returns:
        The labelIds of each `<city>_<sequence>_<frame>`, or its picture, sorted by path.

    Raises:
        InputError: there are none, or two cities have a frame of the same name.
    """
    labels, pictures = data_dir / "gtFine" / split, data_dir / "leftImg8bit" / split
    for folder, ending in ((labels, LABEL_ENDING), *([(pictures, PICTURE_ENDING)] if unlabelled else [])):
        paths = sorted(folder.glob(f"*/*{ending}"))
        frames = {path.name[: -len(ending)]: path for path in paths}
        if len(frames) < len(paths):
            raise InputError(f"{folder}: {len(paths) - len(frames)} frame names occur in two cities")
        if frames:
            return frames
    alternative = f", nor {pictures}/<city>/<frame>{PICTURE_ENDING}" if unlabelled else ""
    raise InputError(
        f"{labels}: no <city>/<frame>{LABEL_ENDING} here{alternative}; DATA_DIR is the folder that holds gtFine"
    )


def find_logits(result_dir: Path, frames: Iterable[str], output: int) -> dict[str, Path]:
    """Find each frame's logits of an output in RESULT_DIR or in ais_bench's device folders below it.

    Raises:
        InputError: a frame has none, or two that differ.
    """
    found, frames = find_results(result_dir), list(frames)
    missing = [frame for frame in frames if f"{frame}_leftImg8bit_{output}" not in found]
    if missing:
        raise InputError(
            f"{result_dir}: {len(missing)} of {len(frames)} frames have no <frame>_leftImg8bit_{output}.bin or "
            f".npy{why_missing(missing, found)}: {first_five(missing)}"
        )
    logits = {frame: choose_one(found.pop(f"{frame}_leftImg8bit_{output}")) for frame in frames}
    strangers = sorted(stem for stem in found if stem.endswith(f"_leftImg8bit_{output}"))
    if strangers and RANK == 0 and output == MAIN:
        print(
            f"warning: {result_dir}: {len(strangers)} results belong to no frame of this split and count nowhere: "
            f"{first_five(strangers)}",
            file=sys.stderr,
        )
    return logits


def find_results(result_dir: Path) -> dict[str, list[Path]]:
    """List the `.bin` and `.npy` of each stem, in RESULT_DIR and in the device folders."""
    if not result_dir.is_dir():
        raise InputError(f"{result_dir}: no such folder; RESULT_DIR is what ais_bench filled, as result/result_bs1")
    found: dict[str, list[Path]] = {}
    for folder in [result_dir, *sorted(path for path in result_dir.glob("device*") if path.is_dir())]:
        for path in sorted(folder.iterdir()):
            if path.suffix in (".bin", ".npy"):
                found.setdefault(path.stem, []).append(path)
    return found


def choose_one(paths: list[Path]) -> Path:
    """Take a frame's result; of several devices' results all must be equal.

    Raises:
        InputError: they are not.
    """
    first, *others = paths
    for other in others:
        if other.suffix != first.suffix:
            raise InputError(f"{first} and {other}: results of two runs; remove one of them")
        if not filecmp.cmp(first, other, shallow=False):
            raise InputError(
                f"{first} and {other} differ: results of two runs; empty the folder and infer "
                "again, for several devices with ais_bench's --divide_input 1"
            )
    return first


def why_missing(missing: list[str], found: dict[str, list[Path]]) -> str:
    """Say what is known of frames without an output's logits."""
    if all(f"{frame}_leftImg8bit_{AUXILIARY}" in found for frame in missing):
        return " (only the auxiliary output, _0: the model must have both)"
    return " (infer them first; RESULT_DIR is what ais_bench filled, as result/result_bs1)"


def first_five(names: list, separator: str = ", ") -> str:
    """Name the first five, so that a message stays one readable line."""
    return separator.join(map(str, names[:5])) + (f"{separator}..." if len(names) > 5 else "")


# ---------------------------------------------------------------------------------------------------- reading


def read_logits(path: Path) -> np.ndarray:
    """Read (19, 65, 129) logits as float32; the size tells float32 from float16, as a `.bin` has no header.

    Raises:
        InputError: another size, another type, or values that are not finite.
    """
    try:
        if path.suffix == ".npy":
            values = np.array(np.lib.format.open_memmap(path, mode="r"))
        else:
            half = path.stat().st_size in (2 * LOGITS_SIZE, 2 * SIZE_WITHOUT_CEIL_MODE)
            values = np.fromfile(path, "<f2" if half else "<f4")
    except (ValueError, EOFError) as error:
        raise InputError(f"{path}: not a whole .npy: {error}") from None
    if values.size == SIZE_WITHOUT_CEIL_MODE:
        raise InputError(
            f"{path}: 64 x 128 logits: the conversion lost the max pool's ceil_mode; export again, with opset 11"
        )
    shapes = [LOGITS_SHAPE, (1, *LOGITS_SHAPE)] if path.suffix == ".npy" else [(LOGITS_SIZE,)]
    if values.shape not in shapes or values.dtype not in (np.float32, np.float16):
        raise InputError(
            f"{path}: {values.dtype} {values.shape}; expected {LOGITS_SHAPE}, {4 * LOGITS_SIZE} bytes of float32 or "
            f"{2 * LOGITS_SIZE} of float16; infer this frame again"
        )
    logits = values.astype(np.float32, copy=False).reshape(LOGITS_SHAPE)
    if not np.isfinite(logits).all():
        raise InputError(f"{path}: logits that are not finite, as an overflow of FP16 leaves them")
    return logits


def read_truth(path: Path) -> np.ndarray:
    """Read (H, W) uint8 label ids; of a picture, which has none, only the size.

    Raises:
        InputError: it is no whole picture of one 8-bit channel.
    """
    try:
        image = Image.open(path)
        if path.name.endswith(PICTURE_ENDING):
            return np.zeros(image.size[::-1], np.uint8)
        image.load()
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all three for a damaged PNG
        reason = getattr(error, "strerror", None) or f"not a whole PNG: {error}"
        raise InputError(f"{path}: {reason}") from None
    if image.mode != "L":
        raise InputError(f"{path}: found mode {image.mode}, expected L, one 8-bit label id a pixel")
    return np.asarray(image)


# ---------------------------------------------------------------------------------------------------- computing


def compiled(function: Callable) -> Callable:
    """Compile with numba, free of the interpreter's lock; keep the machine code where a folder can be written."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # numba finds no folder for its cache, as in a read-only install
        return numba.njit(nogil=True)(function)


def predict(logits_chw: np.ndarray, prediction: np.ndarray) -> None:
    """Write the class with the largest bilinear logit at every pixel; ties go to the lower class.

    The result is that of interpolating to full size in float32 and taking the argmax, without ever holding
    full-size logits.

    Args:
        logits_chw: (C, h, w) float32, finite.
        prediction: (H, W) uint8, written.

    Source: the coordinates and the order of operations are those of torch's `interpolate(mode="bilinear",
    align_corners=True)`.
    """
    _, rows, columns = logits_chw.shape
    height, width = prediction.shape
    y_start, y_weight = grid_cells(rows, height)
    x_start, x_weight = grid_cells(columns, width)
    # Rounding may level out a smaller lead than this, so a class that trails by less is still evaluated.
    slack = np.float32(np.abs(logits_chw).max() * 2.0**-20)
    logits_hwc = np.ascontiguousarray(logits_chw.transpose(1, 2, 0))
    predict_cells(logits_hwc, y_start, y_weight, x_start, x_weight, slack, prediction)


def grid_cells(points: int, pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """Lay `pixels` evenly over `points` grid points, the first on the first and the last on the last.

    Returns:
        (points + 1) int64, the first pixel of each cell (the cell of the last point is its own), and (pixels) float32,
        each pixel's distance from its cell's first point, 0 to 1.
    """
    scale = np.float32(points - 1) / np.float32(pixels - 1) if pixels > 1 else np.float32(0)
    position = scale * np.arange(pixels, dtype=np.float32)
    point = np.minimum(position.astype(np.int64), points - 1)
    return np.searchsorted(point, np.arange(points + 1)), (position - point.astype(np.float32)).clip(0, 1)


@compiled
def predict_cells(logits_hwc, y_start, y_weight, x_start, x_weight, slack, prediction):
    """Predict cell by cell, where a cell is the pixels between four neighbouring grid points.

    A bilinear value is a convex combination of the four corners. So a class that trails another one at all four
    corners trails it in the whole cell: most cells need no interpolation at all, the others only few classes.
    """
    rows, columns, classes = logits_hwc.shape
    candidates, widest = np.empty(classes, np.int32), np.diff(x_start).max()
    values, winner = np.empty((2 * classes + 1, widest), np.float32), np.empty(widest, np.int32)
    for i in range(rows):
        y0, y1, below = y_start[i], y_start[i + 1], min(i + 1, rows - 1)
        for j in range(columns):
            x0, x1, right = x_start[j], x_start[j + 1], min(j + 1, columns - 1)
            corners = logits_hwc[i, j], logits_hwc[i, right], logits_hwc[below, j], logits_hwc[below, right]
            count = find_candidates(corners, slack, candidates)
            if count == 1:
                prediction[y0:y1, x0:x1] = candidates[0]
            else:
                cell = prediction[y0:y1, x0:x1]
                fill_cell(corners, candidates[:count], y_weight[y0:y1], x_weight[x0:x1], values, winner, cell)


@compiled
def fill_cell(corners, candidates, y_weight, x_weight, values, winner, cell):
    """Interpolate the candidates within a cell, first along x, then along y, and keep the largest at each pixel."""
    height, width = cell.shape
    best, upper, lower = values[0], values[1 : 1 + candidates.size], values[1 + candidates.size :]
    for n in range(candidates.size):
        for x in range(width):
            right, k = x_weight[x], candidates[n]
            upper[n, x] = corners[0][k] * (np.float32(1) - right) + corners[1][k] * right
            lower[n, x] = corners[2][k] * (np.float32(1) - right) + corners[3][k] * right
    for y in range(height):
        below = y_weight[y]
        best[:] = -np.inf
        for n in range(candidates.size):
            for x in range(width):
                value = upper[n, x] * (np.float32(1) - below) + lower[n, x] * below
                leads = value > best[x]
                best[x] = value if leads else best[x]
                winner[x] = candidates[n] if leads else winner[x]
        for x in range(width):
            cell[y, x] = winner[x]


@compiled
def find_candidates(corners, slack, candidates):
    """Keep the classes that can win in a cell: those that the strongest one does not beat at all four corners."""
    a, b, c, d = corners
    strongest, best = 0, -np.inf
    for k in range(a.size):
        least = min(min(a[k], b[k]), min(c[k], d[k]))
        if least > best:
            strongest, best = k, least
    a_least, b_least = a[strongest] - slack, b[strongest] - slack
    c_least, d_least = c[strongest] - slack, d[strongest] - slack
    count = 0
    for k in range(a.size):
        candidates[count] = k
        count += (a[k] >= a_least) | (b[k] >= b_least) | (c[k] >= c_least) | (d[k] >= d_least)
    return count


@compiled
def count_pixels(truth, prediction, counts):
    """Add each pixel to counts (256, 19), row = label id, column = predicted train id."""
    for y in range(truth.shape[0]):
        for x in range(truth.shape[1]):
            counts[truth[y, x], prediction[y, x]] += 1


@compiled
def count_flips(prediction, baseline, baseline_logits_hwc, y_start, y_weight, x_start, x_weight, difference):
    """Count the pixels whose labels differ, and those of them whose two largest logits lie within `difference`."""
    rows, columns, _ = baseline_logits_hwc.shape
    flips = harmless = 0
    for i in range(rows):
        below = min(i + 1, rows - 1)
        for j in range(columns):
            right = min(j + 1, columns - 1)
            for y in range(y_start[i], y_start[i + 1]):
                for x in range(x_start[j], x_start[j + 1]):
                    if prediction[y, x] != baseline[y, x]:
                        upper = mix(baseline_logits_hwc[i, j], baseline_logits_hwc[i, right], x_weight[x])
                        lower = mix(baseline_logits_hwc[below, j], baseline_logits_hwc[below, right], x_weight[x])
                        second, first = np.sort(mix(upper, lower, y_weight[y]))[-2:]
                        flips += 1
                        harmless += first - second <= difference
    return flips, harmless


@compiled
def mix(start, end, weight):
    return start * (np.float32(1) - weight) + end * weight


def measure_distance(ours: np.ndarray, baseline: np.ndarray) -> dict[str, float]:
    """Compute cosine similarity, relative Euclidean distance, largest and mean absolute difference of two arrays.

    The relative distance is that of the two divided by the baseline's length. Where one is all zeros, and so has no
    direction, two equal ones have cosine 1 and distance 0, others 0 and 1. All sums run in float64.
    """
    ours, baseline = ours.astype(np.float64), baseline.astype(np.float64)
    difference = np.abs(ours - baseline)
    product, squares = (ours * baseline).sum(), (ours * ours).sum() * (baseline * baseline).sum()
    equal = float(not difference.any())
    distance = np.sqrt((difference**2).sum() / (baseline**2).sum()) if squares else 1 - equal
    return {
        "cosine": min(float(product / np.sqrt(squares)), 1.0) if squares else equal,
        "relative_distance": float(distance),
        "largest_difference": float(difference.max()),
        "mean_difference": float(difference.mean()),
    }


buffers = threading.local()


def predict_frame(logits: np.ndarray, size: tuple[int, int], buffer: str) -> np.ndarray:
    """Predict (H, W) uint8 train ids into this thread's buffer of that name, valid until its next use."""
    if getattr(buffers, buffer, np.empty(0)).shape != size:
        setattr(buffers, buffer, np.empty(size, np.uint8))
    predict(logits, getattr(buffers, buffer))
    return getattr(buffers, buffer)


def score(frame: Frame) -> Score:
    """Score one frame; write its label map and compare it with the baseline's where that is asked for.

    Raises:
        InputError: a file is damaged or cannot be written, or the truth holds what no label id is.
    """
    truth, logits = read_truth(frame.truth), read_logits(frame.logits)
    prediction = predict_frame(logits, truth.shape, "prediction")
    counts = count_by_label(frame, truth, prediction)
    if frame.label_map:
        write_label_map(frame.label_map, prediction)
    confusion = counts[LABEL_IDS]
    row = {
        "frame": frame.name,
        "miou": mean_of_known(iou_of(confusion)),
        "ignored_pixels": int(truth.size - confusion.sum()),
        "predicted_classes": int(np.count_nonzero(counts.sum(axis=0))),
        "smallest_logit": float(logits.min()),
        "largest_logit": float(logits.max()),
    }
    if not frame.baseline:
        return Score(confusion, [row], np.zeros_like(confusion), [])
    return Score(confusion, [row], *compare(frame, truth, logits, prediction))


def count_by_label(frame: Frame, truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Count the pixels of each label id and predicted class, (256, 19) int64.

    Raises:
        InputError: the truth holds what no label id is.
    """
    counts = np.zeros((256, len(CLASSES)), np.int64)
    count_pixels(truth, prediction, counts)
    strange = np.flatnonzero(counts.sum(axis=1)[LARGEST_LABEL_ID + 1 :]) + LARGEST_LABEL_ID + 1
    if strange.size:
        raise InputError(
            f"{frame.truth}: label ids {first_five([str(s) for s in strange])}; expected 0 to "
            f"{LARGEST_LABEL_ID}, so labelIds and not labelTrainIds or colours"
        )
    return counts


def compare(
    frame: Frame, truth: np.ndarray, logits: np.ndarray, prediction: np.ndarray
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Compare a frame's logits and prediction with the baseline's.

    Returns:
        The baseline's confusion matrix, and one row: what measure_distance tells of each output, and of the pixels how
        many there are, how many have other labels, and how many of those lie where the baseline's two largest logits
        are no further apart than the main outputs' largest difference, so that a change of that size may turn them.
    """
    auxiliary, baseline_logits = map(read_logits, frame.baseline)
    outputs = [measure_distance(read_logits(frame.auxiliary), auxiliary), measure_distance(logits, baseline_logits)]
    baseline = predict_frame(baseline_logits, truth.shape, "baseline")
    logits_hwc = np.ascontiguousarray(baseline_logits.transpose(1, 2, 0))
    grid = *grid_cells(LOGITS_SHAPE[1], truth.shape[0]), *grid_cells(LOGITS_SHAPE[2], truth.shape[1])
    flips, harmless = count_flips(prediction, baseline, logits_hwc, *grid, outputs[MAIN]["largest_difference"])
    row = {"frame": frame.name, "outputs": outputs, "pixels": truth.size, "flips": flips, "harmless": harmless}
    return count_by_label(frame, truth, baseline)[LABEL_IDS], [row]


def write_label_map(path: Path, prediction: np.ndarray) -> None:
    """Write train ids (H, W) as the PNG of label ids that Cityscapes' evaluator reads, beside, then rename.

    Raises:
        InputError: it cannot be written, as on a full disk.
    """
    part = path.with_name(path.name + ".part")
    try:
        Image.fromarray(LABEL_ID_OF[prediction]).save(part, "PNG", compress_level=1)
        os.replace(part, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None


def keep_memory() -> None:
    """Let glibc keep freed blocks, which it would otherwise return and fault in again, page by page, frame by frame."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD: blocks up to 32 MB come from the heap
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD: whose free end stays


def score_all(frames: list[Frame], workers: int) -> Score:
    """Score frames in threads; the compiled loops and Pillow's decoder leave the interpreter free.

    Raises:
        InputError: counts and names the damaged files.
    """
    faults = []

    def score_or_fault(frame: Frame) -> Score:
        try:
            return score(frame)
        except InputError as error:
            faults.append(str(error))
            return add_up([])

    with ThreadPoolExecutor(workers) as pool:
        try:
            scores = pool.map(score_or_fault, frames)
            total = add_up(show_progress(scores, len(frames)))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if faults:
        raise InputError(f"{len(faults)} of {len(frames)} frames cannot be scored: {first_five(sorted(faults), '; ')}")
    return total


def add_up(scores: Iterable[Score]) -> Score:
    """Add scores up, frames in the order of their names."""
    total = Score(
        np.zeros((len(CLASSES), len(CLASSES)), np.int64), [], np.zeros((len(CLASSES), len(CLASSES)), np.int64), []
    )
    for part in scores:
        for sum_of_all, value in zip(total, part):
            sum_of_all += value  # matrices are added, lists joined
    for rows in (total.per_frame, total.compared):
        rows.sort(key=lambda row: row["frame"])
    return total


def iou_of(confusion: np.ndarray) -> np.ndarray:
    """Compute each class's intersection over union, NaN for one that occurs in neither truth nor prediction.

    Args:
        confusion: (C, C) integers, row = truth, column = prediction.
    """
    hits = np.diag(confusion)
    return ratio(hits, confusion.sum(axis=1) + confusion.sum(axis=0) - hits)


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Divide, with NaN for 0 / 0."""
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole > 0)


def mean_of_known(values: np.ndarray) -> float | None:
    """Average what is not NaN; None if nothing is left."""
    return None if np.isnan(values).all() else float(np.nanmean(values))


def summarise(score: Score, args: argparse.Namespace) -> dict:
    """Compute the metrics of the whole split from the summed confusion matrix, as fractions from 0 to 1.

    `miou` is the mean IoU over the classes that occur in truth or prediction, each class's IoU counted over all frames
    at once. `mean_class_accuracy` is the mean recall over the classes in truth. Pixels without a class count nowhere,
    and where there are no others every metric is None.

    Raises:
        InputError: no pixel of the split has a class, and metrics are all that was asked for.
    """
    confusion = score.confusion
    if not confusion.sum() and (args.expect is not None or not (args.save_labels or args.baseline)):
        raise InputError(f"no pixel of split {args.split} has a class; the labels of Cityscapes' test split are blank")
    iou, truth = iou_of(confusion), confusion.sum(axis=1)
    by_category = np.zeros((len(CATEGORIES), len(CATEGORIES)), np.int64)
    np.add.at(by_category, (CATEGORY_OF[:, None], CATEGORY_OF), confusion)
    metrics = {
        "split": args.split,
        "result_dir": str(args.result_dir),
        "frames": len(score.per_frame),
        "miou": mean_of_known(iou),
        "iou": by_name(NAMES, iou),
        "category_iou": by_name(CATEGORIES, iou_of(by_category)),
        "pixel_accuracy": mean_of_known(ratio(np.trace(confusion), truth.sum())),
        "mean_class_accuracy": mean_of_known(ratio(np.diag(confusion), truth)),
        "frequency_weighted_iou": mean_of_known(ratio((truth * np.nan_to_num(iou)).sum(), truth.sum())),
        "confusion_matrix": confusion.tolist(),
        "per_frame": score.per_frame,
    }
    if args.expect is not None:
        metrics["expected"] = judge_miou(metrics["miou"], args.expect, args.tolerance)
    if args.baseline:
        metrics["baseline"] = {"result_dir": str(args.baseline), **summarise_baseline(score, iou)}
    return metrics


def by_name(names: list[str], values: np.ndarray) -> dict[str, float | None]:
    """Name the values; JSON has null and no NaN."""
    return {name: None if np.isnan(value) else float(value) for name, value in zip(names, values)}


def judge_miou(miou: float, percent: float, tolerance: float) -> dict:
    """Tell whether the mIoU is the expected one, the tolerance's edges included whatever floats make of them."""
    passed = round(abs(100 * miou - percent), 9) <= tolerance
    return {"percent": percent, "tolerance": tolerance, "passed": passed}


def summarise_baseline(score: Score, iou: np.ndarray) -> dict:
    """Sum the comparison up: logits by output, as the worst frame and the mean of frames; labels over all pixels."""
    rows, baseline_iou = score.compared, iou_of(score.baseline_confusion)
    measures = rows[0]["outputs"][MAIN]
    outputs = [{measure: worst_and_mean(rows, output, measure) for measure in measures} for output in (AUXILIARY, MAIN)]
    pixels, flips, harmless = (sum(row[key] for row in rows) for key in ("pixels", "flips", "harmless"))
    agreement = [{"frame": row["frame"], "agreement": 1 - row["flips"] / row["pixels"]} for row in rows]
    return {
        "miou": mean_of_known(baseline_iou),
        "iou": by_name(NAMES, baseline_iou),
        "iou_change": by_name(NAMES, iou - baseline_iou),
        "outputs": outputs,
        "agreement": 1 - flips / pixels,
        "flips": flips,
        "harmless_flips": harmless / flips if flips else None,
        "least_agreeing": sorted(agreement, key=lambda row: row["agreement"])[:5],
        "least_cosine": LEAST_COSINE,
        "largest_relative_distance": LARGEST_DISTANCE,
        "passed": not [failure for output in (AUXILIARY, MAIN) for failure in find_failures(outputs[output])],
    }


def worst_and_mean(rows: list[dict], output: int, measure: str) -> dict[str, Any]:
    """Find the worst frame by a measure of an output; of cosine the least is worst, of distances the largest."""
    values = [row["outputs"][output][measure] for row in rows]
    worst = (min if measure == "cosine" else max)(values)
    return {"worst": worst, "mean": float(np.mean(values)), "worst_frame": rows[values.index(worst)]["frame"]}


def find_failures(output: dict[str, dict]) -> list[str]:
    """Say what of an output lies outside the thresholds."""
    cosine, distance = output["cosine"], output["relative_distance"]
    failures = []
    if not cosine["worst"] >= LEAST_COSINE:
        failures.append(f"cosine {cosine['worst']:.8g} at {cosine['worst_frame']}")
    if not distance["worst"] <= LARGEST_DISTANCE:
        failures.append(f"relative distance {distance['worst']:.8g} at {distance['worst_frame']}")
    return failures


def find_causes(metrics: dict, frames: list[Frame], args: argparse.Namespace) -> list[str]:
    """Look in the data at hand for what lowers the mIoU; every rank takes part."""
    rows, causes = metrics["per_frame"], []
    auxiliary = score_auxiliary(frames, args) if is_too_low(metrics) else None
    if auxiliary is not None and auxiliary > metrics["miou"]:
        causes.append(f"the auxiliary output, _0, scores better, mIoU {percent(auxiliary)}: were the outputs swapped?")
    if all(row["smallest_logit"] == row["largest_logit"] for row in rows):
        causes.append("the logits of every frame are constant: the model did not compute, or its input was not read")
    elif all(row["predicted_classes"] == 1 for row in rows):
        causes.append("every frame predicts one class: the weights are not loaded, or the input is not the picture")
    largest = max(max(abs(row["smallest_logit"]), abs(row["largest_logit"])) for row in rows)
    if largest > HUGE_LOGIT:
        causes.append(f"logits up to {largest:.0f}, beyond {HUGE_LOGIT}: overflow of FP16, or another network")
    return causes


def is_too_low(metrics: dict) -> bool:
    return 100 * metrics["miou"] < metrics["expected"]["percent"]


def score_auxiliary(frames: list[Frame], args: argparse.Namespace) -> float | None:
    """Compute the mIoU of the auxiliary output; None if the folder does not hold it whole."""
    try:
        logits = find_logits(args.result_dir, [frame.name for frame in frames], AUXILIARY)
        auxiliary = [Frame(frame.name, frame.truth, logits[frame.name]) for frame in frames[RANK::RANKS]]
        part = score_all(auxiliary, args.workers or processors())
    except InputError:
        part = None  # told to the other ranks, which wait
    parts = gather(part)
    return None if any(part is None for part in parts) else mean_of_known(iou_of(add_up(parts).confusion))


# ---------------------------------------------------------------------------------------------------- reporting


def format_report(metrics: dict, args: argparse.Namespace) -> str:
    """Lay all results out for a terminal; without --baseline and --expect the mIoU is the last line."""
    parts = [f"no metrics: no pixel of split {args.split} has a class"]
    if metrics["miou"] is not None:
        parts = [format_table(metrics), f"mIoU = {percent(metrics['miou'])}"]
    if args.save_labels:
        parts.insert(-1, f"{metrics['frames']} label maps in {args.save_labels}")
    if args.baseline:
        parts.append(format_baseline(metrics["baseline"]))
    if args.expect is not None:
        word, near = ("PASS", "within") if metrics["expected"]["passed"] else ("FAIL", "not within")
        parts.append(f"{word}: mIoU {100 * metrics['miou']:.4f} is {near} {args.tolerance} of {args.expect}")
    return "\n\n".join(parts)


def format_table(metrics: dict) -> str:
    """Lay the metrics out in percent, class by class; with a baseline its IoU and the change in percent points."""
    confusion, baseline = np.array(metrics["confusion_matrix"]), metrics.get("baseline")
    truth = confusion.sum(axis=1)
    columns = list(metrics["iou"].values()), ratio(np.diag(confusion), truth), truth / truth.sum()
    lines = [f"{'class':<15}{'IoU %':>8}{'recall %':>10}{'of truth %':>12}"]
    for name, iou, recall, share in zip(NAMES, *columns):
        lines.append(f"{name:<15}{percent(iou):>8}{percent(recall):>10}{percent(share):>12}")
    lines.append(f"{'mean':<15}{percent(metrics['miou']):>8}{percent(metrics['mean_class_accuracy']):>10}{'':>12}")
    if baseline:
        lines[0] += f"{'baseline %':>12}{'change':>8}"
        for n, name in enumerate(NAMES, 1):
            lines[n] += f"{percent(baseline['iou'][name]):>12}{percent(baseline['iou_change'][name], '+'):>8}"
        lines[-1] += f"{percent(baseline['miou']):>12}{percent(metrics['miou'] - baseline['miou'], '+'):>8}"
    lines.append(f"\n{metrics['frames']} frames, pixel accuracy {percent(metrics['pixel_accuracy'])} %")
    return "\n".join(line.rstrip() for line in lines)


def format_baseline(baseline: dict) -> str:
    """Lay the comparison out, its verdict last."""
    lines = [f"{'logits against the baseline':<31}{'worst':>10}{'mean':>12}  worst frame"]
    for n, output in enumerate(baseline["outputs"]):
        for measure, of in output.items():
            name = f"output {n}, {measure.replace('_', ' ')}"
            lines.append(f"{name:<31}{of['worst']:>10.6f}{of['mean']:>12.6f}  {of['worst_frame']}")
    least = ", ".join(f"{row['frame']} {percent(row['agreement'])}" for row in baseline["least_agreeing"])
    lines.append(f"\nlabels agree at {percent(baseline['agreement'])} % of the pixels, least at {least}")
    if baseline["flips"]:
        lines.append(
            f"{baseline['flips']} pixels differ, {percent(baseline['harmless_flips'])} % of them where the baseline's "
            "two largest logits are no further apart than the frame's largest difference"
        )
    failures = [f"output {n}: {failure}" for n, of in enumerate(baseline["outputs"]) for failure in find_failures(of)]
    limits = f"cosine at least {LEAST_COSINE} and relative distance at most {LARGEST_DISTANCE}"
    lines.append(
        f"\nFAIL: logits unlike the baseline's ({limits} asked for): {'; '.join(failures)}"
        if failures
        else f"\nPASS: logits like the baseline's ({limits} at every frame and output)"
    )
    return "\n".join(lines)


def format_causes(found: list[str], too_low: bool) -> str:
    """List what the data tells, then what it cannot, with the way to check it."""
    told = [f"- {cause}" for cause in found] or ["- nothing in the data at hand tells the cause"]
    likely = [f"- {cause}: {check}" for cause, check, raises in CAUSES if too_low or raises]
    return "\n".join(["found:", *told, "likely causes, and how to check each:", *likely])


def percent(fraction: float | None, sign: str = "") -> str:
    """Format a fraction as percent, or a dash where there is none; + 0 takes the sign off -0."""
    return "-" if fraction is None or np.isnan(fraction) else f"{round(100 * fraction, 2) + 0:{sign}.2f}"


def write_json(path: Path, metrics: dict) -> None:
    """Write beside, then rename, so that the name always means a whole file."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def show_progress(frames: Iterable, total: int) -> Iterable:
    """Show a bar where somebody may look at it; tqdm takes a tenth of a second to import."""
    if RANK or not sys.stderr.isatty():
        return frames
    from tqdm import tqdm

    return tqdm(frames, total=total, unit="frame")


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


def percentage(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 100:
        raise ValueError
    return value


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Score logits against the Cityscapes labels: IoU by class and mIoU.")
    add = parser.add_argument
    add("data_dir", metavar="DATA_DIR", type=Path, help="Cityscapes, holds gtFine/")
    add("result_dir", metavar="RESULT_DIR", type=Path, help="folder of logits, as result/result_bs1")
    add("--split", default="val", help="folder below gtFine (default: %(default)s)")
    add("--workers", metavar="N", type=positive, help="threads (default: one for each processor)")
    add("--json", metavar="FILE", type=Path, help="write all metrics and the confusion matrix here")
    add("--save_labels", metavar="DIR", type=Path, help="write each frame's prediction here, as PNG of label ids")
    add(
        "--baseline", metavar="RESULT_DIR", type=Path, help="compare with these results; exit 1 if they are too far off"
    )
    add("--expect", metavar="PERCENT", type=percentage, help="mIoU to hold against; exit 1 and likely causes if missed")
    add(
        "--tolerance",
        metavar="POINTS",
        type=percentage,
        default=0.1,
        help="with --expect, difference allowed, in percent points (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json {args.json}: no such folder")
    return args


def score_ranks(frames: list[Frame], args: argparse.Namespace) -> Score:
    """Score this rank's share of the frames and add up all ranks'."""
    return add_up(gather(score_all(frames[RANK::RANKS], args.workers or processors())))


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    frames = find_frames(args)
    keep_memory()
    join_ranks()
    if args.save_labels:
        args.save_labels.mkdir(parents=True, exist_ok=True)
    metrics = summarise(score_ranks(frames, args), args)
    missed = args.expect is not None and not metrics["expected"]["passed"]
    causes = find_causes(metrics, frames, args) if missed else []
    if RANK == 0:
        print(format_report(metrics, args))
        if missed:
            print(format_causes(causes, is_too_low(metrics)))
        if args.json:
            write_json(args.json, metrics)
    return int(missed or bool(args.baseline and not metrics["baseline"]["passed"]))


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except (InputError, OSError) as error:
        raise SystemExit(f"{Path(__file__).name}: error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
