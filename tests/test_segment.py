"""tools/segment.py on real files of every kind, over ONNX Runtime and over the stand-in for ais_bench."""

from __future__ import annotations

import csv
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from PIL import Image

import tools.segment as tool
from intrada_postprocess import CLASSES, PALETTE, predict
from intrada_preprocess import to_input
from support import OWN_GROUP, ROOT, ascend_environment, call, error_of, refusal, run, save_small_model

SCRIPT = "tools/segment.py"
SEGMENT = "x.onnx", "in", "--output", "out"

X, Y = np.meshgrid(np.arange(320), np.arange(240))
PHOTO = Image.fromarray(np.stack([X * 0.79, Y * 1.05, (X + Y) % 256], 2).astype(np.uint8))
GRAY = PHOTO.convert("L")
PALETTED = PHOTO.convert("P", dither=0)
CUT_OUT = PHOTO.copy()
CUT_OUT.paste("white", (0, 0, 160, 120))
MASK = Image.new("L", PHOTO.size, 255)
MASK.paste(0, (0, 0, 160, 120))
ALPHA = PHOTO.copy()
ALPHA.putalpha(MASK)
TURNS = {2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM, 5: Image.TRANSPOSE,
         6: Image.ROTATE_270, 7: Image.TRANSVERSE, 8: Image.ROTATE_90}  # as EXIF defines its orientations  # fmt: skip
ODD = bytes.fromhex(  # orientation 6, and a resolution that is text
    "45786966 0000 4d4d002a00000008 0002 0112000300000001 00060000 011a000200000003 37320000 00000000"
)
ZERO = bytes.fromhex(  # the same, and a resolution of 0 / 0
    "45786966 0000 4d4d002a00000008 0002 0112000300000001 00060000 011a000500000001 00000026 00000000 0000000000000000"
)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


# The file, its image, how it is saved, the name of its results, and what is seen on it; None: what is decoded.
KINDS = [
    ("plain.png", PHOTO, {}, "plain", PHOTO),
    ("lossy.jpg", PHOTO, {}, "lossy", None),
    ("with space.webp", PHOTO, {"lossless": True}, "with space", PHOTO),
    ("街景.v1.2.bmp", PHOTO, {}, "街景.v1.2", PHOTO),
    *((f"turned{n}.png", PHOTO, {"exif": turned(n)}, f"turned{n}", PHOTO.transpose(turn)) for n, turn in TURNS.items()),
    ("turned.TIFF", PHOTO, {"exif": turned(6)}, "turned", PHOTO.transpose(Image.ROTATE_270)),
    ("zero.jpg", PHOTO, {"exif": ZERO}, "zero", None),
    ("odd.jpg", PHOTO, {"exif": ODD}, "odd", None),
    ("no exif.png", PHOTO, {"exif": b"no EXIF"}, "no exif", PHOTO),
    ("gray.png", GRAY, {}, "gray", GRAY),
    ("alpha.png", ALPHA, {}, "alpha", CUT_OUT),
    ("palette.gif", PALETTED, {}, "palette", PALETTED),
    ("clear.png", PALETTED, {"transparency": bytes(256)}, "clear", Image.new("RGB", PHOTO.size, "white")),
    ("cmyk.jpeg", PHOTO.convert("CMYK"), {}, "cmyk", None),
    ("deep.png", Image.fromarray(np.asarray(GRAY).astype(np.uint16) * 257), {}, "deep.png", GRAY),
    ("deep.tif", Image.fromarray(np.asarray(GRAY).astype(np.uint16) * 257), {}, "deep.tif", GRAY),
    ("tiff.jpg", PHOTO, {"format": "TIFF"}, "tiff", PHOTO),
    ("dot.png", PHOTO.resize((1, 1)), {}, "dot", PHOTO.resize((1, 1))),
]


