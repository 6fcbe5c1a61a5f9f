"""What the field does to files: unreadable folders, hidden files, odd PNGs, names that a terminal cannot show."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import intrada_postprocess as postprocess
import intrada_preprocess as preprocess
from support import GOLDEN_DATA_DIR, LABEL_IDS, ROOT, add_frame, refusal, save_frames, save_small_model
from tools import benchmark, compare, infer, report, segment

FRAMES = "bonn_000000_000000", "ulm_000000_000000"
HALVES = np.repeat([[0] * 129, [10] * 129], [32, 33], axis=0)  # road below sky


@pytest.fixture
def folder(monkeypatch) -> Iterator[Path]:
    """The current folder, which every user may enter: two cities' images and labels, results r and r2, maps, prep."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    monkeypatch.chdir(path)
    for frame in FRAMES:
        add_frame(Path("data"), frame, HALVES, HALVES if frame == FRAMES[0] else HALVES * 0)
        image = Path(f"data/leftImg8bit/val/{frame.split('_')[0]}/{frame}_leftImg8bit.png")
        image.parent.mkdir(parents=True)
        Image.effect_noise((129, 65), 50).convert("RGB").save(image)
    Path("data/r").rename("r")
    Path("r/device0").mkdir()
    Path(f"r/{FRAMES[1]}_leftImg8bit_1.bin").rename(f"r/device0/{FRAMES[1]}_leftImg8bit_1.bin")
    shutil.copytree("r", "r2")
    save_frames(Path("prep"), [FRAMES[0]])
    save_small_model(Path("x.onnx"))
    postprocess.main(["data", "r", "--json", "m.json", "--save_labels", "maps"])
    yield path
    subprocess.run(["chmod", "-R", "u+rwx", path], check=True)
    shutil.rmtree(path)


COMMANDS = {
    "preprocess": (preprocess, "data", "new"),
    "postprocess": (postprocess, "data", "r", "--json", "r.json"),
    "compare": (compare, "r", "r2", "--json", "c.json"),
    "report": (report, "m.json", "--labels", "maps", "--data", "data", "--output", "page.html"),
    "infer": (infer, "--model", "x.onnx", "--input", "prep", "--output", "out", "--output_dirname", "o"),
    "benchmark": (benchmark, "x.onnx", "1", "--input", "prep"),
    "segment": (segment, "x.onnx", "data/leftImg8bit", "--output", "overlays"),
}


@pytest.mark.parametrize(
    ("command", "unreadable"),
    [
        ("preprocess", "data/leftImg8bit/val/bonn"),
        ("postprocess", "data/gtFine/val/bonn"),
        ("postprocess", "data/leftImg8bit/val/bonn"),
        ("postprocess", "data/leftImg8bit"),
        ("postprocess", "r/device0"),
        ("compare", "r2/device0"),
        ("report", "data/gtFine/val/ulm"),
        ("report", "maps"),
        ("infer", "prep"),
        ("benchmark", "prep"),
    ],
)
def test_a_folder_that_may_not_be_read_is_an_error_that_names_it(folder, command, unreadable):
    Path(unreadable).chmod(0)
    if os.getuid() == 0:
        os.seteuid(65534)  # since root may read everything
    try:
        message = refusal(*COMMANDS[command])
    finally:
        os.seteuid(os.getuid())
    assert message.startswith(unreadable) and message.endswith(": Permission denied"), message


@pytest.mark.parametrize("command", ["preprocess", "postprocess"])
def test_a_city_that_is_a_broken_link_is_an_error_that_names_it(folder, command):
    Path("data/leftImg8bit/val/zurich").symlink_to("nowhere")
    assert refusal(*COMMANDS[command]) == "data/leftImg8bit/val/zurich: No such file or directory"


