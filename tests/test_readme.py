"""README.md says what the scripts do: its commands run, its output is theirs, its options are theirs."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import re
import subprocess
import sys

import numpy as np
import onnx
import pytest

import intrada_benchmark
import intrada_postprocess
import intrada_preprocess
import intrada_pth2onnx
import intrada_report
import tiny_cityscapes
from support import ROOT, run

README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = sorted(path.name for path in ROOT.glob("intrada_*.py"))
SHELL_SCRIPTS = sorted(path.name for path in ROOT.glob("*.sh"))
HELP = dict(re.findall(r"^```help\n(\S+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL))


def shape_of(text: str) -> str:
    """Put # for every number and one space for every gap: what a command prints on any machine, for any winner."""
    text = re.sub(r"/\S+/", "/home/me/intrada/", text)
    numberless = re.sub(r"\d+(\.\d+)?(e[-+]?\d+)?", "#", text.replace("best", ""))
    return " ".join(re.sub("-+", "-", numberless).split())


def test_every_command_prints_what_the_readme_says(walk):
    assert len(walk.commands) >= 7
    for command, promised, printed in zip(walk.commands, walk.promised, walk.printed):
        assert shape_of(printed) == shape_of(promised), command


def test_the_tiny_data_set_is_segmented_through_all_four_steps(walk):
    metrics = json.loads((walk.folder / "metrics_bs1.json").read_text())
    assert metrics["frames"] == 3
    assert None not in metrics["iou"].values()
    assert 0.895 < metrics["miou"] < 0.91  # even another resize of the pictures would leave this band
    scores = re.findall(r"^mIoU = (.*)$", "".join(walk.printed), re.MULTILINE)
    assert scores == [f"{100 * metrics['miou']:.2f}"] * 2  # once by ONNX Runtime, once by the stand-in for ais_bench


def test_the_table_of_the_ascend_chapter_holds_the_miou_of_onnx_runtime(walk):
    metrics = json.loads((walk.folder / "metrics_bs1.json").read_text())
    rows = [line.split("|") for line in (walk.folder / "table.md").read_text().splitlines()[2:]]
    assert [(row[1].strip(), row[2].strip()) for row in rows] == [("1", "3"), ("4", "3")]
    assert [float(row[3]) for row in rows] == pytest.approx([100 * metrics["miou"]] * 2, abs=0.01)
    assert sorted(path.name for path in walk.folder.glob("*.om")) == sorted(
        f"intraDA_deeplabv2_bs{bs}.om" for bs in (1, 4, 8, 16, 32, 64)
    )


def test_the_export_of_a_checkpoint_with_equal_weights_holds_no_other_operator(walk):
    model = onnx.load(
        walk.folder / "intraDA_deeplabv2.onnx"
    )  # most convolutions of its heads are zero, so torch shares them
    assert {node.op_type for node in model.graph.node} == {"Conv", "Relu", "MaxPool", "Add"}


def test_the_auxiliary_output_would_score_less(walk, tmp_path):
    for path in (walk.folder / "result" / "result_bs1").glob("*_0.bin"):
        (tmp_path / path.name.replace("_0.bin", "_1.bin")).symlink_to(path)
    run("intrada_postprocess.py", walk.folder / "cityscapes", tmp_path, "--json", tmp_path / "m.json")
    main = json.loads((walk.folder / "metrics_bs1.json").read_text())
    assert json.loads((tmp_path / "m.json").read_text())["miou"] < main["miou"] - 0.02


def test_the_export_equals_the_checkpoint_within_1e_5_at_batch_1_and_2(walk):
    (printed,) = [output for output in walk.printed if "differs from torch" in output]
    errors = dict(re.findall(r"batch (\d): .* at most (\S+) of the largest logit", printed))
    assert list(errors) == ["1", "2"]
    assert all(float(error) <= 1e-5 for error in errors.values())