@pytest.fixture
def weights(tmp_path, monkeypatch) -> np.ndarray:
    """The current folder has x.onnx, x.om and an empty TMPDIR; the model's weights."""
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    Path("tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    Path("x.om").write_text(json.dumps({"onnx": "x.onnx", "batch": 1, "frame_shape": [3, 512, 1024]}))
    return save_small_model(Path("x.onnx"))


def results(folder: str = "out") -> list[str]:
    """List the names of the results, once; there is nothing else, and no temporary folder."""
    assert list(Path("tmp").iterdir()) == []
    files = [str(path.relative_to(folder)) for path in Path(folder).rglob("*") if not path.is_dir()]
    names = sorted(name[: -len("_color.png")] for name in files if name.endswith("_color.png"))
    expected = [f"{name}_{ending}" for name in names for ending in ("color.png", "overlay.jpg")]
    assert sorted(files) == sorted([*expected, "shares.csv"])
    return names


def shares() -> dict[str, list[float]]:
    with Path("out/shares.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["image", *(name for _, name, _, _ in CLASSES), "entropy", "model"]
    found = {name: list(map(float, fractions)) for name, *fractions, _, _ in rows}
    assert len(found) == len(rows)
    return found


def test_every_kind_of_image_is_segmented_and_what_is_none_is_named(weights):
    for name, image, options, _, _ in KINDS:
        image.save(Path("in", name), **options)
    for name in ("n" * 246, "街" * 82):  # a result's name, with .part, is 255 bytes at most
        PHOTO.save(Path("in", f"{name}.png"))
    Path("in", "cut.jpg").write_bytes(Path("in", "lossy.jpg").read_bytes()[:2000])
    Image.new("RGB", (65501, 1)).save("in/long.png")  # more than a JPEG can have
    Path("in", ".hidden.png").write_text("")
    ranks = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    done = run(SCRIPT, *SEGMENT, status=1, env={**os.environ, **ranks}, umask=0o002)
    assert done.stdout == f"overlays written to out: {len(KINDS)}\n"
    last = done.stderr.splitlines()[-1]
    assert last == f"segment.py: error: 4 of {len(KINDS) + 4} images cannot be segmented; see above"
    named = [f"out/{name}_overlay.jpg: File name too long" for name in ("n" * 246, "街" * 82)]
    for error in ("in/cut.jpg: image file is truncated", "in/long.png: overlay: broken data stream", *named):
        assert sum(line.startswith(error) for line in done.stderr.splitlines()) == 1
    assert results() == sorted(kind[3] for kind in KINDS) == sorted(shares())
    assert {path.stat().st_mode & 0o777 for path in Path("out").iterdir()} == {0o644}
    for file, _, _, name, seen in KINDS:
        seen = seen.convert("RGB") if seen else Image.open(Path("in", file)).convert("RGB")
        seen = seen.transpose(Image.ROTATE_270) if file in ("zero.jpg", "odd.jpg") else seen
        points = np.pad(to_input(seen), ((0, 0), (0, 1), (0, 1)))[:, ::8, ::8]
        prediction = predict(np.tensordot(weights[1], points, 1).astype(np.float32), (seen.height, seen.width))
        color = Image.open(f"out/{name}_color.png")
        assert (color.mode, color.size) == ("P", seen.size), file
        assert np.mean(np.asarray(color) != prediction) < 0.001, file  # a tie may go either way
        assert bytes(color.getpalette()[: len(PALETTE)]) == PALETTE
        np.testing.assert_allclose(shares()[name], [np.mean(np.asarray(color) == n) for n in range(19)], atol=1e-9)
        overlay = Image.open(f"out/{name}_overlay.jpg")
        assert overlay.width >= seen.width
        assert overlay.height > seen.height + 16
        shown = np.asarray(overlay)[: seen.height, : seen.width].astype(int)
        blended = (np.asarray(seen).astype(int) + np.asarray(color.convert("RGB"))) / 2
        assert np.abs(shown - blended).mean() < (6 if seen.width > 1 else 99), file  # JPEG blurs the dot


def save_tiff(path: str, values: np.ndarray, **tags: int) -> None:
    """Save gray pixels as they are, little-endian, with these tags; Pillow writes neither 12 bits nor WhiteIsZero."""
    height, width = values.shape
    entries = {256: width, 257: height, 258: 8 * values.itemsize, 259: 1, 262: 1, 273: 0, 277: 1, 278: height}
    entries.update({279: values.nbytes, **{int(tag[1:]): value for tag, value in tags.items()}})
    entries[273] = 8 + 2 + 12 * len(entries) + 4  # where the pixels begin
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
    header = struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + directory + bytes(4)
    Path(path).write_bytes(header + values.tobytes())


def test_what_would_be_segmented_wrongly_is_refused(weights):
    gray = np.asarray(GRAY)
    for name, values in {"small": gray.astype(np.int32), "fraction": (gray / 255).astype(np.float32)}.items():
        Image.fromarray(values).save(f"in/{name}.tif")
    save_tiff("in/plain.tif", gray.astype("<u2") * 257)
    save_tiff("in/inverted.tif", gray.astype("<u2") * 257, t262=0)
    save_tiff("in/signed.tif", gray.astype("<i2") * 128, t339=2)
    save_tiff("in/twelve.tif", gray.astype("<u2")[:, :240], t256=320, t258=12, t279=240 * 240 * 2)
    PHOTO.save("raw.NEF", "TIFF")
    Path("in/photo.JPG").write_bytes(b"\0\0\0\x18ftypheic")
    os.mkfifo("pipe.jpg")
    done = run(SCRIPT, "x.onnx", "in", "raw.NEF", "pipe.jpg", "--output", "out", status=1)
    wrong = "not 16 bits from black to white; convert it to 8 bits first"
    *errors, last = done.stderr.splitlines()
    assert last == "segment.py: error: 8 of 9 images cannot be segmented; see above"
    assert sorted(errors) == [
        f"in/fraction.tif: {wrong}",
        f"in/inverted.tif: {wrong}",
        "in/photo.JPG: cannot identify image file 'in/photo.JPG'; HEIC needs the package pillow_heif",
        f"in/signed.tif: {wrong}",
        f"in/small.tif: {wrong}",
        f"in/twelve.tif: {wrong}",
        "pipe.jpg: no regular file",
        "raw.NEF: camera raw; convert it first",
    ]
    assert results() == ["in/plain"]


def test_a_folder_s_other_files_are_skipped_and_counted_by_suffix(weights):
    names = "a.xmp b.xmp c.XMP IMG.AAE track.gpx raw.nef clip.lrv doc.pdf nohup.out noname photo.HEIC film.mpg e.eps"
    for name in [*names.split(), "photo.jpg:Zone.Identifier", "Thumbs.db"]:
        Path("in", name).write_text("no image")
    for folder in (*tool.NO_PHOTOS, ".trash"):
        Path("in", folder).mkdir()
        PHOTO.save(f"in/{folder}/thumb.jpg")
    os.mkfifo("in/pipe.jpg")
    message = refusal(tool, *SEGMENT)
    assert message.startswith("in: no images; skipped, not images by their suffix: 16 (.xmp 3, ")
    assert all(f"{kind} 1" in message for kind in (".heic", ".nef", "no suffix", "no regular file", ".identifier"))
    assert message.endswith("); HEIC needs the package pillow_heif")
    PHOTO.save("in/photo.jpg")
    done = run(SCRIPT, *SEGMENT)
    assert done.stderr == message[len("in: no images; ") :] + "\n"
    assert results() == ["photo"]
    PHOTO.save("in/noname", "PNG")
    call(tool, "x.onnx", "in/noname", *SEGMENT[2:])  # typed, so tried
    assert results() == ["noname", "photo"]


def test_a_file_is_segmented_once_however_often_it_is_typed(weights):
    for name in ("in/a.jpg", "in/noname"):
        PHOTO.save(name, "JPEG")
    for paths in (["in"], []):
        call(tool, "x.onnx", *paths, "in/a.jpg", "in/a.jpg", "in/../in/a.jpg", "in/noname", *paths, "--output", "out")
        assert results() == ["a", "noname"]
    assert list(tool.find_images([Path("in"), Path("in")], Path("out"))) == ["a"]


def test_links_and_what_they_lead_to_are_images_of_their_own(weights):
    PHOTO.save("in/a.png")
    Path("in/link.png").symlink_to("a.png")
    Path("top.png").symlink_to("in/a.png")
    call(tool, "x.onnx", "in", "top.png", "--output", "out")
    assert results() == ["in/a", "in/link", "top"]


def test_links_are_images_and_a_loop_of_them_is_one_image_s_error(weights):
    PHOTO.save("p.jpg")
    Path("in/b").mkdir()
    for name in ("in/x.jpg", "in/b/y.jpg"):
        Path(name).symlink_to(Path("p.jpg").resolve())
    Path("in/loop.jpg").symlink_to("loop.jpg")
    assert run(SCRIPT, *SEGMENT, status=1).stderr.startswith("in/loop.jpg: ")
    assert results() == ["b/y", "x"]


def test_a_provider_that_is_not_there_is_wrong_usage(weights):
    assert "this onnxruntime supports only cpu" in run(SCRIPT, *SEGMENT, "--provider", "cdua", status=2).stderr


def test_an_installed_pillow_heif_opens_heic(weights, monkeypatch):
    Path("modules").mkdir()
    Path("modules/pillow_heif.py").write_text(
        "from PIL import Image\n"
        "def register_heif_opener():\n"
        "    Image.register_open('HEIF', lambda *_: Image.new('RGB', (8, 8)), lambda start: start[4:8] == b'ftyp')\n"
        "    Image.register_extension('HEIF', '.heic')\n"
        "    Image.register_mime('HEIF', 'image/heif')"
    )
    monkeypatch.setenv("PYTHONPATH", str(Path("modules").resolve()))
    Path("in/a.heic").write_bytes(b"\0\0\0\x18ftypheic")
    run(SCRIPT, *SEGMENT)
    assert Image.open("out/a_color.png").size == (8, 8)


@pytest.mark.parametrize("size", [(320, 240), (6000, 300), (3000, 2000)])
def test_the_legend_has_a_place_for_each_class_and_grows_with_the_image(size):
    few = np.zeros(19)
    few[[0, 6, 13, 18]] = 0.25, 0.70004, 0.04992, 0.00004
    legends = [np.asarray(tool.draw_legend(fractions, size)) for fractions in (few, np.full(19, 1 / 19))]
    assert legends[0].shape == legends[1].shape
    assert legends[0].shape[1] <= max(size[0], 160)
    found, scale = [{}, {}], max(1, round((size[0] * size[1]) ** 0.5 / 650))
    for n, (_, _, _, color) in enumerate(CLASSES):
        for legend, corners in zip(legends, found):
            pixels = np.argwhere((legend == np.frombuffer(bytes.fromhex(color[1:]), np.uint8)).all(axis=2))
            if len(pixels) >= (11 * scale) ** 2:  # not the edge of a letter
                corners[n] = tuple(pixels[0])
    assert list(found[1]) == list(range(19))
    assert found[0] == {n: found[1][n] for n in (0, 6, 13)}  # below 0.005 % a class is not listed
    assert (legends[1][-1] == 255).all()  # nothing is cut off
    assert (legends[1][:, -3:] == 255).all()


def test_an_om_runs_by_ais_bench_whatever_the_names_and_the_umask(weights):
    names = ["a.b", "街景 1"]
    for name, image in zip(names, (PHOTO, GRAY)):
        image.save(f"in/{name}.png")
    call(tool, *SEGMENT)
    done = run(SCRIPT, "x.om", *SEGMENT[1:3], "om/out", "--device", "1", env=ascend_environment(), umask=0o002)
    assert done.stdout == "overlays written to om/out: 2\n"  # and nothing of ais_bench's
    assert "load model" in done.stderr and "device 1" in done.stderr
    assert results() == results("om/out") == names
    for path in Path("out").iterdir():
        assert path.read_bytes() == Path("om/out", path.name).read_bytes() or path.suffix == ".csv"
    texts = [Path(folder, "shares.csv").read_text() for folder in ("out", "om/out")]
    assert re.sub(r"x\.onnx \w{12}", "M", texts[0]) == re.sub(r"x\.om \w{12}", "M", texts[1])


@pytest.mark.parametrize(
    ("model", "environment", "message"),
    [
        ("x.om", {}, "x.om: No module named 'ais_bench'"),
        ("bs4.om", ascend_environment(), "bs4.om: Check i:0 name:image in size:6291456 needsize:25165824 not match"),
        ("cut.om", ascend_environment(), "cut.om: Expecting value: line 1 column 1 (char 0)"),
        ("c20.om", ascend_environment(), "c20.om: cannot reshape array of size 167700 into shape (19,65,129)"),
        ("bs4.onnx", {}, "onnxruntime failed at --batchsize 1: "),
    ],
)
def test_a_model_that_fails_ends_the_run_in_one_line(weights, model, environment, message):
    Path("bs4.om").write_text(Path("x.om").read_text().replace('"batch": 1', '"batch": 4'))
    Path("cut.om").touch()
    save_small_model(Path("bs4.onnx"), 4)
    Path("c20.om").write_text(Path("x.om").read_text().replace("x.onnx", "c20.onnx"))
    other = onnx.load("x.onnx")
    other.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.ones((20, 3, 1, 1), np.float32), "weight_1"))
    other.graph.output[1].type.tensor_type.shape.dim[1].dim_value = 20
    onnx.save(other, "c20.onnx")
    for n in range(9):
        PHOTO.save(f"in/{n}.png")
    done = run(SCRIPT, model, *SEGMENT[1:], status=1, env={**os.environ, **environment})
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith(f"segment.py: error: {message}")
    assert results() == []


