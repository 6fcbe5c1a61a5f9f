#!/usr/bin/env python3
"""Score logits against the Cityscapes labels: IoU of each class and their mean.

    RESULT_DIR/<frame>_leftImg8bit_1.bin (or .npy)               main logits, float32 or float16, (19, 65, 129)
    DATA_DIR/gtFine/<split>/<city>/<frame>_gtFine_labelIds.png   truth, uint8, 2048 x 1024, ids 0 to 34
 -> a table on stdout, and with --json everything that was counted

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
from tqdm import tqdm

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
NAMES = [name for _, name, _ in CLASSES]
CATEGORIES = list(dict.fromkeys(category for _, _, category in CLASSES))
CATEGORY_OF = np.array([CATEGORIES.index(category) for _, _, category in CLASSES])
LARGEST_LABEL_ID = 34


# torchrun's place of this process among all, and how many run on this host; without torchrun one, and no torch.
RANK, RANKS, RANKS_HERE = (
    int(os.environ.get(name, alone)) for name, alone in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1))
)


class InputError(Exception):
    """What the user can mend; told in one line, without a traceback."""


class Score(NamedTuple):
    """What frames add up to: (19, 19) int64, row = truth, column = prediction; and each frame's own figures."""

    confusion: np.ndarray
    per_frame: list[dict[str, str | float | None]]


# ---------------------------------------------------------------------------------------------------- finding files


def find_labels(data_dir: Path, split: str) -> dict[str, Path]:
    """Find the split's labels.

    Returns:
        The labelIds picture of each `<city>_<sequence>_<frame>`, sorted by path.

    Raises:
        InputError: there are none, or two cities have a frame of the same name.
    """
    folder, ending = data_dir / "gtFine" / split, "_gtFine_labelIds.png"
    paths = sorted(folder.glob(f"*/*{ending}"))
    if not paths:
        raise InputError(f"{folder}: no <city>/<frame>{ending} here; DATA_DIR is the folder that holds gtFine")
    labels = {path.name[: -len(ending)]: path for path in paths}
    if len(labels) < len(paths):
        raise InputError(f"{folder}: {len(paths) - len(labels)} frame names occur in two cities")
    return labels


def find_logits(result_dir: Path, frames: list[str]) -> dict[str, Path]:
    """Find each frame's main logits in RESULT_DIR or in ais_bench's device folders below it.

    Raises:
        InputError: a frame has none, or two that differ.
    """
    found = find_results(result_dir)
    missing = [frame for frame in frames if f"{frame}_leftImg8bit_1" not in found]
    if missing:
        raise InputError(
            f"{result_dir}: {len(missing)} of {len(frames)} frames have no <frame>_leftImg8bit_1.bin or "
            f".npy{why_missing(missing, found)}: {first_five(missing)}"
        )
    logits = {frame: choose_one(found.pop(f"{frame}_leftImg8bit_1")) for frame in frames}
    strangers = sorted(stem for stem in found if stem.endswith("_leftImg8bit_1"))
    if strangers and RANK == 0:
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
    """Say what is known of frames without main logits."""
    if all(f"{frame}_leftImg8bit_0" in found for frame in missing):
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
            half = path.stat().st_size == 2 * LOGITS_SIZE
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
    """Read (H, W) uint8 label ids.

    Raises:
        InputError: it is no whole picture of one 8-bit channel.
    """
    try:
        image = Image.open(path)
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


buffers = threading.local()


def score(frame: str, logits_path: Path, truth_path: Path) -> Score:
    """Score one frame.

    Raises:
        InputError: a file is damaged, or the truth holds what no label id is.
    """
    truth = read_truth(truth_path)
    if getattr(buffers, "prediction", truth[:0]).shape != truth.shape:
        buffers.prediction = np.empty(truth.shape, np.uint8)
    predict(read_logits(logits_path), buffers.prediction)
    counts = np.zeros((256, len(CLASSES)), np.int64)
    count_pixels(truth, buffers.prediction, counts)
    strange = np.flatnonzero(counts.sum(axis=1)[LARGEST_LABEL_ID + 1 :]) + LARGEST_LABEL_ID + 1
    if strange.size:
        raise InputError(
            f"{truth_path}: label ids {first_five([str(s) for s in strange])}; expected 0 to "
            f"{LARGEST_LABEL_ID}, so labelIds and not labelTrainIds or colours"
        )
    confusion = counts[LABEL_IDS]
    ignored = int(truth.size - confusion.sum())
    return Score(confusion, [{"frame": frame, "miou": mean_of_known(iou_of(confusion)), "ignored_pixels": ignored}])


