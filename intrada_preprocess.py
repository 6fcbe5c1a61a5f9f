#!/usr/bin/env python3
"""Turn Cityscapes pictures into the network's input, one file a frame.

    DATA_DIR/leftImg8bit/<split>/<city>/<frame>_leftImg8bit.png      RGB, 2048 x 1024
 -> SAVE_DIR/<frame>_leftImg8bit.bin                                 6 291 456 bytes

A `.bin` holds float32, little-endian, C order, shape (3, 512, 1024): blue, green, red, each minus its mean, about
-123 to 151. numpy reads it back with

    np.fromfile(path, "<f4").reshape(3, 512, 1024)

    $ python3 intrada_preprocess.py /data/cityscapes prep
    500 frames (500 made, 0 kept), 3145728000 bytes in prep
"""

from __future__ import annotations

import argparse
import atexit
import ctypes
import fcntl
import os
import shlex
import stat
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 512, 1024
INPUT_BYTES = 4 * 3 * HEIGHT * WIDTH
# Source: the Caffe ResNet-101 that the weights descend from; configured so in IntraDA at 070b0b7 (ADVENT's IMG_MEAN).
MEAN_BGR = np.array((104.00698793, 116.66876762, 122.67891434), dtype=np.float32)


# torchrun's place of this process among all, and how many run on this host; without torchrun one, and no torch.
RANK, RANKS, RANKS_HERE = (
    int(os.environ.get(name, alone)) for name, alone in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1))
)


class InputError(Exception):
    """What the user can mend; told in one line, without a traceback."""


def find_pictures(data_dir: Path, split: str) -> dict[str, Path]:
    """Find the split's pictures.

    Returns:
        The picture of each `<frame>_leftImg8bit`, sorted by path.

    Raises:
        InputError: there are none, or their names would clash or be cut in the flat SAVE_DIR.
    """
    folder = data_dir / "leftImg8bit" / split
    paths = sorted(folder.glob("*/*_leftImg8bit.png"))
    if not paths:
        raise InputError(
            f"{folder}: no <city>/<frame>_leftImg8bit.png here; DATA_DIR is the folder that holds leftImg8bit"
        )
    pictures = {path.stem: path for path in paths}
    twice = [path.name for path in paths if pictures[path.stem] != path]
    if twice:
        raise InputError(f"{folder}: {len(twice)} frame names occur in two cities: {first_five(twice)}")
    dotted = [path.name for path in paths if "." in path.stem]
    if dotted:
        raise InputError(f"{folder}: {len(dotted)} frame names hold a dot, where ais_bench cuts: {first_five(dotted)}")
    return pictures


def first_five(names: list, separator: str = ", ") -> str:
    """Name the first five, so that a message stays one readable line."""
    return separator.join(map(str, names[:5])) + (f"{separator}..." if len(names) > 5 else "")


def is_current(target: Path, picture: Path) -> bool:
    """Tell whether the `.bin` is whole and not older than its picture."""
    try:
        made = target.stat()
    except FileNotFoundError:
        return False
    return made.st_size == INPUT_BYTES and made.st_mtime_ns >= picture.stat().st_mtime_ns


def read_picture(path: Path) -> Image.Image:
    """Decode a picture.

    Raises:
        InputError: it cannot be decoded or is not RGB.
    """
    try:
        image = Image.open(path)
        image.load()
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all three for a damaged PNG
        reason = getattr(error, "strerror", None) or f"not a whole PNG: {error}"
        raise InputError(f"{path}: {reason}") from None
    if image.mode != "RGB":
        raise InputError(f"{path}: found mode {image.mode}, expected RGB; is it a picture of leftImg8bit?")
    return image


def to_input(image: Image.Image) -> np.ndarray:
    """Compute the network's input of a picture, bit for bit the reference's.

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
    """Write beside, then rename, so that a name always means a whole file; 0644 whatever the umask.

    Raises:
        InputError: it cannot be written, as on a full disk.
    """
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(content)
        part.chmod(0o644)
        os.replace(part, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None


def make_folder(path: Path) -> None:
    """Make a folder and its parents, 0755 whatever the umask: newer ais_bench refuses group-writable ones."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        path.chmod(0o755)


def lock_folder(folder: Path) -> None:
    """Hold the folder until this process ends.

    Raises:
        InputError: another run holds it.
    """
    try:
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{folder}: another run is writing here; wait for it, or give another folder") from None


