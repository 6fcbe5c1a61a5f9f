"""intrada_pth2onnx.py: the network against the reference, checkpoints of every age, and the graph it writes."""

from __future__ import annotations

import collections
import json
import os
import pickle
import zlib
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import intrada_pth2onnx as pth2onnx
from support import DATA, error_of, refusal, run

SCRIPT = "intrada_pth2onnx.py"
SHAPES = json.loads((DATA / "state_dict.json").read_text())


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


def test_the_state_dict_has_the_reference_keys_and_shapes_in_order():
    state_dict = pth2onnx.DeepLabV2().state_dict()
    assert {key: list(tensor.shape) for key, tensor in state_dict.items()} == SHAPES
    assert list(state_dict) == list(SHAPES)


CHECKPOINTS = {
    "zip": (lambda probe: probe, True),
    "old_pickle": (lambda probe: probe, False),
    "under_state_dict": (lambda probe: {"state_dict": probe, "epoch": 3}, True),
    "data_parallel": (lambda probe: {f"module.{key}": tensor for key, tensor in probe.items()}, True),
    "torch_0_4": (
        lambda probe: collections.OrderedDict(
            (key, tensor) for key, tensor in probe.items() if not key.endswith("num_batches_tracked")
        ),
        False,
    ),
}


@pytest.mark.parametrize("form", CHECKPOINTS)
def test_every_form_of_checkpoint_computes_the_golden_probe(form, probe, tmp_path):
    wrap, as_zip = CHECKPOINTS[form]
    torch.save(wrap(probe), tmp_path / "x.pth", _use_new_zipfile_serialization=as_zip)
    network = pth2onnx.load_network(tmp_path / "x.pth")
    (tmp_path / "x.pth").unlink()
    image = np.random.default_rng(3).uniform(-120, 150, (2, 3, 64, 128)).astype(np.float32)
    with torch.inference_mode():
        outputs = network(torch.from_numpy(image))
    golden = np.load(DATA / "network_probe.npz")
    for name, output in zip(("output_0", "output_1"), outputs):
        np.testing.assert_allclose(output.numpy(), golden[name], rtol=0, atol=1e-4)


def test_keys_that_do_not_fit_are_named_by_kind(probe, tmp_path):
    wrong = {key: tensor for key, tensor in probe.items() if not key.startswith("layer6")}
    wrong["fc.weight"] = torch.zeros(1)
    wrong["conv1.weight"] = torch.zeros(64, 3, 3, 3)
    torch.save(wrong, tmp_path / "x.pth")
    assert refusal(pth2onnx, tmp_path / "x.pth", tmp_path / "x.onnx") == (
        f"{tmp_path}/x.pth: not the weights of this network: 8 missing (layer6.conv2d_list.0.weight, "
        "layer6.conv2d_list.0.bias, layer6.conv2d_list.1.weight, layer6.conv2d_list.1.bias, "
        "layer6.conv2d_list.2.weight, ...); 1 unexpected (fc.weight); "
        "1 misshapen (conv1.weight (64, 3, 3, 3) instead of (64, 3, 7, 7))"
    )
    assert list(tmp_path.iterdir()) == [tmp_path / "x.pth"]


class Malicious:
    """Would run a command if it were unpickled without `weights_only`."""

    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self):
        return os.mkdir, (str(self.touched),)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    torch.save({"conv1.weight": Malicious(tmp_path / "touched")}, tmp_path / "x.pth")
    assert refusal(pth2onnx, tmp_path / "x.pth", tmp_path / "x.onnx").startswith(
        f"{tmp_path}/x.pth: not a torch checkpoint"
    )
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"<html>not found</html>", pickle.dumps([1, 2]), b"PK\x03\x04 cut short"],
    ids=["empty", "html", "pickle", "cut_zip"],
)
def test_what_is_no_checkpoint_is_told_in_one_line(content, tmp_path):
    (tmp_path / "x.pth").write_bytes(content)
    assert refusal(pth2onnx, tmp_path / "x.pth", tmp_path / "x.onnx") == (
        f"{tmp_path}/x.pth: not a torch checkpoint of plain tensors, or cut short; "
        "anything else could run code and is not loaded"
    )


