"""intrada_preprocess.py through its command line, on the golden frame and on files made here."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support import GOLDEN, GOLDEN_DATA_DIR, GOLDEN_FRAME, ROOT, error_of, make_older, run

SCRIPT = "intrada_preprocess.py"
GOLDEN_PICTURE = GOLDEN_DATA_DIR / f"leftImg8bit/val/frankfurt/{GOLDEN_FRAME}_leftImg8bit.png"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def add_picture(data_dir: Path, frame: str, image: Image.Image | Path = GOLDEN_PICTURE, split: str = "val") -> Path:
    """Add a frame to a data set; the city is the frame's first word."""
    path = data_dir / "leftImg8bit" / split / frame.split("_")[0] / f"{frame}_leftImg8bit.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(image, path) if isinstance(image, Path) else image.save(path)
    return path


@pytest.mark.parametrize("umask", [0o002, 0o077])
def test_the_golden_frame_comes_out_bit_for_bit_and_readable_whatever_the_umask(tmp_path, umask):
    save_dir = tmp_path / "new" / "prep"
    done = run(SCRIPT, GOLDEN_DATA_DIR, save_dir, preexec_fn=lambda: os.umask(umask))
    target = save_dir / f"{GOLDEN_FRAME}_leftImg8bit.bin"
    assert sha256(target) == GOLDEN["preprocess"]["sha256"]
    assert done.stdout == f"1 frames (1 made, 0 kept), 6291456 bytes in {save_dir}\n"
    assert done.stderr == ""
    assert [oct(p.stat().st_mode & 0o777) for p in (target, save_dir, save_dir.parent)] == ["0o644", "0o755", "0o755"]


def test_the_docstring_reads_a_file_back(tmp_path):
    run(SCRIPT, GOLDEN_DATA_DIR, tmp_path)
    input_chw = np.fromfile(tmp_path / f"{GOLDEN_FRAME}_leftImg8bit.bin", "<f4").reshape(3, 512, 1024)
    for channel, row, column, value in GOLDEN["preprocess"]["samples"]:
        assert input_chw[channel, row, column] == np.float32(value)


def test_a_second_run_makes_only_what_is_missing_cut_or_old(tmp_path):
    data_dir, save_dir = tmp_path / "data", tmp_path / "prep"
    pictures = [add_picture(data_dir, f"ulm_000000_00000{n}") for n in range(4)]
    run(SCRIPT, data_dir, save_dir)
    targets = [save_dir / f"{picture.stem}.bin" for picture in pictures]
    whole = sha256(targets[0])
    targets[0].unlink()
    targets[1].write_bytes(b"cut")
    make_older(targets[2], 1e6)
    kept = targets[3].stat()

    done = run(SCRIPT, data_dir, save_dir)
    assert done.stdout == f"4 frames (3 made, 1 kept), 25165824 bytes in {save_dir}\n"
    assert [sha256(target) for target in targets] == [whole] * 4
    assert (targets[3].stat().st_ino, targets[3].stat().st_mtime_ns) == (kept.st_ino, kept.st_mtime_ns)

    assert "(4 made, 0 kept)" in run(SCRIPT, data_dir, save_dir, "--overwrite").stdout
    assert targets[3].stat().st_mtime_ns > kept.st_mtime_ns


