#!/usr/bin/env python3
"""Lay results out as one page to look at: mIoU, classes, confusions, frames, speed.

   METRICS.json ...                                               of intrada_postprocess.py --json, one a run
   --labels DIR/<frame>_predicted_labelIds.png                    the first run's, of --save_labels
   --data DATA_DIR/{leftImg8bit,gtFine}/<split>/<city>/<frame>_*  its pictures and labels
   --perf SUMMARY.json ...                                        of ais_bench or intrada_infer.py
-> one HTML file that needs nothing else: no network, no script

   $ python3 intrada_report.py metrics_bs1.json --labels labels_bs1 --data /data/cityscapes --output report.html
   report.html: 1 run, 500 frames, 8.4 MB
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import shlex
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

# Source: Huawei's ModelZoo-PyTorch, ACL_PyTorch/contrib/cv/segmentation/IntraDA: Cityscapes val, frames/s on 310P3.
PUBLISHED_MIOU = 0.4701
PUBLISHED_FPS = {1: 47.52, 4: 43.64, 8: 43.35, 16: 43.41, 32: 42.09, 64: 20.39}

# Source: cityscapesScripts, helpers/labels.py: every class with a train id, in the order of the train ids.
CLASSES = (
    # labelId, name, colour
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
IGNORED, RIGHT = len(CLASSES), len(CLASSES) + 1  # train ids go on with what is no class
COLOURS = [*(colour for _, _, colour in CLASSES), "#000000", "#ffffff"]
PALETTE = list(bytes.fromhex("".join(COLOURS).replace("#", "")))
TRAIN_ID_OF = np.full(256, IGNORED, np.uint8)
TRAIN_ID_OF[[label_id for label_id, _, _ in CLASSES]] = range(len(CLASSES))

WORST_FRAMES, WORST_CONFUSIONS = 5, 8
SMALL, LARGE = (192, 96), (640, 320)  # width, height of a thumbnail
INK = "#123456"  # the charts' colour of text and lines, which the page replaces by its own
CHART_STYLE = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "svg.fonttype": "none",
    "svg.hashsalt": "intrada",  # the same bytes each time
    "text.parse_math": False,
}
BAR, WORST_BAR = "#3b82c4", "#d9622b"
DOTS = "#e8b004", "#35a16b", "#a05cc4", "#e377a8", "#7a8793"


class InputError(Exception):
    """What the user can mend; told in one line, without a traceback."""


class Frame(NamedTuple):
    """A frame's files and figures; no truth where the split has no labels."""

    name: str
    miou: float | None
    ignored_pixels: int
    picture: Path
    truth: Path | None
    label_map: Path


class Panel(NamedTuple):
    """One picture of a frame, as a data URI."""

    title: str
    uri: str
    size: tuple[int, int]


# ---------------------------------------------------------------------------------------------------- reading


def read_json(path: Path, keys: tuple[str, ...], maker: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: it is none, or lacks a key.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}; expected what {maker} wrote") from None
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        raise InputError(f"{path}: no {first_five(missing)} in it; expected what {maker} wrote")
    return content


def read_run(path: Path) -> dict[str, Any]:
    """Read the metrics of a run, named by its file.

    Raises:
        InputError: they are not those of intrada_postprocess.py.
    """
    keys = "split", "result_dir", "frames", "miou", "iou", "pixel_accuracy", "confusion_matrix", "per_frame"
    run = read_json(path, keys, "intrada_postprocess.py --json")
    if not isinstance(run["iou"], dict) or list(run["iou"]) != NAMES:
        raise InputError(
            f"{path}: other classes than Cityscapes' 19; expected what intrada_postprocess.py --json wrote"
        )
    return {**run, "name": name_of(path)}


def name_of(path: Path) -> str:
    """Name a run by its file; a byte that is no UTF-8 would not go into the page."""
    return path.stem.encode("utf-8", "replace").decode()


