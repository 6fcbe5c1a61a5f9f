#!/usr/bin/env python3
"""Segment any images with an .onnx or .om and draw the prediction over them.

    IMAGE, or a folder, with all below   any size and format that Pillow opens; EXIF's rotation is applied
 -> OUTPUT/<name>_overlay.jpg            the prediction over the image, and below it the classes' shares of pixels
 -> OUTPUT/<name>_color.png              the prediction in Cityscapes' colors, a palette PNG of the image's size
 -> OUTPUT/shares.csv                    one row per image: <name>, and each class's fraction of the pixels, 0 to 1

<name> is the image's path below the given folder without its suffix, and with it where two images would share a name;
of several paths, a folder's own name comes first. The model sees all images at 1024 x 512 and knows street scenes. What
cannot be segmented is reported at the end, with exit status 1; --skip_done resumes. Temporary files are in TMPDIR.

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
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from intrada_postprocess import (
    NAMES,
    PALETTE,
    InputError,
    count_cpus,
    first_five,
    is_there,
    list_folder,
    predict,
    read_logits,
    run_script,
)
from intrada_preprocess import to_input

with contextlib.suppress(ImportError):
    from pillow_heif import register_heif_opener

    register_heif_opener()

mimetypes.types_map.update({".db": "Thumbs.db", ".ini": "desktop.ini"})
CPU_GROUP, GROUP = 32, 256  # images; loading the model takes 1 s on a CPU, and longer than all else on other devices
OUR_NAMES = re.compile(r"(.+_overlay\.jpg|.+_color\.png|shares\.csv)(\.part)?", re.DOTALL)
HEADER = ["image", *NAMES]
UPRIGHT = {2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM, 5: Image.TRANSPOSE,
           6: Image.ROTATE_270, 7: Image.TRANSVERSE, 8: Image.ROTATE_90}  # by EXIF's orientation  # fmt: skip
SWATCH, ROW = 10, 16  # pixels of the legend, before it is enlarged


class Source(NamedTuple):
    """An image, its results, and a number for its temporary files, since ais_bench refuses most names."""

    path: Path
    name: str
    overlay: Path
    color: Path
    number: str


def find_images(paths: list[Path], output: Path) -> list[Source]:
    """List the images, and those below folders, except what is in OUTPUT, and name their results.

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
    results = [(name, output / f"{name}_overlay.jpg", output / f"{name}_color.png") for name in names]
    return [Source(image, *result, f"{n:05}") for n, ((image, _), result) in enumerate(zip(found, results))]


def walk(path: Path, visited: set[Path]) -> list[Path]:
    """List a file, or what may be images below a folder, in a fixed order; a folder that was visited has none."""
    if not path.is_dir():
        return [path]
    entries = [] if path.resolve() in visited else list_folder(path)
    visited.add(path.resolve())
    files = [file for entry in entries for file in walk(entry, visited)]
    return [file for file in files if (mimetypes.guess_type(file.name)[0] or "image/").startswith("image/")]


def read_shares(output: Path) -> dict[str, list[str]]:
    """Read the fractions of shares.csv by image; none if there is no such file."""
    path = output / "shares.csv"
    if not is_there(path):
        return {}
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = list(csv.reader(file))
    if rows[:1] != [HEADER]:
        raise InputError(f"{path}: was not written by this script; pass another --output")
    return {row[0]: row[1:] for row in rows[1:] if len(row) == len(HEADER)}


