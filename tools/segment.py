#!/usr/bin/env python3
"""Segment any images with an .onnx or .om and draw the prediction over them.

    IMAGE, or a folder, with all below   any size and format that Pillow opens; EXIF's rotation is applied
 -> OUTPUT/<name>_overlay.jpg            the prediction over the image, and below it the classes' shares of pixels
 -> OUTPUT/<name>_color.png              the prediction in Cityscapes' colors, a palette PNG of the image's size
 -> OUTPUT/shares.csv                    one row per image: <name>, and each class's fraction of the pixels, 0 to 1

<name> is the image's path below the given folder without its suffix, and with it where two images would share a name;
of several paths, a folder's own name comes first. The model sees all images at 1024 x 512 and knows street scenes. What
cannot be segmented is reported at the end, with exit status 1; --skip_done resumes.

    $ python3 tools/segment.py X.onnx photos --output overlays
    overlays written to overlays: 3
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import errno
import functools
import io
import mimetypes
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm.contrib.concurrent import thread_map

sys.path[:0] = map(str, [*Path(__file__).resolve().parents][:2])
from infer import load_model, one_line, run_model
from intrada_postprocess import (
    LOGITS_SHAPE,
    NAMES,
    PALETTE,
    InputError,
    count_cpus,
    first_five,
    is_there,
    list_folder,
    predict,
    run_script,
)
from intrada_preprocess import to_input

with contextlib.suppress(ImportError):
    from pillow_heif import register_heif_opener

    register_heif_opener()

mimetypes.types_map.update({".db": "Thumbs.db", ".ini": "desktop.ini"})
OUR_NAMES = re.compile(r"(.+_overlay\.jpg|.+_color\.png|shares\.csv)(\.part)?", re.DOTALL)
ENDINGS = "overlay.jpg", "color.png"
HEADER = ["image", *NAMES]
SWATCH, ROW = 10, 16  # pixels of the legend, before it is enlarged


def find_images(paths: list[Path], output: Path) -> dict[str, Path]:
    """Find the images, and those below folders, except what is in OUTPUT, by the name of their results.

    Raises:
        InputError: there are none, two results would have the same name, or OUTPUT holds other images than results.
    """
    others = [str(p) for p in (walk(output, set()) if is_there(output) else []) if not OUR_NAMES.fullmatch(p.name)]
    if others:
        raise InputError(f"{output}: has files that may be your images; pass another --output: {first_five(others)}")
    visited, found = {output.resolve()}, []
    for path in [path for path in paths if path.stat() and not visited & {path.resolve(), *path.resolve().parents}]:
        folder = path if path.is_dir() else path.parent
        start = Path(os.path.abspath(path)).name if len(paths) > 1 and path.is_dir() else ""  # noqa: PTH100
        found += [(image, start / image.relative_to(folder)) for image in walk(path, visited)]
    if not found:
        raise InputError(f"{first_five([str(path) for path in paths])}: no images")
    stems = Counter(place.with_suffix("") for _, place in found)
    names = [str(place if stems[place.with_suffix("")] > 1 else place.with_suffix("")) for _, place in found]
    counts = Counter(names)
    duplicates = [str(image) for (image, _), name in zip(found, names) if counts[name] > 1]
    if duplicates:
        raise InputError(f"images whose results would have the same name: {first_five(duplicates)}")
    return {name: image for name, (image, _) in zip(names, found)}


def walk(path: Path, visited: set[Path]) -> list[Path]:
    """List a file, or what may be images below a folder, in a fixed order; a folder that was visited has none."""
    if not path.is_dir():
        return [path]
    entries = [] if path.resolve() in visited else list_folder(path)
    visited.add(path.resolve())
    files = [file for entry in entries for file in walk(entry, visited)]
    return [file for file in files if (mimetypes.guess_type(file.name)[0] or "image/").startswith("image/")]


def read_image(path: Path) -> Image.Image:
    """Decode an image as RGB: upright, 16-bit gray scaled to 8, on white where it is transparent; or InputError."""
    try:
        with Image.open(path) as image:
            if image.format == "TIFF" and path.suffix.lower() not in (".tif", ".tiff"):  # Pillow opens its thumbnail
                raise ValueError("camera raw; convert it first")
            image.load()
            with contextlib.suppress(Exception):  # a damaged EXIF
                image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":  # convert would clip at 255
            values = np.asarray(image)
            if image.mode == "F" or values.min() < 0 or values.max() > 65535:
                raise ValueError("32 bits per sample; convert it to 8 or 16 first")
            image = Image.fromarray((values >> 8).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:  # Pillow raises nearly everything
        remedy = "; HEIC needs the package pillow_heif" if path.suffix.lower() in (".heic", ".heif") else ""
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}{remedy}") from None


# ---------------------------------------------------------------------------------------------------- the results


def tidy_shares(output: Path) -> dict[str, list[str]]:
    """Read shares.csv, if it is there, and write it again: the last row of each image, sorted; return these by image.

    Raises:
        InputError: it was not written by this script.
    """
    path = output / "shares.csv"
    content = path.read_bytes() if is_there(path) else to_lines(HEADER)
    header, *rows = csv.reader(io.StringIO(content.decode("utf-8", "surrogateescape"), newline=""))
    if header != HEADER:
        raise InputError(f"{path}: was not written by this script; pass another --output")
    complete = rows if content.endswith(b"\n") else rows[:-1]  # an interruption may cut the last one
    shares = {row[0]: row for row in complete if len(row) == len(HEADER)}
    write(path, to_lines(HEADER, *(shares[name] for name in sorted(shares))))
    return shares


def to_lines(*rows: list[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")


def write(path: Path, content: bytes) -> None:
    """Write a file that is complete whenever it has its name."""
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None


def draw(photo: Image.Image, prediction: np.ndarray, target: str) -> np.ndarray:
    """Write the overlay and the color map, and return the classes' fractions of the pixels."""
    color_map = Image.fromarray(prediction)
    fractions = np.array(color_map.histogram()[: len(NAMES)]) / prediction.size
    color_map.putpalette(PALETTE)
    legend = draw_legend(fractions, photo.size)
    overlay = Image.new("RGB", (max(photo.width, legend.width), photo.height + legend.height), "white")
    overlay.paste(Image.blend(photo, color_map.convert("RGB"), 0.5))
    overlay.paste(legend, (0, photo.height))
    jpg, png = io.BytesIO(), io.BytesIO()  # to which Pillow writes whole, and to a full disk perhaps not
    overlay.save(jpg, "JPEG", quality=90)
    color_map.save(png, "PNG", compress_level=1)
    write(Path(f"{target}_overlay.jpg"), jpg.getvalue())
    write(Path(f"{target}_color.png"), png.getvalue())
    return fractions


