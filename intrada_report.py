#!/usr/bin/env python3
"""Write one self-contained HTML page about results: what ran, mIoU, speed, classes, confusions, frames.

   METRICS.json ...                                               of intrada_postprocess.py --json, one per run
   --labels DIR/<frame>_predicted_labelIds.png                    the first run's label maps, of --save_labels
   --data DATA_DIR/{leftImg8bit,gtFine}/<split>/<city>/<frame>_*  its images and labels
   --perf SUMMARY.json ...                                        of ais_bench or intrada_infer.py
-> one HTML file without script that loads nothing; the same inputs give the same bytes

The summary of a run is the --perf file called <name of its RESULT_DIR>_summary.json.

   $ python3 intrada_report.py metrics_bs1.json --labels labels_bs1 --data cityscapes --output report.html
   report.html: 1 run, 3 frames, 0.6 MB
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image
from tqdm import tqdm

# Source: Huawei's ModelZoo-PyTorch, ACL_PyTorch/contrib/cv/segmentation/IntraDA: Cityscapes val, frames/s on 310P3.
PUBLISHED_MIOU = 0.4701
PUBLISHED_FPS = {1: 47.52, 4: 43.64, 8: 43.35, 16: 43.41, 32: 42.09, 64: 20.39}

# Source: cityscapesScripts, helpers/labels.py: every class with a train id, in the order of the train ids.
CLASSES = (
    # labelId, name, color
    (7, "road", "#804080"),
    (8, "sidewalk", "#f423e8"),
    (11, "building", "#464646"),
    (12, "wall", "#66669c"),
    (13, "fence", "#be9999"),
    (17, "pole", "#999999"),
    (19, "traffic light", "#faaa1e"),
    (20, "traffic sign", "#dcdc00"),
    (21, "vegetation", "#6b8e23"),
    (22, "terrain", "#98fb98"),
    (23, "sky", "#4682b4"),
    (24, "person", "#dc143c"),
    (25, "rider", "#ff0000"),
    (26, "car", "#00008e"),
    (27, "truck", "#000046"),
    (28, "bus", "#003c64"),
    (31, "train", "#005064"),
    (32, "motorcycle", "#0000e6"),
    (33, "bicycle", "#770b20"),
)
NAMES = [name for _, name, _ in CLASSES]
IGNORED, CORRECT = len(CLASSES), len(CLASSES) + 1  # two more train ids: not scored, and predicted correctly
COLORS = [*(color for _, _, color in CLASSES), "#000000", "#ffffff"]
PALETTE = bytes.fromhex("".join(COLORS).replace("#", ""))
TRAIN_ID_OF = np.full(256, IGNORED, np.uint8)
TRAIN_ID_OF[[label_id for label_id, _, _ in CLASSES]] = range(len(CLASSES))

LARGE_FRAMES, RUN_CONFUSIONS, FRAME_CONFUSIONS = 5, 8, 3
SMALL, LARGE = (192, 96), (1024, 512)  # width, height of a panel

# What JSON values must be: a schema has these kinds at its leaves. A key that ends in "?" may be absent.
KINDS = {
    "an object": lambda value: isinstance(value, dict),
    "a list": lambda value: isinstance(value, list),
    "text": lambda value: isinstance(value, str),
    "a name": lambda value: isinstance(value, str) and value != "" and value.isprintable(),
    "true or false": lambda value: isinstance(value, bool),
    "a count": lambda value: type(value) is int and 0 <= value < 2**53,
    "19 counts": lambda value: isinstance(value, list) and [KINDS["a count"](n) for n in value] == [True] * 19,
    "19 x 19 counts": lambda value: isinstance(value, list) and [KINDS["19 counts"](n) for n in value] == [True] * 19,
    "a number from 0": lambda value: type(value) in (int, float) and 0 <= value < 2**53,  # false for NaN
    "a fraction": lambda value: type(value) in (int, float) and 0 <= value <= 1,
    "a fraction or null": lambda value: value is None or KINDS["a fraction"](value),
    "64 hex digits": lambda value: isinstance(value, str) and bool(re.fullmatch("[0-9a-f]{64}", value)),
}
METRICS = {
    **dict.fromkeys(("miou", "pixel_accuracy", "mean_class_accuracy", "frequency_weighted_iou"), "a fraction"),
    **{"split": "a name", "result_dir": "text", "frames": "a count", "confusion_matrix": "19 x 19 counts"},
    "iou": dict.fromkeys(NAMES, "a fraction or null"),
    "per_frame": [{"frame": "a name", "miou": "a fraction or null"}],
    "expected?": {"percent": "a number from 0", "tolerance": "a number from 0", "passed": "true or false"},
}
SUMMARY = {
    "NPU_compute_time": dict.fromkeys(("mean", "percentile(99%)"), "a number from 0"),
    **dict.fromkeys(("throughput", "end_to_end_throughput?"), "a number from 0"),
    **{"model?": "text", "model_sha256?": "64 hex digits", "batchsize?": "a count"},
    **dict.fromkeys(("provider?", "date?"), "a name"),
    "versions?": dict.fromkeys(("python?", "numpy?", "onnxruntime?"), "a name"),
}


class InputError(Exception):
    """A mistake the user can fix; reported in one line, without a traceback."""


# ---------------------------------------------------------------------------------------------------- reading JSON


def check(value: Any, schema: Any, key: str = "JSON") -> None:
    """Compare a value with its schema: a kind, an object's keys, or a list of the one schema of all its items.

    Raises:
        ValueError: they differ.
    """
    kind = schema if isinstance(schema, str) else "a list" if isinstance(schema, list) else "an object"
    if not KINDS[kind](value):
        raise ValueError(f"{key}: found {value!r:.40}, expected {kind}")
    for item in value if kind == "a list" else ():
        check(item, schema[0], key)
    for name, part in schema.items() if isinstance(schema, dict) else ():
        if name.rstrip("?") in value:
            check(value[name.rstrip("?")], part, name.rstrip("?"))
        elif not name.endswith("?"):
            raise ValueError(f"no {name} in it")


def read_json(path: Path, schema: dict[str, Any], maker: str) -> dict[str, Any]:
    """Read a JSON file and validate it.

    Raises:
        InputError: it cannot be read, or is not what its maker writes.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        check(content, schema)
    except (OSError, ValueError, RecursionError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else getattr(error, "strerror", error)
        raise InputError(f"{path}: {reason}; expected the output of {maker}") from None
    return content


def read_metrics(path: Path) -> dict[str, Any]:
    """Read the metrics of a run: the frames from the lowest mIoU, and `confusion` (19, 19), row = ground truth."""
    metrics = read_json(path, METRICS, "intrada_postprocess.py --json")
    if len(metrics["per_frame"]) != metrics["frames"]:
        raise InputError(f"{path}: found {metrics['frames']} frames, but {len(metrics['per_frame'])} in per_frame")
    rows = sorted(metrics["per_frame"], key=lambda row: (row["miou"] is None, row["miou"], row["frame"]))
    return {**metrics, "path": path, "per_frame": rows, "confusion": np.array(metrics["confusion_matrix"], np.int64)}


def read_summary(path: Path) -> dict[str, Any]:
    """Read what ran, where, and how fast; ais_bench's summary has options in `args`, and no model, device or date."""
    summary = read_json(path, SUMMARY, "ais_bench or intrada_infer.py")
    options, provider = read_options(summary.get("args")), summary.get("provider")
    fps, mean_ms = summary["throughput"], summary["NPU_compute_time"]["mean"]
    model = Path(summary.get("model") or options.get("model", "model unknown")).name
    batch_size = summary.get("batchsize") or round(fps * mean_ms / 1000)  # which ais_bench has computed fps from
    devices = list(dict.fromkeys(re.findall("[0-9]+", str(summary.get("device", options.get("device", 0))))))
    numbers = f", device{'s' * (len(devices) > 1)} {', '.join(devices)}" if devices and provider != "cpu" else ""
    device = (f"ONNX Runtime, {provider.upper()}" if provider else "Ascend, ais_bench") + numbers
    return {
        "path": path,
        "name": f"{model}, batch {batch_size}, {device}",
        "model": model,
        "sha256": summary.get("model_sha256", ""),
        "batch_size": batch_size,
        "device": device,
        "is_ascend": provider in (None, "cann"),
        "versions": ", ".join(f"{name} {version}" for name, version in summary.get("versions", {}).items()),
        "date": summary.get("date") or time.strftime("%Y-%m-%d", time.gmtime(path.stat().st_mtime)),
        "speed": [fps, mean_ms, summary["NPU_compute_time"]["percentile(99%)"], summary.get("end_to_end_throughput")],
    }


def read_options(args: Any) -> dict[str, str]:
    """Read options from the `args` of a summary, the words of its command."""
    words = [str(word) for word in args] if isinstance(args, list) else []
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    return {name[2:]: value for name, value in zip(words, words[1:]) if name.startswith("--")}


def add_summaries(runs: list[dict[str, Any]], summaries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add each run's summary, `<result_dir>_summary.json`, and a name.

    The name is what ran; where two runs would have one name, with their folders and files.
    """
    by_path = {summary["path"].resolve(): summary for summary in summaries}
    named = []
    for run in runs:
        summary = by_path.get(Path(f"{Path(run['result_dir'])}_summary.json").resolve())
        name = summary["name"] if summary else f"{run['result_dir']}, model unknown"
        named.append({**run, "summary": summary, "name": name})
    for key in ("result_dir", "path"):
        times = Counter(run["name"] for run in named)
        named = [{**run, "name": f"{run['name']} ({run[key]})"} if times[run["name"]] > 1 else run for run in named]
    return named


# ---------------------------------------------------------------------------------------------------- drawing frames


def find_frames(run: dict[str, Any], data_dir: Path, labels: Path) -> list[dict[str, Any]]:
    """Find the files of every frame of a run: the name, the mIoU, and the paths `image`, `label`, `label map`.

    Raises:
        InputError: files are missing; counts and names them.
    """
    found = {
        "image": find_files(data_dir / "leftImg8bit" / run["split"], "*/*", "_leftImg8bit.png"),
        "label": find_files(data_dir / "gtFine" / run["split"], "*/*", "_gtFine_labelIds.png"),
        "label map": find_files(labels, "*", "_predicted_labelIds.png"),
    }
    rows = run["per_frame"]
    missing = [f"{kind} of {row['frame']}" for row in rows for kind in found if row["frame"] not in found[kind]]
    if missing:
        named = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise InputError(f"files missing in {data_dir} and {labels}: {len(missing)}: {named}")
    return [{**row, **{kind: paths[row["frame"]] for kind, paths in found.items()}} for row in rows]


def find_files(folder: Path, pattern: str, ending: str) -> dict[str, Path]:
    """Find the files of a kind, by frame."""
    return {path.name[: -len(ending)]: path for path in folder.glob(f"{pattern}{ending}")}


def read_png(path: Path) -> Image.Image:
    """Decode a PNG after verifying its checksums, which Pillow's decoder does not.

    Raises:
        InputError: it is missing or damaged.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.verify()
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
    except Exception as error:  # Pillow raises many kinds for a damaged PNG
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or 'damaged, too large, or not a PNG'}") from None
    return image


def read_train_ids(path: Path) -> np.ndarray:
    """Read a PNG of label ids as (H, W) uint8 train ids, all that is no class as IGNORED."""
    image = read_png(path)
    if image.mode != "L":
        raise InputError(f"{path}: not a single-channel 8-bit PNG: mode {image.mode}")
    return TRAIN_ID_OF.take(np.asarray(image))


def draw_frame(frame: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """Draw a frame's image, ground truth, prediction and errors, and if it is large the prediction over the image.

    Of the labels every n-th pixel is shown, so that no colors are mixed.

    Raises:
        InputError: a file is damaged, or the label map is not the one of the metrics.
    """
    label_map, miou = frame["label map"], np.nan if frame["miou"] is None else frame["miou"]
    truth, prediction = read_train_ids(frame["label"]), read_train_ids(label_map)
    if truth.shape != prediction.shape:
        raise InputError(f"{label_map}: found {prediction.shape}, expected its label's {truth.shape}")
    confusion = count_pixels(truth, prediction)
    if not np.isclose(miou_of(confusion), miou, rtol=0, atol=1e-9, equal_nan=True):
        raise InputError(f"{label_map}: not the prediction of these metrics; pass --labels of the same run")
    image = read_png(frame["image"]).convert("RGB").resize(size, Image.BOX)
    errors = np.where((prediction == truth) & (truth != IGNORED), np.uint8(CORRECT), truth)
    images = {
        "image": image,
        "ground truth": paint(truth, size),
        "prediction": paint(prediction, size),
        "errors": paint(errors, size),
    }
    if size == LARGE:
        images["overlay"] = Image.blend(image, images["prediction"].convert("RGB"), 0.5)
    shares = confusion / max(confusion.sum(), 1)
    panels = [(title, to_data_uri(drawn), *size) for title, drawn in images.items()]
    return {**frame, "panels": panels, "confusions": find_confusions(shares, FRAME_CONFUSIONS)}


def count_pixels(truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Count the scored pixels of (H, W) train ids; (19, 19) int64, row = ground truth."""
    size = len(CLASSES) + 1
    pairs = truth.astype(np.uint16) * np.uint16(size) + prediction
    return np.bincount(pairs.ravel(), minlength=size * size).reshape(size, size)[:IGNORED, :IGNORED]


def miou_of(confusion: np.ndarray) -> float:
    """Compute a frame's mIoU over the classes in its own ground truth or prediction, NaN without any."""
    hits = np.diag(confusion)
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - hits
    return float(np.mean(hits[union > 0] / union[union > 0])) if union.any() else np.nan


def paint(train_ids: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """Show (H, W) train ids in the colors of Cityscapes."""
    image = Image.fromarray(train_ids).resize(size, Image.NEAREST)
    image.putpalette(PALETTE)
    return image


def to_data_uri(image: Image.Image) -> str:
    """Encode photographs as JPEG and flat colors as PNG, to be part of the page."""
    content, kind = io.BytesIO(), "png" if image.mode == "P" else "jpeg"
    image.save(content, kind, quality=75, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


def draw_frames(frames: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Draw frames in threads, the first ones large; Pillow releases the GIL while it decodes."""
    sizes = [LARGE if n < LARGE_FRAMES else SMALL for n in range(len(frames))]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None) as pool:
        try:
            return list(tqdm(pool.map(draw_frame, frames, sizes), total=len(frames), unit="frame", disable=None))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


# ---------------------------------------------------------------------------------------------------- figures


def find_confusions(shares: np.ndarray, largest: int) -> list[tuple[float, str, str]]:
    """Find the largest confusions in (19, 19) shares: the share, the class in the ground truth, the predicted one."""
    wrong = np.where(np.eye(len(NAMES), dtype=bool), 0, shares)
    pairs = [divmod(int(n), len(NAMES)) for n in np.argsort(-wrong, axis=None, kind="stable")[:largest]]
    return [(wrong[pair], NAMES[pair[0]], NAMES[pair[1]]) for pair in pairs if wrong[pair] >= 0.0005]


def list_classes(run: dict[str, Any]) -> list[tuple]:
    """List name, IoU, recall, precision and share of the pixels of each class, the lowest IoU first."""
    confusion = run["confusion"]
    hits, truth, predicted = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    with np.errstate(invalid="ignore"):  # 0 / 0 of a class that does not occur is NaN
        figures = hits / truth, hits / predicted, truth / truth.sum()
    rows = zip(NAMES, [run["iou"][name] for name in NAMES], *figures)
    return sorted(rows, key=lambda row: (row[1] is None, row[1]))


def count_frames(run: dict[str, Any]) -> list[list[str]]:
    """Sort the frames into bins of 5 points of mIoU; the last bin includes 100 %."""
    rows = [row for row in run["per_frame"] if row["miou"] is not None]
    return [[row["frame"] for row in rows if min(int(20 * row["miou"]), 19) == n] for n in range(20)]


def percent(fraction: float | None, sign: str = "", digits: int = 2) -> str:
    """Format a fraction as percent, or a dash if there is none; + 0 removes the sign of -0."""
    missing = fraction is None or np.isnan(fraction)
    return "-" if missing else f"{round(100 * fraction, digits) + 0:{sign}.{digits}f}"


# ---------------------------------------------------------------------------------------------------- the page

TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>mIoU {{ first.miou | percent }} %: IntraDA on Cityscapes {{ first.split }}</title>
<style>
:root { color-scheme: light dark; --page: #f4f6f8; --card: #fff; --ink: #1b2126; --faint: #59626c; --line: #dbe0e5;
  --accent: #2166a8; --shade: 33 102 168; --good: #17734a; --bad: #ae3519; }
@media screen and (prefers-color-scheme: dark) { :root { --page: #121518; --card: #1b1f24; --ink: #e6e9ec;
  --faint: #9ba5af; --line: #333a41; --accent: #76b3ee; --shade: 60 122 184; --good: #5ac890; --bad: #f48d72; } }
* { box-sizing: border-box; }
html { scroll-padding-top: 3.5rem; }
body { margin: 0 auto; padding: 1.2rem 1rem 3rem; max-width: 78rem; background: var(--page); color: var(--ink);
  font: .94rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.2rem; margin: 1.6rem 0 .6rem; }
h3 { font-size: 1rem; margin: 0 0 .3rem; } p { margin: .3rem 0; } figure, dd { margin: 0; }
a { text-decoration: none; } a[href] { color: var(--accent); } a[href]:hover { text-decoration: underline; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
nav { position: sticky; top: 0; z-index: 2; display: flex; gap: 1.1rem; margin: .3rem 0 .7rem; padding: .5rem 0;
  background: var(--page); border-bottom: 1px solid var(--line); }
.faint, dt, figcaption { color: var(--faint); } .good { color: var(--good); } .bad { color: var(--bad); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: 1rem; margin: 0 0 1rem;
  min-width: 0; }
.cards { display: grid; gap: 0 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }
.run { display: flex; flex-wrap: wrap; align-content: start; gap: .5rem 2rem; } .run > * { flex: 1 14rem; }
.run > h3 { flex-basis: 100%; } .miou { font-size: 2.6rem; font-weight: 650; line-height: 1.1; }
dl { display: grid; grid-template-columns: auto 1fr; gap: .1rem 1rem; margin: .3rem 0 0; align-content: start; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .2rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { font-weight: 400; } tfoot th, tfoot td { font-weight: 650; border: 0; }
thead th { color: var(--faint); white-space: normal; overflow-wrap: normal; vertical-align: bottom; min-width: 5rem; }
thead span { display: inline-block; width: max-content; max-width: 11rem; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--card); padding-left: 0; }
.runs th:first-child { position: static; white-space: normal; min-width: 11rem; }
.bar { width: 16rem; } th.bar::after { background: none; }
.bar::after { content: ""; display: inline-block; width: 11rem; height: .7em; margin-left: .7rem; border-radius: .15em;
  background: linear-gradient(var(--accent) 0 0) 0 / calc(100% * var(--v)) 100% no-repeat var(--line); }
.matrix { font-size: .78rem; table-layout: fixed; min-width: 54rem; }
.matrix th, .matrix td { padding: .25rem .1rem; text-align: center; min-width: 0; border: 1px solid var(--card); }
.matrix td { background: rgb(var(--shade) / calc(.62 * var(--v))); }
.matrix th:first-child { width: 7.2rem; text-align: left; }
.matrix th + th .class { writing-mode: vertical-rl; transform: rotate(180deg); }
ul, ol { padding: 0; margin: .4rem 0 0; list-style: none; } .list { columns: 22rem; }
.index { columns: 17rem; font-size: .85rem; font-variant-numeric: tabular-nums; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1rem; font-size: .85rem; } .class { white-space: nowrap; }
i { display: inline-block; width: .85em; height: .85em; margin-inline-end: .4em; border: 1px solid var(--faint);
  border-radius: .15em; vertical-align: -.06em; }
.histogram { display: grid; grid-template-columns: repeat(20, 1fr); gap: 2px; text-align: center; font-size: .75rem; }
.histogram li { display: grid; grid-template-rows: 1fr 1.3rem; min-width: 0; }
.histogram a { align-self: end; height: calc(1.3rem + 6rem * var(--v));
  background: linear-gradient(var(--accent) 0 0) bottom / 100% calc(100% - 1.3rem) no-repeat; }
.histogram span { border-top: 1px solid var(--faint); color: var(--faint); white-space: nowrap; text-align: left; }
.frame { display: grid; gap: .6rem; break-inside: avoid; } .frame ul, figcaption { font-size: .85rem; }
.frame:target h3 { color: var(--accent); } .large { grid-template-columns: repeat(3, minmax(0, 1fr)); }
.small { grid-template-columns: minmax(0, 1fr) repeat(4, minmax(0, 12rem)); gap: .5rem; padding: .5rem 0; }
.small + .small { border-top: 1px solid var(--line); }
img { width: 100%; height: auto; display: block; border-radius: .2rem; } .slot { aspect-ratio: 2; }
.zoom { display: block; cursor: zoom-in; } .close { display: none; }
.zoom:target { position: fixed; inset: 0; z-index: 3; background: var(--page); display: grid; place-items: center;
  padding: 0 0 2.5rem; }
.zoom:target img { width: min(100vw, calc(200vh - 5rem)); }
.zoom:target + .close { position: fixed; inset: 0; z-index: 4; display: flex; align-items: end; justify-content: center;
  padding: .6rem; cursor: zoom-out; }
@media screen and (max-width: 48rem) {
  .large { grid-template-columns: minmax(0, 1fr); } .small { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .small > div:first-child { grid-column: 1 / -1; } .bar { width: auto; } .bar::after { width: 5rem; }
}
@media print {
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  :root { color-scheme: light; --page: #fff; font-size: 12px; } body { max-width: none; padding: 0; font-size: 1rem; }
  nav, .zoom:target + .close { display: none; } h2 { break-after: avoid; } .card, tr { break-inside: avoid; }
  .zoom:target { position: static; padding: 0; } .zoom:target img { width: 100%; } .wide { overflow: visible; }
  .bar { width: auto; } .bar::after { width: 7rem; } th:first-child { position: static; }
  .matrix { min-width: 0; font-size: .72rem; } .matrix th:first-child { width: 7rem; }
  .small { grid-template-columns: minmax(0, 1fr) repeat(4, minmax(0, 11rem)); }
}
</style>
</head>
<body>
{% macro swatch(name) %}
<span class="class"><i style="background:{{ colors[name] }}"></i>{{ name }}</span>
{%- endmacro %}
{% macro show(panel, frame) %}
<img src="{{ panel[1] }}" width="{{ panel[2] }}" height="{{ panel[3] }}" alt="{{ panel[0] }} of {{ frame.frame }}">
{%- endmacro %}
{% macro list_confusions(confusions, whole, class) %}
<ul class="{{ class }}">
{% for share, truth, prediction in confusions %}
<li>{{ share | percent(digits=1) }} % {{ whole }}{{ swatch(truth) }} is predicted as {{ swatch(prediction) }}</li>
{% else %}
<li>none</li>
{% endfor %}
</ul>
{%- endmacro %}
{% set more = runs | length > 1 %}
<h1>IntraDA on Cityscapes {{ first.split }}</h1>
<p class="faint">DeepLabv2 with ResNet-101, adapted from GTA5. mIoU is the mean of the classes' IoU over all frames.</p>
<nav aria-label="Contents"><a href="#runs">Runs</a>{% if speeds %}<a href="#speed">Speed</a>{% endif %}
<a href="#classes">Classes</a><a href="#confusions">Confusions</a><a href="#frames">Frames</a></nav>
<section id="runs" class="cards" aria-label="Runs">
{% for run in runs %}
<div class="card run"><h3>{{ run.name }}</h3>
<div><p class="miou">{{ run.miou | percent }} %</p>
<p>mIoU of {{ run.frames }} frame{{ "s" if run.frames != 1 }} of {{ run.split }}</p>
{% if not loop.first %}
<p>{{ (run.miou - first.miou) | percent("+") }} points against {{ first.name }}</p>
{% endif %}
{% if run.expected %}
<p>expected: {{ "%.2f" | format(run.expected.percent) }} %,
{{ (run.miou - run.expected.percent / 100) | percent("+") }} points,
tolerance {{ run.expected.tolerance }}: <b class="{{ "good" if run.expected.passed else "bad" }}">
{{- "PASS" if run.expected.passed else "FAIL" }}</b></p>
{% endif %}
{% if run.split == "val" and run.frames == 500 %}
<p>published: {{ published_miou | percent }} %, {{ (run.miou - published_miou) | percent("+") }} points</p>
{% endif %}
<dl>{% for key in ("pixel_accuracy", "mean_class_accuracy", "frequency_weighted_iou") %}
<dt>{{ key | replace("_", " ") | replace("iou", "IoU") }}</dt><dd>{{ run[key] | percent }} %</dd>
{% endfor %}</dl></div>
<dl>
{% set ran = run.summary or {"model": "unknown"} %}
{% for name, value in (("model", ran.model), ("SHA-256", (ran.sha256 or "")[:12]), ("batch size", ran.batch_size),
  ("device", ran.device), ("versions", ran.versions), ("date", ran.date), ("results", run.result_dir)) if value %}
<dt>{{ name }}</dt><dd>{{ value }}</dd>
{% endfor %}
</dl>
</div>
{% endfor %}
</section>
{% if more %}<p>Recall, precision, confusions and frames below are those of {{ first.name }}.</p>{% endif %}

{% if speeds %}
{% set ascend = speeds | selectattr("1.is_ascend") | list | length %}
<h2 id="speed">Speed</h2>
<div class="card"><div class="wide" tabindex="0" role="region" aria-label="Speed"><table class="runs">
<thead><tr><th scope="col">run</th><th scope="col">batch size</th><th scope="col">frames/s</th>
<th scope="col">mean ms</th><th scope="col">p99 ms</th><th scope="col"><span>end to end, frames/s</span></th>
{% if ascend %}<th scope="col"><span>published on 310P3, frames/s</span></th>{% endif %}</tr></thead>
{% for name, ran in speeds %}
<tr><th scope="row">{{ name }}</th><td>{{ ran.batch_size }}</td>
{% for figure in ran.speed + ([published_fps.get(ran.batch_size) if ran.is_ascend else none] if ascend else []) %}
<td>{{ "%.2f" | format(figure) if figure is number else "-" }}</td>
{% endfor %}</tr>
{% endfor %}
</table></div>
<p class="faint">frames/s, mean and p99 are of the model alone; end to end includes reading and writing.
{% if ascend < speeds | length %}Published on Ascend 310P3, not comparable with other devices, in frames/s:
{% for batch, fps in published_fps.items() %}{{ "%.2f" | format(fps) }} at batch {{ batch }}{{ ", " if not loop.last }}
{%- endfor %}{% endif %}</p></div>
{% endif %}
<h2 id="classes">Classes, lowest IoU first</h2>
<div class="card wide" tabindex="0" role="region" aria-label="Classes"><table>
<thead><tr><th scope="col">class</th><th scope="col" class="bar"><span>IoU %{{ ", " ~ first.name if more }}</span></th>
{% for title in ("recall %", "precision %", "GT pixels %") %}<th scope="col">{{ title }}</th>{% endfor %}
{% for run in runs[1:] %}<th scope="col"><span>IoU %, {{ run.name }}</span></th><th scope="col">change, points</th>
{% endfor %}</tr></thead>
{% for name, iou, recall, precision, gt_pixels in classes %}
<tr><th scope="row">{{ swatch(name) }}</th><td class="bar" style="--v:{{ iou or 0 }}">{{ iou | percent }}</td>
<td>{{ recall | percent }}</td><td>{{ precision | percent }}</td><td>{{ gt_pixels | percent }}</td>
{% for run in runs[1:] %}
{% set change = (run.iou[name] - iou if run.iou[name] is number and iou is number else none) | percent("+") %}
<td>{{ run.iou[name] | percent }}</td>
<td class="{{ {"+": "good", "-": "bad"}[change[0]] if change not in ("+0.00", "-") }}">{{ change }}</td>
{% endfor %}</tr>
{% endfor %}
<tfoot><tr><th scope="row">mean</th><td class="bar" style="--v:{{ first.miou }}">{{ first.miou | percent }}</td>
<td>{{ first.mean_class_accuracy | percent }}</td><td></td><td></td>
{% for run in runs[1:] %}<td>{{ run.miou | percent }}</td><td>{{ (run.miou - first.miou) | percent("+") }}</td>
{% endfor %}</tr></tfoot>
</table></div>
<h2 id="confusions">Confusions</h2>
<div class="card"><h3>The largest, in percent of a class's pixels</h3>
{{ list_confusions(confusions, "of ", "list") }}</div>
<div class="card"><p>How the pixels of each class in the ground truth (row) are predicted (column), in percent; values
below 0.5 are left out.</p>
<div class="wide" tabindex="0" role="region" aria-label="Confusion matrix"><table class="matrix">
<thead><tr><th scope="col">ground truth</th>
{% for name, shares in matrix %}<th scope="col">{{ swatch(name) }}</th>{% endfor %}</tr></thead>
{% for name, shares in matrix %}
<tr><th scope="row">{{ swatch(name) }}</th>{% for share in shares %}
<td style="--v:{{ "%.3f" | format(share ** 0.5) }}">{{ share | percent(digits=1) if share >= 0.005 }}</td>
{%- endfor %}</tr>
{% endfor %}
</table></div></div>
<h2 id="frames">Frames</h2>
<div class="card"><h3>Number of frames by mIoU</h3>
<p class="faint">A frame's mIoU is the mean over the classes in its own ground truth or prediction.</p>
<ol class="histogram">
{% set highest = bins | map("length") | max or 1 %}
{% for names in bins %}
<li><a style="--v:{{ (names | length) / highest }}" title="{{ 5 * loop.index0 }} to {{ 5 * loop.index }} %"
{% if large and names %} href="#{{ names[0] | urlencode }}"{% endif %}>{{ names | length or "" }}</a>
<span>{{ 5 * loop.index0 ~ " %" if loop.index0 % 4 == 0 }}</span></li>
{% endfor %}
</ol></div>
<details class="card"{{ " open" if first.frames <= 24 }}><summary>All frames by name, with mIoU in percent</summary>
<ul class="index">
{% for row in first.per_frame | sort(attribute="frame") %}
<li><a{% if large %} href="#{{ row.frame | urlencode }}"{% endif %}>{{ row.frame }}</a> {{ row.miou | percent }}</li>
{% endfor %}
</ul></details>
{% if large %}
<ul class="legend">
{% for name in colors %}<li>{{ swatch(name) }}</li>{% endfor %}
<li><i style="background:#000"></i>not scored</li>
<li><i style="background:#fff"></i>errors: white: correct; colored: wrong, in the color of the true class</li>
</ul><p>Lowest mIoU first; a click on a large image enlarges it.</p>
{% endif %}
{% for frame in large %}
{% set number = loop.index %}
<article class="frame large card" id="{{ frame.frame }}">
<div><h3>{{ frame.frame }}</h3><p class="miou">{{ frame.miou | percent }} %</p>
{{ list_confusions(frame.confusions, "of the pixels: ") }}</div>
{% for panel in frame.panels %}
{% set id = "panel-%d-%d" | format(number, loop.index) %}
<figure><div class="slot"><a class="zoom" id="{{ id }}" href="#{{ id }}">{{ show(panel, frame) }}</a>
<a class="close" href="#{{ frame.frame | urlencode }}">{{ panel[0] }} of {{ frame.frame }}: close</a></div>
<figcaption>{{ panel[0] }}</figcaption></figure>
{% endfor %}</article>
{% endfor %}
{% if small %}
<div class="card">
<div class="frame small faint"><div></div>{% for panel in small[0].panels %}<div>{{ panel[0] }}</div>{% endfor %}</div>
{% for frame in small %}
<article class="frame small" id="{{ frame.frame }}"><div><h3>{{ frame.miou | percent }} %</h3>{{ frame.frame }}</div>
{% for panel in frame.panels %}{{ show(panel, frame) }}{% endfor %}</article>
{% endfor %}</div>
{% endif %}
<p class="faint">Published figures: Huawei's ModelZoo-PyTorch, ACL_PyTorch/contrib/cv/segmentation/IntraDA: Ascend
310P3, cityscapes_easy2hard_intrada_with_norm.pth, the 500 frames of val, {{ published_miou | percent }} %.</p>
</body>
</html>
"""


def render(runs: list[dict[str, Any]], summaries: list[dict[str, Any]], frames: list[dict[str, Any]]) -> str:
    """Fill the page in; everything from files is escaped."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = percent
    first = runs[0]
    with np.errstate(invalid="ignore"):
        shares = np.nan_to_num(first["confusion"] / first["confusion"].sum(axis=1, keepdims=True))
    speeds = [(run["name"], run["summary"]) for run in runs if run["summary"]]
    others = [summary for summary in summaries if summary not in [run["summary"] for run in runs]]
    speeds += [(f"{summary['name']} ({summary['path'].name})", summary) for summary in others]
    return environment.from_string(TEMPLATE).render(
        first=first,
        runs=runs,
        speeds=sorted(speeds, key=lambda speed: speed[1]["batch_size"]),
        published_miou=PUBLISHED_MIOU,
        published_fps=PUBLISHED_FPS,
        colors=dict(zip(NAMES, COLORS)),
        classes=list_classes(first),
        confusions=find_confusions(shares, RUN_CONFUSIONS),
        matrix=list(zip(NAMES, shares)),
        bins=count_frames(first),
        large=frames[:LARGE_FRAMES],
        small=frames[LARGE_FRAMES:],
    )


def write_page(path: Path, content: bytes) -> None:
    """Write a page that is complete whenever it has its name; a link, device or pipe is written to in place.

    Raises:
        InputError: it cannot be written, as on a full disk.
    """
    in_place = path.exists() and (path.is_symlink() or not path.is_file())
    part = path if in_place else path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        if not in_place:
            os.replace(part, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        if not in_place:
            part.unlink(missing_ok=True)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write one self-contained HTML page about results.")
    add = parser.add_argument
    add("metrics", metavar="METRICS.json", nargs="+", type=Path, help="of intrada_postprocess.py --json, one per run")
    add("--labels", metavar="DIR", type=Path, help="the first run's label maps, of --save_labels; needs --data")
    add("--data", metavar="DATA_DIR", type=Path, help="Cityscapes, with leftImg8bit/ and gtFine/; needs --labels")
    add("--perf", metavar="SUMMARY.json", nargs="+", type=Path, default=[], help="of ais_bench or intrada_infer.py")
    add("--output", metavar="FILE", type=Path, default=Path("report.html"), help="page to write (default: %(default)s)")
    args = parser.parse_args(argv)
    if bool(args.labels) != bool(args.data):
        parser.error("--labels and --data go together")
    if args.output.is_dir() or not args.output.parent.is_dir():
        parser.error(f"--output must be a file path in an existing folder: {args.output}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    summaries = [read_summary(path) for path in args.perf]
    runs = add_summaries([read_metrics(path) for path in args.metrics], summaries)
    frames = draw_frames(find_frames(runs[0], args.data, args.labels)) if args.labels else []
    page = render(runs, summaries, frames).encode("utf-8", "replace")
    write_page(args.output, page)
    counts = f"{len(runs)} run{'s' * (len(runs) != 1)}, {len(frames)} frame{'s' * (len(frames) != 1)}"
    print(f"{args.output}: {counts}, {len(page) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except (InputError, OSError) as error:
        raise SystemExit(f"{Path(__file__).name}: error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
