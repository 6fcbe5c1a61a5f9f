"""intrada_pth2onnx.py: the network against the reference, every form of checkpoint, and the graph it writes."""

from __future__ import annotations

import argparse
import collections
import filecmp
import hashlib
import json
import os
import pickle
import re
import resource
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import intrada_pth2onnx as pth2onnx
from support import DATA, ROOT, refusal, run

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


@pytest.fixture
def small(monkeypatch):
    """Export and verify at a small size, which the network takes as well."""
    for name, size in {"HEIGHT": 64, "WIDTH": 128, "LOGITS_HEIGHT": 9, "LOGITS_WIDTH": 17}.items():
        monkeypatch.setattr(pth2onnx, name, size)


@pytest.fixture(scope="module")
def exported(weights, tmp_path_factory) -> Path:
    """The probe as an ONNX of opset 11."""
    path = tmp_path_factory.mktemp("exported") / "x.onnx"
    pth2onnx.main([str(weights), str(path), "--skip_verify"])
    return path


def test_the_state_dict_has_the_reference_keys_and_shapes_in_order():
    state_dict = pth2onnx.DeepLabV2().state_dict()
    assert [(key, list(tensor.shape)) for key, tensor in state_dict.items()] == list(SHAPES.items())


def without_counters(probe):
    """As torch 0.4 saved it."""
    return collections.OrderedDict((k, tensor) for k, tensor in probe.items() if not k.endswith("num_batches_tracked"))


def halved_and_nested(probe):
    """In half precision, by torch.nn.DataParallel, with the state of a training run."""
    halved = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in probe.items()}
    return {"state_dict": {f"module.{key}": tensor for key, tensor in halved.items()}, "epoch": 3}


@pytest.mark.parametrize(
    ("wrap", "as_zip", "tolerance"),
    [(dict, True, 1e-4), (without_counters, False, 1e-4), (halved_and_nested, True, 1e-2)],
)
def test_every_form_of_checkpoint_computes_the_golden_probe(wrap, as_zip, tolerance, probe, tmp_path):
    torch.save(wrap(probe), tmp_path / "x.pth", _use_new_zipfile_serialization=as_zip)
    network = pth2onnx.load_network(tmp_path / "x.pth")
    (tmp_path / "x.pth").unlink()
    image = np.random.default_rng(3).uniform(-120, 150, (2, 3, 64, 128)).astype(np.float32)
    with torch.inference_mode():
        outputs = network(torch.from_numpy(image))
    golden = np.load(DATA / "network_probe.npz")
    for name, output in zip(("output_0", "output_1"), outputs):
        np.testing.assert_allclose(output.numpy(), golden[name], rtol=0, atol=tolerance)


