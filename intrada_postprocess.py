#!/usr/bin/env python3
"""Score logits against the Cityscapes labels: IoU per class and their mean.

    RESULT_DIR/<frame>_leftImg8bit_1.bin                         main logits, float32 or float16, (19, 65, 129)
    DATA_DIR/gtFine/<split>/<city>/<frame>_gtFine_labelIds.png   ground truth, uint8, 2048 x 1024, ids 0 to 34
    RESULT_DIR_summary.json                                      what inferred, beside the folder
 -> a table on stdout, and with --json the run's record: all metrics, the summary, where the files are
 -> DIR/<frame>_predicted_labelIds.png, with --save_labels       prediction, uint8, label ids, of the label's size
 -> DIR/<frame>_predicted_color.png, with --save_colors          the same in Cityscapes' colors, a palette PNG

The logits are upsampled to the label's size (bilinear, align_corners) and the largest one is the prediction. The
folders of several devices (RESULT_DIR/device0, device1_1, ...) are read as well.

    $ python3 intrada_postprocess.py cityscapes result/result_bs1 | tail -n 1
    mIoU = 90.17
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm.contrib.concurrent import thread_map

LABEL_ENDING, IMAGE_ENDING, LABEL_MAP_ENDING = "_gtFine_labelIds.png", "_leftImg8bit.png", "_predicted_labelIds.png"
LOGITS_SHAPE = 19, 65, 129
LOGITS_SIZE = int(np.prod(LOGITS_SHAPE))

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

# Source: Huawei's ModelZoo-PyTorch, ACL_PyTorch/contrib/cv/segmentation/IntraDA; frames/s on 310P3, on zeros.
PUBLISHED_MIOU = 0.4701
PUBLISHED_FPS = {1: 47.52, 4: 43.64, 8: 43.35, 16: 43.41, 32: 42.09, 64: 20.39}


class InputError(Exception):
    """A mistake the user can fix; reported in one line, without a traceback."""


class Frame(NamedTuple):
    name: str
    label: Path
    logits: Path


# ---------------------------------------------------------------------------------------------------- files


def find_labels(data_dir: Path, split: str) -> dict[str, Path]:
    """Find the label of every frame of the split, sorted by path; InputError if they do not match the images."""
    label_dir, image_dir = data_dir / "gtFine" / split, data_dir / "leftImg8bit" / split
    labels = find_by_frame(label_dir, LABEL_ENDING) if is_there(label_dir) else {}
    if not labels:
        raise InputError(f"{label_dir}: no <city>/<frame>{LABEL_ENDING}; DATA_DIR is the folder that holds gtFine")
    images = find_by_frame(image_dir, IMAGE_ENDING) if is_there(image_dir) else labels
    unmatched = sorted(labels.keys() ^ images.keys())
    if unmatched:
        raise InputError(f"{data_dir}: frames of {split} with only one of image and label: {first_five(unmatched)}")
    return labels


def find_frames(labels: dict[str, Path], result_dir: Path, limit: int | None) -> list[Frame]:
    """Find the main logits of every frame or the first ones; InputError if one is missing or types are mixed."""
    logits = find_logits(result_dir)
    frames = [Frame(name, label, logits.get(f"{name}_leftImg8bit_1")) for name, label in labels.items()][:limit]
    missing = [frame.name for frame in frames if not frame.logits]
    if missing:
        remedy = "infer them first, or score fewer by --limit; pass e.g. result/result_bs1"
        counts = f"{len(missing)} of {len(frames)} frames"
        raise InputError(f"{result_dir}: no <frame>_leftImg8bit_1.bin for {counts}: {first_five(missing)}; {remedy}")
    others = sorted({stem for stem in logits if stem.endswith("_1")} - {f"{name}_leftImg8bit_1" for name in labels})
    if others:
        warn(f"{result_dir}: ignored, not of this split: {first_five(others)}")
    halves = [frame.logits.name for frame in frames if frame.logits.stat().st_size == 2 * LOGITS_SIZE]
    if 0 < len(halves) < len(frames):  # half of float32 logits that were rounded to float16 is finite as float16
        raise InputError(f"{result_dir}: float16 among float32 logits, or truncated ones: {first_five(halves)}")
    return frames


def find_by_frame(folder: Path, ending: str) -> dict[str, Path]:
    """Find `<city>/<frame><ending>` by frame, sorted by path; InputError if two cities have a frame of one name."""
    paths = [path for city in list_folder(folder) for path in list_folder(city) if path.name.endswith(ending)]
    frames = {path.name[: -len(ending)]: path for path in paths}
    if len(frames) < len(paths):
        duplicates = [path.name for path in paths if frames[path.name[: -len(ending)]] != path]
        raise InputError(f"{folder}: frame names that occur in two cities: {first_five(duplicates)}")
    return frames


def find_logits(result_dir: Path) -> dict[str, Path]:
    """Find `<frame>_<output>.bin` by stem, in a folder and in those of several devices below it."""
    logits: dict[str, Path] = {}
    entries = list_folder(result_dir)
    for device in [path for path in entries if path.name.startswith("device")]:
        entries += list_folder(device)
    for path in entries:
        is_result = re.fullmatch(r"(?!pure_infer_data).+_[0-9]+\.bin", path.name)
        if is_result and logits.setdefault(path.stem, path) != path:
            remedy = "pass one of the folders, or infer into a new one (several devices: --divide_input 1)"
            raise InputError(f"{logits[path.stem]} and {path} are results of the same frame; {remedy}")
    return logits


def list_folder(folder: Path) -> list[Path]:
    """List what is in a folder, sorted, without hidden files; empty for a file. glob would hide what cannot be read."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except NotADirectoryError:
        return []