def test_killed_and_started_again_it_ends_with_the_same_files(tmp_path):
    data_dir, save_dir = tmp_path / "data", tmp_path / "prep"
    for n in range(12):
        add_picture(data_dir, f"ulm_000000_{n:06}")
    process = subprocess.Popen([sys.executable, ROOT / SCRIPT, data_dir, save_dir, "--workers", "2"])
    while not list(save_dir.glob("*.bin")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(list(save_dir.glob("*.bin"))) < 12
    assert {sha256(path) for path in save_dir.glob("*.bin")} == {GOLDEN["preprocess"]["sha256"]}

    run(SCRIPT, data_dir, save_dir)
    assert [sha256(path) for path in save_dir.iterdir()] == [GOLDEN["preprocess"]["sha256"]] * 12


def test_another_split_is_another_folder(tmp_path):
    add_picture(tmp_path, "ulm_000000_000000", split="train")
    assert "1 frames" in run(SCRIPT, tmp_path, tmp_path / "prep", "--split", "train").stdout
    assert error_of(SCRIPT, tmp_path, tmp_path / "prep") == (
        f"{tmp_path}/leftImg8bit/val: no <city>/<frame>_leftImg8bit.png here; "
        "DATA_DIR is the folder that holds leftImg8bit"
    )


def test_a_file_of_no_frame_is_warned_of(tmp_path):
    for name in ("old.bin", "other.npy", "README.txt"):
        (tmp_path / name).write_bytes(b"")
    assert run(SCRIPT, GOLDEN_DATA_DIR, tmp_path).stderr == (
        f"warning: {tmp_path}: 2 files belong to no frame of this split, and ais_bench would infer them too: "
        "old.bin, other.npy\n"
    )


def test_what_others_may_write_is_warned_of_with_the_command_that_mends_it(tmp_path):
    run(SCRIPT, GOLDEN_DATA_DIR, tmp_path / "prep")
    target = tmp_path / "prep" / f"{GOLDEN_FRAME}_leftImg8bit.bin"
    for path in (tmp_path / "prep", target):
        path.chmod(0o775)
    warning = run(SCRIPT, GOLDEN_DATA_DIR, tmp_path / "prep").stderr
    command = f"chmod -R go-w {tmp_path}/prep"
    assert warning == f"warning: newer ais_bench refuses what others may write: {command}\n"
    subprocess.run(command, shell=True, check=True)
    assert run(SCRIPT, GOLDEN_DATA_DIR, tmp_path / "prep").stderr == ""


def test_two_runs_do_not_write_to_one_folder(tmp_path):
    held = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    message = f"{tmp_path}: another run is writing here; wait for it, or give another folder"
    assert error_of(SCRIPT, GOLDEN_DATA_DIR, tmp_path) == message
    os.close(held)


def test_what_cannot_be_written_is_named(tmp_path):
    limit = "ulimit -f 100; exec"  # blocks of 1024 bytes, as a full disk would
    command = f"{limit} {sys.executable} {ROOT / SCRIPT} {GOLDEN_DATA_DIR} {tmp_path}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 1
    assert f"{tmp_path}/{GOLDEN_FRAME}_leftImg8bit.bin: cannot be written: File too large" in done.stderr


def test_a_name_in_two_cities_is_refused(tmp_path):
    picture = add_picture(tmp_path, "ulm_000000_000000")
    other = picture.parent.parent / "bonn" / picture.name
    other.parent.mkdir()
    shutil.copy(picture, other)
    assert error_of(SCRIPT, tmp_path, tmp_path / "prep") == (
        f"{tmp_path}/leftImg8bit/val: 1 frame names occur in two cities: {picture.name}"
    )


def test_a_name_with_a_dot_is_refused(tmp_path):
    picture = add_picture(tmp_path, "ulm_000000_000.000")
    assert error_of(SCRIPT, tmp_path, tmp_path / "prep") == (
        f"{tmp_path}/leftImg8bit/val: 1 frame names hold a dot, where ais_bench cuts: {picture.name}"
    )


def test_damaged_pictures_are_all_named_and_the_others_made(tmp_path):
    add_picture(tmp_path, "ulm_000000_000000")
    cut = add_picture(tmp_path, "ulm_000000_000001")
    cut.write_bytes(cut.read_bytes()[:5000])
    text = add_picture(tmp_path, "ulm_000000_000002")
    text.write_text("not a picture")
    grey = add_picture(tmp_path, "ulm_000000_000003", Image.new("L", (64, 32)))
    message = error_of(SCRIPT, tmp_path, tmp_path / "prep")
    assert message.startswith("3 of 4 pictures cannot be converted: ")
    assert f"{cut}: not a whole PNG: " in message
    assert f"{text}: not a whole PNG: " in message
    assert f"{grey}: found mode L, expected RGB" in message
    assert [path.name for path in (tmp_path / "prep").iterdir()] == ["ulm_000000_000000_leftImg8bit.bin"]


def test_wrong_usage_exits_2():
    assert "--workers: invalid positive value: '0'" in run(SCRIPT, "data", "prep", "--workers", 0, status=2).stderr
