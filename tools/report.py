#!/usr/bin/env python3
"""Write one HTML page about results: what ran, mIoU, speed, classes, confusions, frames.

   METRICS.json ...      the records of runs, of intrada_postprocess.py --json; runs are called by these files' names
-> one self-contained HTML file without scripts; the same inputs give the same bytes

Images and labels of the first run, and all runs' label maps (of --save_labels), are where METRICS.json or --data and
--labels say.

   $ python3 tools/report.py metrics_bs1.json
   report.html: 1 run, 3 frames, 0.6 MB
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image
from tqdm.contrib.concurrent import thread_map

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from intrada_postprocess import (
    CLASSES,
    IMAGE_ENDING,
    LABEL_ENDING,
    LABEL_IDS,
    LABEL_MAP_ENDING,
    NAMES,
    PUBLISHED_FPS,
    PUBLISHED_MIOU,
    InputError,
    count_cpus,
    count_pixels,
    find_by_frame,
    first_five,
    list_folder,
    make_parent,
    mean_iou,
    percent,
    read_label,
    read_png,
    run_script,
    warn,
)

# More train ids, for the maps of errors and of changes.
IGNORED, CORRECT, FIXED, BROKEN, WRONG = range(len(CLASSES), len(CLASSES) + 5)
CHANGES = {"fixed": FIXED, "broken": BROKEN, "wrong in both": WRONG}
COLORS = [*(color for _, _, _, color in CLASSES), "#000000", "#ffffff", "#1a9641", "#d7191c", "#a0a0a0"]
TRAIN_ID_OF = np.full(256, IGNORED, np.uint8)
TRAIN_ID_OF[LABEL_IDS] = range(len(CLASSES))

LARGE_FRAMES, RUN_CONFUSIONS, FRAME_CONFUSIONS, CHANGED_FRAMES, WORST_FRAMES = 5, 8, 3, 10, 5
AVERAGES = "miou", "pixel_accuracy", "mean_class_accuracy"
SMALL, LARGE = (192, 96), (1024, 512)  # width, height of a panel

# What reading and converting a value raises where JSON is not what our scripts or ais_bench wrote.
WRONG_VALUE = ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError


def read_metrics(path: Path) -> dict[str, Any]:
    """Read a run's record: its frames, and `confusion` (19, 19), row = ground truth.

    Raises:
        InputError: it is not what intrada_postprocess.py --json wrote.
    """
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"), parse_constant=int)  # refuses NaN
        if "per_frame" in metrics and "summaries" not in metrics:
            raise InputError(f"{path}: written by an earlier version; score the results again")
        rows = [{"frame": str(row["frame"]), "miou": to_float(row["miou"]), "accuracy": to_float(row["pixel_accuracy"]),
                 "iou": [to_float(row["iou"][name]) for name in NAMES] if "iou" in row else None,
                 "truth": np.array(row["truth"], np.int64).reshape(len(NAMES)) if "truth" in row else None}
                for row in metrics["per_frame"]]  # fmt: skip
        expected = metrics.get("expected")
        return {
            "path": path,
            "split": str(metrics["split"]),
            "is_limited": "limit" in metrics,
            "result_dir": str(metrics["result_dir"]),
            "data_dir": Path(metrics["data_dir"]),
            "label_maps": metrics["label_maps"] and Path(metrics["label_maps"]),
            "ran": describe_summaries(metrics["summaries"]) if metrics["summaries"] else None,
            "frames": len(rows),
            **{key: float(metrics[key]) for key in AVERAGES},
            "iou": {name: to_float(metrics["iou"][name]) for name in NAMES},
            "confusion": np.array(metrics["confusion_matrix"], np.int64).reshape(len(NAMES), len(NAMES)),
            "per_frame": rows,
            "expected": expected and {key: float(expected[key]) for key in ("percent", "tolerance", "passed")},
        }
    except WRONG_VALUE as error:
        raise InputError(f"{path}: not what intrada_postprocess.py --json wrote: {error!r}") from None


def to_float(value: Any) -> float | None:
    return None if value is None else float(value)


def describe_summaries(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """Describe what ran, where, and how fast; ais_bench's summary has options in `args`, and no model or device.

    The frames/s of several devices add up, their times are averaged, and the largest p99 counts.
    """
    first, times = summaries[0], [summary["NPU_compute_time"] for summary in summaries]
    options = dict(re.findall(r"--(\w+)[ =](?!--)(\S+)", " ".join(map(str, first["args"]))))
    provider = first.get("provider")
    fps = [float(summary["throughput"]) for summary in summaries]
    mean_ms = float(np.mean([float(time["mean"]) for time in times]))
    p99_ms = [time.get("percentile(99%)") for time in times]  # missing with ais_bench's --threads
    end_to_end = [summary.get("end_to_end_throughput") for summary in summaries]
    folders = [re.search(r"^device(\d+)|$", str(summary["file"]))[1] for summary in summaries]
    devices = [str(summary.get("device", n or options.get("device", 0))) for n, summary in zip(folders, summaries)]
    device = f"ONNX Runtime, {str(provider).upper()}" if provider else "Ascend, ais_bench"
    return {
        "model": Path(first.get("model") or options.get("model", "unknown")).name,
        "SHA-256": str(first.get("model_sha256", ""))[:12],
        "batch size": int(
            first.get("batchsize") or round(fps[0] * float(times[0]["mean"]) / 1000)
        ),  # as ais_bench has it
        "device": device if provider == "cpu" else f"{device}, device {', '.join(devices)}",
        "versions": ", ".join(f"{name} {version}" for name, version in first.get("versions", {}).items()),
        "date": str(first["date"]),
        "speed": [
            sum(fps),
            mean_ms,
            None if None in p99_ms else max(map(float, p99_ms)),
            None if None in end_to_end else sum(map(float, end_to_end)),
        ],
    }


def join_runs(runs: list[dict[str, Any]]) -> None:
    """Name each run by its file; add to the first's frames `mious` and `scores` of all runs, and sort them by these."""
    first, stems = runs[0], Counter(run["path"].stem for run in runs)
    by_frame = [{row["frame"]: row for row in run["per_frame"]} for run in runs]
    for run, frames in zip(runs, by_frame):
        run["name"] = run["path"].stem if stems[run["path"].stem] == 1 else str(run["path"])
        same_truth = (run["confusion"].sum(axis=1) == first["confusion"].sum(axis=1)).all()
        if frames.keys() != by_frame[0].keys() or not same_truth:
            raise InputError(f"{run['path']}: of other frames or other ground truth than {first['path']}")
    for row in first["per_frame"]:
        row["mious"] = [frames[row["frame"]]["miou"] for frames in by_frame]
        row["scores"] = [score(frames[row["frame"]], row["truth"]) for frames in by_frame]
    first["per_frame"].sort(key=lambda row: (row["scores"][0] is None, row["scores"][0], row["frame"]))


