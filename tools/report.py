#!/usr/bin/env python3
"""Write one self-contained HTML page about results: what ran, mIoU, speed, classes, confusions, frames.

   METRICS.json ...                                               of intrada_postprocess.py --json, one per run
   --labels DIR/<frame>_predicted_labelIds.png                    the first run's label maps, of --save_labels
   --data DATA_DIR/{leftImg8bit,gtFine}/<split>/<city>/<frame>_*  its images and labels
   --perf SUMMARY.json ...                                        of ais_bench or tools/infer.py
-> one HTML file without script that loads nothing; the same inputs give the same bytes

The summary of a run is the --perf file called <name of its RESULT_DIR>_summary.json.

   $ python3 tools/report.py metrics_bs1.json --labels labels_bs1 --data cityscapes --output report.html
   report.html: 1 run, 3 frames, 0.6 MB
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import re
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from intrada_postprocess import CLASSES, LABEL_IDS, NAMES, InputError, compute_iou, read_png

# Source: Huawei's ModelZoo-PyTorch, ACL_PyTorch/contrib/cv/segmentation/IntraDA: Cityscapes val, frames/s on 310P3.
PUBLISHED_MIOU = 0.4701
PUBLISHED_FPS = {1: 47.52, 4: 43.64, 8: 43.35, 16: 43.41, 32: 42.09, 64: 20.39}

IGNORED, CORRECT = len(CLASSES), len(CLASSES) + 1  # two more train ids: not scored, and predicted correctly
COLORS = [*(color for _, _, _, color in CLASSES), "#000000", "#ffffff"]
TRAIN_ID_OF = np.full(256, IGNORED, np.uint8)
TRAIN_ID_OF[LABEL_IDS] = range(len(CLASSES))

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
    summary = read_json(path, SUMMARY, "ais_bench or tools/infer.py")
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
    mean_iou = np.nanmean(compute_iou(confusion)) if confusion.any() else np.nan
    if not np.isclose(mean_iou, miou, rtol=0, atol=1e-9, equal_nan=True):
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
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None) as pool:
        return list(tqdm(pool.map(draw_frame, frames, sizes), total=len(frames), unit="frame", disable=None))


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


def render(runs: list[dict[str, Any]], summaries: list[dict[str, Any]], frames: list[dict[str, Any]]) -> str:
    """Fill the page in; everything from files is escaped."""
    loader = jinja2.FileSystemLoader(str(Path(__file__).parent))
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = percent
    first = runs[0]
    with np.errstate(invalid="ignore"):
        shares = np.nan_to_num(first["confusion"] / first["confusion"].sum(axis=1, keepdims=True))
    speeds = [(run["name"], run["summary"]) for run in runs if run["summary"]]
    others = [summary for summary in summaries if summary not in [run["summary"] for run in runs]]
    speeds += [(f"{summary['name']} ({summary['path'].name})", summary) for summary in others]
    return environment.get_template("report.html").render(
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
            os.replace(str(part), str(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        if not in_place and part.exists():
            part.unlink()


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write one self-contained HTML page about results.")
    add = parser.add_argument
    add("metrics", metavar="METRICS.json", nargs="+", type=Path, help="of intrada_postprocess.py --json, one per run")
    add("--labels", metavar="DIR", type=Path, help="the first run's label maps, of --save_labels; needs --data")
    add("--data", metavar="DATA_DIR", type=Path, help="Cityscapes, with leftImg8bit/ and gtFine/; needs --labels")
    add("--perf", metavar="SUMMARY.json", nargs="+", type=Path, default=[], help="of ais_bench or tools/infer.py")
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