def keep_memory() -> None:
    """Let glibc keep freed blocks, which it would otherwise return and fault in again, page by page, frame by frame."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD: blocks up to 32 MB come from the heap
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD: whose free end stays


def convert(picture: Path, save_dir: Path) -> None:
    write_file(save_dir / f"{picture.stem}.bin", to_input(read_picture(picture)))


def convert_all(pictures: list[Path], save_dir: Path, workers: int) -> None:
    """Convert in threads; Pillow and numpy leave the interpreter free while they work.

    Raises:
        InputError: names the pictures that cannot be read or written, after all others are made.
    """
    faults = []
    with ThreadPoolExecutor(workers) as pool:
        try:
            futures = [pool.submit(convert, picture, save_dir) for picture in pictures]
            for future in show_progress(as_completed(futures), len(futures)):
                if isinstance(future.exception(), InputError):
                    faults.append(str(future.exception()))
                else:
                    future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if faults:
        raise InputError(
            f"{len(faults)} of {len(pictures)} pictures cannot be converted: {first_five(sorted(faults), '; ')}"
        )


def prepare_folder(save_dir: Path, pictures: dict[str, Path]) -> None:
    """Make the folder, hold it, and warn of what ais_bench would stumble over there."""
    make_folder(save_dir)
    lock_folder(save_dir)
    inputs = sorted(path for path in save_dir.iterdir() if path.suffix.lower() in (".bin", ".npy"))
    strangers = [path.name for path in inputs if path.suffix != ".bin" or path.stem not in pictures]
    if strangers:
        warn(
            f"{save_dir}: {len(strangers)} files belong to no frame of this split, and ais_bench would infer them too: "
            f"{first_five(strangers)}"
        )
    if any(path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH) for path in [save_dir, *inputs]):
        warn(f"newer ais_bench refuses what others may write: chmod -R go-w {shlex.quote(str(save_dir))}")


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def show_progress(frames: Iterable, total: int) -> Iterable:
    """Show a bar where somebody may look at it; tqdm takes a tenth of a second to import."""
    if RANK or not sys.stderr.isatty():
        return frames
    from tqdm import tqdm

    return tqdm(frames, total=total, unit="frame")


def join_ranks() -> None:
    """Connect with torchrun's other processes, early, so that all notice when one ends."""
    if RANKS > 1:
        from torch import distributed

        distributed.init_process_group("gloo")
        atexit.register(distributed.destroy_process_group)  # or gloo's threads may abort the process as it ends


def gather(value: Any) -> list:
    """Collect every rank's value, in the order of the ranks.

    Raises:
        InputError: another rank has ended.
    """
    if RANKS == 1:
        return [value]
    from torch import distributed

    values = [None] * RANKS
    try:
        distributed.all_gather_object(values, value)
    except RuntimeError:
        raise InputError("another rank has ended; its message tells why") from None
    return values


def processors() -> int:
    """Count the processors that this process may use, shared with the other ranks on this host."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, allowed // RANKS_HERE)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Turn Cityscapes pictures into the network's input, one FP32 .bin a frame."
    )
    parser.add_argument("data_dir", metavar="DATA_DIR", type=Path, help="Cityscapes, holds leftImg8bit/")
    parser.add_argument("save_dir", metavar="SAVE_DIR", type=Path, help="folder to write, flat")
    parser.add_argument("--split", default="val", help="folder below leftImg8bit (default: %(default)s)")
    parser.add_argument("--workers", metavar="N", type=positive, help="threads (default: one for each processor)")
    parser.add_argument("--overwrite", action="store_true", help="make all anew, not only what is missing or old")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    pictures = find_pictures(args.data_dir, args.split)
    keep_memory()
    join_ranks()
    if RANK == 0:
        prepare_folder(args.save_dir, pictures)
    gather("the folder is ready")
    todo = [
        picture
        for picture in list(pictures.values())[RANK::RANKS]
        if args.overwrite or not is_current(args.save_dir / f"{picture.stem}.bin", picture)
    ]
    convert_all(todo, args.save_dir, args.workers or processors())
    made, total = sum(gather(len(todo))), len(pictures)
    if RANK == 0:
        print(f"{total} frames ({made} made, {total - made} kept), {total * INPUT_BYTES} bytes in {args.save_dir}")
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except (InputError, OSError) as error:
        raise SystemExit(f"{Path(__file__).name}: error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
