#!/usr/bin/env python3
"""Score logits against the Cityscapes labels: IoU per class and their mean.

    RESULT_DIR/<frame>_leftImg8bit_1.bin (or .npy)               main logits, float32 or float16, (19, 65, 129)
    DATA_DIR/gtFine/<split>/<city>/<frame>_gtFine_labelIds.png   ground truth, uint8, 2048 x 1024, ids 0 to 34
 -> a table on stdout, and with --json all metrics and the confusion matrix
 -> DIR/<frame>_predicted_labelIds.png, with --save_labels       prediction, uint8, label ids, of the label's size
 -> DIR/<frame>_predicted_color.png, with --save_colors          the same in Cityscapes' colors, a palette PNG

The logits are upsampled to the label's size (bilinear, align_corners) and the largest one is the prediction. In a
split without labels they are upsampled to the image's size, and only these maps are written. ais_bench's folders for
several devices (RESULT_DIR/device0, device1_1, ...) are read as well.

    $ python3 intrada_postprocess.py cityscapes result/result_bs1 | tail -n 1
    mIoU = 90.17
"""

from __future__ import annotations

import argparse
import atexit
import fcntl
import io
import json
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numba
import numpy as np
from PIL import Image

LABEL_ENDING, IMAGE_ENDING = "_gtFine_labelIds.png", "_leftImg8bit.png"
LOGITS_SHAPE = 19, 65, 129
LOGITS_SIZE = 19 * 65 * 129

# Source: cityscapesScripts, helpers/labels.py: every class with a train id, in the order of the train ids.
CLASSES = (
    # labelId, name, category, color
    (7, "road", "flat", "#804080"),
    (8, "sidewalk", "flat", "#f423e8"),
    (11, "building", "construction", "#464646"),
    (12, "wall", "construction", "#66669c"),
    (13, "fence", "construction", "#be9999"),
    (17, "pole", "object", "#999999"),
    (19, "traffic light", "object", "#faaa1e"),
    (20, "traffic sign", "object", "#dcdc00"),
    (21, "vegetation", "nature", "#6b8e23"),
    (22, "terrain", "nature", "#98fb98"),
    (23, "sky", "sky", "#4682b4"),
    (24, "person", "human", "#dc143c"),
    (25, "rider", "human", "#ff0000"),
    (26, "car", "vehicle", "#00008e"),
    (27, "truck", "vehicle", "#000046"),
    (28, "bus", "vehicle", "#003c64"),
    (31, "train", "vehicle", "#005064"),
    (32, "motorcycle", "vehicle", "#0000e6"),
    (33, "bicycle", "vehicle", "#770b20"),
)
LABEL_IDS = np.array([label_id for label_id, _, _, _ in CLASSES], np.uint8)
NAMES = [name for _, name, _, _ in CLASSES]
CATEGORIES = list(dict.fromkeys(category for _, _, category, _ in CLASSES))
CATEGORY_OF = np.array([CATEGORIES.index(category) for _, _, category, _ in CLASSES])
PALETTE = bytes.fromhex("".join(color[1:] for _, _, _, color in CLASSES))
LARGEST_LABEL_ID = 34

# Set by torchrun; without it this is the only process.
TORCHRUN = os.environ if os.environ.keys() >= {"TORCHELASTIC_RUN_ID", "WORLD_SIZE"} else {}
RANK, WORLD_SIZE = int(TORCHRUN.get("RANK", 0)), int(TORCHRUN.get("WORLD_SIZE", 1))
LOCAL_WORLD_SIZE = int(TORCHRUN.get("LOCAL_WORLD_SIZE", 1))


class InputError(Exception):
    """A mistake the user can fix; reported in one line, without a traceback."""


class Frame(NamedTuple):
    """The files of a frame; in a split without labels, `label` is the image."""

    name: str
    label: Path
    logits: Path


# ---------------------------------------------------------------------------------------------------- finding files