def test_logits_that_are_not_finite_are_that_image_s_error(weights):
    model = onnx.load("x.onnx")
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.full((19, 3, 1, 1), 3e36, np.float32), "weight_1"))
    onnx.save(model, "x.onnx")
    Image.new("RGB", (8, 8), (120, 120, 130)).save("in/b.png")  # small enough
    Image.new("RGB", (8, 8), "white").save("in/a.png")
    assert "in/a.png: NaN or Inf in its logits, typically an FP16 overflow\n" in run(SCRIPT, *SEGMENT, status=1).stderr
    assert results() == ["b"]


# ---------------------------------------------------------------------------------------------------- folders


def test_results_mirror_the_folders_and_runs_into_one_output_add_up(weights):
    for path in ("in/a.png", "in/cam1/a.png", "in/cam2/a.png", "in/cam2/a.gif", "in/cam2/.trash/b.png"):
        Path(path).parent.mkdir(exist_ok=True)
        PHOTO.save(path)
    Path("in/cam2/again").symlink_to("..")
    output = SEGMENT[0], "in", "--output", "in/out"
    names = ["a", "cam1/a", "cam2/a.gif", "cam2/a.png"]
    assert call(tool, *output) == "overlays written to in/out: 4\n"
    assert results("in/out") == names

    PHOTO.save("in/new.png")
    shutil.move("in/out", "out")
    Path("out/cam1/a_color.png").unlink()
    Path("out/cam2/a.gif_overlay.jpg").unlink()
    Path("out/b_color.png.part").touch()  # as kill -9 leaves it
    rows = Path("out/shares.csv").read_text().splitlines(keepends=True)
    Path("out/shares.csv").write_text("".join(row for row in rows if not row.startswith("a,")))
    Path("out", "notes.txt").touch()  # no image
    shutil.move("out", "in/out")
    printed = call(tool, *output, "--skip_done")  # and what is in OUTPUT is no input
    assert printed == "skipped, already done: 1\noverlays written to in/out: 4\n"
    for name in ("notes.txt", "b_color.png.part"):
        Path("in/out", name).unlink()
    assert results("in/out") == [*names, "new"]

    Path("in/cam2/again").unlink()
    call(tool, "x.onnx", "in/cam1", "in/cam2", "in/new.png", "in/out", "in/out/cam1", "--output", "in/out")
    shutil.move("in/out", "out")
    assert results() == list(shares()) == [*names, "new"]
    call(tool, "x.onnx", "in", "in/cam1/../cam1", "--output", "out")
    assert results() == list(shares()) == [*names, *(f"in/{name}" for name in names), "in/new", "new"]