def is_there(path: Path) -> bool:
    """Return whether a path exists, be it a broken link; one that cannot be looked up is an OSError."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


def make_parent(path: Path) -> None:
    """Make the folder of a file to be written, before the work; InputError if the file is a folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; expected a file to write")


def first_five(names: list[str], separator: str = ", ") -> str:
    """List at most five names and the count, to keep the message on one line."""
    return separator.join(names[:5]) + (f"{separator}... ({len(names)} in all)" if len(names) > 5 else "")


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def read_logits(path: Path) -> np.ndarray:
    """Read (19, 65, 129) float32 or float16 logits as float32; InputError for another size, NaN or Inf."""
    content = path.read_bytes()
    if len(content) not in (2 * LOGITS_SIZE, 4 * LOGITS_SIZE):
        expected = f"{4 * LOGITS_SIZE} (float32) or {2 * LOGITS_SIZE} (float16)"
        raise InputError(f"{path}: {len(content)} bytes; expected {expected}; delete it and infer again")
    logits = np.frombuffer(content, "<f4" if len(content) == 4 * LOGITS_SIZE else "<f2").reshape(LOGITS_SHAPE)
    if not np.isfinite(logits).all():
        raise InputError(f"{path}: NaN or Inf, typically an FP16 overflow")
    return logits.astype(np.float32, copy=False)


def read_summaries(logits: list[Path]) -> list[dict]:
    """Read the `<folder>_summary.json` beside each folder of logits: what inferred, by ais_bench or tools/infer.py.

    Lists of files and of single times are left out, `file` (its name) and `date` are added. A missing or damaged one is
    left out with a warning. InputError if they name several models, or ais_bench's lists other files than these.
    """
    summaries, models, by_folder = [], set(), {}
    for path in map(Path.resolve, logits):
        by_folder.setdefault(path.parent, []).append(path)
    for folder, files in sorted(by_folder.items()):
        path = folder.with_name(f"{folder.name}_summary.json")
        summary = read_summary(path)
        if summary:
            refuse_unlisted(files, path, summary["filesinfo"])
            date = time.strftime("%Y-%m-%d", time.localtime(path.stat().st_mtime))
            kept = {key: value for key, value in summary.items() if key != "filesinfo" and not key.endswith("_list")}
            summaries.append({"file": path.name, "date": date, **kept})
            named = re.findall(r"--model[ =](\S+)", " ".join(map(str, summary["args"]))) or ["unknown"]
            models.add(str(summary.get("model_sha256") or Path(named[0])))
        else:
            warn(f"{path}: missing or damaged; which model inferred these logits is unknown")
    if len(models) > 1:
        folders = first_five(list(map(str, by_folder)))
        raise InputError(f"{folders}: results of several models: {first_five(sorted(models))}")
    return summaries