def draw_legend(shares: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """Draw the classes, each in its own place; small, then enlarged, since Pillow 9's own font has only one size."""
    names = [name.replace(" ", "  ") for name in NAMES]  # one space of this font is hardly seen
    figures = [f"{100 * share:.2f} %" for share in shares]
    widths = {text: ImageFont.load_default().getmask(text).size[0] for text in [*names, *figures, "100.00 %"]}
    cell = SWATCH + max(widths[name] for name in names) + widths["100.00 %"] + 28
    factor = max(1, round((size[0] * size[1]) ** 0.5 / 650))
    columns = min(len(names), max(1, size[0] // factor // cell))
    legend = Image.new("RGB", (columns * cell, -(-len(names) // columns) * ROW + 4), "white")
    pen = ImageDraw.Draw(legend)
    for n in np.flatnonzero(shares >= 0.00005):
        x, y = n % columns * cell + 4, n // columns * ROW + 5
        pen.rectangle((x, y, x + SWATCH, y + SWATCH), fill=tuple(PALETTE[3 * n : 3 * n + 3]))
        pen.text((x + SWATCH + 4, y), names[n], fill="black")
        pen.text((x + cell - 16 - widths[figures[n]], y), figures[n], fill="black")
    return legend.resize((legend.width * factor, legend.height * factor), Image.NEAREST)


# ---------------------------------------------------------------------------------------------------- the run


def load(args: argparse.Namespace) -> Callable[[np.ndarray], np.ndarray]:
    """Load the model; return a function from an input, (3, 512, 1024), to its main logits, (19, 65, 129) float32."""
    if args.model.suffix == ".onnx":
        session, _ = load_model(args.model, args.provider, args.device, count_cpus())
        return lambda input_chw: run_model(session, input_chw[None])[0][1][0]
    from ais_bench.infer.interface import InferSession

    session = InferSession(args.device, str(args.model))
    return lambda input_chw: session.infer([input_chw[None]])[1].reshape(LOGITS_SHAPE).astype(np.float32, copy=False)


def segment(name: str, path: Path, infer: Callable[[np.ndarray], np.ndarray], output: Path) -> str | None:
    """Write an image's results, and its row of shares.csv last; return what is wrong with the image."""
    try:
        photo = read_image(path)
    except InputError as error:
        return str(error)
    logits = infer(to_input(photo))
    if not np.isfinite(logits).all():
        return f"{path}: NaN or Inf in its logits, typically an FP16 overflow"
    try:
        fractions = draw(photo, predict(logits, (photo.height, photo.width)), str(output / name))
    except OSError as error:  # a name is too long, or a side above JPEG's 65500 pixels
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # ends all
            raise
        return f"{error.filename or f'{path}: overlay'}: {error.strerror or error}"
    line = to_lines([name, *(f"{fraction:.9f}" for fraction in fractions)])
    with (output / "shares.csv").open("ab", buffering=0) as file:
        file.write(line)  # in one piece, whatever other threads write
    return None


def segment_all(images: dict[str, Path], args: argparse.Namespace) -> list[str]:
    """Segment images in threads, and run the model in one of its own, as ais_bench requires; return what is wrong."""
    with ThreadPoolExecutor(1) as model_thread:

        def call(function: Callable, argument: object) -> Any:
            try:
                return model_thread.submit(function, argument).result()
            except InputError:
                raise
            except Exception as error:  # ais_bench and what it imports raise nearly everything
                raise InputError(f"{args.model}: {one_line(error)}") from None

        segment_image = functools.partial(segment, infer=functools.partial(call, call(load, args)), output=args.output)
        workers = min(4, count_cpus())  # a photo of 24 megapixels takes 0.4 GB
        errors = thread_map(segment_image, images, images.values(), max_workers=workers, unit="image", disable=None)
    return [error for error in errors if error]


def keep_stdout() -> TextIO:
    """Send what is printed on stdout, in C++ too, to stderr, and return a file that is still stdout."""
    stdout = os.fdopen(os.dup(1), "w", errors="backslashreplace")
    os.dup2(2, 1)
    return stdout


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Segment any images and draw the prediction over them.")
    add = parser.add_argument
    add("model", metavar="MODEL", type=Path, help=".onnx (any host) or .om of batch size 1 (Ascend)")
    add("images", metavar="IMAGE_OR_FOLDER", type=Path, nargs="+", help="images, or folders, searched recursively")
    add("--output", metavar="DIR", type=Path, required=True, help="folder to write to; without other images")
    add("--skip_done", action="store_true", help="skip images that have results")
    add("--device", metavar="ID", type=int, default=0, help="device of ais_bench or provider (default: %(default)s)")
    add("--provider", default="cpu", help="execution provider for an .onnx (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.model.suffix not in (".onnx", ".om"):
        parser.error("MODEL must be an .onnx or an .om")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    args.model.stat()  # raises if there is none
    images = find_images(args.images, args.output)
    shares = tidy_shares(args.output)  # before any work, since OUTPUT may be read-only
    stdout = keep_stdout() if args.model.suffix == ".om" else sys.stdout  # ais_bench prints a lot
    if args.skip_done:
        done = {name for name in shares if all(is_there(Path(f"{args.output / name}_{ending}")) for ending in ENDINGS)}
        print(f"skipped, already done: {len(done & images.keys())}", file=stdout)
        images = {name: path for name, path in images.items() if name not in done}
    errors = segment_all(images, args)
    tidy_shares(args.output)
    print(f"overlays written to {args.output}: {len(images) - len(errors)}", file=stdout, flush=True)
    if errors:
        raise InputError(f"{len(errors)} of {len(images)} images cannot be segmented: {first_five(errors, '; ')}")
    return 0


if __name__ == "__main__":
    run_script(main)
