#!/usr/bin/env python3
"""Segment any images with an .onnx or .om and draw the prediction over them.

    IMAGE, or a folder, with all below   any size and image format that Pillow opens; EXIF's rotation is applied
 -> OUTPUT/<name>_overlay.jpg            the prediction over the image, and below it the classes' shares of pixels
 -> OUTPUT/<name>_color.png              the prediction in Cityscapes' colors, a palette PNG of the image's size
 -> OUTPUT/shares.csv                    one row per image: <name>, each class's fraction of the pixels, 0 to 1; entropy
                                         (0: the model is sure, 1: it is not); the model that segmented it

<name> is the image's path below the given folder without its suffix, and with it where two images would share a name;
of several paths, a folder's own name comes first. What cannot be segmented is listed at the end, with exit status 1.

    $ python3 tools/segment.py X.onnx photos --output overlays
    overlays written to overlays: 3
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import errno
import functools
import hashlib
import io
import os
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm.contrib.concurrent import thread_map

sys.path[:0] = map(str, [*Path(__file__).resolve().parents][:2])
from infer import known_provider, load_model, one_line, run_model
from intrada_postprocess import LOGITS_SHAPE, NAMES, PALETTE, InputError, is_there, predict, run_script
from intrada_preprocess import count_cpus, first_five, list_folder, to_input, write

with contextlib.suppress(ImportError):
    from pillow_heif import register_heif_opener

    register_heif_opener()

SUFFIXES = Image.registered_extensions()
IMAGE_SUFFIXES = {s for s, kind in SUFFIXES.items() if kind in Image.OPEN and Image.MIME.get(kind, "")[:6] == "image/"}
NO_PHOTOS = "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "__MACOSX", "lost+found"
HEIF = b"ftyphei", b"ftyphev", b"ftypmif", b"ftypmsf"  # how its content begins, after four bytes
HEIF_REMEDY = "; HEIC needs the package pillow_heif"
ENDINGS = "_overlay.jpg", "_color.png"
HEADERS = ["image", *NAMES], ["image", *NAMES, "entropy", "model"]  # of an earlier version, and of this one
UPRIGHT = {2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM, 5: Image.TRANSPOSE,
           6: Image.ROTATE_270, 7: Image.TRANSVERSE, 8: Image.ROTATE_90}  # by EXIF's orientation  # fmt: skip
SWATCH, ROW = 10, 16  # pixels of the legend, before it is enlarged


def find_images(paths: list[Path], output: Path) -> dict[str, Path]:
    """Find the images, and those below folders, by the name of their results; InputError for none, or a name twice."""
    refuse_other_files(output)
    visited, skipped, found = {output.resolve()}, Counter(), []
    for path in paths:
        path.stat()  # a missing one is an OSError
    wanted = [path for path in dict.fromkeys(paths) if not visited & {path.resolve(), *path.resolve().parents}]
    typed = {path.parent.resolve() / path.name: path for path in wanted if not path.is_dir()}
    for folder in filter(Path.is_dir, wanted):
        start = Path(os.path.abspath(folder)).name if len(wanted) > 1 else ""  # noqa: PTH100
        kinds = {f: name_kind(f) for f in walk(folder, visited) if f.parent.resolve() / f.name not in typed}
        skipped.update(filter(None, kinds.values()))
        found += [(file, Path(start, file.relative_to(folder))) for file, kind in kinds.items() if not kind]
    found += [(file, Path(file.name)) for file in typed.values()]
    listed = ", ".join(f"{kind} {count}" for kind, count in skipped.most_common())
    remedy = HEIF_REMEDY if ".heic" in skipped else ""
    note = f"skipped, not images by their suffix: {sum(skipped.values())} ({listed}){remedy}" if skipped else ""
    if not found:
        raise InputError("; ".join(filter(None, [f"{first_five(list(map(str, paths)))}: no images", note])))
    if note:
        print(note, file=sys.stderr)
    return name_results(found)


def name_results(found: list[tuple[Path, Path]]) -> dict[str, Path]:
    """Name the results of images by their places in OUTPUT; InputError for a name twice."""
    stems = Counter(place.with_suffix("") for _, place in found)
    names = [str(place if stems[place.with_suffix("")] > 1 else place.with_suffix("")) for _, place in found]
    counts = Counter(names)
    duplicates = [str(image) for (image, _), name in zip(found, names) if counts[name] > 1]
    if duplicates:
        raise InputError(f"images whose results would have the same name: {first_five(duplicates)}")
    return {name: image for name, (image, _) in zip(names, found)}


def refuse_other_files(output: Path) -> None:
    """Raise InputError if OUTPUT has images, or a shares.csv, that this script did not write."""
    ours = is_ours(output)
    if is_there(output / "shares.csv") and not ours:
        raise InputError(f"{output / 'shares.csv'}: not of this script, or changed since; pass another --output")
    files = [file for entry in list_folder(output) for file in walk(entry, set())] if is_there(output) else []
    others = [str(f) for f in files if f.is_dir() or not (name_kind(f) or (ours and f.name.endswith(ENDINGS)))]
    if others:
        raise InputError(f"{output}: has files that may be yours; pass another --output: {first_five(others)}")


def walk(path: Path, visited: set[Path]) -> list[Path]:
    """List a file, or those below a folder, in a fixed order; of an earlier OUTPUT itself, of a visited one nothing."""
    if not path.is_dir():
        return [path]
    if path.resolve() in visited:
        return []
    visited.add(path.resolve())
    entries = [entry for entry in list_folder(path) if entry.name not in NO_PHOTOS]
    return [path] if is_ours(path) else [file for entry in entries for file in walk(entry, visited)]


def name_kind(file: Path) -> str:
    """Name the kind of a file that is no image by its suffix, empty for an image."""
    if file.exists() and not file.is_file():
        return "earlier OUTPUT" if file.is_dir() else "no regular file"
    return "" if file.suffix.lower() in IMAGE_SUFFIXES else file.suffix.lower() or "no suffix"


def is_ours(folder: Path) -> bool:
    """Return whether a folder has a shares.csv of this script."""
    path = folder / "shares.csv"
    return is_there(path) and path.read_text("utf-8", "replace").split("\n")[0].rstrip("\r") in map(",".join, HEADERS)


def read_image(path: Path) -> Image.Image:
    """Decode an image as RGB: upright, 16-bit gray scaled to 8, on white where it is transparent; or InputError."""
    head = b""
    try:
        if path.exists() and not path.is_file():
            raise ValueError("no regular file")
        with path.open("rb") as file:
            head = file.read(12)
        with Image.open(path) as image:
            if image.format == "TIFF" and path.suffix and path.suffix.lower() not in SUFFIXES:  # Pillow saw a thumbnail
                raise ValueError("camera raw; convert it first")
            tags = image.tag_v2 if image.format == "TIFF" else {}
            image.load()
            with contextlib.suppress(Exception):  # no EXIF, or a damaged one; exif_transpose would fail at any odd tag
                image = image.transpose(UPRIGHT[image.getexif()[0x0112]])
        if image.mode[0] in "IF":  # convert would clip at 255
            values = np.asarray(image)
            is_plain = tags.get(258, (16,)) == (16,) and tags.get(262) != 0 and tags.get(339) != (2,)  # TIFF's own tags
            if not is_plain or image.mode == "F" or values.min() < 0 or values.max() > 65535:
                raise ValueError("not 16 bits from black to white; convert it to 8 bits first")
            image = Image.fromarray((values >> 8).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:  # Pillow raises nearly everything
        reason = getattr(error, "strerror", None) or one_line(error) or repr(error)
        raise InputError(f"{path}: {reason}{HEIF_REMEDY if head[4:11] in HEIF else ''}") from None


# ---------------------------------------------------------------------------------------------------- the results


def tidy_shares(output: Path) -> dict[str, list[str]]:
    """Read shares.csv, if there is one, and write it again: each image's last row, sorted; return these by image."""
    path = output / "shares.csv"
    content = path.read_bytes() if is_there(path) else to_lines(HEADERS[-1])
    text = content.replace(b"\0", b"").decode("utf-8", "surrogateescape")  # zeros: after a power loss
    header, *rows = csv.reader(io.StringIO(text, newline=""))
    complete = rows if text.endswith("\n") else rows[:-1]  # an interruption may cut the last one
    shares = {row[0]: [*row, "", ""][: len(HEADERS[-1])] for row in complete if len(row) == len(header)}
    output.mkdir(parents=True, exist_ok=True)
    write(path, to_lines(HEADERS[-1], *(shares[name] for name in sorted(shares))))
    return shares