class Malicious:
    """Would make a folder if it were unpickled without `weights_only`."""

    def __reduce__(self):
        return os.mkdir, ("touched",)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>not found</html>",
        b"PK\x03\x04 cut short",
        pickle.dumps([1, 2], protocol=2),
        {"conv1.weight": Malicious()},
        [torch.zeros(1)],
    ],
    ids=["empty", "html", "cut_zip", "pickle", "code", "list"],
)
def test_anything_but_a_checkpoint_is_refused_and_its_code_not_run(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.pth").write_bytes(content) if isinstance(content, bytes) else torch.save(content, "x.pth")
    assert refusal(pth2onnx, "x.pth", "x.onnx").startswith("x.pth: ")
    assert [path.name for path in tmp_path.iterdir()] == ["x.pth"]


def test_weights_that_do_not_fit_are_named_by_kind(probe, tmp_path):
    wrong = {key: tensor for key, tensor in probe.items() if not key.startswith("layer6")}
    wrong["fc.weight"] = torch.zeros(1)
    wrong["conv1.weight"] = torch.zeros(64, 3, 3, 3)
    wrong["layer1.0.bn1.bias"] = torch.full((64,), float("nan"))
    wrong["bn1.bias"] = torch.zeros(64, dtype=torch.int8)
    torch.save(wrong, tmp_path / "x.pth")
    message = refusal(pth2onnx, tmp_path / "x.pth", tmp_path / "x.onnx")
    assert "8 missing (layer6.conv2d_list.0.bias, layer6.conv2d_list.0.weight, " in message
    assert "...); 1 unexpected (fc.weight); 1 of another shape (conv1.weight); " in message
    assert message.endswith("; 2 not finite floats (bn1.bias, layer1.0.bn1.bias)")


def test_a_checkpoint_whose_zip_marks_a_tensor_as_a_folder_is_refused(weights, tmp_path):
    """Or torch would read zeros; no checksum covers the mark."""
    with zipfile.ZipFile(weights) as file:
        first_entry = file.start_dir
    content = bytearray(weights.read_bytes())
    content[first_entry + 38] ^= 0x10
    (tmp_path / "x.pth").write_bytes(content)
    assert refusal(pth2onnx, tmp_path / "x.pth", tmp_path / "x.onnx").startswith(f"{tmp_path}/x.pth: damaged")


HOLDERS = {
    "argparse.Namespace": argparse.Namespace(lr=1),
    "collections.defaultdict": collections.defaultdict(list),
}


@pytest.mark.parametrize("found", HOLDERS)
def test_other_objects_beside_the_weights_are_named_with_the_remedy(found, tmp_path):
    torch.save({"state_dict": {"conv1.weight": torch.zeros(1)}, "more": HOLDERS[found]}, tmp_path / "x.pth")
    message = refusal(pth2onnx, tmp_path / "x.pth", tmp_path / "x.onnx")
    assert f"holds {found} beside the tensors" in message
    assert 'torch.save(torch.load(X, weights_only=False)["state_dict"], Y)' in message


def test_keys_both_with_and_without_module_are_refused(probe, tmp_path):
    torch.save({**probe, "module.bn1.bias": probe["bn1.bias"] + 1}, tmp_path / "x.pth")
    message = refusal(pth2onnx, tmp_path / "x.pth", tmp_path / "x.onnx")
    assert message.endswith("keys both with and without `module.`: bn1.bias")


@pytest.mark.parametrize(
    "convert",
    [
        lambda tensor: tensor.to_sparse(),
        lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
        lambda tensor: tensor.to("meta"),
        lambda tensor: torch.nested.nested_tensor([tensor]),
    ],
    ids=["sparse", "quantized", "meta", "nested"],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_not_plain_are_one_line(probe, tmp_path, convert):
    torch.save({**probe, "bn1.bias": convert(probe["bn1.bias"])}, tmp_path / "x.pth")
    assert refusal(pth2onnx, tmp_path / "x.pth", tmp_path / "x.onnx").startswith(f"{tmp_path}/x.pth: ")


def test_only_a_truncated_checkpoint_is_called_so(weights, tmp_path):
    for content, word in ((weights.read_bytes()[:-1000], "truncated"), (b"<html>", "perhaps a web page")):
        (tmp_path / "x.pth").write_bytes(content)
        assert word in refusal(pth2onnx, tmp_path / "x.pth", tmp_path / "x.onnx")


def test_two_dicts_of_tensors_without_a_state_dict_are_refused(probe, tmp_path):
    torch.save({"model": probe, "ema": probe}, tmp_path / "x.pth")
    assert "the one dict of tensors" in refusal(pth2onnx, tmp_path / "x.pth", tmp_path / "x.onnx")


SAME_WEIGHTS = {
    "module.": lambda probe: {f"module.{key}": value for key, value in probe.items()},
    "state_dict": lambda probe: {"state_dict": probe, "epoch": 3, "ema": probe},
    "model": lambda probe: {"model": probe, "optimizer": {"state": {0: {"step": torch.zeros(1)}}, "param_groups": []}},
    "net": lambda probe: {"net": collections.OrderedDict(probe)},
    "float64": lambda probe: {key: value.double() for key, value in probe.items()},
    "Parameters": lambda probe: {
        key: torch.nn.Parameter(value) if value.is_floating_point() else value for key, value in probe.items()
    },
    "channels_last": lambda probe: {
        key: value.to(memory_format=torch.channels_last) if value.ndim == 4 else value for key, value in probe.items()
    },
    "half": lambda probe: {k: value.half() if value.is_floating_point() else value for k, value in probe.items()},
    "bf16": lambda probe: {k: value.bfloat16() if value.is_floating_point() else value for k, value in probe.items()},
}


def test_every_form_of_a_checkpoint_gives_the_bytes_of_its_values(probe, small, tmp_path):
    """Half and bfloat16 hold other values, those of the same rounded."""

    def export(checkpoint: object, **options: bool) -> str:
        torch.save(checkpoint, tmp_path / "x.pth", **options)
        network = pth2onnx.load_network(tmp_path / "x.pth")
        return hashlib.sha256(pth2onnx.write_graph(network)).hexdigest()

    expected = dict.fromkeys(SAME_WEIGHTS, export(probe))
    for name in ("half", "bf16"):
        expected[name] = export({k: v.float() for k, v in SAME_WEIGHTS[name](probe).items()})
    assert {name: export(wrap(probe)) for name, wrap in SAME_WEIGHTS.items()} == expected
    assert export(probe, _use_new_zipfile_serialization=False) == expected["net"]


def test_the_export_has_what_atc_takes(exported):
    model = onnx.load(exported)
    onnx.checker.check_model(model, full_check=True)
    operators = collections.Counter(node.op_type for node in model.graph.node)
    assert operators == {"Conv": 112, "Relu": 100, "Add": 39, "MaxPool": 1}
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 11)]
    (pool,) = [node for node in model.graph.node if node.op_type == "MaxPool"]
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in pool.attribute}
    assert attributes == {"ceil_mode": 1, "kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [2, 2]}
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in [*model.graph.input, *model.graph.output]
    }
    logits = ["batch", 19, 65, 129]
    assert shapes == {"image": ["batch", 3, 512, 1024], "output_0": logits, "output_1": logits}