def test_no_link_is_written_through(weights):
    PHOTO.save("in/b.png")
    call(tool, *SEGMENT)
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    for name in ("b_overlay.jpg", "b_color.png"):
        Path("out", name).rename(f"my_{name}")
        Path("out", name).symlink_to(f"../my_{name}")
    GRAY.save("in/b.png")
    call(tool, *SEGMENT)
    assert all(Path(f"my_{name}").read_bytes() == before[name] for name in ("b_overlay.jpg", "b_color.png"))
    assert not any(path.is_symlink() or path.read_bytes() == before[path.name] for path in Path("out").iterdir())


def test_a_broken_link_at_shares_csv_is_an_error_and_kept(weights):
    """As where the disk that it is on is not mounted."""
    PHOTO.save("in/a.png")
    for output in (Path("out"), Path("in/earlier")):
        output.mkdir()
        (output / "shares.csv").symlink_to("/mnt/away/shares.csv")
        PHOTO.save(output / "b_color.png")
        assert refusal(tool, *SEGMENT) == f"{output}/shares.csv: No such file or directory"
        assert (output / "shares.csv").is_symlink() and len(list(output.iterdir())) == 2
        output.rename(f"done{output.name}")
    Path("loop").symlink_to("loop")
    assert refusal(tool, *SEGMENT[:3], "loop") == "loop/shares.csv: Too many levels of symbolic links"


