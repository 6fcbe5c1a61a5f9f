"""The scripts on an older Python: OLD_PYTHON names one that has the packages of requirements.txt."""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import intrada_pth2onnx as pth2onnx
from support import (
    GOLDEN,
    GOLDEN_DATA_DIR,
    GOLDEN_FRAME,
    ROOT,
    ascend_environment,
    golden_logits,
    run,
    save_two_channel_model,
)

OLD_PYTHON = os.environ.get("OLD_PYTHON")
NEEDS_OLD_PYTHON = pytest.mark.skipif(not OLD_PYTHON, reason="OLD_PYTHON names no interpreter, e.g. of Python 3.7")


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """An environment in which no Python leaves anything beside the scripts."""
    cache = str(tmp_path_factory.mktemp("numba"))
    return {**os.environ, "NUMBA_CACHE_DIR": cache, "PYTHONDONTWRITEBYTECODE": "1"}


def run_old(script: str, *args: object, **options: object) -> str:
    command = [OLD_PYTHON, ROOT / script, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@NEEDS_OLD_PYTHON
def test_an_old_python_exports_the_same_bytes(tmp_path, environment):
    torch.save(pth2onnx.DeepLabV2().state_dict(), tmp_path / "x.pth")
    run_old("intrada_pth2onnx.py", tmp_path / "x.pth", tmp_path / "old.onnx", env=environment)
    run("intrada_pth2onnx.py", tmp_path / "x.pth", tmp_path / "new.onnx", "--skip_verify")
    assert filecmp.cmp(tmp_path / "old.onnx", tmp_path / "new.onnx", shallow=False)


@NEEDS_OLD_PYTHON
def test_an_old_python_gives_the_golden_results(tmp_path, environment):
    prep, result = tmp_path / "prep", tmp_path / "known"
    run_old("intrada_preprocess.py", GOLDEN_DATA_DIR, prep, env=environment)
    content = (prep / f"{GOLDEN_FRAME}_leftImg8bit.bin").read_bytes()
    assert hashlib.sha256(content).hexdigest() == GOLDEN["preprocess"]["sha256"]

    result.mkdir()
    for output in (0, 1):
        golden_logits().tofile(result / f"{GOLDEN_FRAME}_leftImg8bit_{output}.bin")
    run_old("intrada_postprocess.py", GOLDEN_DATA_DIR, result, "--json", tmp_path / "metrics.json", env=environment)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["confusion_matrix"] == GOLDEN["evaluate"]["confusion"]

    shutil.copytree(result, tmp_path / "baseline")
    assert "PASS" in run_old("tools/compare.py", result, tmp_path / "baseline", env=environment)

    # ais_bench's stand-in runs on this Python, with a small model, and writes the golden logits
    save_two_channel_model(tmp_path / "x.onnx")
    (tmp_path / "x_bs1.om").write_text(
        json.dumps({"onnx": str(tmp_path / "x.onnx"), "batch": 1, "frame_shape": [3, 4, 6]})
    )
    (prep / f"{GOLDEN_FRAME}_leftImg8bit.bin").write_bytes(bytes(4 * 3 * 4 * 6))
    ascend = ascend_environment(**{**environment, "FAKE_AIS_BENCH_KNOWN": str(result)})
    (tmp_path / "modules").mkdir()  # not in the current folder, where the stand-in would find this again
    (tmp_path / "modules" / "ais_bench.py").write_text(
        f"import os, sys\nos.environ['PYTHONPATH'] = {ascend['PYTHONPATH']!r}\n"
        f"os.execv({sys.executable!r}, [{sys.executable!r}, '-m', 'ais_bench'] + sys.argv[1:])\n"
    )
    args = "x", 1, "--input", "prep", "--data", GOLDEN_DATA_DIR
    options = {"cwd": tmp_path, "env": {**ascend, "PYTHONPATH": str(tmp_path / "modules")}}
    planned = run_old("tools/benchmark.py", *args, "--dry_run", **options).splitlines()
    printed = run_old("tools/benchmark.py", *args, **options)
    assert [line[2:] for line in printed.splitlines() if line.startswith("+ ")] == planned
    assert f" {100 * GOLDEN['evaluate']['miou']:.2f} " in printed
    assert "best" in printed


@pytest.mark.parametrize(
    ("script", "python"),
    [
        ("preprocess", sys.executable),
        pytest.param("preprocess", OLD_PYTHON, marks=NEEDS_OLD_PYTHON),
        pytest.param("postprocess", OLD_PYTHON, marks=NEEDS_OLD_PYTHON),
    ],
)
def test_ctrl_c_ends_a_run_early(tmp_path, environment, script, python):
    frames, output = 500, tmp_path / "output"
    for n in range(frames):
        for path in GOLDEN_DATA_DIR.rglob("*.png"):
            link = tmp_path / str(path.relative_to(GOLDEN_DATA_DIR)).replace(GOLDEN_FRAME, f"frankfurt_{n:06}")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    (tmp_path / "result").mkdir()
    np.zeros((19, 65, 129), "<f4").tofile(tmp_path / "logits.bin")
    for n in range(frames):
        (tmp_path / "result" / f"frankfurt_{n:06}_leftImg8bit_1.bin").symlink_to(tmp_path / "logits.bin")
    args = {"preprocess": [output], "postprocess": [tmp_path / "result", "--save_labels", output]}[script]
    command = [python, ROOT / f"intrada_{script}.py", tmp_path, *args]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    while not (output.is_dir() and any(output.iterdir())):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert (process.communicate(timeout=60)[1], process.returncode) == ("", 130)
    assert 0 < len(list(output.iterdir())) < frames / 2
