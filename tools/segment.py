#!/usr/bin/env python3
"""Segment any images with an .onnx or .om and draw the prediction over them.

    IMAGE, or a folder of images        any size and format that Pillow opens; EXIF's rotation is applied
 -> DIR/<name>_overlay.jpg              the prediction over the image, and below it each class with its share of pixels
 -> DIR/<name>_color.png                the prediction in Cityscapes' colors, a palette PNG of the image's size

<name> is the image's name without its suffix, and with it where two images would share a name. The model sees every
image at 1024 x 512, whatever its shape, and was trained on street scenes: results elsewhere will be poor. A file that
is no image is reported, the others are drawn, and the exit status is 1; a path that is missing ends it at once. A
temporary folder takes 8 MB per image while this runs; TMPDIR says where.

    $ python3 tools/segment.py X.onnx photos --output overlays
    overlays written to overlays: 3
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm.contrib.concurrent import thread_map

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from intrada_postprocess import (
    CLASSES,
    PALETTE,
    InputError,
    count_cpus,
    first_five,
    is_there,
    list_folder,
    percent,
    predict,
    read_logits,
    run_script,
)
from intrada_preprocess import to_input

SWATCH, ROW = 10, 16  # pixels of the legend, before it is enlarged


class Source(NamedTuple):
    """An image, the name of its results, and a number for its temporary files, since ais_bench refuses most names."""

    path: Path
    name: str
    number: str


def find_images(paths: list[Path], output: Path) -> list[Source]:
    """List the images and those in folders, and name their results.

    Raises:
        InputError: there are none, two results would have the same name, or a result would overwrite an image.
    """
    images = [image for path in paths for image in list_folder(path) or [path]]
    images = [image for image in images if not image.is_dir()]
    if not images:
        raise InputError(f"{first_five([str(path) for path in paths])}: no images")
    stems = Counter(image.stem for image in images)
    names = [image.name if stems[image.stem] > 1 else image.stem for image in images]
    counts = Counter(names)
    duplicates = [str(image) for image, name in zip(images, names) if counts[name] > 1]
    if duplicates:
        raise InputError(f"images whose results would have the same name: {first_five(duplicates)}")
    targets = {target.resolve() for name in names for target in name_targets(output, name)}
    overwritten = [str(image) for image in images if image.resolve() in targets]
    if overwritten:
        raise InputError(f"{output}: results would overwrite images; pass another --output: {first_five(overwritten)}")
    return [Source(image, name, f"{n:05}") for n, (image, name) in enumerate(zip(images, names))]


def name_targets(output: Path, name: str) -> tuple[Path, Path]:
    return output / f"{name}_overlay.jpg", output / f"{name}_color.png"


def for_all(step: Callable[[Source], None], images: list[Source], title: str) -> tuple[list[Source], list[str]]:
    """Do a step for every image in threads; return the images that it succeeded for, and the errors of the others."""

    def attempt(image: Source) -> str | None:
        try:
            step(image)
        except InputError as error:
            return str(error)
        return None

    errors = thread_map(attempt, images, desc=title, unit="image", disable=None, max_workers=count_cpus())
    return [image for image, error in zip(images, errors) if not error], [error for error in errors if error]


def read_image(path: Path) -> Image.Image:
    """Decode an image as RGB: upright, 16-bit gray scaled to 8, on white where it is transparent.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I"):  # convert would clip at 255
            image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:  # Pillow raises nearly everything
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def prepare(image: Source, folder: Path) -> None:
    """Write the network's input."""
    (folder / "input" / f"{image.number}.bin").write_bytes(to_input(read_image(image.path)))


def infer(images: list[Source], folder: Path, args: argparse.Namespace) -> None:
    """Run tools/infer.py or ais_bench: folder/input/<number>.bin -> folder/logits/<number>_1.bin.

    Raises:
        InputError: it failed, or results are missing.
    """
    tool = ["-m", "ais_bench"]
    if args.model.suffix == ".onnx":
        tool = [str(Path(__file__).with_name("infer.py")), "--provider", args.provider]
    options = ["--input", str(folder / "input"), "--output", str(folder), "--output_dirname", "logits"]
    options += ["--model", str(args.model), "--batchsize", "1", "--device", str(args.device)]
    # as a rank of torchrun, tools/infer.py would take only a part of the images
    environment = {name: os.environ[name] for name in os.environ.keys() - {"RANK", "WORLD_SIZE", "LOCAL_RANK"}}
    command = [sys.executable, *tool, *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, errors="replace", env=environment)
    missing = [image for image in images if not is_there(folder / "logits" / f"{image.number}_1.bin")]
    if done.returncode or missing:
        last_lines = " | ".join(["see its messages above", *done.stdout.splitlines()[-3:]])
        problem = f"inference ended with status {done.returncode}, results missing: {len(missing)} of {len(images)}"
        raise InputError(f"{args.model}: {problem}; {last_lines}")