def test_what_cannot_work_is_refused_before_any_work(weights):
    Path("other/in").mkdir(parents=True)
    assert refusal(tool, *SEGMENT) == "in: no images"
    for path in ("in/a.png", "in/b.png", "other/a.png", "other/in/a.png"):
        PHOTO.save(path)
    message = "images whose results would have the same name: in/a.png, other/in/a.png"
    assert refusal(tool, "x.onnx", "in", "other/in", "--output", "out") == message
    message = "images whose results would have the same name: in/a.png, other/a.png"
    assert refusal(tool, "x.onnx", "in/a.png", "other/a.png", "--output", "out") == message
    Path("own").mkdir()
    for name in ("x_color.png", "x_overlay.jpg", "notes.txt"):  # usual names
        PHOTO.save(f"own/{name}", "PNG")
    named_in = {"in": "in/a.png, in/b.png", "other": "other/a.png, other/in/a.png"}
    named_in["own"] = "own/x_color.png, own/x_overlay.jpg"
    for output, named in named_in.items():
        message = f"{output}: has files that may be yours; pass another --output: {named}"
        assert refusal(tool, "x.onnx", "in", "other", "--output", output) == message
    assert refusal(tool, "y.onnx", *SEGMENT[1:]) == "y.onnx: No such file or directory"
    assert refusal(tool, "x.onnx", "y", *SEGMENT[1:]) == "y: No such file or directory"
    assert run(SCRIPT, "in", *SEGMENT, status=2).stderr.endswith("error: MODEL must be an .onnx or an .om\n")
    assert not Path("out").exists()
    Path("own/shares.csv").write_text("name,price\nApple,1\n")
    message = "own/shares.csv: not of this script, or changed since; pass another --output"
    assert refusal(tool, "x.onnx", "in", "--output", "own") == message
    done = run(SCRIPT, *SEGMENT[:3], "/proc/out", status=1)
    assert done.stderr == "segment.py: error: /proc/out: No such file or directory\n"
    assert done.stdout == ""  # not even how many were drawn


