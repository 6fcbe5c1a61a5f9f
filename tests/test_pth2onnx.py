"""intrada_pth2onnx.py: the network against the reference, every form of checkpoint, and the graph it writes."""

from __future__ import annotations

import argparse
import collections
import copy
import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import intrada_pth2onnx as pth2onnx
from support import DATA, ROOT, refusal

SCRIPT = "intrada_pth2onnx.py"
SHAPES = json.loads((DATA / "state_dict.json").read_text())
SMALL = {"HEIGHT": 64, "WIDTH": 128, "LOGITS_HEIGHT": 9, "LOGITS_WIDTH": 17}


def probe_tensor(key: str, shape: list[int]) -> torch.Tensor:
    """Make the golden probe's weights, as tests/data/README.md defines them."""
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    if key.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    if key.endswith("running_var"):
        values = rng.uniform(0.5, 1.5, shape)
    elif len(shape) == 4:
        values = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
    elif key.endswith("weight"):
        values = rng.uniform(0.1, 0.5, shape)
    else:
        values = rng.standard_normal(shape) * 0.1
    return torch.from_numpy(values.astype(np.float32))


@pytest.fixture(scope="module")
def probe() -> dict[str, torch.Tensor]:
    return {key: probe_tensor(key, shape) for key, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def weights(probe, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "probe.pth"
    torch.save(probe, path)
    return path


@pytest.fixture(scope="module")
def network(weights) -> pth2onnx.DeepLabV2:
    return pth2onnx.load_network(weights)


@pytest.fixture(scope="module")
def exported(network) -> bytes:
    """The probe as an ONNX of opset 11."""
    return pth2onnx.write_graph(network)


@pytest.fixture
def small(monkeypatch):
    """Export and verify at a small size, which the network takes as well."""
    for name, size in SMALL.items():
        monkeypatch.setattr(pth2onnx, name, size)


@pytest.fixture
def shallow(network) -> pth2onnx.DeepLabV2:
    """A copy with fewer blocks, which is exported and verified sooner."""
    shallow = copy.deepcopy(network)
    shallow.layer3, shallow.layer4 = shallow.layer3[:1], shallow.layer4[:1]
    return shallow


def test_the_network_computes_the_golden_probe(network):
    image = np.random.default_rng(3).uniform(-120, 150, (2, 3, 64, 128)).astype(np.float32)
    with torch.inference_mode():
        outputs = network(torch.from_numpy(image))
    golden = np.load(DATA / "network_probe.npz")
    for name, output in zip(("output_0", "output_1"), outputs):
        np.testing.assert_allclose(output.numpy(), golden[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("wrap", "as_zip"),
    [
        (lambda values: {"state_dict": {f"module.{key}": value for key, value in values.items()}, "ema": values}, True),
        (lambda values: {"model": values, "optimizer": {"state": {0: {"step": torch.zeros(1)}}}}, True),
        (lambda values: {"net": collections.OrderedDict((key, torch.nn.Parameter(value, requires_grad=False))
                                                        for key, value in values.items())}, True),
        (lambda values: {"weights": values}, False),  # as torch 0.4 saved it
    ],
    ids=["state_dict", "model", "net", "old"],
)  # fmt: skip
def test_every_form_of_a_checkpoint_gives_its_values(tmp_path, wrap, as_zip):
    values = {key: probe_tensor(key, SHAPES[key]) for key in ("conv1.weight", "bn1.bias")}
    torch.save(wrap(values), tmp_path / "x.pth", _use_new_zipfile_serialization=as_zip)
    found = pth2onnx.read_state_dict(tmp_path / "x.pth")
    assert found.keys() == values.keys()
    assert all(torch.equal(found[key], value) for key, value in values.items())


def test_half_precision_and_no_counts_of_batches_are_weights_too(probe, tmp_path):
    halves = {key: value.half() for key, value in probe.items() if "num_batches" not in key}
    torch.save(halves, tmp_path / "x.pth")
    found = pth2onnx.load_network(tmp_path / "x.pth").state_dict()
    assert all(torch.equal(found[key], value.float()) for key, value in halves.items())


class Malicious:
    """Would make a folder if it were unpickled without `weights_only`."""

    def __reduce__(self):
        return os.mkdir, ("touched",)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "perhaps a web page"),
        (b"<html>not found</html>", "perhaps a web page"),
        (b"PK\x03\x04 cut short", "truncated"),
        (pickle.dumps([1, 2], protocol=2), "perhaps a web page"),
        ([torch.zeros(1)], "expected a state dict"),
        ({"model": {"x": torch.zeros(1)}, "ema": {"x": torch.zeros(1)}}, "the one dict of tensors"),
        ({"conv1.weight": Malicious()}, "mkdir beside the tensors"),
        ({"state_dict": {"x": torch.zeros(1)}, "args": argparse.Namespace(lr=1)}, "holds argparse.Namespace beside"),
        ({"x": torch.zeros(1), "log": collections.defaultdict(list)}, "holds collections.defaultdict beside"),
    ],
    ids=["empty", "html", "cut_zip", "pickle", "list", "two", "code", "namespace", "defaultdict"],
)
def test_anything_but_a_checkpoint_is_refused_and_its_code_not_run(content, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.pth").write_bytes(content) if isinstance(content, bytes) else torch.save(content, "x.pth")
    message = refusal(pth2onnx, "x.pth", "x.onnx")
    assert message.startswith("x.pth: ") and words in message
    assert [path.name for path in tmp_path.iterdir()] == ["x.pth"]


def test_weights_that_do_not_fit_are_named_by_kind(probe, tmp_path):
    wrong = {key: tensor for key, tensor in probe.items() if not key.startswith("layer6")}
    wrong["fc.weight"] = torch.zeros(1)
    wrong["conv1.weight"] = torch.zeros(64, 3, 3, 3)
    wrong["layer1.0.bn1.bias"] = torch.full((64,), float("nan"))
    wrong["bn1.bias"] = torch.zeros(64, dtype=torch.int8)
    wrong["bn1.weight"] = torch.full((64,), 1e300, dtype=torch.float64)  # which float32 cannot hold
    torch.save(wrong, tmp_path / "x.pth")
    message = refusal(pth2onnx, tmp_path / "x.pth", tmp_path / "x.onnx")
    assert ": missing: layer6.conv2d_list.0.bias, layer6.conv2d_list.0.weight, " in message
    assert ", ... (8 in all); unexpected: fc.weight; of another shape: conv1.weight; " in message
    assert message.endswith("; not finite floats: bn1.bias, bn1.weight, layer1.0.bn1.bias")


def test_the_export_has_what_atc_takes(exported):
    model = onnx.load_from_string(exported)
    onnx.checker.check_model(model, full_check=True)
    operators = collections.Counter(node.op_type for node in model.graph.node)
    assert operators == {"Conv": 112, "Relu": 100, "Add": 39, "MaxPool": 1}
    opsets = [(opset.domain, opset.version) for opset in model.opset_import]
    assert (model.ir_version, opsets) == (6, [("", 11)])  # 6 is the oldest that has opset 11
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in [*model.graph.input, *model.graph.output]
    }
    assert {entry.key: entry.value for entry in model.metadata_props} == pth2onnx.METADATA
    logits = ["batch", 19, 65, 129]
    assert shapes == {"image": ["batch", 3, 512, 1024], "output_0": logits, "output_1": logits}


