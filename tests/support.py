"""What the tests share: paths, how a user starts a script, and data small enough to check by hand."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data"
GOLDEN_DATA_DIR = DATA / "cityscapes"
GOLDEN_FRAME = "frankfurt_999999_000001"
GOLDEN = json.loads((DATA / "expected.json").read_text())
LABEL_IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]

sys.path.insert(0, str(ROOT))


def run(script: str, *args: object, status: int = 0, **options: object) -> subprocess.CompletedProcess:
    """Start a script as a user does and check its exit status."""
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def error_of(script: str, *args: object) -> str:
    """Return the one-line error message of a script, without its `SCRIPT: error: `."""
    stderr = run(script, *args, status=1).stderr
    start = f"{Path(script).name}: error: "
    assert stderr.startswith(start), stderr
    assert stderr.count("\n") == 1, stderr
    return stderr[len(start) : -1]


def refusal(module: ModuleType, *args: object) -> str:
    """Return a script's message for a user's mistake; in-process, which is faster."""
    try:
        module.main([str(arg) for arg in args])
    except module.InputError as error:
        assert "\n" not in str(error)
        return str(error)
    raise AssertionError(f"{module.__name__} refuses nothing")


def shift_mtime(path: Path, seconds: float) -> None:
    changed = path.stat().st_mtime + seconds
    os.utime(path, (changed, changed))


def golden_logits() -> np.ndarray:
    """Read the golden logits, (19, 65, 129) float32."""
    return np.load(DATA / "logits_1x19x65x129.npy").astype(np.float32)[0]


def add_frame(folder: Path, frame: str, truth: np.ndarray, prediction: np.ndarray) -> None:
    """Add labels of train ids, 255 for ignored, and to folder/r logits that predict (65, 129) train ids."""
    label_path = folder / "gtFine" / "val" / frame.split("_")[0] / f"{frame}_gtFine_labelIds.png"
    label_path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array([*LABEL_IDS, *[0] * 237], np.uint8)[truth]).save(label_path)
    (folder / "r").mkdir(exist_ok=True)
    logits = (np.arange(19)[:, None, None] == prediction).astype("<f4")
    logits.tofile(folder / "r" / f"{frame}_leftImg8bit_1.bin")


def save_two_channel_model(path: Path, batch: int | str = "batch", offset: float = 0) -> np.ndarray:
    """Save a model image (batch, 3, 4, 6) -> two outputs (batch, 2, 4, 6), by 1x1 convolutions, and return its weights.

    Returns:
        (2, 2, 3) float32: output, channel, input channel.
    """
    weights = np.arange(2 * 2 * 3, dtype=np.float32).reshape(2, 2, 3) - 5 + offset
    nodes = [helper.make_node("Conv", ["image", f"weight_{i}"], [f"output_{i}"]) for i in range(2)]
    initializers = [numpy_helper.from_array(weights[i, :, :, None, None], f"weight_{i}") for i in range(2)]
    inputs = [helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 3, 4, 6])]
    outputs = [helper.make_tensor_value_info(f"output_{i}", TensorProto.FLOAT, [batch, 2, 4, 6]) for i in range(2)]
    graph = helper.make_graph(nodes, "two_channels", inputs, outputs, initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=6), path)
    return weights


def read_blocks(text: str) -> list[tuple[str, str | None]]:
    """Find the bash blocks, each with the text block that follows; the quick starts last, since they need a model."""
    found = re.findall(r"^```bash\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", text, re.MULTILINE | re.DOTALL)
    first = next(n for n, (commands, _) in enumerate(found) if commands.startswith("DATA_DIR="))
    return found[first:] + found[:first]


def ascend_environment(**settings: str) -> dict[str, str]:
    """Make an environment in which npu-smi, atc and ais_bench are those of tests/fake_ascend."""
    fakes = ROOT / "tests" / "fake_ascend"
    path = f"{fakes / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(fakes / "python"), **settings}