# ---------------------------------------------------------------------------------------------------- the run


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_signal_loses_only_what_is_being_segmented_and_skip_done_resumes(weights, number):
    for n in range(40):
        PHOTO.save(f"in/{n:02}.png")
    command = [sys.executable, str(ROOT / SCRIPT), *SEGMENT]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **OWN_GROUP)
    while not Path("out/shares.csv").exists() or Path("out/shares.csv").read_text().count("\n") < 4:
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(number)
    assert (*child.communicate(), child.returncode) == ("", "", -number)
    parts = list(Path("out").rglob("*.part"))
    assert len(parts) <= 4
    for path in parts:  # which the next run writes again
        assert path.with_name(path.name[: -len(".part")]).name[:2] not in shares()
    done = shares()
    assert 3 <= len(done) < 40
    Path("out/shares.csv").write_bytes(Path("out/shares.csv").read_bytes() + b"39,0.1,0.2")  # cut
    stdout = call(tool, *SEGMENT, "--skip_done")
    assert stdout == f"skipped, already done: {len(done)}\noverlays written to out: {40 - len(done)}\n"
    assert results() == list(shares()) == [f"{n:02}" for n in range(40)]
    assert len({path.read_bytes() for path in Path("out").glob("*_overlay.jpg")}) == 1


def test_of_two_rows_the_last_counts_and_a_cut_one_does_not(weights):
    PHOTO.save("in/a.png")
    call(tool, *SEGMENT)
    header, row = Path("out/shares.csv").read_text().splitlines()
    other = ",".join(["b", *["0.5"] * 20, "model"])
    cut = row.replace("a,", "c,")[:-3]
    Path("out/shares.csv").write_text("\n".join([header, "a" + other[1:], row, other, "d,1", cut]))
    Path("x.onnx").rename("y.onnx")  # the same bytes
    assert call(tool, "y.onnx", *SEGMENT[1:], "--skip_done").startswith("skipped, already done: 1\n")
    assert Path("out/shares.csv").read_text().splitlines() == [header, row, other]
    with Path("out/shares.csv").open("ab") as file:
        file.write(bytes(3))  # as a power loss leaves it
    assert call(tool, "y.onnx", *SEGMENT[1:], "--skip_done").startswith("skipped, already done: 1\n")
    assert Path("out/shares.csv").read_text().splitlines() == [header, row, other]