def draw(image: Source, folder: Path, output: Path) -> None:
    """Write an image's overlay and color map, both or none of them."""
    photo = read_image(image.path)
    logits = read_logits(folder / "logits" / f"{image.number}_1.bin")
    prediction = predict(logits, (photo.height, photo.width))
    color_map = Image.fromarray(prediction)
    color_map.putpalette(PALETTE)
    legend = draw_legend(np.bincount(prediction.ravel(), minlength=len(CLASSES)) / prediction.size, photo.size)
    overlay = Image.new("RGB", (max(photo.width, legend.width), photo.height + legend.height), "white")
    overlay.paste(Image.blend(photo, color_map.convert("RGB"), 0.5))
    overlay.paste(legend, (0, photo.height))
    targets = name_targets(output, image.name)
    try:
        overlay.save(targets[0], quality=90)
        color_map.save(targets[1], compress_level=1)
    except OSError as error:  # a full disk, or a side above JPEG's 65500 pixels
        for target in filter(is_there, targets):
            target.unlink()
        raise InputError(f"{targets[0]}: {error.strerror or error}") from None


def draw_legend(shares: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """Draw the classes that occur, largest first; small, then enlarged, since Pillow 9's own font has only one size.

    Args:
        shares: (19) fractions of the pixels.
        size: the image's width and height.
    """
    classes = [n for n in np.argsort(-shares, kind="stable") if shares[n]]
    texts = [f"{CLASSES[n][1]}  {percent(shares[n])} %" for n in classes]
    factor = max(1, round((size[0] * size[1]) ** 0.5 / 650))
    cell = max(ImageFont.load_default().getmask(text).size[0] for text in texts) + SWATCH + 14
    columns = max(1, size[0] // factor // cell)
    rows = -(-len(texts) // columns)
    legend = Image.new("RGB", (columns * cell, rows * ROW + 4), "white")
    pen = ImageDraw.Draw(legend)
    for position, (n, text) in enumerate(zip(classes, texts)):
        x, y = position % columns * cell + 4, position // columns * ROW + 5
        pen.rectangle((x, y, x + SWATCH, y + SWATCH), fill=CLASSES[n][3])
        pen.text((x + SWATCH + 4, y), text, fill="black")
    return legend.resize((legend.width * factor, legend.height * factor), Image.NEAREST)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Segment any images and draw the prediction over them.")
    add = parser.add_argument
    add("model", metavar="MODEL", type=Path, help=".onnx (any host) or .om of batch size 1 (Ascend)")
    add("images", metavar="IMAGE_OR_FOLDER", type=Path, nargs="+", help="images, or folders of images")
    add("--output", metavar="DIR", type=Path, required=True, help="folder to write to")
    add("--device", metavar="ID", type=int, default=0, help="device of ais_bench or provider (default: %(default)s)")
    add("--provider", default="cpu", help="of tools/infer.py, for an .onnx (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.model.suffix not in (".onnx", ".om"):
        parser.error("MODEL must be an .onnx or an .om")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    args.model.stat()  # raises if there is none
    images = find_images(args.images, args.output)
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="segment_") as name:
        folder = Path(name)
        (folder / "input").mkdir()
        readable, errors = for_all(functools.partial(prepare, folder=folder), images, "read")
        if readable:
            infer(readable, folder, args)
        drawn, more_errors = for_all(functools.partial(draw, folder=folder, output=args.output), readable, "draw")
    print(f"overlays written to {args.output}: {len(drawn)}")
    errors += more_errors
    if errors:
        raise InputError(f"{len(errors)} of {len(images)} images cannot be segmented: {first_five(errors, '; ')}")
    return 0


if __name__ == "__main__":
    run_script(main, unwind=True)