def test_the_script_writes_the_same_bytes_and_nothing_else(weights, exported, tmp_path):
    own = "ignore:TypedStorage is deprecated:UserWarning"  # of torch 2.1 itself
    command = [sys.executable, "-W", "error", "-W", own, ROOT / SCRIPT, weights, tmp_path / "x.onnx", "--skip_verify"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["x.onnx"]
    assert filecmp.cmp(tmp_path / "x.onnx", exported, shallow=False)


@pytest.mark.filterwarnings("error")
def test_an_export_that_fails_the_verification_replaces_nothing(small, weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pth2onnx, "TOLERANCE", 0)
    (tmp_path / "x.onnx").write_text("earlier export")
    assert "does not match" in refusal(pth2onnx, weights, tmp_path / "x.onnx")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["earlier export"]
    assert 0 < float(re.search("at most (.*) of the largest logit", capsys.readouterr().out)[1]) < 1e-5


@pytest.mark.parametrize("mistake", ["bias", "nan", "batch"])
def test_a_graph_that_differs_fails_the_verification(small, weights, capsys, mistake):
    network = pth2onnx.load_network(weights)
    model = onnx.load_from_string(pth2onnx.write_graph(network))
    if mistake == "batch":  # every image becomes the mean of its batch
        model.graph.node[0].input[0] = "mean"
        model.graph.node.insert(0, onnx.helper.make_node("ReduceMean", ["image"], ["mean"], axes=[0], keepdims=1))
    else:  # NaN in the second output, after a first one that matches
        network.layer6.conv2d_list[3].bias.data[18] += {"bias": 0.1, "nan": float("nan")}[mistake]
    with pytest.raises(pth2onnx.InputError, match="does not match"):
        pth2onnx.verify(model.SerializeToString(), network)
    assert capsys.readouterr().out.count("batch") == (2 if mistake == "batch" else 1)


def test_a_float64_that_float32_cannot_hold_is_refused(probe, tmp_path):
    torch.save({**probe, "bn1.bias": torch.full((64,), 1e300, dtype=torch.float64)}, tmp_path / "x.pth")
    assert refusal(pth2onnx, tmp_path / "x.pth", tmp_path / "x.onnx").endswith("1 not finite floats (bn1.bias)")


def test_weights_that_are_not_finite_once_folded_are_refused(probe, tmp_path):
    torch.save({**probe, "bn1.running_var": torch.full((64,), -1.0)}, tmp_path / "x.pth")
    message = refusal(pth2onnx, tmp_path / "x.pth", tmp_path / "x.onnx", "--skip_verify")
    assert "negative variance" in message


def test_an_older_torch_is_named(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "1.8.1+cpu")
    assert "torch 1.8.1+cpu is too old" in refusal(pth2onnx, weights, tmp_path / "x.onnx")


def test_a_full_disk_is_one_line_and_leaves_no_file(weights, tmp_path):
    done = run(SCRIPT, weights, tmp_path / "x.onnx", "--skip_verify", status=1,
               preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10**7, 10**7)))  # fmt: skip
    assert done.stderr.count("\n") == 1 and "File too large" in done.stderr
    assert not list(tmp_path.iterdir())


def test_wrong_usage_exits_2(tmp_path, capsys):
    cases = {
        "./x.pth": "another file than WEIGHTS",
        tmp_path: "ONNX must be a file path",
        tmp_path / "none" / "x.onnx": "ONNX must be a file path",
    }
    for onnx_path, words in cases.items():
        with pytest.raises(SystemExit, match="2"):
            pth2onnx.main(["x.pth", str(onnx_path)])
        assert words in capsys.readouterr().err