def test_another_model_s_results_and_an_earlier_version_s_are_not_done(weights):
    PHOTO.save("in/a.png")
    call(tool, *SEGMENT)
    before = Path("out/a_color.png").read_bytes()
    save_small_model(Path("x.onnx"), seed=1)  # under the same name
    assert call(tool, *SEGMENT, "--skip_done") == "skipped, already done: 0\noverlays written to out: 1\n"
    assert Path("out/a_color.png").read_bytes() != before
    table = [line.split(",") for line in Path("out/shares.csv").read_text().splitlines()]
    Path("out/shares.csv").write_text("".join(f"{','.join(row[:-2])}\n" for row in [*table, ["gone", *table[1][1:]]]))
    assert call(tool, *SEGMENT, "--skip_done").startswith("skipped, already done: 0\n")
    rows = [line.split(",") for line in Path("out/shares.csv").read_text().splitlines()]
    assert rows == [*table, ["gone", *table[1][1:-2], "", ""]]


def test_an_earlier_output_among_the_photos_is_left_out(weights):
    PHOTO.save("in/a.png")
    call(tool, "x.onnx", "in", "--output", "in/first")
    assert run(SCRIPT, *SEGMENT).stderr == "skipped, not images by their suffix: 1 (earlier OUTPUT 1)\n"
    assert results() == ["a"]
    shutil.copytree("out", "in/out/nested")
    message = "in/out: has files that may be yours; pass another --output: in/out/nested"
    assert refusal(tool, *SEGMENT[:3], "in/out") == message


def test_the_entropy_is_that_of_softmax_over_the_grid(weights):
    for name, image in {"a": PHOTO, "b": Image.new("RGB", (8, 8))}.items():
        image.save(f"in/{name}.png")
    call(tool, *SEGMENT)
    rows = [line.split(",") for line in Path("out/shares.csv").read_text().splitlines()[1:]]
    entropies = {row[0]: float(row[-2]) for row in rows}
    for name, image in {"a": PHOTO, "b": Image.new("RGB", (8, 8))}.items():
        points = np.pad(to_input(image), ((0, 0), (0, 1), (0, 1)))[:, ::8, ::8]
        shares = torch.softmax(torch.from_numpy(np.tensordot(weights[1], points, 1)).double(), dim=0)
        expected = torch.special.entr(shares).sum(dim=0).mean() / np.log(19)
        assert entropies[name] == pytest.approx(float(expected), abs=1e-6)
    assert tool.compute_entropy(np.zeros((19, 65, 129), np.float32)) == pytest.approx(1)


def test_the_opacity_is_that_of_the_prediction(weights):
    PHOTO.save("in/a.png")
    call(tool, *SEGMENT, "--opacity", 1)
    shown = Image.open("out/a_overlay.jpg").crop((0, 0, *PHOTO.size))
    expected = Image.open("out/a_color.png").convert("RGB")
    assert np.abs(np.asarray(shown).astype(int) - np.asarray(expected)).mean() < 8
    assert "--opacity must be 0 to 1" in run(SCRIPT, *SEGMENT, "--opacity", "2", status=2).stderr


def test_a_full_disk_ends_all(weights):
    """A link to a device that is full stands in for it."""
    for name in "abcdefgh":
        PHOTO.save(f"in/{name}.png")
    call(tool, "x.onnx", "in/h.png", *SEGMENT[2:])
    for name in "abcdefgh":
        Path(f"out/{name}_color.png.part").symlink_to("/dev/full")
    assert error_of(SCRIPT, *SEGMENT).endswith("_color.png: No space left on device")
    assert list(shares()) == ["h"]


def test_a_bar_shows_how_many_images_are_done(weights):
    for name in ("a", "b"):
        PHOTO.save(f"in/{name}.png")
    terminal, stderr = pty.openpty()
    termios.tcsetwinsize(stderr, (24, 80))
    command = [sys.executable, str(ROOT / SCRIPT), *SEGMENT]
    assert subprocess.run(command, stdout=subprocess.DEVNULL, stderr=stderr).returncode == 0
    os.set_blocking(terminal, False)
    assert " 2/2 " in os.read(terminal, 65536).decode()
