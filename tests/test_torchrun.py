"""Several processes through torchrun give the bytes of one, and end together."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support import GOLDEN_DATA_DIR, GOLDEN_FRAME, ROOT, run, save_two_channel_model

FRAMES = [f"{city}_000000_{n:06}" for city in ("bonn", "ulm") for n in range(4)]


@pytest.fixture
def folder(tmp_path) -> Path:
    """data/ with labels and pictures of 8 frames, logits/ of random predictions."""
    rng = np.random.default_rng(0)
    (tmp_path / "logits").mkdir()
    picture = GOLDEN_DATA_DIR / f"leftImg8bit/val/frankfurt/{GOLDEN_FRAME}_leftImg8bit.png"
    for frame in FRAMES:
        city = frame.split("_")[0]
        label = tmp_path / "data" / "gtFine" / "val" / city / f"{frame}_gtFine_labelIds.png"
        copy = tmp_path / "data" / "leftImg8bit" / "val" / city / f"{frame}_leftImg8bit.png"
        for path in (label, copy):
            path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, copy)
        Image.fromarray(rng.integers(0, 34, (130, 258), dtype=np.uint8)).save(label)
        rng.normal(0, 5, (19, 65, 129)).astype("<f4").tofile(tmp_path / "logits" / f"{frame}_leftImg8bit_1.bin")
    return tmp_path


def torchrun_command(ranks: int, script: str, *args: object, options: tuple[str, ...] = ("--standalone",)) -> list[str]:
    start = [sys.executable, "-m", "torch.distributed.run", *options, "--nproc-per-node", str(ranks)]
    return [*start, str(ROOT / script), *map(str, args)]


def torchrun(ranks: int, script: str, *args: object, status: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run(torchrun_command(ranks, script, *args), capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def score(folder: Path, name: str) -> list[object]:
    return ["intrada_postprocess.py", folder / "data", folder / "logits", "--json", folder / name]


def test_ranks_score_save_and_compare_as_one_process(folder):
    for path in sorted((folder / "logits").iterdir()):
        shutil.copy(path, path.with_name(path.name.replace("_1.bin", "_0.bin")))
    shutil.copytree(folder / "logits", folder / "baseline")
    wrong = folder / "baseline" / f"{FRAMES[5]}_leftImg8bit_1.bin"
    np.zeros((19, 65, 129), "<f4").tofile(wrong)
    options = "--baseline", folder / "baseline", "--expect", 99, "--save_labels", folder / "labels"
    alone = run(*score(folder, "alone.json"), *options, status=1)
    label_maps = {path.name: path.read_bytes() for path in (folder / "labels").iterdir()}
    shutil.rmtree(folder / "labels")
    together = torchrun(3, *score(folder, "together.json"), *options, status=1)
    assert "FAIL: logits unlike the baseline's" in alone.stdout
    assert "nothing in the data at hand tells the cause" in alone.stdout
    assert together.stdout == alone.stdout
    assert (folder / "together.json").read_bytes() == (folder / "alone.json").read_bytes()
    assert {path.name: path.read_bytes() for path in (folder / "labels").iterdir()} == label_maps
    assert len(label_maps) == len(FRAMES)


def test_two_hosts_score_as_one_process(folder):
    """By two agents that meet on loopback."""
    alone = run(*score(folder, "alone.json"))
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        endpoint = f"localhost:{probe.getsockname()[1]}"
    options = ("--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "test")
    options = (*options, "--local-addr", "localhost")
    command = torchrun_command(2, *score(folder, "together.json"), options=options)
    hosts = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [host.communicate(timeout=120) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], outputs
    assert sorted(stdout for stdout, _ in outputs) == ["", alone.stdout]
    assert (folder / "together.json").read_bytes() == (folder / "alone.json").read_bytes()


def test_more_ranks_than_frames_preprocess_as_one_process(folder):
    shutil.rmtree(folder / "data" / "leftImg8bit" / "val" / "ulm")
    for picture in sorted((folder / "data" / "leftImg8bit" / "val" / "bonn").iterdir())[2:]:
        picture.unlink()
    done = torchrun(3, "intrada_preprocess.py", folder / "data", folder / "together")
    alone = run("intrada_preprocess.py", folder / "data", folder / "alone")
    assert done.stdout == alone.stdout.replace("alone", "together")
    files = {
        name: {path.name: path.read_bytes() for path in (folder / name).iterdir()} for name in ("alone", "together")
    }
    assert files["alone"] == files["together"]
    assert len(files["alone"]) == 2


def test_ranks_infer_as_one_process_into_one_summary(tmp_path):
    save_two_channel_model(tmp_path / "x.onnx")
    (tmp_path / "prep").mkdir()
    for n in range(7):
        np.random.default_rng(n).normal(0, 1, (3, 4, 6)).astype("<f4").tofile(tmp_path / "prep" / f"frame_{n}.bin")
    args = ["--model", tmp_path / "x.onnx", "--input", tmp_path / "prep", "--output", tmp_path, "--batchsize", 2]
    done = torchrun(3, "intrada_infer.py", *args, "--output_dirname", "together")
    run("intrada_infer.py", *args, "--output_dirname", "alone")
    files = {name: {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("alone", "together")}
    assert files["alone"] == files["together"]
    assert done.stdout.startswith("provider cpu: 7 frames (7 inferred, 0 kept), ")
    assert done.stdout.count("\n") == 1
    summary = json.loads((tmp_path / "together_summary.json").read_text())
    infiles = [Path(name).stem for group in summary["filesinfo"].values() for name in group["infiles"]]
    assert sorted(infiles) == [f"frame_{n}" for n in range(7)]
    assert summary["NPU_compute_time"]["count"] == 2 + 1 + 1  # batches of 2 of 3, 2 and 2 frames
    assert summary["device"] == [0, 0, 0]


def test_one_rank_s_failure_ends_all_with_its_line(folder):
    damaged = folder / "logits" / f"{FRAMES[1]}_leftImg8bit_1.bin"  # the second rank's
    damaged.write_bytes(b"cut")
    done = torchrun(
        3, *score(folder, "together.json"), status=1
    )  # within its time limit; gloo alone waits half an hour
    assert f"intrada_postprocess.py: error: 1 of 3 frames cannot be scored: {damaged}: " in done.stderr
    assert done.stdout == ""
    assert not (folder / "together.json").exists()


def test_killing_a_rank_ends_the_others(folder):
    picture = folder / "data" / "leftImg8bit" / "val" / "ulm" / f"{FRAMES[-1]}_leftImg8bit.png"
    for n in range(400):  # enough to be at work when the blow falls
        os.link(picture, picture.with_name(f"ulm_000001_{n:06}_leftImg8bit.png"))
    command = torchrun_command(2, "intrada_preprocess.py", folder / "data", folder / "prep")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while len(list(folder.glob("prep/*.bin"))) < 4:
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode != 0
    assert stdout == ""
    assert "SIGKILL" in stderr