def to_lines(*rows: list[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")


def compute_entropy(logits_chw: np.ndarray) -> float:
    """Average softmax's entropy over the grid, 0 to 1 (divided by log 19). Source: arXiv:2004.07703 ranks images so."""
    shifted = logits_chw - logits_chw.max(axis=0)
    weights = np.exp(shifted)
    total = weights.sum(axis=0)
    return float(np.mean(np.log(total) - (weights * shifted).sum(axis=0) / total) / np.log(len(logits_chw)))


def draw(photo: Image.Image, prediction: np.ndarray, target: str, opacity: float) -> np.ndarray:
    """Write the overlay and the color map, and return the classes' fractions of the pixels."""
    color_map = Image.fromarray(prediction)
    fractions = np.array(color_map.histogram()[: len(NAMES)]) / prediction.size
    color_map.putpalette(PALETTE)
    legend = draw_legend(fractions, photo.size)
    overlay = Image.new("RGB", (max(photo.width, legend.width), photo.height + legend.height), "white")
    overlay.paste(Image.blend(photo, color_map.convert("RGB"), opacity))
    overlay.paste(legend, (0, photo.height))
    Path(target).parent.mkdir(parents=True, exist_ok=True)
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


def segment(name: str, path: Path, infer: Callable[[np.ndarray], np.ndarray], args: argparse.Namespace) -> str | None:
    """Write an image's results, and its row of shares.csv last; return what is wrong with the image."""
    try:
        photo = read_image(path)
    except InputError as error:
        return str(error)
    logits = infer(to_input(photo))
    if not np.isfinite(logits).all():
        return f"{path}: NaN or Inf in its logits, typically an FP16 overflow"
    try:
        prediction = predict(logits, (photo.height, photo.width))
        fractions = draw(photo, prediction, str(args.output / name), args.opacity)
    except MemoryError:
        return f"{path}: out of memory"
    except OSError as error:  # a name is too long, or a side above JPEG's 65500 pixels
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # ends all
            raise
        return f"{error.filename or f'{path}: overlay'}: {error.strerror or error}"
    figures = [f"{figure:.9f}" for figure in (*fractions, compute_entropy(logits))]
    with (args.output / "shares.csv").open("ab", buffering=0) as file:
        file.write(to_lines([name, *figures, args.model_id]))  # in one piece, whatever other threads write
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

        model = call(load, args)
        segment_image = functools.partial(segment, infer=functools.partial(call, model), args=args)
        options = {"max_workers": min(4, count_cpus()), "unit": "image", "disable": None}  # 24 megapixels take 0.4 GB
        return [error for error in thread_map(segment_image, images, images.values(), **options) if error]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Segment any images and draw the prediction over them.")
    add = parser.add_argument
    add("model", metavar="MODEL", type=Path, help=".onnx (any host) or .om of batch size 1 (Ascend)")
    add("images", metavar="IMAGE_OR_FOLDER", type=Path, nargs="+", help="images, or folders, searched recursively")
    add("--output", metavar="DIR", type=Path, required=True, help="folder to write to; without other images")
    add("--skip_done", action="store_true", help="skip images that have results")
    add("--opacity", metavar="X", type=float, default=0.5, help="of the prediction, 0 to 1 (default: %(default)s)")
    add("--device", metavar="ID", type=int, default=0, help="device of ais_bench or provider (default: %(default)s)")
    add("--provider", type=known_provider, default="cpu", help="execution provider for an .onnx (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.model.suffix not in (".onnx", ".om"):
        parser.error("MODEL must be an .onnx or an .om")
    if not 0 <= args.opacity <= 1:
        parser.error("--opacity must be 0 to 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    args.model_id = f"{args.model.name} {hashlib.sha256(args.model.read_bytes()).hexdigest()[:12]}"
    images = find_images(args.images, args.output)
    shares = tidy_shares(args.output)  # before any work, since OUTPUT may be read-only
    stdout = sys.stdout
    if args.model.suffix == ".om":  # what ais_bench prints on stdout, in C++ too, goes to stderr
        stdout = os.fdopen(os.dup(1), "w", errors="backslashreplace")
        os.dup2(2, 1)
    if args.skip_done:
        rows = {name for name in images.keys() & shares if shares[name][-1].endswith(args.model_id.split()[-1])}
        done = {name for name in rows if all(Path(f"{args.output / name}{ending}").exists() for ending in ENDINGS)}
        print(f"skipped, already done: {len(done)}", file=stdout)
        images = {name: path for name, path in images.items() if name not in done}
    errors = segment_all(images, args) if images else []
    tidy_shares(args.output)
    print(f"overlays written to {args.output}: {len(images) - len(errors)}", file=stdout, flush=True)
    if errors:
        print(*errors, sep="\n", file=sys.stderr)
        raise InputError(f"{len(errors)} of {len(images)} images cannot be segmented; see above")
    return 0


if __name__ == "__main__":
    run_script(main)