def find_frames(args: argparse.Namespace) -> list[Frame]:
    """Find the files of every frame of the split, in the order of the labels' paths.

    Raises:
        InputError: a file is missing, or labels and images do not match one to one.
    """
    data_dir, split = args.data_dir, args.split
    labels = find_by_frame(data_dir / "gtFine" / split, LABEL_ENDING)
    images = find_by_frame(data_dir / "leftImg8bit" / split, IMAGE_ENDING)
    if labels and (data_dir / "leftImg8bit" / split).is_dir() and labels.keys() != images.keys():
        unmatched = sorted(labels.keys() ^ images.keys())
        raise InputError(f"{data_dir}: frames of {split} with only one of image and label: {first_five(unmatched)}")
    if not labels and (needs_labels(args) or not images):
        remedy = (
            "without labels only --save_labels and --save_colors" if images else "DATA_DIR is the folder above gtFine"
        )
        raise InputError(f"{data_dir}/gtFine/{split}: no <city>/<frame>{LABEL_ENDING}; {remedy}")
    paths = labels or images
    logits = find_logits(args.result_dir, list(paths))
    return [Frame(name, path, logits[name]) for name, path in paths.items()]


def needs_labels(args: argparse.Namespace) -> bool:
    """Return whether more is required than label and color maps, which need no labels."""
    return bool(args.json or args.expect is not None or not (args.save_labels or args.save_colors))


def find_by_frame(folder: Path, ending: str) -> dict[str, Path]:
    """Find `<city>/<frame><ending>` by frame, sorted by path.

    Raises:
        InputError: two cities have a frame of the same name.
    """
    paths = sorted(folder.glob(f"*/*{ending}"))
    frames = {path.name[: -len(ending)]: path for path in paths}
    if len(frames) < len(paths):
        twice = [path.name for path in paths if frames[path.name[: -len(ending)]] != path]
        raise InputError(f"{folder}: frame names that occur in two cities: {first_five(twice)}")
    return frames


def find_logits(result_dir: Path, frames: list[str]) -> dict[str, Path]:
    """Find each frame's main logits in RESULT_DIR or in ais_bench's device folders below it.

    Raises:
        InputError: a frame has none, or two that differ, or the frames' types do.
    """
    if not result_dir.is_dir():
        raise InputError(f"{result_dir}: no such folder; RESULT_DIR is what ais_bench filled, e.g. result/result_bs1")
    found: dict[str, list[Path]] = {}
    for path in sorted([*result_dir.glob("*_leftImg8bit_1.*"), *result_dir.glob("device*/*_leftImg8bit_1.*")]):
        if path.suffix in (".bin", ".npy"):
            found.setdefault(path.name[: -len("_leftImg8bit_1.bin")], []).append(path)
    missing = [frame for frame in frames if frame not in found]
    if missing:
        raise InputError(
            f"{result_dir}: no <frame>_leftImg8bit_1.bin or .npy for {len(missing)} of {len(frames)} frames; infer "
            f"them first, and pass e.g. result/result_bs1: {first_five(missing)}"
        )
    unexpected = sorted(found.keys() - set(frames))
    if unexpected and RANK == 0:
        warn(f"{result_dir}: ignored, not of this split: {first_five(unexpected)}")
    logits = {frame: pick_equal(found[frame]) for frame in frames}
    halves = [path.name for path in logits.values() if path.suffix == ".bin" and path.stat().st_size == 2 * LOGITS_SIZE]
    if 0 < len(halves) < len(logits):
        raise InputError(f"{result_dir}: float16 among float32 logits, or truncated ones: {first_five(halves)}")
    return logits


def pick_equal(paths: list[Path]) -> Path:
    """Take a frame's logits; where several devices have them, all must be equal.

    Raises:
        InputError: they are not.
    """
    first, *others = paths
    for other in others:
        if not np.array_equal(read_logits(first), read_logits(other)):
            raise InputError(
                f"{first} and {other} differ: results of two runs; empty the folder and infer again, "
                "for several devices with ais_bench's --divide_input 1"
            )
    return first


def first_five(names: list[str], separator: str = ", ") -> str:
    """List at most five names and the count, to keep the message on one line."""
    return separator.join(names[:5]) + (f"{separator}... ({len(names)} in all)" if len(names) > 5 else "")


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------- reading