def refuse_unlisted(logits: list[Path], path: Path, listed: set[str]) -> None:
    """Raise InputError for logits that ais_bench's summary does not list; warn of those that are much newer than it."""
    others = [file.name for file in logits if file.name not in listed]
    if listed and others:
        remedy = "infer into a new folder; or, if all are of one model, move the summary away"
        raise InputError(f"{path}: does not list {first_five(others)}: of another run; {remedy}")
    if max(file.stat().st_mtime for file in logits) > path.stat().st_mtime + 60:
        warn(f"{path}: older than the logits, which may be of a later run that did not end")


def read_summary(path: Path) -> dict:
    """Read a summary of ais_bench or tools/infer.py, the names of its files as `filesinfo`; empty if it is damaged."""
    summary = read_json(path)
    try:
        times, runs = summary["NPU_compute_time"], summary.get("filesinfo") or {}
        figures = summary["throughput"], times["mean"], times.get("percentile(99%)", 0)  # no p99 with --threads
        summary["filesinfo"] = {Path(file).name for run in runs.values() for file in run["outfiles"]}
        return summary if np.isfinite(figures).all() and isinstance(summary["args"], list) else {}
    except (LookupError, TypeError, ValueError, AttributeError):
        return {}


def read_json(path: Path) -> dict:
    """Read a JSON object; empty if there is none, or if it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=int)  # refuses NaN
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def read_png(path: Path, mode: str) -> Image.Image:
    """Decode an 8-bit PNG of this mode, its checksums checked, which decoding alone does not; or InputError."""
    try:
        with path.open("rb") as file:
            Image.open(file, formats=["PNG"]).verify()
            image = Image.open(file, formats=["PNG"])
            image.load()
            file.seek(24)
            bits = file.read(1)[0]  # bit depth, byte 24 of every PNG
    except Exception as error:  # Pillow raises nearly everything
        reason = getattr(error, "strerror", None) or f"damaged, too large, or not a PNG: {error}"
        raise InputError(f"{path}: {reason}") from None
    if (bits, image.mode) != (8, mode):
        raise InputError(f"{path}: found mode {image.mode}, {bits} bits per sample; expected mode {mode}, 8 bits")
    return image


def read_label(path: Path) -> np.ndarray:
    """Read (H, W) uint8 label ids; InputError if it is damaged or not a PNG of label ids."""
    label = np.asarray(read_png(path, "L"))
    if label.max() > LARGEST_LABEL_ID:
        raise InputError(f"{path}: label id {label.max()}; expected labelIds, 0 to {LARGEST_LABEL_ID}")
    return label


# ---------------------------------------------------------------------------------------------------- computing


def predict(logits_chw: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Find the class with the largest bilinear logit at every pixel; ties go to the lower class.

    The result is that of upsampling to full size in plain float32 arithmetic and taking the argmax; torch's own last
    bits may differ, where a lead is a few units in the last place. Only the h grid rows are interpolated along x. The
    pixels between two of them are weighted means of the upper and the lower value, so where one class alone leads in
    both rows, it leads everywhere between. Only the other columns are interpolated along y.

    Args:
        logits_chw: (C, h, w) float32, finite.
        size: (H, W).

    Returns:
        (H, W) uint8.

    Source: the coordinates and the order of operations are those of torch's `interpolate(mode="bilinear",
    align_corners=True)`.
    """
    row, y_weight = locate(logits_chw.shape[1], size[0])
    column, x_weight = locate(logits_chw.shape[2], size[1])
    # Rounding can erase a smaller lead than this.
    slack = np.float32(np.abs(logits_chw).max() * 2.0**-20) + np.finfo(np.float32).tiny

    def widen(grid_row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values = grid_row.take(column, axis=1) * (1 - x_weight) + grid_row.take(column + 1, axis=1) * x_weight
        return values, values >= values.max(axis=0) - slack

    prediction = np.empty(size, np.uint8)
    edged = np.pad(logits_chw, ((0, 0), (0, 1), (0, 1)), mode="edge")  # the last row and column have a next one too
    grid_rows = map(widen, edged.transpose(1, 0, 2))
    upper, upper_leads = next(grid_rows)
    for point, (lower, lower_leads) in enumerate(grid_rows):
        pixels = np.flatnonzero(row == point)
        prediction[pixels] = upper_leads.argmax(axis=0)
        columns = np.flatnonzero((upper_leads | lower_leads).sum(axis=0, dtype=np.uint8) > 1)
        weight = y_weight[pixels, None]
        values = upper[:, None, columns] * (1 - weight) + lower[:, None, columns] * weight
        prediction[pixels[:, None], columns] = values.argmax(axis=0)
        upper, upper_leads = lower, lower_leads
    return prediction


def locate(points: int, pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """Find each pixel's grid point before it, int64, and its distance from that, float32; both ends coincide."""
    scale = np.float32(points - 1) / np.float32(pixels - 1) if pixels > 1 else np.float32(0)
    position = scale * np.arange(pixels, dtype=np.float32)
    point = position.astype(np.int64)
    return point, position - point.astype(np.float32)


def count_pixels(label: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Count (H, W) uint8 label ids by predicted train id: (19, 19) int64, row = ground truth, without other ids."""
    pairs = label.astype(np.uint16) << 8 | prediction
    return np.bincount(pairs.ravel(), minlength=1 << 16).reshape(256, 256)[LABEL_IDS, : len(CLASSES)]


def score(frame: Frame, save_labels: Path | None, save_colors: Path | None) -> np.ndarray | str:
    """Count one frame's pixels, (19, 19), and write the maps that are wanted; or return what is wrong with it."""
    try:
        label = read_label(frame.label)
        prediction = predict(read_logits(frame.logits), label.shape)
    except InputError as error:
        return str(error)
    if save_labels:
        Image.fromarray(LABEL_IDS[prediction]).save(save_labels / f"{frame.name}{LABEL_MAP_ENDING}", compress_level=1)
    if save_colors:
        color_map = Image.fromarray(prediction)
        color_map.putpalette(PALETTE)
        color_map.save(save_colors / f"{frame.name}_predicted_color.png", compress_level=1)
    return count_pixels(label, prediction)


def score_all(frames: list[Frame], args: argparse.Namespace) -> list[np.ndarray]:
    """Make the folders to write to, and score frames in threads; return (19, 19) int64 for each, or InputError."""
    for folder in filter(None, (args.save_labels, args.save_colors)):
        folder.mkdir(parents=True, exist_ok=True)
    if args.json:
        make_parent(args.json)
    score_frame = functools.partial(score, save_labels=args.save_labels, save_colors=args.save_colors)
    scored = thread_map(score_frame, frames, max_workers=args.workers, unit="frame", disable=None)
    errors = [result for result in scored if isinstance(result, str)]
    if errors:
        raise InputError(f"{len(errors)} of {len(frames)} frames cannot be scored: {first_five(errors, '; ')}")
    return scored


def compute_iou(confusion: np.ndarray) -> np.ndarray:
    """Compute each class's IoU from (C, C) counts, row = ground truth; NaN for one that does not occur in either."""
    return divide(np.diag(confusion), confusion.sum(axis=1) + confusion.sum(axis=0) - np.diag(confusion))


def divide(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Divide, with NaN for 0 / 0."""
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole > 0)


def mean_iou(confusion: np.ndarray) -> float | None:
    """Average the IoU over the classes that occur in ground truth or prediction; None without any."""
    return float(np.nanmean(compute_iou(confusion))) if confusion.any() else None


def summarise(frames: list[Frame], confusions: list[np.ndarray]) -> dict:
    """Compute the metrics of the whole split from the summed confusion matrix, as fractions from 0 to 1.

    `miou` is the mean IoU over the classes that occur in ground truth or prediction, each class's IoU counted over all
    frames at once. `mean_class_accuracy` is the mean recall of those in the ground truth. Other ids count nowhere.
    """
    confusion = np.sum(confusions, axis=0)
    by_category = np.zeros((len(CATEGORIES), len(CATEGORIES)), np.int64)
    np.add.at(by_category, (CATEGORY_OF[:, None], CATEGORY_OF), confusion)
    return {
        "frames": len(frames),
        **measure(confusion),
        "category_iou": by_name(CATEGORIES, compute_iou(by_category)),
        "mean_class_accuracy": float(np.nanmean(divide(np.diag(confusion), confusion.sum(axis=1)))),
        "confusion_matrix": confusion.tolist(),
        "per_frame": [
            {"frame": frame.name, **measure(part), "truth": part.sum(axis=1).tolist()}
            for frame, part in zip(frames, confusions)
        ],
    }


def measure(confusion: np.ndarray) -> dict:
    """Compute the metrics that a frame and the split share, from (19, 19) counts; None where nothing is counted."""
    return {
        "miou": mean_iou(confusion),
        "pixel_accuracy": float(np.trace(confusion) / confusion.sum()) if confusion.any() else None,
        "iou": by_name(NAMES, compute_iou(confusion)),
    }


def note_files(args: argparse.Namespace, frames: list[Frame], labels: dict[str, Path]) -> dict:
    """Note what is scored, with absolute paths; `limit` only where it left frames out."""
    limit = {"limit": args.limit} if len(frames) < len(labels) else {}
    folders = {"data_dir": args.data_dir, "result_dir": args.result_dir, "label_maps": args.save_labels}
    return {"split": args.split, **limit, **{name: path and str(path.resolve()) for name, path in folders.items()}}


def by_name(names: list[str], values: np.ndarray) -> dict[str, float | None]:
    """Name the values; JSON has null and no NaN."""
    return {name: None if np.isnan(value) else float(value) for name, value in zip(names, values)}


def compare_with_expected(miou: float, expected: float, tolerance: float) -> dict:
    """Compare with the expected mIoU in percent; bounds inclusive, immune to rounding."""
    return {"percent": expected, "tolerance": tolerance, "passed": round(abs(100 * miou - expected), 9) <= tolerance}


# ---------------------------------------------------------------------------------------------------- reporting


def report_maps(frames: list[Frame], args: argparse.Namespace) -> None:
    """Print where the maps are; warn of label maps of other frames there, which an evaluator would count too."""
    for kind, folder in (("label", args.save_labels), ("color", args.save_colors)):
        if folder:
            print(f"{kind} maps written to {folder}: {len(frames)}")
    present = list_folder(args.save_labels) if args.save_labels else []
    written = {f"{frame.name}{LABEL_MAP_ENDING}" for frame in frames}
    others = [path.name for path in present if path.name.endswith(LABEL_MAP_ENDING) and path.name not in written]
    if others:
        warn(f"{args.save_labels}: has label maps of other frames: {first_five(others)}")


def warn_if_suspicious(metrics: dict, frames: list[Frame]) -> None:
    """Warn of what a working model does not predict, and of what Cityscapes' labels are not."""
    resized = [frame.name for frame in frames if Image.open(io.BytesIO(frame.label.read_bytes())).size != (2048, 1024)]
    if resized:
        warn(f"labels that are not 2048 x 1024, whose mIoU is not comparable: {first_five(resized)}")
    confusion = np.array(metrics["confusion_matrix"])
    if not confusion[LABEL_IDS > 19].any():
        warn("no label id above 19 in the whole split: are these labelTrainIds? Expected *_gtFine_labelIds.png")
    predicted = np.flatnonzero(confusion.any(axis=0))
    if len(predicted) == 1:
        warn(f"every pixel is predicted as {NAMES[predicted[0]]}: the model, its weights or its input are wrong")


def format_table(metrics: dict) -> str:
    """Format the metrics in percent, one class per line; then the mIoU, and whether it is the expected one."""
    confusion = np.array(metrics["confusion_matrix"])
    truth = confusion.sum(axis=1)
    columns = list(metrics["iou"].values()), divide(np.diag(confusion), truth), truth / truth.sum()
    lines = [f"{'class':<15}{'IoU %':>8}{'recall %':>10}{'GT pixels %':>13}"]
    for name, iou, recall, share in zip(NAMES, *columns):
        lines.append(f"{name:<15}{percent(iou):>8}{percent(recall):>10}{percent(share):>13}")
    lines.append(f"{'mean':<15}{percent(metrics['miou']):>8}{percent(metrics['mean_class_accuracy']):>10}")
    only_predicted = np.count_nonzero(confusion[:, truth == 0].any(axis=0))
    if only_predicted:
        rest = percent(np.mean(compute_iou(confusion)[truth > 0]))
        lines.append(f"classes that are only predicted, and count 0: {only_predicted}; mean over the others: {rest} %")
    lines.append(f"\nframes: {metrics['frames']}, pixel accuracy {percent(metrics['pixel_accuracy'])} %")
    lines.append(f"\nmIoU = {percent(metrics['miou'])}")
    if "expected" in metrics:
        expected, miou = metrics["expected"], f"{100 * metrics['miou']:.4f}"
        near = f"within {expected['tolerance']} of {expected['percent']:.4f}"
        see = 'see "The mIoU is not the expected one" in docs/troubleshooting.md'
        lines.append(f"\nPASS: {miou} is {near}" if expected["passed"] else f"\nFAIL: {miou} is not {near}; {see}")
    return "\n".join(lines)


def percent(fraction: float | None, sign: str = "", digits: int = 2) -> str:
    """Format a fraction as percent, or a dash where there is none; + 0 removes the sign of -0."""
    missing = fraction is None or np.isnan(fraction)
    return "-" if missing else f"{round(100 * float(fraction), digits) + 0:{sign}.{digits}f}"


def count_cpus() -> int:
    """Count the CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("must be an integer, 1 or more")
    return int(text)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Score logits against the Cityscapes labels: IoU per class and mIoU.")
    add = parser.add_argument
    add("data_dir", metavar="DATA_DIR", type=Path, help="Cityscapes; holds gtFine/")
    add("result_dir", metavar="RESULT_DIR", type=Path, help="folder of logits, e.g. result/result_bs1")
    add("--split", default="val", help="folder below gtFine (default: %(default)s)")
    add("--limit", metavar="N", type=at_least_one, help="score the first N frames only (default: all)")
    add("--workers", metavar="N", type=at_least_one, default=count_cpus(), help="threads (default: one per CPU)")
    add("--json", metavar="FILE", type=Path, help="write the run's record: metrics, inference summary, paths")
    add("--save_labels", metavar="DIR", type=Path, help="write each prediction here, as a PNG of label ids")
    add("--save_colors", metavar="DIR", type=Path, help="write each prediction here, as a PNG in Cityscapes' colors")
    add("--expect", metavar="PERCENT", type=float, help="expected mIoU; exit status 1 if it is missed")
    add("--tolerance", metavar="POINTS", type=float, default=0.1, help="points around --expect (default: %(default)s)")
    args = parser.parse_args(argv)
    if not np.isfinite([args.expect or 0, args.tolerance]).all():
        parser.error("--expect and --tolerance must be finite")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    labels = find_labels(args.data_dir, args.split)
    frames = find_frames(labels, args.result_dir, args.limit)
    summaries = read_summaries([frame.logits for frame in frames])
    confusions = score_all(frames, args)
    report_maps(frames, args)
    if not np.any(confusions):  # as in Cityscapes' test split, of which only the maps are of use
        if (args.save_labels or args.save_colors) and not args.json and args.expect is None:
            return 0
        raise InputError(f"{args.data_dir}/gtFine/{args.split}: no pixel of any label has a class")
    metrics = {**note_files(args, frames, labels), "summaries": summaries, **summarise(frames, confusions)}
    if args.expect is not None:
        metrics["expected"] = compare_with_expected(metrics["miou"], args.expect, args.tolerance)
    if args.json:  # before printing, which a closed pipe ends
        args.json.write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    warn_if_suspicious(metrics, frames)
    print(format_table(metrics))
    return int("expected" in metrics and not metrics["expected"]["passed"])


def run_script(main: Callable[[], int], umask: int = 0o022) -> None:
    """Run main and exit: a mistake of the user is one line on stderr, and Ctrl-C ends a shell's loop too."""
    os.umask(os.umask(0) | umask)  # ais_bench rejects group- or world-writable files
    for name in ("stdin", "stdout", "stderr"):  # None if it is closed; another file would get its descriptor
        setattr(sys, name, getattr(sys, name) or os.fdopen(os.open(os.devnull, os.O_RDWR), "w"))
    if hasattr(sys.stdout, "reconfigure"):  # not in Jupyter, whose kernel Ctrl-C would end too
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that its encoding cannot hold
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        raise SystemExit(main())
    except (InputError, OSError) as error:
        reason = f"{error.filename or 'output'}: {error.strerror or error}" if isinstance(error, OSError) else error
        raise SystemExit(f"{Path(sys.argv[0]).name}: error: {reason}") from None


if __name__ == "__main__":
    run_script(main)
