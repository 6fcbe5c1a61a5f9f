"""The guide is what the scripts do: its commands run, its output is theirs, its options and links exist."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import intrada_postprocess
import intrada_preprocess
import intrada_pth2onnx
import tiny_cityscapes
from support import GOLDEN, GOLDEN_DATA_DIR, LABEL_IDS, ROOT, read_blocks, run, save_small_model

NAMES = "README.md", "README_CN.md", "docs/tools.md", "docs/tools_CN.md", "docs/ascend.md"
ENGLISH, CHINESE, TOOLS_GUIDE, TOOLS_CN, ASCEND_GUIDE = ((ROOT / name).read_text(encoding="utf-8") for name in NAMES)
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "tests" / "speed" / "README.md"]
TRIO = "intrada_preprocess.py", "intrada_pth2onnx.py", "intrada_postprocess.py"


def shape_of(text: str) -> str:
    """Put # for every number and one space for every gap: what a command prints on any machine."""
    text = re.sub(r"/\S+/python3?", "python3", text)
    numberless = re.sub(r"\d+(\.\d+)?(e[-+]?\d+)?", "#", text)
    return " ".join(re.sub("-+", "-", re.sub(r"(frankfurt|munster)\S+", "FRAME", numberless)).split())


# ---------------------------------------------------------------------------------------------------- the walk


def test_every_block_prints_what_the_readme_shows(walk):
    assert len(walk.commands) >= 12
    for commands, shown, printed in zip(walk.commands, walk.shown, walk.printed):
        if shown:  # an ellipsis stands for any lines
            first, *last = map(shape_of, shown.split("\n...\n"))
            assert shape_of(printed).startswith(first), commands
            assert shape_of(printed).endswith(last[0] if last else first), commands


def test_the_tiny_data_set_is_segmented_by_both_ways(walk):
    metrics = json.loads((walk.folder / "metrics_bs1.json").read_text())
    assert metrics["frames"] == 3
    assert None not in metrics["iou"].values()
    assert 0.895 < metrics["miou"] < 0.91  # another resize of the images is enough to leave this band
    assert sum("mIoU = " in printed for printed in walk.printed) == 2  # step 5 and the quick start


def test_the_auxiliary_output_would_score_less(walk, tmp_path):
    for path in (walk.folder / "result_onnx" / "result_bs1").glob("*_0.bin"):
        (tmp_path / path.name.replace("_0.bin", "_1.bin")).symlink_to(path)
    run("intrada_postprocess.py", walk.folder / "tiny_cityscapes", tmp_path, "--json", tmp_path / "m.json")
    main = json.loads((walk.folder / "metrics_bs1.json").read_text())
    assert json.loads((tmp_path / "m.json").read_text())["miou"] < main["miou"] - 0.02


def test_the_export_equals_the_checkpoint_within_1e_5(walk):
    (printed,) = [output for output in walk.printed if "differs from torch" in output]
    assert float(re.search("by at most (.*) of the largest logit", printed)[1]) <= 1e-5


def test_nothing_leaves_the_machine(walk):
    """onnxruntime would keep below HOME what it sends to Microsoft."""
    assert list((walk.folder / "home").iterdir()) == []


def python_blocks(name: str) -> list[str]:
    return re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs" / name).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def test_the_snippets_for_own_code_give_the_golden_input_and_the_tiny_miou(walk, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert python_blocks("own_code.md") == python_blocks("own_code_CN.md")
    to_logits, to_maps, to_file = python_blocks("own_code.md")
    save_small_model(Path("intraDA_deeplabv2.onnx"))
    shutil.copy(next(GOLDEN_DATA_DIR.glob("leftImg8bit/*/*/*.png")), "photo.png")
    names = {}
    exec(to_logits, names)
    assert hashlib.sha256(names["input_nchw"].tobytes()).hexdigest() == GOLDEN["preprocess"]["sha256"]
    exec(to_file, names)
    (written,) = Path("result/mine").iterdir()
    assert written.read_bytes() == names["logits"][0].tobytes()

    confusion = np.zeros((19, 19), np.int64)
    for label in (walk.folder / "tiny_cityscapes").glob("gtFine/*/*/*_labelIds.png"):
        frame = label.name[: -len("_gtFine_labelIds.png")]
        logits = np.fromfile(walk.folder / f"result_onnx/result_bs1/{frame}_leftImg8bit_1.bin", "<f4")
        names.update(logits=logits.reshape(1, 19, 65, 129), image=Image.open(label).convert("RGB"))
        exec(to_maps, names)
        found = np.searchsorted(LABEL_IDS, np.asarray(Image.open("label_map.png"))).astype(np.uint8)
        confusion += intrada_postprocess.count_pixels(intrada_postprocess.read_label(label), found)
        assert Image.open("overlay.png").size == (2048, 1024)
    metrics = json.loads((walk.folder / "metrics_bs1.json").read_text())
    assert intrada_postprocess.mean_iou(confusion) == pytest.approx(metrics["miou"], abs=1e-4)