def test_hidden_files_are_no_data_anywhere(folder):
    """Archives made on a Mac hold ._<name> beside every file and folder."""
    for path in [path for path in folder.rglob("*") if path.name[0] != "."]:
        (path.parent / f"._{path.name}").write_bytes(b"Mac OS X")
    Path("data/leftImg8bit/val/.cache").mkdir()
    assert preprocess.main(["data", "new"]) == 0
    assert sorted(path.name for path in Path("new").iterdir()) == [f"{frame}_leftImg8bit.bin" for frame in FRAMES]
    metrics = json.loads(Path("m.json").read_text())
    assert postprocess.main(["data", "r", "--json", "m2.json", "--save_labels", "maps"]) == 0
    assert json.loads(Path("m2.json").read_text()) == metrics
    assert compare.main(["r", "r2"]) == 0
    assert report.main(["m.json", "--labels", "maps", "--data", "data"]) == 0
    assert infer.main([*COMMANDS["infer"][1:]]) == 0
    assert sorted(path.name for path in Path("out/o").iterdir()) == [f"{FRAMES[0]}_leftImg8bit_{i}.bin" for i in (0, 1)]


@pytest.mark.parametrize("command", ["postprocess", "compare"])
def test_a_pipe_closed_by_its_reader_loses_no_json(folder, command):
    module, *args = COMMANDS[command]
    reader, writer = os.pipe()
    os.close(reader)
    subprocess.run([sys.executable, "-u", module.__file__, *args], stdout=writer, stderr=subprocess.DEVNULL)
    os.close(writer)
    assert json.loads(Path(args[-1]).read_text())["frames"] == 2


WRITTEN = "new/*.bin", "r.json", "c.json", "page.html", "out/o/*_1.bin", "bench/*/bs1/*_1.bin", "overlays/*/*/*.png"


@pytest.mark.parametrize(("command", "written"), list(zip(COMMANDS, WRITTEN)))
def test_closed_streams_stop_no_script(folder, command, written):
    module, *args = COMMANDS[command]
    contents = set()
    for n, closed in enumerate(("", "<&- >&-", "2>&-")):
        line = f"{shlex.join([sys.executable, module.__file__, *args])} {closed}"
        assert subprocess.run(line, shell=True).returncode == 0, closed
        contents.add(min(Path().glob(written)).read_bytes())
        Path(Path(written).parts[0]).rename(f"written{n}")
    assert len(contents) == 1


def test_a_script_runs_where_stdout_cannot_be_reconfigured(folder):
    """As by Jupyter's %run."""
    path = preprocess.__file__
    program = f"import io, runpy, sys; sys.stdout = io.StringIO(); runpy.run_path({path!r}, run_name='__main__')"
    assert subprocess.run([sys.executable, "-c", program, "data", "new"]).returncode == 0
    assert len(list(Path("new").iterdir())) == 2


# ---------------------------------------------------------------------------------------------------- PNGs


def make_png(pixels: np.ndarray, bits: int = 8, interlaced: bool = False) -> bytes:
    """Encode (H, W) or (H, W, 3) uint8 or uint16 pixels; Pillow writes neither Adam7 nor RGB of 16 bits."""
    height, width = pixels.shape[:2]
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    parts = [pixels[y::dy, x::dx] for y, x, dy, dx in passes] if interlaced else [pixels]
    rows = b"".join(b"\0" + row.tobytes() for part in parts if part.size for row in part.astype(f">u{bits // 8}"))
    header = struct.pack(">2I5B", width, height, bits, 2 if pixels.ndim == 3 else 0, 0, 0, interlaced)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(rows, 1)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(make_chunk(*chunk) for chunk in chunks)


def make_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def insert(png: bytes, kind: bytes, content: bytes) -> bytes:
    """Insert a chunk after the header, which takes the first 33 bytes."""
    return png[:33] + make_chunk(kind, content) + png[33:]


ORIENTATION_6 = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
VARIANTS = {
    "plain": lambda png, pixels: png,
    "interlaced": lambda png, pixels: make_png(pixels, interlaced=True),
    "gAMA": lambda png, pixels: insert(png, b"gAMA", struct.pack(">I", 220000)),
    "sRGB": lambda png, pixels: insert(png, b"sRGB", b"\0"),
    "tRNS": lambda png, pixels: insert(png, b"tRNS", bytes([0, 7] * (pixels.ndim * 2 - 3))),
    "rotated": lambda png, pixels: insert(png, b"eXIf", ORIENTATION_6),
    "APNG": lambda png, pixels: insert(png, b"acTL", struct.pack(">2I", 1, 0)),
    "followed": lambda png, pixels: png + b"more",
}