def read_logits(path: Path) -> np.ndarray:
    """Read (19, 65, 129) logits as float32; a `.bin` has no header, so its size distinguishes float32 and float16.

    Raises:
        InputError: another size or type, or values that are NaN or Inf.
    """
    expected = f"expected {LOGITS_SHAPE}, float32 ({4 * LOGITS_SIZE} bytes) or float16 ({2 * LOGITS_SIZE} bytes)"
    if path.suffix == ".bin":
        size = path.stat().st_size
        if size not in (2 * LOGITS_SIZE, 4 * LOGITS_SIZE):
            raise InputError(f"{path}: {size} bytes; {expected}; infer this frame again")
        logits = np.fromfile(str(path), "<f4" if size == 4 * LOGITS_SIZE else "<f2").reshape(LOGITS_SHAPE)
    else:
        try:
            logits = np.array(np.lib.format.open_memmap(str(path), mode="r"))
        except Exception as error:  # numpy raises many kinds for a damaged header
            raise InputError(f"{path}: not a complete .npy: {error}") from None
        if logits.shape not in (LOGITS_SHAPE, (1, *LOGITS_SHAPE)) or logits.dtype not in (np.float32, np.float16):
            raise InputError(f"{path}: {logits.dtype} {logits.shape}; {expected}; infer this frame again")
    if not np.isfinite(logits).all():
        raise InputError(f"{path}: NaN or Inf, typically an FP16 overflow")
    return logits.astype(np.float32, copy=False).reshape(LOGITS_SHAPE)


def read_png(path: Path) -> Image.Image:
    """Decode a PNG after checking its checksums, which decoding alone does not.

    Raises:
        InputError: it cannot be read or is damaged.
    """
    try:
        content = path.read_bytes()
        Image.open(io.BytesIO(content), formats=["PNG"]).verify()
        image = Image.open(io.BytesIO(content), formats=["PNG"])
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # all of them from Pillow
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or 'damaged, too large, or not a PNG'}") from None
    return image


def read_label(path: Path) -> np.ndarray:
    """Read (H, W) uint8 label ids; for an image, which has none, return zeros of its size.

    Raises:
        InputError: it is damaged, too large, or not a PNG of label ids.
    """
    try:
        if path.name.endswith(IMAGE_ENDING):
            with Image.open(path, formats=["PNG"]) as image:
                return np.zeros(image.size[::-1], np.uint8)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # all of them from Pillow
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or 'damaged, too large, or not a PNG'}") from None
    image = read_png(path)
    if image.mode != "L":
        raise InputError(f"{path}: found mode {image.mode}, expected L: one 8-bit label id per pixel")
    label = np.asarray(image)
    if label.max() > LARGEST_LABEL_ID:
        raise InputError(
            f"{path}: label id {label.max()}; expected 0 to {LARGEST_LABEL_ID}: labelIds, not labelTrainIds or color"
        )
    return label


# ---------------------------------------------------------------------------------------------------- computing


def compiled(function: Callable) -> Callable:
    """Compile without the GIL; cache on disk if it is writable."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # numba finds no folder for its cache, as in a read-only install
        return numba.njit(nogil=True)(function)


def predict(logits_chw: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Find the class with the largest bilinear logit at every pixel; ties go to the lower class.

    The result is that of upsampling to full size in float32 and taking the argmax, without ever holding full-size
    logits.

    Args:
        logits_chw: (C, h, w) float32, finite.
        size: (H, W).

    Returns:
        (H, W) uint8.

    Source: the coordinates and the order of operations are those of torch's `interpolate(mode="bilinear",
    align_corners=True)`.
    """
    _, rows, columns = logits_chw.shape
    y_start, y_weight = grid_cells(rows, size[0])
    x_start, x_weight = grid_cells(columns, size[1])
    # Rounding can erase a smaller lead than this, so a class that trails by less is still evaluated.
    slack = np.float32(np.abs(logits_chw).max() * 2.0**-20)
    logits_hwc = np.ascontiguousarray(logits_chw.transpose(1, 2, 0))
    prediction = np.empty(size, np.uint8)
    predict_cells(logits_hwc, y_start, y_weight, x_start, x_weight, slack, prediction)
    return prediction


