"""Flipped bits, kills and Ctrl-C: refused, or the result of an undisturbed run. SOAK=1 tries many more at random."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

import intrada_postprocess as postprocess
import intrada_preprocess as preprocess
import intrada_pth2onnx as pth2onnx
from support import GOLDEN, GOLDEN_DATA_DIR, GOLDEN_FRAME, OWN_GROUP, ROOT, golden_logits, save_frames, save_small_model

SOAK = bool(os.environ.get("SOAK"))
IMAGE, LABEL = (path.relative_to(GOLDEN_DATA_DIR) for path in sorted(GOLDEN_DATA_DIR.rglob("*.png"), reverse=True))
LOGITS = f"{GOLDEN_FRAME}_leftImg8bit_1.bin"
KILLS, FRAMES = (20, 20) if SOAK else (1, 10)
RANDOM = random.Random(None if SOAK else 0)


def flip_bits(
    path: Path, hidden: tuple[int, int], examples: int, run: Callable[[], object], module: ModuleType
) -> None:
    """Flip one bit at a time: `run` gives the result of the undamaged file, or refuses.

    The first one is `hidden`, a position and a bit of which only a checksum tells. Of the others half are in the last
    100 kB, where a zip has its directory.
    """
    undamaged, content, outcomes = run(), path.read_bytes(), collections.Counter()
    starts = [0, max(0, len(content) - 10**5)] * (examples // 2)
    flips = [hidden] + [(RANDOM.randrange(start, len(content)), RANDOM.randrange(8)) for start in starts]
    for position, bit in flips:
        with path.open("r+b") as file:
            file.seek(position)
            file.write(bytes([content[position] ^ 1 << bit]))
        try:
            assert run() == undamaged, (position, bit)
            outcomes["equal"] += 1
        except module.InputError:
            outcomes["refused"] += 1
        with path.open("r+b") as file:
            file.seek(position)
            file.write(content[position : position + 1])
    print(f"\n{path.name}: {dict(outcomes)}")


def test_a_flipped_bit_in_a_label(tmp_path):
    shutil.copytree(GOLDEN_DATA_DIR, tmp_path, dirs_exist_ok=True)
    golden_logits().tofile(tmp_path / LOGITS)

    def run() -> list:
        postprocess.main([str(tmp_path), str(tmp_path), "--json", str(tmp_path / "x.json")])
        return json.loads((tmp_path / "x.json").read_text())["confusion_matrix"]

    assert run() == GOLDEN["evaluate"]["confusion"]
    flip_bits(tmp_path / LABEL, (7947, 4), 200 if SOAK else 14, run, postprocess)


def test_a_flipped_bit_in_an_image(tmp_path):
    shutil.copytree(GOLDEN_DATA_DIR, tmp_path, dirs_exist_ok=True)

    def run() -> str:
        preprocess.main([str(tmp_path), str(tmp_path / "prep")])
        return hashlib.sha256((tmp_path / f"prep/{IMAGE.stem}.bin").read_bytes()).hexdigest()

    assert run() == GOLDEN["preprocess"]["sha256"]
    flip_bits(tmp_path / IMAGE, (73820, 2), 200 if SOAK else 14, run, preprocess)


def test_a_flipped_bit_in_a_checkpoint(tmp_path):
    torch.save({"conv1.weight": torch.rand(64, 3, 7, 7)}, tmp_path / "x.pth")

    def run() -> list[bytes]:
        return [values.numpy().tobytes() for values in pth2onnx.read_state_dict(tmp_path / "x.pth").values()]

    middle = (tmp_path / "x.pth").stat().st_size // 2
    flip_bits(tmp_path / "x.pth", (middle, 0), 200 if SOAK else 14, run, pth2onnx)


def run(command: list[object], killed_after_s: float | None = None) -> float:
    """Run a command, perhaps only until it is killed, and return its seconds."""
    start_s = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.DEVNULL)
    if killed_after_s is not None:
        time.sleep(killed_after_s)
        process.kill()
    assert process.wait() in ([0, -signal.SIGKILL] if killed_after_s else [0])
    return time.perf_counter() - start_s


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*")}


def kill_and_restart(folder: Path, command: list[object]) -> None:
    """Kill and restart a command: what has its final name is complete, and the end is that of an undisturbed run."""
    elapsed_s = run(command)
    expected, halfway = contents(folder), 0
    for _ in range(KILLS):
        shutil.rmtree(folder)
        run(command, killed_after_s=RANDOM.uniform(0.3, 0.95) * elapsed_s)  # the imports before it apart
        found = {name: content for name, content in contents(folder).items() if not name.endswith(".part")}
        assert found.items() <= expected.items()
        halfway += 0 < len(found) < len(expected)
        run(command)
        assert contents(folder) == expected
    print(f"\n{command[0].name}: {KILLS} kills, {halfway} of them after the first result and before the last")


def test_preprocess_killed_and_restarted(tmp_path):
    for n in range(FRAMES):
        link = tmp_path / str(IMAGE).replace(GOLDEN_FRAME, f"frankfurt_{n:06}")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(GOLDEN_DATA_DIR / IMAGE)
    kill_and_restart(tmp_path / "prep", [ROOT / "intrada_preprocess.py", tmp_path, tmp_path / "prep"])


def test_infer_killed_and_restarted(tmp_path):
    save_small_model(tmp_path / "x.onnx")
    save_frames(tmp_path / "prep", [f"ulm_{n}" for n in range(FRAMES)])
    args = ["--model", tmp_path / "x.onnx", "--input", tmp_path / "prep", "--output", tmp_path, "--loop", 200]
    kill_and_restart(tmp_path / "r", [ROOT / "tools/infer.py", *args, "--output_dirname", "r"])


@pytest.mark.parametrize(
    ("command", "blocked"),
    [
        ("intrada_preprocess.py data prep", Path("data", IMAGE)),
        ("intrada_pth2onnx.py x.pth y.onnx", "x.pth"),
        ("intrada_postprocess.py data r", Path("data", LABEL)),
        ("tools/infer.py --model x.onnx", "x.onnx"),
        ("tools/compare.py r baseline", f"r/{LOGITS}"),
        ("tools/report.py m.json", "m.json"),
    ],
)
def test_ctrl_c_ends_a_shell_s_loop_at_once(tmp_path, command, blocked):
    """Pressed while the script waits for a pipe into which nobody writes."""
    shutil.copytree(GOLDEN_DATA_DIR, tmp_path / "data")
    for path in (f"r/{LOGITS}", f"baseline/{LOGITS}", blocked):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(b"")
    pipe = tmp_path / blocked
    pipe.unlink()
    os.mkfifo(pipe)
    loop = f"for i in 1 2 3; do {shlex.quote(sys.executable)} {ROOT}/{command}; echo next; done"
    process = subprocess.Popen(["bash", "-c", loop], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               **OWN_GROUP)  # fmt: skip
    writer = None
    while writer is None and process.poll() is None:
        time.sleep(0.01)
        with contextlib.suppress(OSError):  # until the script opens it
            writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    if writer is not None:
        os.killpg(process.pid, signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert b"next" not in printed and b"Traceback" not in printed
    os.close(writer)
