#!/usr/bin/env python3
"""Convert Cityscapes images to the network's input, one file per frame.

    DATA_DIR/leftImg8bit/<split>/<city>/<frame>_leftImg8bit.png      RGB, 2048 x 1024
 -> SAVE_DIR/<frame>_leftImg8bit.bin                                 6 291 456 bytes

A `.bin` holds float32, little-endian, C order, shape (3, 512, 1024): blue, green, red, each minus its mean, about
-123 to 151. numpy reads it back with

    np.fromfile(path, "<f4").reshape(3, 512, 1024)

    $ python3 intrada_preprocess.py /data/cityscapes prep
    frames written to prep: 500 of 500
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import os
import sys
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 512, 1024
# Source: the Caffe ResNet-101 that the weights descend from; configured so in IntraDA at 070b0b7 (ADVENT's IMG_MEAN).
MEAN_BGR = np.array((104.00698793, 116.66876762, 122.67891434), dtype=np.float32)

# Set by torchrun; without it this is the only process.
TORCHRUN = os.environ if os.environ.keys() >= {"TORCHELASTIC_RUN_ID", "WORLD_SIZE"} else {}
RANK, WORLD_SIZE = int(TORCHRUN.get("RANK", 0)), int(TORCHRUN.get("WORLD_SIZE", 1))
LOCAL_WORLD_SIZE = int(TORCHRUN.get("LOCAL_WORLD_SIZE", 1))


class InputError(Exception):
    """A mistake the user can fix; reported in one line, without a traceback."""


def find_images(data_dir: Path, split: str) -> list[Path]:
    """Find the split's images, sorted by path.

    Raises:
        InputError: there are none, or their names would clash or be truncated in the flat SAVE_DIR.
    """
    folder = data_dir / "leftImg8bit" / split
    images = sorted(folder.glob("*/*_leftImg8bit.png"))
    if not images:
        raise InputError(f"{folder}: no <city>/<frame>_leftImg8bit.png; DATA_DIR is the folder that holds leftImg8bit")
    by_name = {path.name: path for path in images}
    twice = [path.name for path in images if by_name[path.name] != path]
    if twice:
        raise InputError(f"{folder}: frame names that occur in two cities: {first_five(twice)}")
    dotted = [path.name for path in images if "." in path.stem]
    if dotted:
        raise InputError(f"{folder}: frame names contain a dot; ais_bench truncates there: {first_five(dotted)}")
    return images


def first_five(names: list[str], separator: str = ", ") -> str:
    """List at most five names and the count, to keep the message on one line."""
    return separator.join(names[:5]) + (f"{separator}... ({len(names)} in all)" if len(names) > 5 else "")


def read_image(path: Path) -> Image.Image:
    """Decode an RGB PNG after checking its checksums, which decoding alone does not.

    Raises:
        InputError: it cannot be read, is damaged or is not RGB.
    """
    try:
        with path.open("rb") as file:
            Image.open(file, formats=["PNG"]).verify()
            image = Image.open(file, formats=["PNG"])
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # all of them from Pillow
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or 'damaged, too large, or not a PNG'}") from None
    if image.mode != "RGB":
        raise InputError(f"{path}: found mode {image.mode}, expected RGB; convert it first")
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


def write_file(path: Path, content: np.ndarray) -> None:
    """Write a file that is complete whenever it has its name; 0644 whatever the umask.

    Raises:
        InputError: it cannot be written, as on a full disk.
    """
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(content)
        part.chmod(0o644)
        os.replace(str(part), str(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None


def prepare_folder(save_dir: Path, images: list[Path]) -> None:
    """Make SAVE_DIR; rank 0 locks it until it ends, and warns of other files that ais_bench would infer too.

    Raises:
        InputError: another run holds it.
    """
    make_folder(save_dir)
    if RANK:
        return
    try:
        fcntl.flock(os.open(str(save_dir), os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{save_dir}: another run is writing here; wait for it, or pass another folder") from None
    expected = {f"{path.stem}.bin" for path in images}
    present = {path.name for path in save_dir.iterdir() if path.suffix.lower() in (".bin", ".npy")}
    unexpected = sorted(present - expected)
    if unexpected:
        print(f"warning: {save_dir}: not of this split, but ais_bench will infer them too: {first_five(unexpected)}",
              file=sys.stderr)  # fmt: skip


def make_folder(path: Path) -> None:
    """Make a folder and its parents, 0755 whatever the umask: newer ais_bench rejects group-writable ones."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        path.chmod(0o755)


def convert(image: Path, save_dir: Path) -> None:
    write_file(save_dir / f"{image.stem}.bin", to_input(read_image(image)))


def convert_all(images: list[Path], save_dir: Path, workers: int) -> None:
    """Convert in threads; Pillow and numpy release the GIL while they work.

    Raises:
        InputError: lists the images that cannot be converted, after all others are written.
    """
    faults = []
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(convert, image, save_dir) for image in images]
        try:
            for future in show_progress(futures):
                try:
                    future.result()
                except InputError as error:
                    faults.append(str(error))
        finally:  # after Ctrl-C or a bug start no more
            for future in futures:
                future.cancel()
    if faults:
        raise InputError(f"{len(faults)} of {len(images)} images cannot be converted: {first_five(faults, '; ')}")


def show_progress(futures: list[Future]) -> Iterable[Future]:
    """Show a progress bar if stderr is a terminal; tqdm takes a tenth of a second to import."""
    if RANK or not sys.stderr.isatty():
        return futures
    from tqdm import tqdm

    return tqdm(futures, unit="frame")


def keep_memory() -> None:
    """Stop glibc from returning memory after every frame, which would cost a page fault for every 4 KB of the next."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD: blocks up to 32 MB come from the heap
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD: the heap's free end stays


def count_cpus() -> int:
    """Count the CPUs this process may use, shared with the other ranks on this host."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, allowed // LOCAL_WORLD_SIZE)


def at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("must be an integer, 1 or more")
    return int(text)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Convert Cityscapes images to the network's input, one FP32 .bin per frame."
    )
    parser.add_argument("data_dir", metavar="DATA_DIR", type=Path, help="Cityscapes; holds leftImg8bit/")
    parser.add_argument("save_dir", metavar="SAVE_DIR", type=Path, help="folder to write to")
    parser.add_argument("--split", default="val", help="folder below leftImg8bit (default: %(default)s)")
    parser.add_argument("--workers", metavar="N", type=at_least_one, help="threads (default: one per CPU)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    images = find_images(args.data_dir, args.split)
    prepare_folder(args.save_dir, images)
    keep_memory()
    share = images[RANK::WORLD_SIZE]
    convert_all(share, args.save_dir, args.workers or count_cpus())
    by_rank = f" by rank {RANK} of {WORLD_SIZE}" if WORLD_SIZE > 1 else ""
    print(f"frames written to {args.save_dir}{by_rank}: {len(share)} of {len(images)}")
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except (InputError, OSError) as error:
        raise SystemExit(f"{Path(__file__).name}: error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