def grid_cells(points: int, pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """Map pixels to grid cells with align_corners: the first and last pixel lie on the first and last point.

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
def count_pixels(label, prediction, counts):
    """Add each pixel to counts (256, 19), row = label id, column = predicted train id."""
    for y in range(label.shape[0]):
        for x in range(label.shape[1]):
            counts[label[y, x], prediction[y, x]] += 1


def score(frame: Frame, args: argparse.Namespace) -> np.ndarray:
    """Count one frame's pixels; with --save_labels or --save_colors write its prediction.

    Returns:
        (19, 19) int64, row = ground truth, column = prediction; other label ids count nowhere.

    Raises:
        InputError: a file is damaged or cannot be written.
    """
    label = read_label(frame.label)
    prediction = predict(read_logits(frame.logits), label.shape)
    if args.save_labels:
        write_png(args.save_labels / f"{frame.name}_predicted_labelIds.png", Image.fromarray(LABEL_IDS[prediction]))
    if args.save_colors:
        colors = Image.fromarray(prediction)
        colors.putpalette(PALETTE)
        write_png(args.save_colors / f"{frame.name}_predicted_color.png", colors)
    counts = np.zeros((256, len(CLASSES)), np.int64)
    count_pixels(label, prediction, counts)
    return counts[LABEL_IDS]


def score_all(frames: list[Frame], args: argparse.Namespace) -> list[np.ndarray]:
    """Score frames in threads; the compiled loops and Pillow's decoder release the GIL.

    Raises:
        InputError: counts and names the damaged files.
    """
    confusions, faults = [], []
    with ThreadPoolExecutor(args.workers or count_cpus()) as pool:
        futures = [pool.submit(score, frame, args) for frame in frames]
        try:
            for future in show_progress(futures):
                try:
                    confusions.append(future.result())
                except InputError as error:
                    faults.append(str(error))
        finally:  # after Ctrl-C or a bug start no more
            for future in futures:
                future.cancel()
    if faults:
        raise InputError(f"{len(faults)} of {len(frames)} frames cannot be scored: {first_five(faults, '; ')}")
    return confusions


def compute_iou(confusion: np.ndarray) -> np.ndarray:
    """Compute each class's intersection over union, NaN for one that is in neither ground truth nor prediction.

    Args:
        confusion: (C, C) integers, row = ground truth, column = prediction.
    """
    hits = np.diag(confusion)
    return divide(hits, confusion.sum(axis=1) + confusion.sum(axis=0) - hits)


def divide(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Divide, with NaN for 0 / 0."""
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole > 0)


def summarise(frames: list[Frame], confusions: list[np.ndarray], args: argparse.Namespace) -> dict:
    """Compute the metrics of the whole split from the summed confusion matrix, as fractions from 0 to 1.

    `miou` is the mean IoU over the classes that occur in ground truth or prediction, each class's IoU counted over all
    frames at once. `mean_class_accuracy` is the mean recall over the classes in the ground truth. Pixels without a
    class count nowhere. A frame's `miou` is None if it has no pixel with a class.

    Raises:
        InputError: no pixel of the split has a class.
    """
    confusion = np.sum(confusions, axis=0)
    if not confusion.any():
        raise InputError(f"{args.data_dir}/gtFine/{args.split}: no pixel of any label has a class")
    iou, truth = compute_iou(confusion), confusion.sum(axis=1)
    by_category = np.zeros((len(CATEGORIES), len(CATEGORIES)), np.int64)
    np.add.at(by_category, (CATEGORY_OF[:, None], CATEGORY_OF), confusion)
    metrics = {
        "split": args.split,
        "result_dir": str(args.result_dir),
        "frames": len(frames),
        "miou": float(np.nanmean(iou)),
        "iou": by_name(NAMES, iou),
        "category_iou": by_name(CATEGORIES, compute_iou(by_category)),
        "pixel_accuracy": float(np.trace(confusion) / truth.sum()),
        "mean_class_accuracy": float(np.nanmean(divide(np.diag(confusion), truth))),
        "frequency_weighted_iou": float((truth * np.nan_to_num(iou)).sum() / truth.sum()),
        "confusion_matrix": confusion.tolist(),
        "per_frame": [
            {"frame": frame.name, "miou": float(np.nanmean(compute_iou(part))) if part.any() else None}
            for frame, part in zip(frames, confusions)
        ],
    }
    if args.expect is not None:
        metrics["expected"] = judge(metrics["miou"], args.expect, args.tolerance)
    return metrics