# ---------------------------------------------------------------------------------------------------- the text


def without_comments(commands: str) -> str:
    return re.sub(r"\s+#.*", "", commands)


def test_the_chinese_readme_and_tools_have_the_same_commands():
    languages = (CHINESE, TOOLS_CN), (ENGLISH, TOOLS_GUIDE)
    commands = [[(without_comments(block), shown) for block, shown in read_blocks(*texts)] for texts in languages]
    assert commands[0] == commands[1]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_within_the_repository_resolve(path):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", path.read_text(encoding="utf-8")):
        linked = path.parent / target if target else path
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_the_options_in_the_tables_are_those_of_help():
    table = re.compile(r"^\| option of `(\S+)` .*\n\|.*\n((?:\|.*\n)+)", re.MULTILINE)
    tables = table.findall(ENGLISH + TOOLS_GUIDE + ASCEND_GUIDE)
    assert len(tables) == 3
    for script, rows in tables:
        command = ["bash"] if script.endswith(".sh") else [sys.executable]
        help_text = subprocess.run([*command, ROOT / script, "--help"], capture_output=True, text=True).stdout
        for option in re.findall(r"(--\w+)", "".join(row.split("|")[1] for row in rows.splitlines())):
            assert option in help_text, (script, option)


# ---------------------------------------------------------------------------------------------------- the scripts