def test_the_script_alone_writes_the_same_bytes_and_nothing_else(weights, exported, tmp_path):
    own = "ignore:TypedStorage is deprecated:UserWarning"  # of torch 2.1 itself
    shutil.copy(ROOT / SCRIPT, tmp_path)
    (tmp_path / "x.onnx.part").write_text("left by an interrupted export")
    command = [sys.executable, "-W", "error", "-W", own, SCRIPT, weights, "x.onnx", "--skip_verify"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == [SCRIPT, "x.onnx"]
    assert (tmp_path / "x.onnx").read_bytes() == exported


@pytest.mark.filterwarnings("error")
def test_an_export_that_fails_the_verification_replaces_nothing(small, weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pth2onnx, "TOLERANCE", 0)
    (tmp_path / "x.onnx").write_text("earlier export")
    assert "does not match" in refusal(pth2onnx, weights, tmp_path / "x.onnx")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["earlier export"]
    assert 0 < float(re.search("at most (.*) of the largest logit", capsys.readouterr().out)[1]) < 1e-5


@pytest.mark.parametrize(
    ("mistake", "words"),
    [("scale", "does not match"), ("nan", "does not match"), ("batch", "does not match"), ("name", "name")],
)
def test_a_graph_that_differs_or_is_invalid_fails_the_verification(small, shallow, mistake, words):
    model = onnx.load_from_string(pth2onnx.write_graph(shallow))
    if mistake == "batch":  # every image becomes the mean of its batch
        model.graph.node[0].input[0] = "mean"
        model.graph.node.insert(0, onnx.helper.make_node("ReduceMean", ["image"], ["mean"], axes=[0], keepdims=1))
    elif mistake == "nan":  # in the second output, after a first one that matches
        shallow.layer6.conv2d_list[3].bias.data[18] = float("nan")
    elif mistake == "scale":  # the first output by 1 %
        for parameter in shallow.layer5.parameters():
            parameter.data *= 1.01
    else:
        model.graph.name = ""  # which ONNX Runtime takes
    with pytest.raises((pth2onnx.InputError, onnx.checker.ValidationError), match=words):
        pth2onnx.verify(model.SerializeToString(), shallow)


def test_weights_that_are_not_finite_once_folded_are_refused(shallow):
    shallow.bn1.running_var.fill_(-1)
    with pytest.raises(pth2onnx.InputError, match="negative variance"):
        pth2onnx.write_graph(shallow)


def test_an_older_torch_is_named(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "1.12.1+cpu")
    assert "torch 1.12.1+cpu is too old; expected 1.13 " in refusal(pth2onnx, weights, tmp_path / "x.onnx")


def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_none(exported, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**7, limits[1]))
    try:
        with pytest.raises(OSError, match=f"File too large: '{tmp_path}/x.onnx'"):
            pth2onnx.write(tmp_path / "x.onnx", exported)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("other.pth", "ends in .onnx"),  # as *.pth gives it
        ("/dev/null", "ends in .onnx"),
        (".", "ONNX must be a file path"),
        ("none/x.onnx", "in an existing folder"),
    ],
)
def test_wrong_usage_exits_2_and_writes_nothing(weights, tmp_path, monkeypatch, capsys, path, words):
    monkeypatch.chdir(tmp_path)
    Path("other.pth").write_bytes(b"the user's")
    with pytest.raises(SystemExit, match="2"):
        pth2onnx.main([str(weights), path, "--skip_verify"])
    assert words in capsys.readouterr().err
    assert [path.read_bytes() for path in Path().iterdir()] == [b"the user's"]