def by_name(names: list[str], values: np.ndarray) -> dict[str, float | None]:
    """Name the values; JSON has null and no NaN."""
    return {name: None if np.isnan(value) else float(value) for name, value in zip(names, values)}


def judge(miou: float, percent: float, tolerance: float) -> dict:
    """Compare with the expected mIoU; bounds inclusive, immune to rounding."""
    return {"percent": percent, "tolerance": tolerance, "passed": round(abs(100 * miou - percent), 9) <= tolerance}


def warn_if_one_class(confusion: np.ndarray) -> None:
    """Warn if every pixel is predicted as the same class: the model or its input is broken."""
    predicted = np.flatnonzero(confusion.any(axis=0))
    if len(predicted) == 1:
        warn(f"every pixel is predicted as {NAMES[predicted[0]]}: the model, its weights or its input are wrong")


# ---------------------------------------------------------------------------------------------------- reporting


def format_maps(args: argparse.Namespace, frames: int) -> str:
    """Format one line for each kind of map written."""
    folders = {"label": args.save_labels, "color": args.save_colors}
    return "".join(f"{kind} maps written to {folder}: {frames}\n" for kind, folder in folders.items() if folder)


def format_report(metrics: dict) -> str:
    """Format the metrics in percent, one class per line; then the mIoU, and whether it is the expected one."""
    confusion = np.array(metrics["confusion_matrix"])
    truth = confusion.sum(axis=1)
    columns = list(metrics["iou"].values()), divide(np.diag(confusion), truth), truth / truth.sum()
    lines = [f"{'class':<15}{'IoU %':>8}{'recall %':>10}{'GT pixels %':>13}"]
    for name, iou, recall, share in zip(NAMES, *columns):
        lines.append(f"{name:<15}{percent(iou):>8}{percent(recall):>10}{percent(share):>13}")
    lines.append(f"{'mean':<15}{percent(metrics['miou']):>8}{percent(metrics['mean_class_accuracy']):>10}")
    lines.append(f"\nframes: {metrics['frames']}, pixel accuracy {percent(metrics['pixel_accuracy'])} %")
    lines.append(f"\nmIoU = {percent(metrics['miou'])}")
    if "expected" in metrics:
        expected, miou = metrics["expected"], 100 * metrics["miou"]
        near = f"within {expected['tolerance']} of {expected['percent']:.4f}"
        see = 'see "The mIoU is not the expected one" in README.md'
        passed, failed = f"PASS: {miou:.4f} is {near}", f"FAIL: {miou:.4f} is not {near}; {see}"
        lines.append("\n" + (passed if expected["passed"] else failed))
    return "\n".join(lines)


def percent(fraction: float | None) -> str:
    """Format a fraction as percent, or a dash where there is none."""
    return "-" if fraction is None or np.isnan(fraction) else f"{100 * fraction:.2f}"


