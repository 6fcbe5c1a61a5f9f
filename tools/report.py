#!/usr/bin/env python3
"""Write one self-contained HTML page about results: what ran, mIoU, speed, classes, confusions, frames.

   METRICS.json ...                                               of intrada_postprocess.py --json, one per run
   --labels DIR/<frame>_predicted_labelIds.png                    a run's label maps, of --save_labels; once per run
   --data DATA_DIR/{leftImg8bit,gtFine}/<split>/<city>/<frame>_*  its images and labels
   --perf SUMMARY.json ...                                        of ais_bench or tools/infer.py
-> one self-contained HTML file without scripts; the same inputs give the same bytes

The summary of a run is the --perf file called <name of its RESULT_DIR>_summary.json, or those of several devices,
<name of its RESULT_DIR>/device0_summary.json, ...; each must be of one of the runs.

   $ python3 tools/report.py metrics_bs1.json --labels labels_bs1 --data cityscapes --output report.html
   report.html: 1 run, 3 frames, 0.6 MB
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import re
import sys
import time
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
    NAMES,
    InputError,
    count_cpus,
    count_pixels,
    find_by_frame,
    first_five,
    list_folder,
    mean_iou,
    read_label,
    read_png,
    run_script,
)

# Source: Huawei's ModelZoo-PyTorch, ACL_PyTorch/contrib/cv/segmentation/IntraDA: Cityscapes val, frames/s on 310P3.
PUBLISHED_MIOU = 0.4701
PUBLISHED_FPS = {1: 47.52, 4: 43.64, 8: 43.35, 16: 43.41, 32: 42.09, 64: 20.39}

IGNORED, CORRECT = len(CLASSES), len(CLASSES) + 1  # two more train ids: not scored, and predicted correctly
COLORS = [*(color for _, _, _, color in CLASSES), "#000000", "#ffffff"]
TRAIN_ID_OF = np.full(256, IGNORED, np.uint8)
TRAIN_ID_OF[LABEL_IDS] = range(len(CLASSES))

LARGE_FRAMES, RUN_CONFUSIONS, FRAME_CONFUSIONS, CHANGED_FRAMES = 5, 8, 3, 10
SMALL, LARGE = (192, 96), (1024, 512)  # width, height of a panel

# What reading and converting a value raises where JSON is not what our scripts or ais_bench wrote.
WRONG_VALUE = ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError


# ---------------------------------------------------------------------------------------------------- reading JSON


def read_metrics(path: Path) -> dict[str, Any]:
    """Read the metrics of a run: the frames from the lowest mIoU, and `confusion` (19, 19), row = ground truth.

    Raises:
        InputError: it is not what intrada_postprocess.py --json wrote.
    """
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"), parse_constant=int)  # refuses NaN
        rows = [{"frame": str(row["frame"]), "miou": to_float(row["miou"])} for row in metrics["per_frame"]]
        expected = metrics.get("expected")
        averages = "miou", "pixel_accuracy", "mean_class_accuracy", "frequency_weighted_iou"
        return {
            "path": path,
            "split": str(metrics["split"]),
            "result_dir": str(metrics["result_dir"]),
            "sha256": metrics.get("model_sha256"),
            "frames": len(rows),
            **{key: float(metrics[key]) for key in averages},
            "iou": {name: to_float(metrics["iou"][name]) for name in NAMES},
            "confusion": np.array(metrics["confusion_matrix"], np.int64).reshape(len(NAMES), len(NAMES)),
            "per_frame": sorted(rows, key=lambda row: (row["miou"] is None, row["miou"], row["frame"])),
            "expected": expected and {key: float(expected[key]) for key in ("percent", "tolerance", "passed")},
        }
    except WRONG_VALUE as error:
        raise InputError(f"{path}: not what intrada_postprocess.py --json wrote: {error!r}") from None


def to_float(value: Any) -> float | None:
    return None if value is None else float(value)


def read_summary(path: Path) -> dict[str, Any]:
    """Read what ran, where, and how fast; ais_bench's summary has options in `args`, and no model, device or date.

    Raises:
        InputError: it is not what ais_bench or tools/infer.py wrote.
    """
    try:
        summary = json.loads(path.read_text(encoding="utf-8"), parse_constant=int)  # refuses NaN
        options, provider = read_options(summary["args"]), summary.get("provider")
        times = summary["NPU_compute_time"]
        fps, mean_ms, p99_ms = float(summary["throughput"]), float(times["mean"]), float(times["percentile(99%)"])
        model = Path(summary.get("model") or options.get("model", "model unknown")).name
        batch_size = int(summary.get("batchsize") or round(fps * mean_ms / 1000))  # ais_bench computed fps from it
        device = f"ONNX Runtime, {provider.upper()}" if provider else "Ascend, ais_bench"
        if provider != "cpu":
            device += f", device {summary.get('device', options.get('device', 0))}"
        return {
            "path": path,
            "is_device": re.match(r"device\d", path.name) is not None,
            "name": f"{model}, batch {batch_size}, {device}",
            "model": model,
            "sha256": str(summary.get("model_sha256", "")),
            "batch_size": batch_size,
            "device": device,
            "versions": ", ".join(f"{name} {version}" for name, version in summary.get("versions", {}).items()),
            "date": summary.get("date") or time.strftime("%Y-%m-%d", time.gmtime(path.stat().st_mtime)),
            "speed": [fps, mean_ms, p99_ms, to_float(summary.get("end_to_end_throughput"))],
        }
    except WRONG_VALUE as error:
        raise InputError(f"{path}: not what ais_bench or tools/infer.py wrote: {error!r}") from None


def read_options(words: list[str]) -> dict[str, str]:
    """Read options, `--name value` or `--name=value`, from the words of a command."""
    parts = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    return {name[2:]: value for name, value in zip(parts, parts[1:]) if name.startswith("--")}


def add_summaries(runs: list[dict[str, Any]], summaries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add each run's summary and a name: what ran, and where two runs would have one name, their folders and files.

    Raises:
        InputError: a summary is of no run, or a run has two.
    """
    of_run: dict[int, list[dict[str, Any]]] = {}
    for summary in summaries:
        of_run.setdefault(find_run(runs, summary), []).append(summary)
    named = []
    for n, run in enumerate(runs):
        summary = merge_devices(of_run[n]) if n in of_run else None
        if summary and run["sha256"] and summary["sha256"] != run["sha256"]:
            raise InputError(f"{summary['path']}: of another model than {run['path']}; score those results again")
        name = summary["name"] if summary else f"{run['result_dir']}, model unknown"
        named.append({**run, "summary": summary, "name": name})
    for key in ("result_dir", "path"):
        times = Counter(run["name"] for run in named)
        named = [{**run, "name": f"{run['name']} ({run[key]})"} if times[run["name"]] > 1 else run for run in named]
    return named