def test_png_variants_give_the_bytes_of_the_plain_one(tmp_path):
    rng = np.random.default_rng(0)
    image, label = rng.integers(0, 256, (64, 96, 3), np.uint8), rng.choice(np.array(LABEL_IDS, np.uint8), (64, 96))
    (tmp_path / "leftImg8bit/val/bonn").mkdir(parents=True)
    for variant, change in VARIANTS.items():
        add_frame(tmp_path, f"bonn_{variant}", HALVES, HALVES)
        image_path = tmp_path / f"leftImg8bit/val/bonn/bonn_{variant}_leftImg8bit.png"
        image_path.write_bytes(change(make_png(image), image))
        label_path = tmp_path / f"gtFine/val/bonn/bonn_{variant}_gtFine_labelIds.png"
        label_path.write_bytes(change(make_png(label), label))
    preprocess.main([str(tmp_path), str(tmp_path / "prep")])
    postprocess.main([str(tmp_path), str(tmp_path / "r"), "--json", str(tmp_path / "m.json")])
    metrics = {frame.pop("frame"): frame for frame in json.loads((tmp_path / "m.json").read_text())["per_frame"]}
    assert metrics == {f"bonn_{variant}": metrics["bonn_plain"] for variant in VARIANTS}
    inputs = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "prep").iterdir()}
    plain = inputs["bonn_plain_leftImg8bit.bin"]
    assert inputs == {f"bonn_{variant}_leftImg8bit.bin": plain for variant in VARIANTS}


def encode_jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


PIXELS = np.zeros((8, 8, 3), np.uint8)
PNG = make_png(PIXELS)
BOMB = PNG[:8] + make_chunk(b"IHDR", struct.pack(">2I5B", 14000, 14000, 8, 2, 0, 0, 0)) + PNG[33:]
UNREADABLE = "damaged, too large, or not a PNG: "


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"<html>", f"{UNREADABLE}cannot identify image file"),
        (PNG[:-20], UNREADABLE),
        (PNG[:33] + make_chunk(b"IEND", b""), UNREADABLE),
        (BOMB, f"{UNREADABLE}Image size (196000000 pixels)"),
        (insert(PNG, b"zTXt", b"k\0\0" + zlib.compress(bytes(2 << 20))), f"{UNREADABLE}Decompressed data too large"),
        (make_png(PIXELS.astype(np.uint16), bits=16), "found mode RGB, 16 bits per sample; expected mode RGB, 8 bits"),
        (make_png(PIXELS[..., 0]), "found mode L, 8 bits per sample; expected mode RGB, 8 bits"),
        (encode_jpeg(PIXELS), f"{UNREADABLE}cannot identify image file"),
    ],
    ids=["web page", "cut", "no pixels", "bomb", "large text", "16 bits", "gray", "JPEG"],
)
def test_images_that_are_refused_are_counted_and_named_and_the_others_converted(tmp_path, content, reason):
    folder = tmp_path / "leftImg8bit/val/ulm"
    folder.mkdir(parents=True)
    for name, written in {"a": content, "b": PNG, "c": content}.items():
        (folder / f"{name}_leftImg8bit.png").write_bytes(written)
    message = refusal(preprocess, tmp_path, tmp_path / "prep")
    assert message.startswith("2 of 3 images ")
    assert all(f"{folder}/{name}_leftImg8bit.png: {reason}" in message for name in "ac")
    assert [path.name for path in (tmp_path / "prep").iterdir()] == ["b_leftImg8bit.bin"]


# ---------------------------------------------------------------------------------------------------- labels, names