def write_json(path: Path, metrics: dict) -> None:
    """Write a file that is complete whenever it has its name; a link, device or pipe is written to in place.

    Raises:
        InputError: it cannot be written, as on a full disk.
    """
    in_place = path.exists() and (path.is_symlink() or not path.is_file())
    part = path if in_place else path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        if not in_place:
            os.replace(str(part), str(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        if not in_place and part.exists():
            part.unlink()


def write_png(path: Path, image: Image.Image) -> None:
    """Write a file that is complete whenever it has its name.

    Raises:
        InputError: it cannot be written, as on a full disk.
    """
    part = path.with_name(path.name + ".part")
    try:
        image.save(part, "PNG", compress_level=1)
        os.replace(str(part), str(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None


def make_folders(args: argparse.Namespace) -> None:
    """Make the folders for the maps; rank 0 locks them until it ends.

    Raises:
        InputError: another run holds one.
    """
    for folder in {args.save_labels, args.save_colors} - {None}:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            if RANK == 0:
                fcntl.flock(os.open(str(folder), os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: another run is writing here; wait for it, or pass another folder") from None


def show_progress(futures: list[Future]) -> Iterable[Future]:
    """Show a progress bar if stderr is a terminal; tqdm takes a tenth of a second to import."""
    if RANK or not sys.stderr.isatty():
        return futures
    from tqdm import tqdm

    return tqdm(futures, unit="frame")


def join_ranks() -> None:
    """Connect with torchrun's other processes, early, so that all notice when one fails."""
    if WORLD_SIZE > 1:
        from torch import distributed

        distributed.init_process_group("gloo", timeout=timedelta(days=1))
        atexit.register(distributed.destroy_process_group)  # or gloo's threads may abort the process as it ends


def gather(share: list) -> list:
    """Collect every rank's share, which is every WORLD_SIZE-th value, in the order of the values.

    Raises:
        InputError: another rank failed.
    """
    if WORLD_SIZE == 1:
        return share
    from torch import distributed

    shares = [None] * WORLD_SIZE
    try:
        distributed.all_gather_object(shares, share)
    except RuntimeError:
        raise InputError("another rank failed; see its message") from None
    return [shares[n % WORLD_SIZE][n // WORLD_SIZE] for n in range(sum(map(len, shares)))]


def count_cpus() -> int:
    """Count the CPUs this process may use, shared with the other ranks on this host."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, allowed // LOCAL_WORLD_SIZE)


def at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("must be an integer, 1 or more")
    return int(text)


def percentage(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = np.nan
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 100; found {text}")
    return value


def expected_miou(text: str) -> float:
    """Read --expect: percent, or a METRICS.json whose mIoU is meant."""
    if text.endswith(".json"):
        try:
            return percentage(str(100 * json.loads(Path(text).read_text(encoding="utf-8"))["miou"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise argparse.ArgumentTypeError(f"{text}: not what --json writes: {error!r}") from None
    value = percentage(text)
    if 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected percent, e.g. 47.01; found {text}")
    return value


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Score logits against the Cityscapes labels: IoU per class and mIoU.")
    add = parser.add_argument
    add("data_dir", metavar="DATA_DIR", type=Path, help="Cityscapes; holds gtFine/")
    add("result_dir", metavar="RESULT_DIR", type=Path, help="folder of logits, e.g. result/result_bs1")
    add("--split", default="val", help="folder below gtFine (default: %(default)s)")
    add("--workers", metavar="N", type=at_least_one, help="threads (default: one per CPU)")
    add("--json", metavar="FILE", type=Path, help="write all metrics and the confusion matrix here")
    add("--save_labels", metavar="DIR", type=Path, help="write each prediction here, as a PNG of label ids")
    add("--save_colors", metavar="DIR", type=Path, help="write each prediction here, as a PNG in Cityscapes' colors")
    add("--expect", metavar="PERCENT", type=expected_miou,
        help="expected mIoU, or a METRICS.json that holds it; exit status 1 if it is missed")  # fmt: skip
    add("--tolerance", metavar="POINTS", type=percentage, default=0.1,
        help="allowed difference to --expect, in percentage points (default: %(default)s)")  # fmt: skip
    args = parser.parse_args(argv)
    if args.json and (args.json.is_dir() or not args.json.parent.is_dir()):
        parser.error(f"--json {args.json}: must be a file in an existing folder")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    frames = find_frames(args)
    make_folders(args)
    join_ranks()
    confusions = gather(score_all(frames[RANK::WORLD_SIZE], args))
    if RANK:
        return 0
    if not needs_labels(args) and not np.any(confusions):
        print(format_maps(args, len(frames)), end="")
        return 0
    metrics = summarise(frames, confusions, args)
    if args.json:  # before printing, which a closed pipe ends
        write_json(args.json, metrics)
    warn_if_one_class(np.sum(confusions, axis=0))
    print(format_maps(args, len(frames)), format_report(metrics), sep="")
    return int("expected" in metrics and not metrics["expected"]["passed"])


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except (InputError, OSError) as error:
        raise SystemExit(f"{Path(__file__).name}: error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