def find_run(runs: list[dict[str, Any]], summary: dict[str, Any]) -> int:
    """Find the run that a summary is of, by `<result folder>_summary.json`, or `<result folder>/device0_summary.json`.

    Raises:
        InputError: there is none, or several that only their paths could tell apart.
    """
    path = summary["path"].resolve()
    folder = path.parent / re.sub(r"_summary\.json$", "", path.name)
    paths = [Path(run["result_dir"]).resolve() for run in runs]
    if summary["is_device"] and (path.parent in paths or folder not in paths):  # or a device was scored by itself
        folder = path.parent
    found = [n for n, result_dir in enumerate(paths) if result_dir == folder]
    found = found or [n for n, result_dir in enumerate(paths) if result_dir.name == folder.name]
    if len(found) != 1:
        raise InputError(f"{summary['path']}: is the summary of {len(found)} of the runs, by the name of their results")
    return found[0]


def merge_devices(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """Make one summary of those of a run's devices: frames/s add up, times are averaged, the largest p99 counts.

    Raises:
        InputError: there are several, and not all of a device.
    """
    first, *others = summaries
    if not others:
        return first
    names = [summary["path"].name for summary in summaries]
    if not all(summary["is_device"] for summary in summaries) or len(set(names)) < len(names):
        raise InputError(f"{first_five([str(summary['path']) for summary in summaries])}: several summaries of one run")
    fps, mean_ms, p99_ms, end_to_end = zip(*(summary["speed"] for summary in summaries))
    end_to_end = None if None in end_to_end else sum(end_to_end)
    more = {key: f"{first[key]} and {len(others)} more" for key in ("name", "device")}
    return {**first, **more, "speed": [sum(fps), sum(mean_ms) / len(mean_ms), max(p99_ms), end_to_end]}


# ---------------------------------------------------------------------------------------------------- drawing frames


def find_frames(runs: list[dict[str, Any]], data_dir: Path, labels: list[Path]) -> list[dict[str, Any]]:
    """Find the files of every frame of the first run: its row of the metrics, and `image`, `label` and `label maps`.

    Args:
        labels: folders of label maps, of the first runs in their order.

    Raises:
        InputError: files are missing; counts and names them.
    """
    split = runs[0]["split"]
    found = {
        f"image in {data_dir}": find_by_frame(data_dir / "leftImg8bit" / split, IMAGE_ENDING),
        f"label in {data_dir}": find_by_frame(data_dir / "gtFine" / split, LABEL_ENDING),
        **{f"label map in {folder}": find_label_maps(folder) for folder in labels},
    }
    rows = runs[0]["per_frame"]
    missing = [f"{kind} of {row['frame']}" for row in rows for kind in found if row["frame"] not in found[kind]]
    if missing:
        raise InputError(f"files missing: {len(missing)}: {first_five(missing)}")
    paths = [[by_frame[row["frame"]] for by_frame in found.values()] for row in rows]
    return [
        {**row, "image": image, "label": label, "label maps": maps} for row, (image, label, *maps) in zip(rows, paths)
    ]


def find_label_maps(folder: Path) -> dict[str, Path]:
    """Find `<frame>_predicted_labelIds.png` by frame."""
    ending = "_predicted_labelIds.png"
    return {path.name[: -len(ending)]: path for path in list_folder(folder) if path.name.endswith(ending)}


def draw_frame(frame: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """Draw a frame's image, ground truth, prediction and errors, and if it is large the prediction over the image.

    A large frame also shows the predictions of further runs, and where they differ from the first. Of the labels every
    n-th pixel is shown, so that no colors are mixed.

    Raises:
        InputError: a file is damaged, or a label map is not the one of the metrics.
    """
    label = read_label(frame["label"])
    truth = TRAIN_ID_OF[label]
    predictions = [read_prediction(path, label, miou) for path, miou in zip(frame["label maps"], frame["mious"])]
    prediction, *others = predictions
    image = read_png(frame["image"], "RGB").resize(size, Image.BOX)
    errors = np.where((prediction == truth) & (truth != IGNORED), np.uint8(CORRECT), truth)
    images = {
        "image": image,
        "ground truth": paint(truth, size),
        "prediction": paint(prediction, size),
        "errors": paint(errors, size),
    }
    if size == LARGE:
        images["overlay"] = Image.blend(image, images["prediction"].convert("RGB"), 0.5)
        for n, other in enumerate(others, 2):
            images[f"prediction of run {n}"] = paint(other, size)
            images[f"changes in run {n}"] = paint(np.where(other == prediction, np.uint8(CORRECT), other), size)
    confusion = count_pixels(label, prediction)
    shares = confusion / max(confusion.sum(), 1)
    panels = [(title, to_data_uri(drawn), *size) for title, drawn in images.items()]
    return {**frame, "panels": panels, "confusions": find_confusions(shares, FRAME_CONFUSIONS)}


def read_prediction(path: Path, label: np.ndarray, miou: float | None) -> np.ndarray:
    """Read a label map as (H, W) uint8 train ids.

    Raises:
        InputError: it is damaged, or not the one that has this mIoU.
    """
    label_map = read_label(path)
    if label.shape != label_map.shape:
        raise InputError(f"{path}: found {label_map.shape}, expected its label's {label.shape}")
    prediction = TRAIN_ID_OF[label_map]
    found, expected = (
        np.nan if value is None else value for value in (mean_iou(count_pixels(label, prediction)), miou)
    )
    if not np.isclose(found, expected, rtol=0, atol=1e-9, equal_nan=True):
        raise InputError(f"{path}: not the prediction of these metrics; pass --labels of the same run")
    return prediction


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


def draw_frames(frames: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Draw frames in threads, the first ones large; Pillow releases the GIL while it decodes."""
    sizes = [LARGE if n < LARGE_FRAMES else SMALL for n in range(len(frames))]
    return thread_map(draw_frame, frames, sizes, max_workers=count_cpus(), unit="frame", disable=None)


# ---------------------------------------------------------------------------------------------------- figures


def find_confusions(shares: np.ndarray, largest: int) -> list[tuple[float, str, str]]:
    """Find the largest confusions in (19, 19) shares: the share, the class in the ground truth, the predicted one."""
    wrong = np.where(np.eye(len(NAMES), dtype=bool), 0, shares)
    pairs = [divmod(int(n), len(NAMES)) for n in np.argsort(-wrong, axis=None, kind="stable")[:largest]]
    return [(wrong[pair], NAMES[pair[0]], NAMES[pair[1]]) for pair in pairs if wrong[pair] >= 0.0005]


def add_mious(runs: list[dict[str, Any]]) -> None:
    """Add to each frame of the first run its mIoU in every run, None where a run has no such frame."""
    by_frame = [{row["frame"]: row["miou"] for row in run["per_frame"]} for run in runs]
    for row in runs[0]["per_frame"]:
        row["mious"] = [mious.get(row["frame"]) for mious in by_frame]


def find_changes(runs: list[dict[str, Any]], other: int) -> list[tuple[float, dict[str, Any]]]:
    """Find the frames whose mIoU changed most from the first run to another, up or down, and by how much."""
    rows = [row for row in runs[0]["per_frame"] if None not in (row["mious"][0], row["mious"][other])]
    changes = [(row["mious"][other] - row["mious"][0], row) for row in rows]
    largest = sorted(changes, key=lambda change: (-abs(change[0]), change[1]["frame"]))[:CHANGED_FRAMES]
    return sorted(
        (change for change in largest if abs(change[0]) >= 0.00005), key=lambda change: (change[0], change[1]["frame"])
    )


def list_classes(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """List each class's IoU in every run with its change, and the first run's other figures; the lowest IoU first."""
    confusion = runs[0]["confusion"]
    hits, truth, predicted = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    with np.errstate(invalid="ignore"):  # 0 / 0 of a class that does not occur is NaN
        figures = zip(hits / truth, hits / predicted, truth / truth.sum())
    rows = []
    for name, figures_of_class in zip(NAMES, figures):
        iou, *others = (run["iou"][name] for run in runs)
        changes = [(other, None if None in (iou, other) else other - iou) for other in others]
        rows.append({"name": name, "iou": iou, "others": changes, "figures": figures_of_class})
    return sorted(rows, key=lambda row: (row["iou"] is None, row["iou"]))


def count_frames(run: dict[str, Any]) -> list[list[str]]:
    """Sort the frames into bins of 5 points of mIoU; the last bin includes 100 %."""
    rows = [row for row in run["per_frame"] if row["miou"] is not None]
    return [[row["frame"] for row in rows if min(int(20 * row["miou"]), 19) == n] for n in range(20)]


def percent(fraction: float | None, sign: str = "", digits: int = 2) -> str:
    """Format a fraction as percent, or a dash if there is none; + 0 removes the sign of -0."""
    missing = fraction is None or np.isnan(fraction)
    return "-" if missing else f"{round(100 * fraction, digits) + 0:{sign}.{digits}f}"


# ---------------------------------------------------------------------------------------------------- the page


def render(runs: list[dict[str, Any]], frames: list[dict[str, Any]]) -> str:
    """Fill the page in; everything from files is escaped."""
    loader = jinja2.FileSystemLoader(str(Path(__file__).parent))
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = percent
    first = runs[0]
    with np.errstate(invalid="ignore"):
        shares = np.nan_to_num(first["confusion"] / first["confusion"].sum(axis=1, keepdims=True))
    speeds = [(run["name"], run["summary"]) for run in runs if run["summary"]]
    return environment.get_template("report.html").render(
        first=first,
        runs=runs,
        speeds=sorted(speeds, key=lambda speed: speed[1]["batch_size"]),
        published_miou=PUBLISHED_MIOU,
        published_fps=PUBLISHED_FPS,
        colors=dict(zip(NAMES, COLORS)),
        classes=list_classes(runs),
        changes=[(run["name"], find_changes(runs, n)) for n, run in enumerate(runs) if n],
        confusions=find_confusions(shares, RUN_CONFUSIONS),
        matrix=list(zip(NAMES, shares)),
        bins=count_frames(first),
        large=frames[:LARGE_FRAMES],
        small=frames[LARGE_FRAMES:],
    )


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write one self-contained HTML page about results.")
    add = parser.add_argument
    add("metrics", metavar="METRICS.json", nargs="+", type=Path, help="of intrada_postprocess.py --json, one per run")
    add("--labels", metavar="DIR", type=Path, action="append", default=[],
        help="a run's label maps, of --save_labels; once per run, in their order; needs --data")  # fmt: skip
    add("--data", metavar="DATA_DIR", type=Path, help="Cityscapes, with leftImg8bit/ and gtFine/; needs --labels")
    add("--perf", metavar="SUMMARY.json", nargs="+", type=Path, default=[], help="of ais_bench or tools/infer.py")
    add("--output", metavar="FILE", type=Path, default=Path("report.html"), help="page to write (default: %(default)s)")
    args = parser.parse_args(argv)
    if bool(args.labels) != bool(args.data):
        parser.error("--labels and --data go together")
    if len(args.labels) > len(args.metrics):
        parser.error("--labels was given more often than METRICS.json")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    runs = add_summaries(list(map(read_metrics, args.metrics)), list(map(read_summary, args.perf)))
    add_mious(runs)
    frames = draw_frames(find_frames(runs, args.data, args.labels)) if args.labels else []
    page = render(runs, frames).encode("utf-8", "backslashreplace")
    args.output.write_bytes(page)
    counts = f"{len(runs)} run{'s' * (len(runs) != 1)}, {len(frames)} frame{'s' * (len(frames) != 1)}"
    print(f"{args.output}: {counts}, {len(page) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    run_script(main)