def test_a_missing_checkpoint_is_told_in_one_line(tmp_path):
    assert error_of(SCRIPT, tmp_path / "x.pth", tmp_path / "x.onnx") == (
        f"[Errno 2] No such file or directory: '{tmp_path}/x.pth'"
    )


def test_the_export_holds_what_atc_takes_and_is_the_same_each_time(weights, tmp_path):
    path = tmp_path / "x.onnx"
    done = run(SCRIPT, weights, path, "--skip_verify")
    assert done.stdout == f"{path}: opset 11, {path.stat().st_size / 1e6:.1f} MB\n"
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {node.op_type for node in model.graph.node} == {"Conv", "Relu", "MaxPool", "Add"}
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 11)]
    (pool,) = [node for node in model.graph.node if node.op_type == "MaxPool"]
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in pool.attribute}
    assert attributes == {"ceil_mode": 1, "kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [2, 2]}
    assert describe(model.graph.input) == {"image": ["batch", 3, 512, 1024]}
    assert describe(model.graph.output) == {"output_0": ["batch", 19, 65, 129], "output_1": ["batch", 19, 65, 129]}

    first = path.stat()
    pth2onnx.main([str(weights), str(path), "--skip_verify"])
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (first.st_ino, first.st_mtime_ns)  # the same bytes again
    assert list(tmp_path.iterdir()) == [path]


def describe(values) -> dict[str, list[str | int]]:
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values
    }


def test_an_export_that_computes_something_else_fails(weights, tmp_path, monkeypatch, capsys):
    for name, size in {"HEIGHT": 64, "WIDTH": 128, "LOGITS_HEIGHT": 9, "LOGITS_WIDTH": 17}.items():
        monkeypatch.setattr(pth2onnx, name, size)
    network = pth2onnx.load_network(weights)
    pth2onnx.export(network, tmp_path / "x.onnx", opset=11)
    pth2onnx.verify(network, tmp_path / "x.onnx")
    assert capsys.readouterr().out.count("of the largest logit") == 2

    network.layer6.conv2d_list[3].bias.data[18] += 0.1
    with pytest.raises(pth2onnx.InputError, match="the export computes something else than the checkpoint"):
        pth2onnx.verify(network, tmp_path / "x.onnx")


def test_values_that_are_no_finite_numbers_are_named(probe, tmp_path):
    wrong = {
        **probe,
        "layer1.0.bn1.bias": torch.full((64,), float("nan")),
        "bn1.bias": torch.zeros(64, dtype=torch.int8),
    }
    torch.save(wrong, tmp_path / "x.pth")
    assert refusal(pth2onnx, tmp_path / "x.pth", tmp_path / "x.onnx") == (
        f"{tmp_path}/x.pth: not the weights of this network: 2 not finite numbers (bn1.bias, layer1.0.bn1.bias)"
    )


def test_half_precision_weights_are_exported_as_float32(probe, tmp_path):
    torch.save(
        {key: value.half() if value.is_floating_point() else value for key, value in probe.items()}, tmp_path / "x.pth"
    )
    network = pth2onnx.load_network(tmp_path / "x.pth")
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


@pytest.mark.parametrize("opset", [12, 17])
def test_every_opset_gives_the_same_operators(weights, tmp_path, opset):
    pth2onnx.export(pth2onnx.load_network(weights), tmp_path / "x.onnx", opset)
    model = onnx.load(tmp_path / "x.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert {node.op_type for node in model.graph.node} == {"Conv", "Relu", "MaxPool", "Add"}
    assert model.opset_import[0].version == opset


def test_a_place_that_cannot_be_written_is_told_before_the_work(tmp_path):
    for place in (tmp_path, tmp_path / "none" / "x.onnx"):
        assert refusal(pth2onnx, Path("x.pth"), place) == f"{place}: ONNX is a file to write, in a folder that is there"


def test_an_opset_that_atc_cannot_read_is_wrong_usage():
    assert "invalid choice: 18" in run(SCRIPT, "x.pth", "x.onnx", "--opset", 18, status=2).stderr
