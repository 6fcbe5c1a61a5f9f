"""tools/segment.py on real files of every kind, over ONNX Runtime and over the stand-in for ais_bench."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

import tools.segment as tool
from intrada_postprocess import CLASSES, PALETTE, predict
from intrada_preprocess import to_input
from support import GOLDEN_DATA_DIR, GOLDEN_FRAME, ROOT, ascend_environment, error_of, refusal, run, save_small_model

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
TURNED = Image.Exif()
TURNED[0x0112] = 6  # to be turned clockwise

# The file, its image, how it is saved, the name of its results, and what is seen on it; None: what is decoded.
KINDS = [
    ("plain.png", PHOTO, {}, "plain", PHOTO),
    ("lossy.jpg", PHOTO, {}, "lossy", None),
    ("with space.webp", PHOTO, {"lossless": True}, "with space", PHOTO),
    ("街景.v1.2.bmp", PHOTO, {}, "街景.v1.2", PHOTO),
    ("turned.jpg", PHOTO, {"exif": TURNED}, "turned", None),
    ("gray.png", GRAY, {}, "gray", GRAY),
    ("alpha.png", ALPHA, {}, "alpha", CUT_OUT),
    ("palette.gif", PALETTED, {}, "palette", PALETTED),
    ("cmyk.jpeg", PHOTO.convert("CMYK"), {}, "cmyk", None),
    ("deep.png", Image.fromarray(np.asarray(GRAY).astype(np.uint16) * 257), {}, "deep.png", GRAY),
    ("deep.tif", Image.fromarray(np.asarray(GRAY).astype(np.int32) * 257), {}, "deep.tif", GRAY),
    ("noname", PHOTO, {"format": "PNG"}, "noname", PHOTO),
    ("dot.png", PHOTO.resize((1, 1)), {}, "dot", PHOTO.resize((1, 1))),
]


@pytest.fixture
def weights(tmp_path, monkeypatch) -> np.ndarray:
    """The current folder has x.onnx, x.om and an empty TMPDIR; the model's weights."""
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    Path("tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    Path("x.om").write_text(json.dumps({"onnx": "x.onnx", "batch": 1, "frame_shape": [3, 512, 1024]}))
    return save_small_model(Path("x.onnx"))


def results() -> list[str]:
    assert list(Path("tmp").iterdir()) == []
    return sorted(path.name for path in Path("out").iterdir())


def test_every_kind_of_image_is_segmented_and_what_is_none_is_named(weights):
    for name, image, options, _, _ in KINDS:
        image.save(Path("in", name), **options)
    Path("in", "notes.txt").write_text("no image")
    Path("in", "cut.jpg").write_bytes(Path("in", "lossy.jpg").read_bytes()[:2000])
    Image.new("RGB", (65501, 1)).save("in/long.png")  # more than a JPEG can have
    Path("in", ".hidden.png").write_text("")
    Path("in", "folder").mkdir()
    done = run(SCRIPT, *SEGMENT, status=1, env={**os.environ, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"})
    assert done.stdout == f"overlays written to out: {len(KINDS)}\n"
    start = (
        f"segment.py: error: 3 of {len(KINDS) + 3} images cannot be segmented: in/cut.jpg: image file is truncated ("
    )
    message = done.stderr.splitlines()[-1]  # libjpeg has a line of its own on the long one
    assert message.startswith(start)
    assert "; in/notes.txt: cannot identify image file 'in/notes.txt'; out/long_overlay.jpg: " in message
    assert results() == sorted(f"{kind[3]}_{ending}" for kind in KINDS for ending in ("color.png", "overlay.jpg"))
    for file, _, options, name, seen in KINDS:
        seen = seen.convert("RGB") if seen else Image.open(Path("in", file)).convert("RGB")
        seen = seen.transpose(Image.ROTATE_270) if "exif" in options else seen
        points = np.pad(to_input(seen), ((0, 0), (0, 1), (0, 1)))[:, ::8, ::8]
        prediction = predict(np.tensordot(weights[1], points, 1).astype(np.float32), (seen.height, seen.width))
        color = Image.open(f"out/{name}_color.png")
        assert (color.mode, color.size) == ("P", seen.size), file
        assert np.mean(np.asarray(color) != prediction) < 0.001, file  # a tie may go either way
        assert bytes(color.getpalette()[: len(PALETTE)]) == PALETTE
        overlay = Image.open(f"out/{name}_overlay.jpg")
        assert overlay.width >= seen.width
        assert overlay.height > seen.height + 16
        shown = np.asarray(overlay)[: seen.height, : seen.width].astype(int)
        blended = (np.asarray(seen).astype(int) + np.asarray(color.convert("RGB"))) / 2
        assert np.abs(shown - blended).mean() < (6 if seen.width > 1 else 99), file  # JPEG blurs the dot


@pytest.mark.parametrize("size", [(1, 1), (320, 240), (240, 320), (1920, 1080), (6000, 4000)])
def test_the_legend_has_the_classes_that_occur_largest_first_in_rows_and_grows_with_the_image(size, monkeypatch):
    texts, write = [], ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw, "text", lambda *args, **options: (texts.append(args[2]), write(*args, **options))
    )
    shares = np.zeros(19)
    shares[[0, 6, 13, 18]] = 0.25, 0.7, 0.04996, 0.00004
    legend = tool.draw_legend(shares, size)
    assert texts == ["traffic light  70.00 %", "road  25.00 %", "car  5.00 %", "bicycle  0.00 %"]
    pixels = np.asarray(legend)
    colors = [np.frombuffer(bytes.fromhex(CLASSES[n][3][1:]), np.uint8) for n in (6, 0, 13, 18)]
    corners = [np.argwhere((pixels == color).all(axis=2))[0] for color in colors]
    assert [tuple(corner) for corner in corners] == sorted(tuple(corner) for corner in corners)
    assert legend.width <= max(size[0], 160)
    swatch = int((pixels == colors[0]).all(axis=2).any(axis=1).sum())
    assert swatch >= max(11, 0.012 * (size[0] * size[1]) ** 0.5)
    assert (pixels[-1] == 255).all()  # nothing is cut off
    assert (pixels[:, -3:] == 255).all()


def test_the_colors_of_a_cityscapes_frame_are_those_of_postprocess(weights):
    run("intrada_preprocess.py", GOLDEN_DATA_DIR, "prep")
    run("tools/infer.py", "--model", "x.onnx", "--input", "prep", "--output", "result", "--output_dirname", "r")
    run("intrada_postprocess.py", GOLDEN_DATA_DIR, "result/r", "--save_colors", "colors")
    (image,) = GOLDEN_DATA_DIR.glob("leftImg8bit/val/*/*.png")
    run(SCRIPT, "x.onnx", image, "--output", "out")
    ours = Image.open(f"out/{image.stem}_color.png")
    theirs = Image.open(f"colors/{GOLDEN_FRAME}_predicted_color.png")
    assert ours.getpalette() == theirs.getpalette()
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def test_an_om_runs_by_ais_bench_whatever_the_names_and_the_umask(weights):
    names = ["街景 1", "a.b"]
    for name, image in zip(names, (PHOTO, GRAY)):
        image.save(f"in/{name}.png")
    run(SCRIPT, *SEGMENT)
    files = {name: Path("out", name).read_bytes() for name in results()}
    done = run(SCRIPT, "x.om", *SEGMENT[1:3], "om/out", env=ascend_environment(), umask=0o002)
    assert done.stdout == "overlays written to om/out: 2\n"
    assert {path.name: path.read_bytes() for path in Path("om/out").iterdir()} == files
    assert len(files) == 4
    assert results()


def test_ctrl_c_removes_the_temporary_folder_and_ends_as_a_signal_does(weights):
    PHOTO.save("in/a.png")
    command = [sys.executable, str(ROOT / SCRIPT), "x.om", *SEGMENT[1:]]
    environment = ascend_environment(FAKE_AIS_BENCH_STOP="1")
    done = subprocess.run(command, env=environment, start_new_session=True, capture_output=True, text=True)
    assert (done.returncode, done.stdout, results()) == (-signal.SIGINT, "", [])
    assert "segment.py" not in done.stderr


COMPLETE = """import pathlib, sys
folder = pathlib.Path(sys.argv[sys.argv.index("--output") + 1], "logits")
folder.mkdir()
for name in ("00000_1.bin", "00001_1.bin"):
    (folder / name).touch()
"""


@pytest.mark.parametrize(
    ("ais_bench", "words"),
    [
        (
            COMPLETE + "print('a\\nb\\nc\\nd')\nsys.exit(3)",
            "status 3, results missing: 0 of 2; see its messages above | b",
        ),
        ("print('d')", "status 0, results missing: 2 of 2; see its messages above | d"),
    ],
)
def test_a_failed_inference_is_one_line_with_its_last_lines(weights, monkeypatch, ais_bench, words):
    Path("modules").mkdir()
    Path("modules/ais_bench.py").write_text(ais_bench)
    monkeypatch.setenv("PYTHONPATH", str(Path("modules").resolve()))
    for name in ("a", "b"):
        PHOTO.save(f"in/{name}.png")
    message = error_of(SCRIPT, "x.om", *SEGMENT[1:])
    assert message.startswith(f"x.om: inference ended with {words}")
    assert message.endswith(" | d")
    assert results() == []


def test_what_cannot_work_is_refused_before_any_work(weights):
    Path("other").mkdir()
    assert refusal(tool, *SEGMENT) == "in: no images"
    for path in ("in/a.png", "in/b.png", "other/a.png"):
        PHOTO.save(path)
    message = "images whose results would have the same name: in/a.png, other/a.png"
    assert refusal(tool, "x.onnx", "in", "other", "--output", "out") == message
    PHOTO.save("in/a_color.png")
    message = "in: results would overwrite images; pass another --output: in/a_color.png"
    assert refusal(tool, "x.onnx", "in", "--output", "in") == message
    assert error_of(SCRIPT, "y.onnx", *SEGMENT[1:]) == "y.onnx: No such file or directory"
    assert error_of(SCRIPT, "x.onnx", "y", *SEGMENT[1:]) == "y: No such file or directory"
    assert run(SCRIPT, "in", *SEGMENT, status=2).stderr.endswith("error: MODEL must be an .onnx or an .om\n")
    assert not Path("out").exists()
