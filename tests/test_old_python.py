"""The scripts and tools on an older Python: OLD_PYTHON names one that has the packages of requirements.txt."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path

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
    save_small_model,
)

OLD_PYTHON = os.environ.get("OLD_PYTHON")
pytestmark = pytest.mark.skipif(not OLD_PYTHON, reason="OLD_PYTHON names no interpreter, e.g. of Python 3.7")


def run_old(folder: Path, script: str, *args: object) -> str:
    """Run a script on the old Python in a folder, where ais_bench's stand-in knows the logits in known/."""
    environment = ascend_environment(FAKE_AIS_BENCH_KNOWN="known", PYTHONDONTWRITEBYTECODE="1")
    command = [OLD_PYTHON, ROOT / script, *map(str, args)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_an_old_python_exports_the_same_bytes(tmp_path):
    torch.save(pth2onnx.DeepLabV2().state_dict(), tmp_path / "x.pth")
    run_old(tmp_path, "intrada_pth2onnx.py", "x.pth", "old.onnx")
    assert (tmp_path / "old.onnx").read_bytes() == pth2onnx.write_graph(pth2onnx.load_network(tmp_path / "x.pth"))


def test_an_old_python_gives_the_golden_results_and_runs_every_tool(tmp_path):
    run_old(tmp_path, "intrada_preprocess.py", GOLDEN_DATA_DIR, "prep")
    content = (tmp_path / "prep" / f"{GOLDEN_FRAME}_leftImg8bit.bin").read_bytes()
    assert hashlib.sha256(content).hexdigest() == GOLDEN["preprocess"]["sha256"]

    (tmp_path / "known").mkdir()
    for output in (0, 1):
        golden_logits().tofile(tmp_path / "known" / f"{GOLDEN_FRAME}_leftImg8bit_{output}.bin")
    args = GOLDEN_DATA_DIR, "known", "--json", "m.json", "--save_labels", "labels"
    run_old(tmp_path, "intrada_postprocess.py", *args)
    assert json.loads((tmp_path / "m.json").read_text())["confusion_matrix"] == GOLDEN["evaluate"]["confusion"]

    save_small_model(tmp_path / "x.onnx")
    args = "--model", tmp_path / "x.onnx", "--input", tmp_path / "prep", "--output", tmp_path, "--output_dirname"
    run_old(tmp_path, "tools/infer.py", *args, "old")
    run("tools/infer.py", *args, "new")
    assert "PASS" in run_old(tmp_path, "tools/compare.py", "old", "new")

    (tmp_path / "x_bs1.om").write_text(json.dumps({"batch": 1, "frame_shape": [3, 512, 1024]}))
    printed = run_old(tmp_path, "tools/benchmark.py", "x", 1, "--input", "prep", "--data", GOLDEN_DATA_DIR)
    assert f" {100 * GOLDEN['evaluate']['miou']:.2f} " in printed

    args = "bench/x/bs1_metrics.json", "--labels", "labels"
    assert run_old(tmp_path, "tools/report.py", *args).startswith("report.html: 1 run, 1 frame, ")
    image = next(GOLDEN_DATA_DIR.glob("leftImg8bit/val/*/*.png"))
    assert run_old(tmp_path, "tools/segment.py", "x.onnx", image, "--output", "o") == "overlays written to o: 1\n"