def keep_memory() -> None:
    """Let glibc keep freed blocks, which it would otherwise return and fault in again, page by page, frame by frame."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD: blocks up to 32 MB come from the heap
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD: whose free end stays


def score_all(frames: list[str], logits: dict[str, Path], labels: dict[str, Path], workers: int) -> Score:
    """Score frames in threads; the compiled loops and Pillow's decoder leave the interpreter free.

    Raises:
        InputError: counts and names the damaged files.
    """
    faults = []

    def score_or_fault(frame: str) -> Score:
        try:
            return score(frame, logits[frame], labels[frame])
        except InputError as error:
            faults.append(str(error))
            return Score(np.zeros((len(CLASSES), len(CLASSES)), np.int64), [])

    with ThreadPoolExecutor(workers) as pool:
        try:
            scores = pool.map(score_or_fault, frames)
            total = add_up(tqdm(scores, total=len(frames), unit="frame", disable=True if RANK else None))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if faults:
        raise InputError(f"{len(faults)} of {len(frames)} frames cannot be scored: {first_five(sorted(faults), '; ')}")
    return total


def add_up(scores: Iterable[Score]) -> Score:
    """Add scores up, frames in the order of their names."""
    confusion, per_frame = np.zeros((len(CLASSES), len(CLASSES)), np.int64), []
    for part in scores:
        confusion += part.confusion
        per_frame += part.per_frame
    return Score(confusion, sorted(per_frame, key=lambda row: row["frame"]))


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
    return float(np.nanmean(values)) if not np.isnan(values).all() else None


def summarise(score: Score, split: str) -> dict:
    """Compute the metrics of the whole split from the summed confusion matrix, as fractions from 0 to 1.

    `miou` is the mean IoU over the classes that occur in truth or prediction, each class's IoU counted over all frames
    at once. `mean_class_accuracy` is the mean recall over the classes in truth. Pixels without a class count nowhere.

    Raises:
        InputError: no pixel of the split has a class.
    """
    confusion = score.confusion
    if not confusion.sum():
        raise InputError(f"no pixel of split {split} has a class; the labels of Cityscapes' test split are blank")
    iou, truth = iou_of(confusion), confusion.sum(axis=1)
    by_category = np.zeros((len(CATEGORIES), len(CATEGORIES)), np.int64)
    np.add.at(by_category, (CATEGORY_OF[:, None], CATEGORY_OF), confusion)
    return {
        "split": split,
        "frames": len(score.per_frame),
        "miou": mean_of_known(iou),
        "iou": by_name(NAMES, iou),
        "category_iou": by_name(CATEGORIES, iou_of(by_category)),
        "pixel_accuracy": float(np.trace(confusion) / truth.sum()),
        "mean_class_accuracy": mean_of_known(ratio(np.diag(confusion), truth)),
        "frequency_weighted_iou": float((truth * np.nan_to_num(iou)).sum() / truth.sum()),
        "confusion_matrix": confusion.tolist(),
        "per_frame": score.per_frame,
    }


def by_name(names: list[str], values: np.ndarray) -> dict[str, float | None]:
    """Name the values; JSON has null and no NaN."""
    return {name: None if np.isnan(value) else float(value) for name, value in zip(names, values)}


# ---------------------------------------------------------------------------------------------------- reporting


def format_table(metrics: dict) -> str:
    """Lay the metrics out in percent, class by class, the mIoU by itself in the last line."""
    confusion = np.array(metrics["confusion_matrix"])
    truth = confusion.sum(axis=1)
    columns = list(metrics["iou"].values()), ratio(np.diag(confusion), truth), truth / truth.sum()
    lines = [f"{'class':<15}{'IoU %':>8}{'recall %':>10}{'of truth %':>12}"]
    for name, iou, recall, share in zip(NAMES, *columns):
        lines.append(f"{name:<15}{percent(iou):>8}{percent(recall):>10}{percent(share):>12}")
    lines.append(f"{'mean':<15}{percent(metrics['miou']):>8}{percent(metrics['mean_class_accuracy']):>10}")
    lines.append(f"\n{metrics['frames']} frames, pixel accuracy {percent(metrics['pixel_accuracy'])} %\n")
    lines.append(f"mIoU = {percent(metrics['miou'])}")
    return "\n".join(lines)


def percent(fraction: float | None) -> str:
    """Format a fraction as percent, or a dash where there is none."""
    return "-" if fraction is None or np.isnan(fraction) else f"{100 * fraction:.2f}"


def write_json(path: Path, metrics: dict) -> None:
    """Write beside, then rename, so that the name always means a whole file."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(part, path)


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


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Score logits against the Cityscapes labels: IoU by class and mIoU.")
    parser.add_argument("data_dir", metavar="DATA_DIR", type=Path, help="Cityscapes, holds gtFine/")
    parser.add_argument("result_dir", metavar="RESULT_DIR", type=Path, help="folder of logits, as result/result_bs1")
    parser.add_argument("--split", default="val", help="folder below gtFine (default: %(default)s)")
    parser.add_argument("--workers", metavar="N", type=positive, help="threads (default: one for each processor)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all metrics and the confusion matrix here")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    labels = find_labels(args.data_dir, args.split)
    logits = find_logits(args.result_dir, list(labels))
    keep_memory()
    join_ranks()
    score = score_all(list(labels)[RANK::RANKS], logits, labels, args.workers or processors())
    metrics = summarise(add_up(gather(score)), args.split)
    if RANK == 0:
        print(format_table(metrics))
        if args.json:
            write_json(args.json, metrics)
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except (InputError, OSError) as error:
        raise SystemExit(f"{Path(__file__).name}: error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
