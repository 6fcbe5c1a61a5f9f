"""The README's commands, run once for all tests that look at what they leave."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # the tests import onnxruntime themselves

from support import ROOT, ascend_environment

MARK = "--- what the next command prints ---"


class Walk(NamedTuple):
    """A walk through README.md: where its files lie, and the commands with what is promised and what they print."""

    folder: Path
    commands: list[str]
    promised: list[str]
    printed: list[str]


def read_commands(text: str) -> tuple[list[str], list[str]]:
    """Find the commands in console blocks (after `$ `, joined by a backslash at the end) and their output."""
    commands, promised = [], []
    for block in re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, output = re.fullmatch(r"((?:[^\n]*\\\n)*[^\n]*\n)(.*)", part, re.DOTALL).groups()
            commands.append(command)
            promised.append(output)
    return commands, promised


@pytest.fixture(scope="session")
def walk(tmp_path_factory) -> Walk:
    """Run every command of the README in a folder with the project's files; an Ascend host's tools are stand-ins."""
    folder = tmp_path_factory.mktemp("walk")
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.sh"), ROOT / "tests"]:
        (folder / path.name).symlink_to(path)
    commands, promised = read_commands((ROOT / "README.md").read_text(encoding="utf-8"))
    script = "".join(f"echo '{MARK}'\n{command}" for command in commands)
    environment = ascend_environment(FAKE_AIS_BENCH_KNOWN="result/result_bs1")
    done = subprocess.run(["bash", "-euc", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return Walk(folder, commands, promised, done.stdout.split(f"{MARK}\n")[1:])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the README, whose walk takes longest, so that the other processes of pytest-xdist work beside it."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")
