"""Several processes through torchrun give the bytes of one, and end together."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from support import GOLDEN, GOLDEN_DATA_DIR, GOLDEN_FRAME, ROOT, add_frame, run, save_two_channel_model

FRAMES = [f"{city}_000000_{n:06}" for city in ("bonn", "ulm") for n in range(4)]


def start(folder: Path, ranks: int, *args: object, options: tuple[str, ...] = ("--standalone",)) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", *options, "--nproc-per-node", str(ranks)]
    return subprocess.Popen(
        [*command, str(ROOT / str(args[0])), *map(str, args[1:])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(folder)},
    )


def torchrun(folder: Path, ranks: int, *args: object, status: int = 0) -> tuple[str, str]:
    process = start(folder, ranks, *args)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == status, stdout + stderr
    return stdout, stderr


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def add_images(folder: Path, count: int) -> None:
    """Add copies of the golden image as links."""
    image = GOLDEN_DATA_DIR / f"leftImg8bit/val/frankfurt/{GOLDEN_FRAME}_leftImg8bit.png"
    city = folder / "leftImg8bit" / "val" / "ulm"
    city.mkdir(parents=True)
    for n in range(count):
        (city / f"ulm_{n:06}_leftImg8bit.png").symlink_to(image)


@pytest.fixture
def score(tmp_path) -> list[object]:
    """The command that scores 8 frames with random labels and logits, without the name of its --json."""
    rng = np.random.default_rng(0)
    for frame in FRAMES:
        add_frame(tmp_path, frame, rng.integers(0, 19, (130, 258)), rng.integers(0, 19, (65, 129)))
    return ["intrada_postprocess.py", tmp_path, tmp_path / "r", "--json"]


@pytest.fixture
def infer(tmp_path) -> list[object]:
    """The command that infers 7 frames, without the name of its --output_dirname."""
    save_two_channel_model(tmp_path / "x.onnx")
    (tmp_path / "prep").mkdir()
    for n in range(7):
        np.random.default_rng(n).normal(0, 1, (3, 4, 6)).astype("<f4").tofile(tmp_path / "prep" / f"frame_{n}.bin")
    args = ["--model", tmp_path / "x.onnx", "--input", tmp_path / "prep", "--output", tmp_path / "result"]
    return ["tools/infer.py", *args, "--batchsize", 2, "--output_dirname"]


def test_more_ranks_than_frames_preprocess_as_one_process(tmp_path):
    add_images(tmp_path, 2)
    stdout, _ = torchrun(tmp_path, 3, "intrada_preprocess.py", tmp_path, tmp_path / "prep")
    lines = [f"frames written to {tmp_path}/prep by rank {n} of 3: {share} of 2" for n, share in enumerate((1, 1, 0))]
    assert sorted(stdout.splitlines()) == lines
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents(tmp_path / "prep").items()}
    assert digests == {f"ulm_00000{n}_leftImg8bit.bin": GOLDEN["preprocess"]["sha256"] for n in range(2)}


def test_ranks_on_two_hosts_score_as_one_process(tmp_path, score):
    """By two agents that meet on loopback."""
    alone = run(*score, tmp_path / "alone.json", "--save_labels", tmp_path / "labels")
    labels = contents(tmp_path / "labels")
    assert len(labels) == len(FRAMES)
    shutil.rmtree(tmp_path / "labels")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        endpoint = f"localhost:{probe.getsockname()[1]}"
    options = ("--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "test")
    options = (*options, "--local-addr", "localhost")
    command = *score, tmp_path / "together.json", "--save_labels", tmp_path / "labels"
    hosts = [start(tmp_path, 1, *command, options=options) for _ in range(2)]
    outputs = [host.communicate(timeout=120) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], outputs
    assert sorted(stdout for stdout, _ in outputs) == ["", alone.stdout]
    assert (tmp_path / "together.json").read_bytes() == (tmp_path / "alone.json").read_bytes()
    assert contents(tmp_path / "labels") == labels


def test_ranks_infer_as_one_process_and_another_number_resumes(tmp_path, infer):
    """From one process to two and back."""
    run(*infer, "alone")
    result = tmp_path / "result"
    files = contents(result / "alone")
    run(*infer, "together")
    for n in range(1, 7):
        (result / "together" / f"frame_{n}_0.bin").unlink()
    stdout, _ = torchrun(tmp_path, 2, *infer, "together")
    assert contents(result / "together") == files
    assert "7 (6 inferred, 1 kept)" in stdout
    assert stdout.count("\n") == 1
    summary = json.loads((result / "together_summary.json").read_text())
    infiles = [Path(name).stem for group in summary["filesinfo"].values() for name in group["infiles"]]
    assert sorted(infiles) == [f"frame_{n}" for n in range(1, 7)]
    assert summary["NPU_compute_time"]["count"] == 2 + 2  # batches of 2 of 3 frames each
    assert summary["device"] == [0, 1]

    (result / "together" / "frame_3_1.bin").unlink()
    assert "7 (1 inferred, 6 kept)" in run(*infer, "together").stdout
    assert contents(result / "together") == files
    assert (result / "together_model.json").read_bytes() == (result / "alone_model.json").read_bytes()


def test_a_failed_rank_ends_all_with_its_message(tmp_path, score):
    damaged = tmp_path / "r" / f"{FRAMES[1]}_leftImg8bit_1.bin"  # the second rank's
    damaged.write_bytes(b"cut")
    # within its time limit; gloo alone waits for a day
    stdout, stderr = torchrun(tmp_path, 2, *score, tmp_path / "together.json", status=1)
    assert f"intrada_postprocess.py: error: 1 of 4 frames cannot be scored: {damaged}: " in stderr
    assert stdout == ""
    assert not (tmp_path / "together.json").exists()


def test_rank_without_world_size_is_one_process(tmp_path, score, infer):
    commands = {
        ": 1 of 1\n": ["intrada_preprocess.py", GOLDEN_DATA_DIR, tmp_path / "golden"],
        "7 (7 inferred, 0 kept)": [*infer, "alone"],
        "frames: 8,": [*score, tmp_path / "x.json"],
    }
    for words, command in commands.items():
        assert words in run(*command, env={**os.environ, "TORCHELASTIC_RUN_ID": "x", "RANK": "1"}).stdout
