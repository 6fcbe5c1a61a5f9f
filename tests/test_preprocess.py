"""intrada_preprocess.py through its command line, on the golden frame and on files made here."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import intrada_preprocess as preprocess
from support import GOLDEN, GOLDEN_DATA_DIR, GOLDEN_FRAME, ROOT, refusal, run

SCRIPT = "intrada_preprocess.py"
GOLDEN_IMAGE = GOLDEN_DATA_DIR / f"leftImg8bit/val/frankfurt/{GOLDEN_FRAME}_leftImg8bit.png"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def add_image(data_dir: Path, frame: str, city: str = "ulm", split: str = "val") -> Path:
    """Add the golden image to a data set as another frame."""
    path = data_dir / "leftImg8bit" / split / city / f"{frame}_leftImg8bit.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(GOLDEN_IMAGE, path)
    return path


def test_the_golden_frame_is_reproduced_bit_for_bit_and_writable_by_one_only(tmp_path):
    save_dir = tmp_path / "new" / "prep"
    done = run(SCRIPT, GOLDEN_DATA_DIR, save_dir, preexec_fn=lambda: os.umask(0o002))
    target = save_dir / f"{GOLDEN_FRAME}_leftImg8bit.bin"
    input_chw = np.fromfile(target, "<f4").reshape(3, 512, 1024)  # as the docstring reads it
    samples = np.array(GOLDEN["preprocess"]["samples"])  # first, since they tell what is wrong
    np.testing.assert_array_equal(input_chw[tuple(samples[:, :3].astype(int).T)], samples[:, 3].astype(np.float32))
    assert sha256(target) == GOLDEN["preprocess"]["sha256"]
    assert (done.stdout, done.stderr) == (f"frames written to {save_dir}: 1\n", "")
    assert [oct(p.stat().st_mode & 0o777) for p in (target, save_dir, save_dir.parent)] == ["0o644", "0o755", "0o755"]


def test_every_file_is_made_again_however_current_it_looks(tmp_path):
    image = add_image(tmp_path, "ulm_0", split="train")
    target = tmp_path / "prep" / f"{image.stem}.bin"
    target.parent.mkdir()
    target.write_bytes(bytes(6291456))  # of the right size, and newer than the image
    assert preprocess.main([str(tmp_path), str(target.parent), "--split", "train"]) == 0
    assert sha256(target) == GOLDEN["preprocess"]["sha256"]


def test_unexpected_files_are_reported(tmp_path, capsys):
    for name in ("._old.bin", "other.npy", "README.txt"):
        (tmp_path / name).write_bytes(b"")
    preprocess.main([str(GOLDEN_DATA_DIR), str(tmp_path)])
    assert ": ._old.bin, other.npy\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ([], "leftImg8bit/val: no <city>/"),
        ([("ulm_0", "bonn"), ("ulm_0", "ulm")], "two cities: ulm_0_leftImg8bit.png"),
        ([("ulm_0.5", "ulm")], "dot; ais_bench truncates there: ulm_0.5_leftImg8bit.png"),
    ],
    ids=["no_images", "a_name_in_two_cities", "a_name_with_a_dot"],
)
def test_frames_that_cannot_be_told_apart_are_refused(tmp_path, frames, words):
    for frame in frames:
        add_image(tmp_path, *frame)
    assert words in refusal(preprocess, tmp_path, tmp_path / "prep")
    assert not (tmp_path / "prep").exists()


def test_a_full_disk_is_one_line_and_leaves_no_bin(tmp_path):
    limit = "ulimit -f 100; exec"  # blocks of 1024 bytes, as a full disk would
    command = f"{limit} {sys.executable} {ROOT / SCRIPT} {GOLDEN_DATA_DIR} {tmp_path}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert f": error: {tmp_path}/{GOLDEN_FRAME}_leftImg8bit.bin: File" in done.stderr
    assert not list(tmp_path.iterdir())
