"""What the tests share: paths, how a user starts a script, and data small enough to check by hand."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
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


def reset_signals() -> None:
    """Undo what nohup and a shell's background set: that Ctrl-C and a hang-up are ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


OWN_GROUP = {"start_new_session": True, "preexec_fn": reset_signals}  # for subprocess


def run(script: str, *args: object, status: int = 0, **options: object) -> subprocess.CompletedProcess:
    """Start a script as a user does and check its exit status."""
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def error_of(script: str, *args: object, **options: object) -> str:
    """Return the one-line error message of a script, without its `SCRIPT: error: `."""
    stderr = run(script, *args, status=1, **options).stderr
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
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    raise AssertionError(f"{module.__name__} refuses nothing")


def call(module: ModuleType, *args: object) -> str:
    """Run a script in this process, which is faster, and return what it prints on stdout."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert module.main([str(arg) for arg in args]) == 0
    return printed.getvalue()


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


def save_small_model(path: Path, batch: int | str = "batch", seed: int = 0) -> np.ndarray:
    """Save a model of the full shapes, cheap and computable by hand: 1x1 convolutions of every eighth pixel.

    Returns:
        (2, 19, 3) float32: output, channel, input channel.
    """
    weights = np.random.default_rng(seed).integers(-9, 10, (2, 19, 3)).astype(np.float32)
    options = {"strides": [8, 8], "pads": [0, 0, 1, 1]}
    nodes = [helper.make_node("Conv", ["image", f"weight_{i}"], [f"output_{i}"], **options) for i in range(2)]
    initializers = [numpy_helper.from_array(weights[i, :, :, None, None], f"weight_{i}") for i in range(2)]
    shapes = {"image": (3, 512, 1024), "output_0": (19, 65, 129), "output_1": (19, 65, 129)}
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [batch, *shape]) for n, shape in shapes.items()]
    graph = helper.make_graph(nodes, "small", values[:1], values[1:], initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=6), path)
    return weights


def save_frames(folder: Path, frames: list[str]) -> list[np.ndarray]:
    """Save folder/<frame>_leftImg8bit.bin, all different, and return their contents, each (3, 512, 1024) float32."""
    folder.mkdir(exist_ok=True)
    images = [np.random.default_rng(n).integers(-9, 10, (3, 512, 1024), np.int8) for n in range(len(frames))]
    for frame, image in zip(frames, images):
        image.astype("<f4").tofile(folder / f"{frame}_leftImg8bit.bin")
    return [image.astype(np.float32) for image in images]


def read_blocks(*texts: str) -> list[tuple[str, str | None]]:
    """Find the bash blocks, each with the text block that follows; the quick starts last, since they need a model."""
    pattern = re.compile(r"^```bash\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", re.MULTILINE | re.DOTALL)
    found = [block for text in texts for block in pattern.findall(text)]
    first = next(n for n, (commands, _) in enumerate(found) if commands.startswith("DATA_DIR="))
    return found[first:] + found[:first]


def ascend_environment(**settings: str) -> dict[str, str]:
    """Make an environment in which npu-smi, atc and ais_bench are those of tests/fake_ascend."""
    fakes = ROOT / "tests" / "fake_ascend"
    path = f"{fakes / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(fakes / "python"), **settings}