def write_shares(output: Path, shares: dict[str, list[str]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([HEADER, *([name, *shares[name]] for name in sorted(shares))])
    write({output / "shares.csv": text.getvalue().encode("utf-8", "surrogateescape")})


def write(contents: dict[Path, bytes]) -> None:
    """Write files as `.part` and rename them, all or none."""
    parts = {target: target.with_name(f"{target.name}.part") for target in contents}
    try:
        for target, part in parts.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(contents[target])
        for target, part in parts.items():
            part.replace(target)
    except OSError as error:
        for part in parts.values():
            with contextlib.suppress(OSError):
                part.unlink()
        raise OSError(error.errno, error.strerror, str(target)) from None


def for_all(step: functools.partial, images: list[Source], stop: threading.Event) -> dict[Source, str]:
    """Do a step for every image in threads, until it is to stop; return the errors of those that failed."""

    def attempt(image: Source) -> str | None:
        try:
            return "interrupted" if stop.is_set() else step(image)
        except InputError as error:
            return str(error)

    with ThreadPoolExecutor(min(4, count_cpus())) as pool:  # a photo of 24 megapixels takes 0.4 GB
        return {image: error for image, error in zip(images, pool.map(attempt, images)) if error}


def read_image(path: Path) -> Image.Image:
    """Decode an image as RGB: upright, 16-bit gray scaled to 8, on white where it is transparent.

    Raises:
        InputError: it cannot be read, or would not look as it should.
    """
    try:
        with Image.open(path) as image:
            if image.format == "TIFF" and path.suffix.lower() not in (".tif", ".tiff"):  # Pillow opens its thumbnail
                raise ValueError("camera raw; convert it first")
            image.load()
            with contextlib.suppress(Exception):  # it has no EXIF, or a damaged one
                image = image.transpose(UPRIGHT[image.getexif()[0x0112]])
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


def prepare(image: Source, folder: Path) -> None:
    write({folder / f"{image.number}.bin": to_input(read_image(image.path))})


def infer(images: list[Source], folder: Path, args: argparse.Namespace, bar: tqdm, stop: threading.Event) -> None:
    """Run tools/infer.py or ais_bench, and kill it if it is to stop: <number>.bin -> logits/<number>_1.bin."""
    is_om = args.model.suffix == ".om"
    tool = ["-m", "ais_bench"] if is_om else [str(Path(__file__).with_name("infer.py")), "--provider", args.provider]
    command = [sys.executable, *tool, "--model", str(args.model), "--batchsize", "1", "--device", str(args.device)]
    command += ["--input", str(folder), "--output", str(folder), "--output_dirname", "logits"]
    environment = {**os.environ, "RANK": "-1"}  # as a rank of torchrun, tools/infer.py would take a part of the images
    log, before = folder / "log", bar.n
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file, env=environment) as child:
        while child.poll() is None and not stop.wait(0.1):
            bar.update(before + len(list(folder.glob("logits/*_1.bin"))) - bar.n)
        child.kill()  # if it has not ended
    missing = [image for image in images if not is_there(folder / "logits" / f"{image.number}_1.bin")]
    bar.update(before + len(images) - len(missing) - bar.n)
    if child.returncode or missing:
        last_lines = " | ".join(log.read_text(errors="replace").splitlines()[-5:]) or "no message; TMPDIR may be full"
        problem = f"inference ended with status {child.returncode}, results missing: {len(missing)} of {len(images)}"
        raise InputError(f"{args.model}: {problem}, in {folder}: {last_lines}")


def draw(image: Source, folder: Path, shares: dict[str, list[str]]) -> None:
    """Write an image's overlay and color map, and note its shares."""
    photo = read_image(image.path)
    prediction = predict(read_logits(folder / "logits" / f"{image.number}_1.bin"), (photo.height, photo.width))
    color_map = Image.fromarray(prediction)
    fractions = np.array(color_map.histogram()[: len(NAMES)]) / prediction.size
    color_map.putpalette(PALETTE)
    legend = draw_legend(fractions, photo.size)
    overlay = Image.new("RGB", (max(photo.width, legend.width), photo.height + legend.height), "white")
    overlay.paste(Image.blend(photo, color_map.convert("RGB"), 0.5))
    overlay.paste(legend, (0, photo.height))
    jpg, png = io.BytesIO(), io.BytesIO()  # to which Pillow writes whole, and to a full disk perhaps not
    try:
        overlay.save(jpg, "JPEG", quality=90)
        color_map.save(png, "PNG", compress_level=1)
        write({image.overlay: jpg.getvalue(), image.color: png.getvalue()})
    except OSError as error:  # the name is too long, or a side above JPEG's 65500 pixels
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # which ends all
            raise
        raise InputError(f"{image.overlay}: {error.strerror or error}") from None
    shares[image.name] = [f"{fraction:.9f}" for fraction in fractions]


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


def segment(images: list[Source], args: argparse.Namespace, stop: threading.Event) -> list[str]:
    """Prepare, infer and draw group after group, until it is to stop; return what is wrong with which image."""
    shares, errors, drawn = read_shares(args.output), {}, {}
    write_shares(args.output, shares)  # before any work, since OUTPUT may be read-only
    if args.skip_done:
        done = {i for i in images if i.name in shares and is_there(i.overlay) and is_there(i.color)}
        print(f"skipped, already done: {len(done)}")
        images = [image for image in images if image not in done]
    size = CPU_GROUP if args.model.suffix == ".onnx" and args.provider == "cpu" else GROUP
    starts = [0, *range(CPU_GROUP, len(images), size)]  # the first group is small, and tells of a wrong model
    try:
        with tqdm(total=len(images), unit="image", disable=None) as bar:
            for group in [images[start:end] for start, end in zip(starts, [*starts[1:], None])]:
                if stop.is_set():
                    break
                with tempfile.TemporaryDirectory(prefix="segment_") as name:
                    folder = Path(name)
                    errors.update(for_all(functools.partial(prepare, folder=folder), group, stop))
                    readable = [image for image in group if image not in errors]
                    bar.update(len(group) - len(readable))
                    if readable:
                        infer(readable, folder, args, bar, stop)
                    errors.update(for_all(functools.partial(draw, folder=folder, shares=drawn), readable, stop))
                write_shares(args.output, {**shares, **drawn})
    finally:
        print(f"overlays written to {args.output}: {len(drawn)}", flush=True)  # a signal ends the process without that
    return list(errors.values())


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
    stop = threading.Event()
    with ThreadPoolExecutor(1) as worker:  # signals interrupt only the main thread: what is begun there is finished
        try:
            work = worker.submit(segment, images, args, stop)
            while not work.done():
                time.sleep(0.1)  # a wait for the other thread does not end if that receives the signal
        finally:
            stop.set()
    errors = work.result()
    if errors:
        raise InputError(f"{len(errors)} of {len(images)} images cannot be segmented: {first_five(errors, '; ')}")
    return 0


if __name__ == "__main__":
    run_script(main, unwind=True)