@pytest.mark.parametrize("script", [f"tools/{path.name}" for path in ROOT.glob("tools/*.py")])
def test_a_tool_runs_by_a_symbolic_link(script, tmp_path):
    (tmp_path / "link.py").symlink_to(ROOT / script)
    subprocess.run([sys.executable, "link.py", "--help"], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("script", ["intrada_preprocess.py", "intrada_postprocess.py"])
def test_a_script_of_the_trio_runs_alone(script, tmp_path):
    """The third one runs so in test_pth2onnx.py."""
    shutil.copy(ROOT / script, tmp_path)
    subprocess.run([sys.executable, script, "--help"], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)


def test_facts_that_two_scripts_hold_are_equal():
    assert (intrada_preprocess.HEIGHT, intrada_preprocess.WIDTH) == (intrada_pth2onnx.HEIGHT, intrada_pth2onnx.WIDTH)
    logits_shape = intrada_pth2onnx.NUM_CLASSES, intrada_pth2onnx.LOGITS_HEIGHT, intrada_pth2onnx.LOGITS_WIDTH
    assert logits_shape == intrada_postprocess.LOGITS_SHAPE
    assert intrada_pth2onnx.METADATA["classes"].split(",") == intrada_postprocess.NAMES
    means = re.findall(r"\d+\.\d+", intrada_pth2onnx.METADATA["input"])
    assert [np.float32(mean) for mean in means] == list(intrada_preprocess.MEAN_BGR)
    classes = [(label_id, name) for label_id, name, _, _ in intrada_postprocess.CLASSES]
    assert classes == [(facts[0], name) for name, facts in list(tiny_cityscapes.CLASSES.items())[:19]]


def test_functions_that_two_scripts_hold_are_the_same_text():
    """They stand alone, so that what several need is repeated."""
    scripts = intrada_preprocess, intrada_pth2onnx, intrada_postprocess
    for name, count in {
        "run_script": 3,
        "first_five": 3,
        "list_folder": 2,
        "count_cpus": 2,
        "at_least_one": 2,
        "write": 2,
    }.items():
        texts = [inspect.getsource(getattr(script, name)) for script in scripts if hasattr(script, name)]
        assert (len(texts), len(set(texts))) == (count, 1), name


# ---------------------------------------------------------------------------------------------------- make


def plan(*args: str) -> str:
    return subprocess.run(["make", "-n", "run", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_make_run_runs_the_steps_in_order():
    on_own_data = plan("DATA=/d", "WEIGHTS=w.pth", "BS=4", "PROVIDER=cuda", "OUT=o")
    for commands in (plan(), on_own_data):
        order = ["infer", "preprocess", "pth2onnx", "infer", "postprocess", "report"]  # first only --help
        assert re.findall(r"(?:intrada_|tools/)(\w+)\.py", commands.split("tests/tiny_cityscapes.py")[-1]) == order
    assert '"/d" "o/prep_val"' in on_own_data
    assert "--batchsize 4 --provider cuda" in " ".join(on_own_data.split())
    assert "--expect 90.2 --tolerance 0.8\n" in plan()
    assert "--expect" not in on_own_data


def test_make_run_keeps_runs_apart_by_checkpoint_and_limit():
    (tiny, own, first) = (plan(*args) for args in ((), OWN_DATA, (*OWN_DATA, "LIMIT=20")))
    assert '"out/tiny/prep_val"' in tiny
    assert '"out/my_weights_on_d/prep_val" --split val' in own and "--limit" not in own
    assert first.count("--limit 20") == 2 and "--expect" not in plan("LIMIT=2")
    assert '"out/my_weights_on_d/prep_val_first20"' in first and "--output_dirname val_first20_cpu_bs1" in first


OWN_DATA = "DATA=/d", "WEIGHTS=a/my weights.pth"


@pytest.fixture
def clone(tmp_path, monkeypatch) -> Path:
    """The current folder, with the project's files and a .venv that is installed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MAKEFLAGS", raising=False)
    names = "Makefile", "requirements.txt", "requirements", "tests", "tools", *TRIO
    for name in names:
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / ".venv/bin/python").chmod(0o755)
    (tmp_path / ".venv/installed").touch()
    return tmp_path


def make(*args: str, **settings: str) -> subprocess.CompletedProcess:
    return subprocess.run(["make", *args], capture_output=True, text=True, env={**os.environ, **settings})


def test_make_run_says_first_that_there_is_no_checkpoint(clone):
    assert "a/my weights.pth: no such file\n" in make("run", *OWN_DATA).stderr
    assert not Path("out").exists()


def test_make_run_says_first_that_labels_are_missing_or_out_is_of_another_checkpoint(clone):
    for n in (1, 2):
        Path(f"{n} a").mkdir()
        Path(f"{n} a/best.pth").write_text(f"<html>{n}")
    data = shutil.copytree(GOLDEN_DATA_DIR, "my data")
    run = "run", f"DATA={data}", "OUT=o"
    (label,) = Path(data).glob("gtFine/*/*/*.png")
    label.rename("label.png")
    assert "my data/gtFine/val: no <city>/" in make(*run, "WEIGHTS=1 a/best.pth").stderr
    assert list(Path("o").iterdir()) == []
    Path("label.png").rename(label)
    assert "1 a/best.pth: not a checkpoint that torch can read" in make(*run, "WEIGHTS=1 a/best.pth").stderr
    python = Path(".venv/bin/python")  # the second checkpoint is exported, and then not inferred
    stubs = 'case "$1 $2" in "intrada_pth2onnx.py 2 a/best.pth") exit ;; "tools/infer.py --model") exit 3 ;; esac\n'
    python.write_text(python.read_text().replace("exec", f"{stubs}exec"))
    assert "] Error 3" in make(*run, "WEIGHTS=2 a/best.pth").stderr  # the first one has made nothing
    before = sorted(Path("o").iterdir())
    other = shutil.copytree(data, "other/my data")
    for changes in (["WEIGHTS=1 a/best.pth"], ["WEIGHTS=2 a/best.pth", f"DATA={other}"]):
        refused = make(*run, *changes).stderr
        assert "error: o: has results of another checkpoint, data set or version; pass another OUT=" in refused
    assert sorted(Path("o").iterdir()) == before
    Path("o/result").mkdir()
    assert "] Error 3" in make(*run, "WEIGHTS=2 a/best.pth").stderr  # the same one may go on
    refused = make("run", "OUT=o").stderr  # the tiny data set
    assert "o: has results of another data set; pass another OUT=." in refused
    Path("o/made_of").unlink()  # as an earlier version leaves it
    assert "data set or version; pass another OUT=" in make(*run, "WEIGHTS=2 a/best.pth").stderr


@pytest.mark.parametrize("out", ["", "a b", "a:b"])
def test_make_run_refuses_an_out_that_make_cannot_handle(clone, out):
    assert f'OUT="{out}": expected a path without blanks and colons' in make("run", f"OUT={out}").stderr


def test_make_clears_no_folder_of_the_user_s(clone):
    Path(".venv/installed").unlink()
    planned = make("-n", "setup", VENV="/home/of/the/user").stdout
    assert "-m venv .venv\n" in planned and "/home/of/the/user" not in planned and "--clear" not in planned
    assert "/data/tiny_cityscapes" in make("-n", "run", "OUT=/data").stdout
    assert "data /" not in make("-n", "run", "OUT=/data ").stdout


def test_the_tiny_data_set_is_not_mixed_with_another(tmp_path):
    shutil.copytree(GOLDEN_DATA_DIR, tmp_path / "cityscapes")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        SystemExit, match=r"^tiny_cityscapes.py: error: .*: is another frame; pass a folder of its own$"
    ):
        tiny_cityscapes.main([str(tmp_path / "cityscapes")])
    assert sorted(tmp_path.rglob("*")) == before


def test_make_run_needs_data_and_weights_together():
    done = subprocess.run(["make", "run", "DATA=/d"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "DATA= and WEIGHTS= go together" in done.stderr


def test_make_clean_keeps_what_was_made_of_own_data(tmp_path):
    (tmp_path / "Makefile").symlink_to(ROOT / "Makefile")
    for name in ("out/result", "out/tiny", ".venv"):
        (tmp_path / name).mkdir(parents=True)
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["Makefile", "out", "result"]