def test_a_label_of_four_bits_which_pillow_would_scale_is_refused(tmp_path):
    add_frame(tmp_path, FRAMES[0], HALVES, HALVES)
    png = make_png(np.full((8, 4), 0x17, np.uint8))  # two pixels a byte
    header = make_chunk(b"IHDR", struct.pack(">2I5B", 8, 8, 4, 0, 0, 0, 0))
    (tmp_path / f"gtFine/val/bonn/{FRAMES[0]}_gtFine_labelIds.png").write_bytes(png[:8] + header + png[33:])
    assert refusal(postprocess, tmp_path, tmp_path / "r").endswith(
        ": found mode L, 4 bits per sample; expected mode L, 8 bits"
    )


@pytest.mark.parametrize(("largest", "warned"), [(19, True), (20, False), (34, True)])  # 34 has no class
def test_train_ids_without_255_are_warned_of(tmp_path, capsys, largest, warned):
    add_frame(tmp_path, FRAMES[0], HALVES, HALVES)
    label = np.tile(np.append(np.arange(19, dtype=np.uint8), np.uint8(largest)), (65, 7))
    Image.fromarray(label).save(tmp_path / f"gtFine/val/bonn/{FRAMES[0]}_gtFine_labelIds.png")
    assert postprocess.main([str(tmp_path), str(tmp_path / "r")]) == 0
    assert ("are these labelTrainIds?" in capsys.readouterr().err) == warned


@pytest.mark.parametrize(
    ("name", "settings", "shown"),
    [
        (b"\xb3\xc7\xca\xd0", {"LC_ALL": "C.UTF-8"}, "\\udcb3\\udcc7\\udcca\\udcd0"),  # GBK under UTF-8
        ("城市".encode(), {"PYTHONIOENCODING": "ascii"}, "\\u57ce\\u5e02"),
    ],
    ids=["GBK", "ascii"],
)
def test_a_name_that_stdout_cannot_hold_is_escaped(tmp_path, name, settings, shown):
    data = tmp_path / os.fsdecode(name)
    shutil.copytree(GOLDEN_DATA_DIR, data)
    command = [sys.executable, ROOT / "intrada_preprocess.py", data, data / "prep"]
    done = subprocess.run(command, capture_output=True, env={**os.environ, **settings})
    assert (done.returncode, done.stderr) == (0, b"")
    assert f"{shown}/prep: 1\n" in done.stdout.decode()


def test_a_name_of_another_encoding_is_inferred(folder):
    Path(f"prep/{FRAMES[0]}_leftImg8bit.bin").rename("prep/\udcb3\udcc7_leftImg8bit.bin")
    assert infer.main([*COMMANDS["infer"][1:]]) == 0
    assert Path("out/o/\udcb3\udcc7_leftImg8bit_1.bin").exists()


def test_results_in_the_current_folder_are_scored(folder, monkeypatch):
    monkeypatch.chdir("r")
    assert postprocess.main(["../data", ".", "--json", "../m2.json", "--save_labels", "../maps"]) == 0
    assert json.loads(Path("../m2.json").read_text()) == json.loads(Path("../m.json").read_text())


def test_a_speed_test_does_not_replace_the_summary_of_results(folder):
    assert infer.main([*COMMANDS["infer"][1:]]) == 0
    before = {path: path.read_bytes() for path in Path("out").glob("**/*.*")}
    for more in ((), ("--overwrite",)):
        message = refusal(infer, "--model", "x.onnx", "--output", "out", "--output_dirname", "o", *more)
        assert message == "out/o_summary.json: of another run; pass another --output_dirname"
    assert {path: path.read_bytes() for path in Path("out").glob("**/*.*")} == before


def test_a_clone_with_crlf_keeps_the_line_ends_of_scripts(tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    command = ["git", "-c", "core.autocrlf=true", "clone", "-q", "--no-local", ROOT, tmp_path / "clone"]
    subprocess.run(command, check=True)
    for name in ("atc_convert.sh", ".ci/run", "tests/fake_ascend/bin/atc", "intrada_preprocess.py"):
        assert b"\r" not in (tmp_path / "clone" / name).read_bytes()