def read_speed(path: Path) -> dict[str, Any]:
    """Read a summary of ais_bench, which has no batch size, or of intrada_infer.py."""
    summary = read_json(path, ("NPU_compute_time", "throughput"), "ais_bench or intrada_infer.py")
    times, fps = summary["NPU_compute_time"], summary["throughput"]
    try:
        mean_ms, p99_ms = times["mean"], times["percentile(99%)"]
        batch_size = summary.get("batchsize", round(fps * mean_ms / 1000))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a whole summary: {error!r}; measure again") from None
    args, versions = summary.get("args", []), summary.get("versions", {})
    return {
        "name": name_of(path),
        "batch_size": batch_size,
        "fps": fps,
        "mean_ms": mean_ms,
        "p99_ms": p99_ms,
        "end_to_end_fps": summary.get("end_to_end_throughput"),
        "published_fps": PUBLISHED_FPS.get(batch_size),
        "model": summary.get("model") or dict(zip(args, args[1:])).get("--model", "model unknown"),
        "provider": summary.get("provider", "Ascend, by ais_bench"),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()) or "versions unknown",
        "command": shlex.join(map(str, args)),
    }


def tell_apart(runs: list[dict[str, Any]], paths: list[Path]) -> list[dict[str, Any]]:
    """Name runs by their whole paths where their files have one name."""
    times = Counter(run["name"] for run in runs)
    return [run if times[run["name"]] == 1 else {**run, "name": str(path)} for run, path in zip(runs, paths)]


def find_frames(run: dict[str, Any], data_dir: Path, labels: Path) -> list[Frame]:
    """Find the files of every frame of a run.

    Raises:
        InputError: some are missing; counts and names them.
    """
    labelled = run["miou"] is not None
    found = {
        "picture": find_files(data_dir / "leftImg8bit" / run["split"], "*/*", "_leftImg8bit.png"),
        "label": find_files(data_dir / "gtFine" / run["split"], "*/*", "_gtFine_labelIds.png") if labelled else {},
        "label map": find_files(labels, "*", "_predicted_labelIds.png"),
    }
    wanted = [what for what in found if labelled or what != "label"]
    rows = run["per_frame"]
    missing = [f"{what} of {row['frame']}" for row in rows for what in wanted if row["frame"] not in found[what]]
    if missing:
        raise InputError(f"{len(missing)} files are not in {data_dir} and {labels}: {first_five(missing)}")
    return [
        Frame(row["frame"], row["miou"], row["ignored_pixels"], *(paths.get(row["frame"]) for paths in found.values()))
        for row in rows
    ]


def find_files(folder: Path, pattern: str, ending: str) -> dict[str, Path]:
    """Find the files of a kind, by frame."""
    return {path.name[: -len(ending)]: path for path in folder.glob(f"{pattern}{ending}")}


def first_five(names: list, separator: str = ", ") -> str:
    """Name the first five, so that a message stays one readable line."""
    return separator.join(map(str, names[:5])) + (f"{separator}..." if len(names) > 5 else "")


def read_picture(path: Path) -> Image.Image:
    """Decode a picture.

    Raises:
        InputError: it cannot be decoded.
    """
    try:
        image = Image.open(path)
        image.load()
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all three for a damaged PNG
        reason = getattr(error, "strerror", None) or f"not a whole PNG: {error}"
        raise InputError(f"{path}: {reason}") from None
    return image


# ---------------------------------------------------------------------------------------------------- pictures


def draw_panels(frame: Frame, size: tuple[int, int]) -> list[Panel]:
    """Draw a frame's picture, truth, prediction and errors, small.

    Of the labels every n-th pixel is shown, so that no colour is mixed. In the errors a pixel that is right is white
    and one that is wrong has the colour of its true class.

    Raises:
        InputError: a file is damaged, or the label map is not the one that the metrics are of.
    """
    prediction = read_train_ids(frame.label_map)
    panels = [("picture", read_picture(frame.picture).convert("RGB").resize(size, Image.BOX))]
    if frame.truth:
        truth = read_train_ids(frame.truth)
        if truth.shape != prediction.shape:
            raise InputError(f"{frame.label_map}: {prediction.shape}, its label {truth.shape}; of another data set?")
        if not np.isclose(miou_of(truth, prediction), frame.miou or 0, rtol=0, atol=1e-9):
            raise InputError(f"{frame.label_map}: not the prediction that the metrics are of; --labels of another run?")
        errors = np.where((prediction == truth) & (truth != IGNORED), np.uint8(RIGHT), truth)
        panels += [
            ("truth", colour(truth, size)),
            ("prediction", colour(prediction, size)),
            ("errors", colour(errors, size)),
        ]
    else:
        panels += [("prediction", colour(prediction, size))]
    return [Panel(title, data_uri(image), size) for title, image in panels]


