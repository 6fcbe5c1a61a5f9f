#!/usr/bin/env python3
"""Convert Cityscapes images to the network's input, one file per frame.

    DATA_DIR/leftImg8bit/<split>/<city>/<frame>_leftImg8bit.png      RGB, 2048 x 1024
 -> SAVE_DIR/<frame>_leftImg8bit.bin                                 6 291 456 bytes

A `.bin` holds float32, little-endian, C order, shape (3, 512, 1024): blue, green, red, each minus its mean, about
-123 to 151. `np.fromfile(path, "<f4").reshape(3, 512, 1024)` reads it.

    $ python3 intrada_preprocess.py /data/cityscapes prep
    frames written to prep: 500
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.contrib.concurrent import thread_map

HEIGHT, WIDTH = 512, 1024
# Source: the Caffe ResNet-101 that the weights descend from; configured so in IntraDA at 070b0b7 (ADVENT's IMG_MEAN).
MEAN_BGR = np.array((104.00698793, 116.66876762, 122.67891434), dtype=np.float32)


class InputError(Exception):
    """A mistake the user can fix; reported in one line, without a traceback."""


def find_images(data_dir: Path, split: str) -> list[Path]:
    """Find the split's images, sorted by path; InputError for none, or names that clash or have a dot."""
    folder = data_dir / "leftImg8bit" / split
    try:
        cities = list_folder(folder)
    except FileNotFoundError:
        cities = []
    images = [path for city in cities for path in list_folder(city) if path.name.endswith("_leftImg8bit.png")]
    if not images:
        remedy = "DATA_DIR is the folder that holds leftImg8bit; other images are for tools/segment.py"
        raise InputError(f"{folder}: no <city>/<frame>_leftImg8bit.png; {remedy}")
    by_name = {path.name: path for path in images}
    duplicates = [path.name for path in images if by_name[path.name] != path]
    if duplicates:
        raise InputError(f"{folder}: frame names that occur in two cities: {first_five(duplicates)}")
    dotted = [path.name for path in images if "." in path.stem]
    if dotted:
        raise InputError(f"{folder}: frame names contain a dot; ais_bench truncates there: {first_five(dotted)}")
    return images


def list_folder(folder: Path) -> list[Path]:
    """List what is in a folder, sorted, without hidden files; empty for a file. glob would hide what cannot be read."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except NotADirectoryError:
        return []


def first_five(names: list[str], separator: str = ", ") -> str:
    """List at most five names and the count, to keep the message on one line."""
    return separator.join(names[:5]) + (f"{separator}... ({len(names)} in all)" if len(names) > 5 else "")


def read_image(path: Path) -> Image.Image:
    """Decode an 8-bit RGB PNG, its checksums checked, which decoding alone does not; or InputError."""
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
    if (bits, image.mode) != (8, "RGB"):
        raise InputError(f"{path}: found mode {image.mode}, {bits} bits per sample; expected mode RGB, 8 bits")
    return image


def to_input(image: Image.Image) -> np.ndarray:
    """Compute the network's input from an image, bit for bit the reference's.

    Args:
        image: RGB, any size.

    Returns:
        (3, 512, 1024) float32, BGR minus mean.

    Source: IntraDA at 070b0b7, ADVENT's Cityscapes dataset: bicubic to 1024 x 512, reverse the channels, subtract.
    """
    image_hwc = np.asarray(image.resize((WIDTH, HEIGHT), Image.BICUBIC))
    input_chw = image_hwc[:, :, ::-1].transpose(2, 0, 1).astype("<f4", order="C")
    input_chw -= MEAN_BGR[:, None, None]
    return input_chw


def convert(image: Path, save_dir: Path) -> str | None:
    """Write an image's `.bin`; return what is wrong with the image. An OSError ends all, as on a full disk."""
    try:
        input_chw = to_input(read_image(image))
    except InputError as error:
        return str(error)
    write(save_dir / f"{image.stem}.bin", input_chw.data)
    return None


def write(path: Path, content: bytes) -> None:
    """Write a file that is complete whenever it has its name; an OSError names it."""
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None


def convert_all(images: list[Path], save_dir: Path, workers: int) -> list[str]:
    """Convert images in threads, since Pillow and numpy release the GIL; return what is wrong with which image."""
    save_dir.mkdir(parents=True, exist_ok=True)
    Image.core.set_blocks_max(2 * workers)  # keep decoded images' memory for the next ones
    convert_image = functools.partial(convert, save_dir=save_dir)
    return list(filter(None, thread_map(convert_image, images, max_workers=workers, unit="frame", disable=None)))


def warn_of_other_files(save_dir: Path, images: list[Path]) -> None:
    """Warn of files in SAVE_DIR that ais_bench would infer too."""
    present = {path.name for path in save_dir.iterdir() if path.suffix.lower() in (".bin", ".npy")}
    others = sorted(present - {f"{image.stem}.bin" for image in images})
    if others:
        print(f"warning: {save_dir}: other files, which will be inferred too: {first_five(others)}", file=sys.stderr)


def count_cpus() -> int:
    """Count the CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("must be an integer, 1 or more")
    return int(text)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Convert Cityscapes images to the network's input, one .bin a frame.")
    add = parser.add_argument
    add("data_dir", metavar="DATA_DIR", type=Path, help="Cityscapes; holds leftImg8bit/")
    add("save_dir", metavar="SAVE_DIR", type=Path, help="folder to write to")
    add("--split", default="val", help="folder below leftImg8bit (default: %(default)s)")
    add("--limit", metavar="N", type=at_least_one, help="convert the first N images only (default: all)")
    add("--workers", metavar="N", type=at_least_one, default=count_cpus(), help="threads (default: one per CPU)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    images = find_images(args.data_dir, args.split)[: args.limit]
    errors = convert_all(images, args.save_dir, args.workers)
    warn_of_other_files(args.save_dir, images)
    if errors:
        raise InputError(f"{len(errors)} of {len(images)} images cannot be converted: {first_five(errors, '; ')}")
    print(f"frames written to {args.save_dir}: {len(images)}")
    return 0


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