def score(row: dict[str, Any], truth: np.ndarray | None) -> float | None:
    """Average a frame's IoU over the classes in its ground truth; its mIoU if a record has no `truth`."""
    if truth is None or row["iou"] is None:
        return row["miou"]
    ious = [iou for iou, pixels in zip(row["iou"], truth) if pixels and iou is not None]
    return float(np.mean(ious)) if ious else None


# ---------------------------------------------------------------------------------------------------- drawing frames


def find_frames(runs: list[dict[str, Any]], data_dir: Path) -> list[dict[str, Any]]:
    """Find every frame's files: its row of the first run, `image`, `label`, and `label_maps` of the runs that have any.

    Raises:
        InputError: files are missing; counts and names them.
    """
    if not runs[0]["label_maps"]:
        raise InputError(f"{runs[0]['path']}: scored without --save_labels; pass --labels")
    split = runs[0]["split"]
    image_dir, label_dir = data_dir / "leftImg8bit" / split, data_dir / "gtFine" / split
    found = {image_dir: find_by_frame(image_dir, IMAGE_ENDING), label_dir: find_by_frame(label_dir, LABEL_ENDING)}
    maps = {n: run["label_maps"] for n, run in enumerate(runs) if run["label_maps"]}
    for folder in maps.values():
        label_maps = [path for path in list_folder(folder) if path.name.endswith(LABEL_MAP_ENDING)]
        found[folder] = {path.name[: -len(LABEL_MAP_ENDING)]: path for path in label_maps}
    rows = {row["frame"]: row for row in runs[0]["per_frame"]}
    missing = [f"{name} in {folder}" for name in rows for folder in found if name not in found[folder]]
    if missing:
        raise InputError(f"files missing: {len(missing)}: {first_five(missing)}")
    return [{**row, "image": found[image_dir][name], "label": found[label_dir][name],
             "label_maps": {n: found[maps[n]][name] for n in maps}} for name, row in rows.items()]  # fmt: skip