def test_the_chinese_readme_has_the_same_chapters_commands_and_figures():
    chinese = (ROOT / "README_CN.md").read_text(encoding="utf-8")
    for part in (r"^```.*?^```", r"^#+ ", r"\d+\.\d+", r"`[^`\n]+\.(?:py|sh|bin|onnx|om)`"):
        found = [re.findall(part, text, re.MULTILINE | re.DOTALL) for text in (README, chinese)]
        assert sorted(found[0]) == sorted(found[1])


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_options_in_the_readme_are_the_script_s(script):
    done = run(script, "--help", env={**os.environ, "COLUMNS": "120", "NO_COLOR": "1"})
    as_told_by_newer_pythons = done.stdout.replace("optional arguments:", "options:")
    assert " ".join(HELP[script].split()) == " ".join(as_told_by_newer_pythons.split())


@pytest.mark.parametrize("script", SHELL_SCRIPTS)
def test_the_options_in_the_readme_are_the_shell_script_s(script):
    assert subprocess.run(["bash", ROOT / script, "--help"], capture_output=True, text=True).stdout == HELP[script]


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != "intrada_pth2onnx.py"])
def test_only_the_export_imports_torch(script):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {script[:-3]}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_imports_no_sibling(script):
    tree = ast.parse((ROOT / script).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not [name for name in imported if name.startswith("intrada")]


def test_facts_that_two_scripts_hold_are_equal():
    assert (intrada_preprocess.HEIGHT, intrada_preprocess.WIDTH) == (intrada_pth2onnx.HEIGHT, intrada_pth2onnx.WIDTH)
    logits_shape = intrada_pth2onnx.NUM_CLASSES, intrada_pth2onnx.LOGITS_HEIGHT, intrada_pth2onnx.LOGITS_WIDTH
    assert logits_shape == intrada_postprocess.LOGITS_SHAPE
    assert len(intrada_postprocess.CLASSES) == intrada_pth2onnx.NUM_CLASSES
    assert tuple(intrada_preprocess.MEAN_BGR) == tuple(np.float32(tiny_cityscapes.MEAN_BGR))
    assert {name: facts[0] for name, facts in list(tiny_cityscapes.CLASSES.items())[:19]} == {
        name: label_id for label_id, name, _ in intrada_postprocess.CLASSES
    }
    assert 2 * 4 * np.prod(logits_shape) == intrada_benchmark.RESULT_BYTES
    assert [c[:2] for c in intrada_report.CLASSES] == [c[:2] for c in intrada_postprocess.CLASSES]
    assert intrada_report.PUBLISHED_FPS == intrada_benchmark.PUBLISHED_FPS


@pytest.mark.parametrize(
    "name",
    [
        "InputError",
        "first_five",
        "join_ranks",
        "gather",
        "keep_memory",
        "lock_folder",
        "processors",
        "positive",
        "percent",
        "show_progress",
        "beside",
    ],
)
def test_what_two_scripts_repeat_is_equal(name):
    modules = [importlib.import_module(script[:-3]) for script in SCRIPTS]
    copies = [inspect.getsource(getattr(module, name)) for module in modules if hasattr(module, name)]
    assert len(copies) >= 2
    assert len(set(copies)) == 1


def test_make_run_runs_the_readme_s_commands():
    plan = subprocess.run(["make", "-n", "run"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    on_own_data = subprocess.run(
        ["make", "-n", "run", "DATA=/d", "WEIGHTS=w.pth", "BS=4", "PROVIDER=cuda", "OUT=o"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    order = ["preprocess", "pth2onnx", "infer", "postprocess", "report"]
    for commands in (plan, on_own_data):
        assert re.findall(r"intrada_(\w+)\.py", commands) == order
    assert '"/d" "o/prep_val"' in on_own_data
    assert "--batchsize 4 --provider cuda" in " ".join(on_own_data.split())


def test_make_run_wants_data_and_weights_together():
    done = subprocess.run(["make", "run", "DATA=/d"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "DATA= and WEIGHTS= go together" in done.stderr
