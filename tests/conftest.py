"""README.md's commands, run once for all tests that look at what they leave."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # the tests import onnxruntime themselves
# Or threads of torch and numpy would spin while pytest-xdist's other process works.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from support import ROOT, ascend_environment, read_blocks, save_small_model

MARK = "--- what the next block prints ---"


class Walk(NamedTuple):
    """A walk through README.md: its folder, and of each block the commands, the output shown and the output printed."""

    folder: Path
    commands: list[str]
    shown: list[str | None]
    printed: list[str]


@pytest.fixture(scope="session")
def walk(tmp_path_factory) -> Walk:
    """Run README.md and docs/tools.md in a folder with the project's files; an Ascend host's tools are stand-ins.

    pip3 is a stub, make runs with -n, .venv is empty, the quick start's export, the second, is not verified again, and
    segment has a small model, since its real one has inferred the frame before. infer.py runs before ais_bench, whose
    stand-in returns its logits; a reader runs one of the two.
    """
    folder, tools = tmp_path_factory.mktemp("walk"), tmp_path_factory.mktemp("tools")
    scripts = [path for ending in ("py", "sh", "txt") for path in ROOT.glob(f"*.{ending}")]
    for path in [*scripts, *map(ROOT.joinpath, ("Makefile", "requirements", "tests", "tools"))]:
        (folder / path.name).symlink_to(path)
    for name, command in {
        "pip3": '[ "$2" != -r ] || { test -f "$3" && test -f "$6"; }',
        "make": '/usr/bin/make -n "$@" > /dev/null',
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{command}\n")
        (tools / name).chmod(0o755)
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").touch()
    (folder / "home").mkdir()
    save_small_model(folder / "small.onnx")
    (folder / "cityscapes_easy2hard_intrada_with_norm.pth").symlink_to("tiny_cityscapes/tiny_intrada.pth")

    blocks = read_blocks(*((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/tools.md")))
    tools_of_step_4 = "ais_bench", "tools/infer.py"
    first, second = (next(n for n, block in enumerate(blocks) if tool in block[0]) for tool in tools_of_step_4)
    blocks.insert(first, blocks.pop(second))
    environment = ascend_environment(FAKE_AIS_BENCH_KNOWN="result_onnx/result_bs1", LD_LIBRARY_PATH="")
    environment["HOME"] = str(folder / "home")
    del environment["ORT_DISABLE_TELEMETRY"]  # which the scripts set themselves
    environment["PATH"] = f"{tools}:{environment['PATH']}"
    script = "".join(f"echo '{MARK}'\n{commands}" for commands, _ in blocks)
    for shown, run in {
        "/data/cityscapes": "tiny_cityscapes",
        "_with_norm.pth intraDA_deeplabv2.onnx": "_with_norm.pth intraDA_deeplabv2.onnx --skip_verify",
        "tools/segment.py intraDA_deeplabv2.onnx": "tools/segment.py small.onnx",
        "/usr/local/Ascend": str(ROOT / "tests" / "fake_ascend" / "home" / "Ascend"),
    }.items():
        assert shown in script
        script = script.replace(shown, run)
    done = subprocess.run(["bash", "-ec", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return Walk(folder, *map(list, zip(*blocks)), done.stdout.split(f"{MARK}\n")[1:])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that both of pytest-xdist's processes work to the end."""
    longest = [f"test_{name}.py" for name in ("readme", "pth2onnx", "segment", "benchmark", "damage", "report")]
    items.sort(key=lambda item: [*longest, item.path.name].index(item.path.name))