def miou_of(truth: np.ndarray, prediction: np.ndarray) -> float:
    """Compute a frame's mIoU over the classes that occur, 0 without any; of (H, W) train ids."""
    size = len(CLASSES) + 1
    counts = np.bincount(truth.ravel().astype(np.int64) * size + prediction.ravel(), minlength=size * size)
    confusion = counts.reshape(size, size)[:IGNORED, :IGNORED]
    hits = np.diag(confusion)
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - hits
    return float(np.mean(hits[union > 0] / union[union > 0])) if union.any() else 0.0


def read_train_ids(path: Path) -> np.ndarray:
    """Read a PNG of label ids as (H, W) uint8 train ids, all that is no class as IGNORED."""
    image = read_picture(path)
    if image.mode != "L":
        raise InputError(f"{path}: found mode {image.mode}, expected L, one 8-bit label id a pixel")
    return TRAIN_ID_OF[np.asarray(image)]


def colour(train_ids: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """Show (H, W) train ids in the colours of Cityscapes."""
    image = Image.fromarray(train_ids).resize(size, Image.NEAREST)
    image.putpalette(PALETTE)
    return image


def data_uri(image: Image.Image) -> str:
    """Write photographs as JPEG, flat colours as PNG, both into the page."""
    content, kind = io.BytesIO(), "png" if image.mode == "P" else "jpeg"
    image.save(content, kind, quality=75, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


def draw_frames(frames: list[Frame], size: tuple[int, int]) -> list[tuple[Frame, list[Panel]]]:
    """Draw frames in threads; Pillow leaves the interpreter free while it decodes."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            panels = pool.map(lambda frame: draw_panels(frame, size), frames)
            return list(zip(frames, tqdm(panels, total=len(frames), unit="frame", disable=None)))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


# ---------------------------------------------------------------------------------------------------- charts


def draw_classes(first: dict[str, Any], others: list[dict[str, Any]]) -> Markup:
    """Draw the IoU of each class, the worst at the top: a run as bars, its baseline and other runs as marks."""
    order = sorted(NAMES, key=lambda name: (first["iou"][name] is None, first["iou"][name] or 0), reverse=True)
    values = [100 * (first["iou"][name] or 0) for name in order]
    figure = Figure(figsize=(5.2, 6.2), layout="constrained")
    axes = figure.add_subplot()
    known = [name for name in order if first["iou"][name] is not None]
    axes.barh(order, values, color=[WORST_BAR if name in known[-3:] else BAR for name in order])
    for n, value in enumerate(values):
        text = f"{value:.1f}" if first["iou"][order[n]] is not None else "does not occur"
        axes.text(2, n, text, va="center", fontsize=8, color="white" if value > 15 else INK)
    marks = [(run["iou"], "o", dot) for run, dot in zip(others, cycle(DOTS))]
    marks += [(first["baseline"]["iou"], "|", INK)] if "baseline" in first else []
    for iou, mark, ink in marks:
        places = [(100 * iou[name], n) for n, name in enumerate(order) if iou[name] is not None]
        axes.scatter(*zip(*places), s=60, c=ink, marker=mark, linewidths=2 if mark == "|" else 0, zorder=3)
    axes.set(xlim=(0, 100), xlabel="IoU, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.01)
    return to_svg(figure, f"IoU of each class of {first['name']}, the worst at the top")


def draw_confusion(run: dict[str, Any]) -> Markup:
    """Draw the confusion matrix as a heat map, each row of truth adding up to 100 %."""
    shares = np.nan_to_num(100 * normalise_rows(run["confusion_matrix"]))
    figure = Figure(figsize=(7.4, 7.4), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    for row, column in zip(*np.nonzero(shares >= 0.5)):
        share = shares[row, column]
        ink = "white" if share > 55 else "black"
        axes.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=7, color=ink)
    axes.set_xticks(range(len(NAMES)), NAMES, rotation=90)
    axes.set_yticks(range(len(NAMES)), NAMES)
    axes.set(xlabel="prediction", ylabel="truth")
    return to_svg(figure, f"Confusion matrix of {run['name']}, rows of truth in percent")


def to_svg(figure: Figure, title: str) -> Markup:
    """Write a figure as SVG to stand in the page, in the page's own colour of text."""
    content = io.StringIO()
    figure.savefig(content, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Title": title})
    svg = content.getvalue()
    return Markup(svg[svg.index("<svg") :].replace(INK, "currentColor"))


# ---------------------------------------------------------------------------------------------------- the page


def normalise_rows(confusion: list[list[int]]) -> np.ndarray:
    """Divide each row of (19, 19) by its sum, NaN for a class without truth."""
    matrix = np.array(confusion, np.float64)
    sums = matrix.sum(axis=1, keepdims=True)
    return np.divide(matrix, sums, out=np.full_like(matrix, np.nan), where=sums > 0)


def find_confusions(run: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Find the largest confusions: how many percent of a class's pixels are called by another name."""
    shares = np.nan_to_num(normalise_rows(run["confusion_matrix"]))
    np.fill_diagonal(shares, 0)
    largest = np.argsort(-shares, axis=None, kind="stable")[:WORST_CONFUSIONS]
    pairs = [np.unravel_index(n, shares.shape) for n in largest]
    return [(f"{100 * shares[pair]:.0f}", NAMES[pair[0]], NAMES[pair[1]]) for pair in pairs if shares[pair] >= 0.005]


def percent(fraction: float | None, sign: str = "") -> str:
    """Format a fraction as percent, or a dash where there is none; + 0 takes the sign off -0."""
    return "-" if fraction is None or np.isnan(fraction) else f"{round(100 * fraction, 2) + 0:{sign}.2f}"


def fixed(number: float | None) -> str:
    """Format a number, or a dash where there is none."""
    return "-" if number is None else f"{number:.2f}"


TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>mIoU {{ runs[0].miou | percent }} %: IntraDA on Cityscapes {{ runs[0].split }}</title>
<style>
:root { color-scheme: light dark; --page: #f6f7f8; --card: #fff; --ink: #1c2024; --faint: #5c646d; --line: #d9dde1;
  --good: #1a7f4b; --bad: #b3381d; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --card: #1d2125; --ink: #e8eaec; --faint: #9aa3ad;
  --line: #363c42; --good: #55c48a; --bad: #f2886b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 76rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
p { margin: .4rem 0; }
.faint, figcaption, th { color: var(--faint); }
.good { color: var(--good); }
.bad { color: var(--bad); }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem; min-width: 0; }
.large { font-size: 2.6rem; font-weight: 650; line-height: 1.1; }
.wide { overflow-x: auto; }
.sides { display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .2rem 1rem .2rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
th { font-weight: 500; white-space: normal; overflow-wrap: normal; }
svg { width: 100%; height: auto; display: block; }
.matrix svg { min-width: 34rem; }
figure { margin: 0; min-width: 0; }
img { width: 100%; height: auto; display: block; border-radius: .2rem; }
figcaption { font-size: .8rem; }
.frame { break-inside: avoid; margin: 1rem 0; }
.frame p { margin: 0; }
.panels { display: grid; gap: .5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); }
.gallery .panels { grid-template-columns: repeat(4, minmax(0, 12rem)); }
.legend { display: flex; flex-wrap: wrap; gap: .2rem .9rem; padding: 0; list-style: none; font-size: .85rem; }
i { display: inline-block; width: .9em; height: .9em; margin-right: .35em; border: 1px solid var(--faint);
  border-radius: .15em; vertical-align: -.08em; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.class { white-space: nowrap; }
i.dot { border-radius: 50%; }
i.tick { width: 3px; background: var(--ink); border: 0; }
pre { white-space: pre-wrap; font-size: .8rem; margin: .3rem 0; }
@media print {
  :root { color-scheme: light; --page: #fff; --card: #fff; --ink: #000; --faint: #444; --line: #bbb; --good: #1a7f4b;
    --bad: #b3381d; }
  body { max-width: none; padding: 0; }
  h2 { break-after: avoid; }
  .card { break-inside: avoid; }
  .sides { grid-template-columns: minmax(0, 1fr); }
  .panels { grid-template-columns: 1fr 1fr; }
  .wide { overflow: visible; }
  .wide th, .wide td { padding-right: .5rem; }
}
</style>
</head>
<body>
{% macro swatch(name) %}
<span class="class"><i style="background:{{ colours[name] }}"></i>{{ name }}</span>
{%- endmacro %}
{% macro verdict(passed) %}
<b class="{{ "good" if passed else "bad" }}">{{ "PASS" if passed else "FAIL" }}</b>
{% endmacro %}
{% macro show(panels, frame) %}
<div class="panels">
{% for panel in panels %}
<figure><img src="{{ panel.uri }}" width="{{ panel.size[0] }}" height="{{ panel.size[1] }}"
 alt="{{ panel.title }} of {{ frame.name }}"><figcaption>{{ panel.title }}</figcaption></figure>
{% endfor %}
</div>
{% endmacro %}

<h1>IntraDA on Cityscapes {{ runs[0].split }}</h1>
<p class="faint">DeepLabv2, ResNet-101, adapted from GTA5. mIoU is the mean of the classes' IoU, each counted over all
frames at once.</p>

<section class="cards">
{% for run in runs %}
<div class="card">
<p class="faint">{{ run.name }}</p>
{% if run.miou is none %}
<p class="large">no mIoU</p>
<p>{{ run.frames }} frames, and no pixel of the split has a class.</p>
{% else %}
<p class="large">{{ run.miou | percent }} %</p>
<p>mIoU of {{ run.frames }} frames of {{ run.split }}, pixel accuracy {{ run.pixel_accuracy | percent }} %</p>
{% if run.expected %}
<p>expected: {{ run.expected.percent }} %, {{ (run.miou - run.expected.percent / 100) | percent("+") }} points, at most
{{ run.expected.tolerance }} allowed: {{ verdict(run.expected.passed) }}</p>
{% endif %}
<p>published on 310P3, of the 500 frames of val: {{ published_miou | percent }} %
{%- if run.split == "val" and run.frames == 500 %}
, {{ (run.miou - published_miou) | percent("+") }} points
{% endif %}
</p>
{% if run.baseline %}
<p>baseline: {{ run.baseline.miou | percent }} %, {{ (run.miou - run.baseline.miou) | percent("+") }} points</p>
{% endif %}
{% endif %}
{% if run.baseline %}
<p>logits like the baseline's: {{ verdict(run.baseline.passed) }}</p>
<p>labels like the baseline's: {{ run.baseline.agreement | percent }} % of the pixels</p>
{% endif %}
</div>
{% endfor %}
</section>

{% if speeds %}
<h2>Speed</h2>
<div class="card wide"><table>
<tr><th>run</th><th>batch size</th><th>frames/s</th><th>mean ms</th><th>p99 ms</th><th>end to end, frames/s</th>
<th>published on 310P3, frames/s</th></tr>
{% for speed in speeds %}
<tr><td>{{ speed.name }}</td><td>{{ speed.batch_size }}</td><td>{{ speed.fps | fixed }}</td>
<td>{{ speed.mean_ms | fixed }}</td><td>{{ speed.p99_ms | fixed }}</td><td>{{ speed.end_to_end_fps | fixed }}</td>
<td>{{ speed.published_fps | fixed }}</td></tr>
{% endfor %}
</table></div>
<p class="faint">frames/s, mean and p99 count the model alone; end to end counts reading and writing as well.</p>
{% endif %}

{% if charted %}
<h2>Classes</h2>
<div class="sides">
<figure class="card">{{ classes_chart }}
<figcaption>The worst class at the top, the three worst in another colour
<ul class="legend">
<li><i style="background:{{ bar }}"></i>{{ charted.name }}</li>
{% if charted.baseline %}
<li><i class="tick"></i>baseline of {{ charted.name }}</li>
{% endif %}
{% for run, colour in others %}
<li><i class="dot" style="background:{{ colour }}"></i>{{ run.name }}</li>
{% endfor %}
</ul></figcaption></figure>
<div class="card wide"><table>
<tr><th>IoU, %</th>
{% for run in runs %}
<th>{{ run.name }}</th>
{% if run.baseline %}<th>baseline</th><th>change</th>{% endif %}
{% endfor %}
</tr>
{% for name in names %}
<tr><td>{{ swatch(name) }}</td>
{% for run in runs %}
<td>{{ run.iou[name] | percent }}</td>
{% if run.baseline %}
<td>{{ run.baseline.iou[name] | percent }}</td><td>{{ run.baseline.iou_change[name] | percent("+") }}</td>
{% endif %}
{% endfor %}
</tr>
{% endfor %}
</table></div>
</div>

<h2>Confusions</h2>
<div class="sides">
<figure class="card wide matrix">{{ confusion_chart }}
<figcaption>{{ charted.name }}: of a row's true pixels, the percentage that is called by the column's
name</figcaption>
</figure>
<div class="card"><p>The largest of {{ charted.name }}:</p><ul>
{% for share, truth, prediction in confusions %}
<li>{{ share }} % of {{ swatch(truth) }} is called {{ swatch(prediction) }}</li>
{% else %}
<li>none</li>
{% endfor %}
</ul></div>
</div>
{% endif %}

{% for run in runs if run.baseline %}
<h2>{{ run.name }} against {{ run.baseline.result_dir }}</h2>
<div class="card wide"><table>
<tr><th>logits</th><th>worst</th><th>mean</th><th>worst frame</th></tr>
{% for output in run.baseline.outputs %}
{% set n = loop.index0 %}
{% for measure, of in output.items() %}
<tr><td>output {{ n }}, {{ measure | replace("_", " ") }}</td><td>{{ "%.6f" | format(of.worst) }}</td>
<td>{{ "%.6f" | format(of.mean) }}</td><td>{{ of.worst_frame }}</td></tr>
{% endfor %}
{% endfor %}
</table></div>
<p>{{ verdict(run.baseline.passed) }} asked for, at every frame and output: cosine at least
{{ run.baseline.least_cosine }}, relative distance at most {{ run.baseline.largest_relative_distance }}.</p>
<p>Labels agree at {{ run.baseline.agreement | percent }} % of the pixels.
{% if run.baseline.flips %}
Of the {{ run.baseline.flips }} that differ, {{ run.baseline.harmless_flips | percent }} % lie where the baseline's two
largest logits are no further apart than the frame's largest difference.
{% endif %}
They agree least at:</p>
<ul>
{% for row in run.baseline.least_agreeing %}
<li>{{ row.agreement | percent }} %: {{ row.frame }}</li>
{% endfor %}
</ul>
{% endfor %}

{% if gallery %}
<h2>Frames</h2>
<ul class="legend">
{% for name in names %}
<li>{{ swatch(name) }}</li>
{% endfor %}
<li><i style="background:{{ ignored }}"></i>not scored</li>
<li><i style="background:{{ right }}"></i>errors: right; what is wrong has the colour of its true class</li>
</ul>
{% if worst %}
<p>The lowest mIoU of {{ runs[0].name }}; a frame's is the mean over the classes in its own truth or prediction:</p>
{% for frame, panels in worst %}
<div class="frame card"><p><b>{{ frame.miou | percent }} %</b> {{ frame.name }}</p>
{{ show(panels, frame) }}</div>
{% endfor %}
{% endif %}
<p>All frames of {{ runs[0].name }}, by name:</p>
<div class="gallery">
{% for frame, panels in gallery %}
<div class="frame"><p><b>{{ frame.miou | percent }} %</b> {{ frame.name }}
<span class="faint">{{ frame.ignored_pixels }} pixels not scored</span></p>
{{ show(panels, frame) }}</div>
{% endfor %}
</div>
{% endif %}

<h2>What ran</h2>
{% for run in runs %}
<p>{{ run.name }}: {{ run.frames }} frames of split {{ run.split }}, results in {{ run.result_dir }}</p>
{% endfor %}
{% for speed in speeds %}
<p>{{ speed.name }}: {{ speed.model }}, {{ speed.provider }}, {{ speed.versions }}</p>
<pre>{{ speed.command }}</pre>
{% endfor %}
<p class="faint">Published figures: Huawei's ModelZoo-PyTorch, ACL_PyTorch/contrib/cv/segmentation/IntraDA, on Ascend
310P3, for cityscapes_easy2hard_intrada_with_norm.pth on the 500 frames of Cityscapes val.</p>
</body>
</html>
"""


def render(runs: list[dict[str, Any]], speeds: list[dict[str, Any]], frames: list[Frame]) -> str:
    """Fill the page in; everything from outside is escaped."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    environment.filters.update(percent=percent, fixed=fixed)
    scored = [frame for frame in frames if frame.miou is not None]
    charted, *others = [run for run in runs if run["miou"] is not None] or [None]
    with matplotlib.rc_context(CHART_STYLE):
        charts = (draw_classes(charted, others), draw_confusion(charted)) if charted else (None, None)
    return environment.from_string(TEMPLATE).render(
        runs=runs,
        speeds=speeds,
        published_miou=PUBLISHED_MIOU,
        names=NAMES,
        colours=dict(zip(NAMES, COLOURS)),
        ignored=COLOURS[IGNORED],
        right=COLOURS[RIGHT],
        bar=BAR,
        charted=charted,
        others=list(zip(others, cycle(DOTS))),
        classes_chart=charts[0],
        confusion_chart=charts[1],
        confusions=find_confusions(charted) if charted else [],
        worst=draw_frames(sorted(scored, key=lambda frame: frame.miou)[:WORST_FRAMES], LARGE),
        gallery=draw_frames(frames, SMALL),
    )


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Lay results out as one page to look at, that needs nothing else.")
    add = parser.add_argument
    add("metrics", metavar="METRICS.json", nargs="+", type=Path, help="of intrada_postprocess.py --json, one a run")
    add("--labels", metavar="DIR", type=Path, help="the first run's label maps, of --save_labels; with --data")
    add("--data", metavar="DATA_DIR", type=Path, help="Cityscapes, holds leftImg8bit/ and gtFine/; with --labels")
    add("--perf", metavar="SUMMARY.json", nargs="+", type=Path, default=[], help="of ais_bench or intrada_infer.py")
    add("--output", metavar="FILE", type=Path, default=Path("report.html"), help="page to write (default: %(default)s)")
    args = parser.parse_args(argv)
    if bool(args.labels) != bool(args.data):
        parser.error("--labels and --data go together")
    if not args.output.parent.is_dir():
        parser.error(f"--output {args.output}: no such folder")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    runs = tell_apart([read_run(path) for path in args.metrics], args.metrics)
    speeds = tell_apart([read_speed(path) for path in args.perf], args.perf)
    speeds.sort(key=lambda speed: speed["batch_size"])
    frames = find_frames(runs[0], args.data, args.labels) if args.labels else []
    part = args.output.with_name(args.output.name + ".part")
    part.write_text(render(runs, speeds, frames), encoding="utf-8", errors="replace")
    os.replace(part, args.output)
    told = f"{len(runs)} runs, {len(frames)} frames" if len(runs) > 1 else f"1 run, {len(frames)} frames"
    print(f"{args.output}: {told}, {args.output.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except (InputError, OSError) as error:
        raise SystemExit(f"{Path(__file__).name}: error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