def draw_frame(frame: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """Draw a frame's image, ground truth, prediction and errors, and if it is large the prediction over the image.

    A large frame also shows the predictions of further runs, and what became of each pixel. Of the labels every n-th
    pixel is shown, so that no colors are mixed.

    Raises:
        InputError: a file is damaged, or a label map is not the one of the metrics.
    """
    label = read_label(frame["label"])
    truth = TRAIN_ID_OF[label]
    read = {n: read_prediction(path, label, frame["mious"][n]) for n, path in frame["label_maps"].items()}
    prediction, confusion = read.pop(0)
    image = read_png(frame["image"], "RGB").resize(size, Image.BOX)
    errors = np.where((prediction == truth) & (truth != IGNORED), np.uint8(CORRECT), truth)
    images = {
        "image": image,
        "ground truth": paint(truth, size),
        "prediction": paint(prediction, size),
        "errors": paint(errors, size),
    }
    captions = {}
    if size == LARGE:
        images["overlay"] = Image.blend(image, images["prediction"].convert("RGB"), 0.5)
        for n, (later, _) in read.items():
            changes, captions[f"changes in run {n + 1}"] = compare_predictions(truth, prediction, later)
            images[f"prediction of run {n + 1}"] = paint(later, size)
            images[f"changes in run {n + 1}"] = paint(changes, size)
    return {
        **frame,
        "size": size,
        "panels": [
            {"title": title, "source": to_data_uri(drawn), "caption": captions.get(title)}
            for title, drawn in images.items()
        ],
        "confusions": find_confusions(confusion / max(confusion.sum(), 1), FRAME_CONFUSIONS),
    }


def compare_predictions(truth: np.ndarray, earlier: np.ndarray, later: np.ndarray) -> tuple[np.ndarray, str]:
    """Map what became of each pixel, (H, W) uint8: CORRECT in both, FIXED, ...; and describe the shares in percent."""
    was_right, is_right = earlier == truth, later == truth
    cases = [truth == IGNORED, was_right & is_right, is_right, was_right]
    changes = np.select(cases, [IGNORED, CORRECT, FIXED, BROKEN], WRONG).astype(np.uint8)
    shares = np.bincount(changes.ravel(), minlength=len(COLORS)) / max((truth != IGNORED).sum(), 1)
    return changes, ", ".join(f"{name} {percent(shares[n])} %" for name, n in CHANGES.items())


def read_prediction(path: Path, label: np.ndarray, miou: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Read a label map as (H, W) uint8 train ids, and count its pixels, (19, 19); InputError if it has another mIoU."""
    label_map = read_label(path)
    if label.shape != label_map.shape:
        raise InputError(f"{path}: found {label_map.shape}, expected its label's {label.shape}")
    prediction = TRAIN_ID_OF[label_map]
    confusion = count_pixels(label, prediction)
    found, expected = (np.nan if value is None else value for value in (mean_iou(confusion), miou))
    if not np.isclose(found, expected, rtol=0, atol=1e-9, equal_nan=True):
        raise InputError(f"{path}: not the prediction of these metrics; score the run again")
    return prediction, confusion


def paint(train_ids: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """Show (H, W) train ids in the colors of Cityscapes."""
    image = Image.fromarray(train_ids).resize(size, Image.NEAREST)
    image.putpalette(bytes.fromhex("".join(COLORS).replace("#", "")))
    return image


def to_data_uri(image: Image.Image) -> str:
    """Encode photographs as JPEG and flat colors as PNG, to be part of the page."""
    content, kind = io.BytesIO(), "png" if image.mode == "P" else "jpeg"
    image.save(content, kind, quality=75, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


def draw_frames(runs: list[dict[str, Any]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Draw frames in threads, the first ones large; if the records' files do not fit, warn and draw none."""
    for run, folder in zip(runs, args.labels):
        run["label_maps"] = folder
    if not runs[0]["label_maps"] and not args.data:
        return []
    try:
        frames = find_frames(runs, args.data or runs[0]["data_dir"])
        large = {frame for n in range(1, len(runs)) for _, frame in find_changed_frames(runs[0], n)}
        sizes = [LARGE if n < LARGE_FRAMES or frame["frame"] in large else SMALL for n, frame in enumerate(frames)]
        return thread_map(draw_frame, frames, sizes, max_workers=count_cpus(), unit="frame", disable=None)
    except (InputError, OSError) as error:
        if args.data or args.labels:
            raise
        warn(f"no images: {error}; pass --data and --labels if they are elsewhere now")
        return []


# ---------------------------------------------------------------------------------------------------- the page


def find_confusions(shares: np.ndarray, largest: int) -> list[tuple[float, str, str]]:
    """Find the largest confusions in (19, 19) shares: the share, the class in the ground truth, the predicted one."""
    wrong = np.where(np.eye(len(NAMES), dtype=bool), 0, shares)
    pairs = [divmod(int(n), len(NAMES)) for n in np.argsort(-wrong, axis=None, kind="stable")[:largest]]
    return [(wrong[pair], NAMES[pair[0]], NAMES[pair[1]]) for pair in pairs if wrong[pair] >= 0.0005]


def find_changed_frames(first: dict[str, Any], other: int) -> list[tuple[float, str]]:
    """Find the frames whose score changed most from the first run to another, up or down, and by how much."""
    scores = [(row["frame"], row["scores"][0], row["scores"][other]) for row in first["per_frame"]]
    changes = [(after - before, frame) for frame, before, after in scores if None not in (before, after)]
    largest = sorted(changes, key=lambda change: (-abs(change[0]), change[1]))[:CHANGED_FRAMES]
    return sorted(change for change in largest if abs(change[0]) >= 0.00005)


def list_classes(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """List each class's IoU in every run with its change, and the first run's other figures; the lowest IoU first.

    Of the first run also what its pixels are `predicted_as`, as shares of its ground truth, what is predicted as it but
    `in_fact` is another, as shares of its predictions, and its `worst` frames, where it has 0.1 % of the pixels.
    """
    confusion = runs[0]["confusion"]
    hits, truth, predicted = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    with np.errstate(invalid="ignore"):  # 0 / 0 of a class that does not occur is NaN
        figures = list(zip(hits / truth, hits / predicted, truth / truth.sum()))
        shares = {"predicted_as": confusion / truth[:, None], "in_fact": (confusion / predicted).T}
    rows = []
    for n, name in enumerate(NAMES):
        iou, *others = (run["iou"][name] for run in runs)
        changes = [(other, None if None in (iou, other) else other - iou) for other in others]
        lists = {key: find_largest(np.delete(of[n], n), np.delete(NAMES, n)) for key, of in shares.items()}
        frames = [row for row in runs[0]["per_frame"] if row["truth"] is not None and row["iou"][n] is not None]
        worst = sorted((row["iou"][n], row["frame"]) for row in frames if row["truth"][n] >= 0.001 * row["truth"].sum())
        rows.append({"name": name, "iou": iou, "others": changes, "figures": figures[n], "worst": worst[:WORST_FRAMES],
                     **lists})  # fmt: skip
    return sorted(rows, key=lambda row: (row["iou"] is None, row["iou"]))


def find_largest(shares: np.ndarray, names: np.ndarray) -> list[tuple[float, str]]:
    """Find the largest shares of a class's pixels, at most three."""
    return [(shares[n], names[n]) for n in np.argsort(-shares, kind="stable")[:3] if shares[n] >= 0.0005]


def bin_frames(run: dict[str, Any]) -> list[list[str]]:
    """Sort the frames into bins of 5 points of their score; the last bin includes 100 %."""
    scores = {row["frame"]: row["scores"][0] for row in run["per_frame"] if row["scores"][0] is not None}
    return [[frame for frame, score in scores.items() if min(int(20 * score), 19) == n] for n in range(20)]


def render(runs: list[dict[str, Any]], frames: list[dict[str, Any]]) -> str:
    """Fill the page in; everything from files is escaped."""
    loader = jinja2.FileSystemLoader(str(Path(__file__).resolve().parent))
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = percent
    first = runs[0]
    with np.errstate(invalid="ignore"):
        shares = np.nan_to_num(first["confusion"] / first["confusion"].sum(axis=1, keepdims=True))
    speeds = [(run["name"], run["ran"]) for run in runs if run["ran"]]
    return environment.get_template("report.html.jinja").render(
        first=first,
        runs=runs,
        speeds=sorted(speeds, key=lambda speed: speed[1]["batch size"]),
        published_miou=PUBLISHED_MIOU,
        published_fps=PUBLISHED_FPS,
        colors=dict(zip(NAMES, COLORS)),
        change_colors={name: COLORS[n] for name, n in CHANGES.items()},
        classes=list_classes(runs),
        changes=[(run["name"], find_changed_frames(first, n)) for n, run in enumerate(runs) if n],
        confusions=find_confusions(shares, RUN_CONFUSIONS),
        matrix=list(zip(NAMES, shares)),
        bins=bin_frames(first),
        by_truth=all(row["truth"] is not None for row in first["per_frame"]),
        large=[frame for frame in frames if frame["size"] == LARGE],
        small=[frame for frame in frames if frame["size"] != LARGE],
    )


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write one self-contained HTML page about results.")
    add = parser.add_argument
    add("metrics", metavar="METRICS.json", nargs="+", type=Path, help="of intrada_postprocess.py --json, one per run")
    add("--data", metavar="DATA_DIR", type=Path, help="Cityscapes (default: as recorded)")
    add("--labels", metavar="DIR", nargs="+", type=Path, default=[],
        help="label map folders, after and in the order of METRICS.json (default: as recorded)")  # fmt: skip
    add("--output", metavar="FILE", type=Path, default=Path("report.html"), help="page to write (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.labels and len(args.labels) != len(args.metrics):
        parser.error(f"--labels: {len(args.labels)} given, METRICS.json: {len(args.metrics)}")
    if args.output.suffix != ".html":
        parser.error(f"{args.output}: --output must end in .html")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    make_parent(args.output)
    runs = list(map(read_metrics, args.metrics))
    join_runs(runs)
    frames = draw_frames(runs, args)
    page = render(runs, frames).encode("utf-8", "backslashreplace")
    args.output.write_bytes(page)
    counts = f"{len(runs)} run{'s' * (len(runs) != 1)}, {runs[0]['frames']} frame{'s' * (runs[0]['frames'] != 1)}"
    print(f"{args.output}: {counts}, {len(page) / 1e6:.1f} MB{'' if frames else ', no images'}")
    return 0


if __name__ == "__main__":
    run_script(main)
