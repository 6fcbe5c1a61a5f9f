#!/usr/bin/env python3
"""Export the IntraDA checkpoint to ONNX and verify that both compute the same.

   WEIGHTS    state dict of DeepLabv2 (ResNet-101), 640 tensors, FP32, about 180 MB
-> ONNX       opset 11; input  image              float32 (batch, 3, 512, 1024)
                        output output_0, output_1 float32 (batch, 19, 65, 129), auxiliary and main logits
              only Conv, Relu, MaxPool and Add (batch norm is folded), only the batch is dynamic; its metadata
              says how an image becomes the input, and names the classes

   $ python3 intrada_pth2onnx.py cityscapes_easy2hard_intrada_with_norm.pth intraDA_deeplabv2.onnx
   ONNX Runtime differs from torch by at most 5.4e-06 of the largest logit
   intraDA_deeplabv2.onnx: opset 11, 178.2 MB
"""

from __future__ import annotations

import argparse
import contextlib
import operator
import os
import re
import signal
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch
import torch.fx
from onnx import TensorProto, helper
from torch import nn

HEIGHT, WIDTH = 512, 1024
LOGITS_HEIGHT, LOGITS_WIDTH = 65, 129
NUM_CLASSES = 19
OPSET = 11  # which ATC of CANN 5 to 8 takes
# What the model's metadata says about its use.
METADATA = {
    "input": f"RGB image, bicubic to {WIDTH} x {HEIGHT}, BGR minus 104.00698793 116.66876762 122.67891434, "
    "NCHW float32",
    "classes": "road,sidewalk,building,wall,fence,pole,traffic light,traffic sign,vegetation,terrain,sky,person,"
    "rider,car,truck,bus,train,motorcycle,bicycle",
}
TOLERANCE = 1e-3  # of the largest logit, between torch and ONNX Runtime


class InputError(Exception):
    """A mistake the user can fix; reported in one line, without a traceback."""


class Bottleneck(nn.Module):
    """Residual block of ResNet whose stride sits on the first convolution.

    Source: He et al., Deep Residual Learning for Image Recognition, arXiv:1512.03385, in the Caffe variant that
    DeepLab uses; dilation as in Chen et al., DeepLab, arXiv:1606.00915.
    """

    def __init__(self, in_channels: int, width: int, stride: int, dilation: int, downsample: bool) -> None:
        super().__init__()
        out_channels = 4 * width
        self.conv1 = nn.Conv2d(in_channels, width, kernel_size=1, stride=stride, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if downsample:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.relu(self.bn3(self.conv3(x)) + shortcut)


class Classifier(nn.Module):
    """Sum of four dilated 3x3 convolutions: DeepLabv2's atrous spatial pyramid (Source: arXiv:1606.00915)."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.conv2d_list = nn.ModuleList(
            nn.Conv2d(in_channels, NUM_CLASSES, kernel_size=3, padding=rate, dilation=rate) for rate in (6, 12, 18, 24)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.conv2d_list[0](x)
        for conv in self.conv2d_list[1:]:
            logits = logits + conv(x)
        return logits


class DeepLabV2(nn.Module):
    """DeepLabv2 on ResNet-101 with an auxiliary head, the network of the IntraDA checkpoint.

    `forward` takes image (N, 3, H, W) float32, BGR minus mean, and returns (auxiliary, main) logits, each
    (N, 19, H / 8 + 1, W / 8 + 1) float32 for H and W divisible by 8.

    Source: Pan et al., Unsupervised Intra-domain Adaptation, arXiv:2004.07703, github.com/feipan664/IntraDA
    at 070b0b7; the names of its state dict are those of its ADVENT package.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1, ceil_mode=True)
        self.layer1 = make_stage(64, width=64, blocks=3, stride=1, dilation=1)
        self.layer2 = make_stage(256, width=128, blocks=4, stride=2, dilation=1)
        self.layer3 = make_stage(512, width=256, blocks=23, stride=1, dilation=2)
        self.layer4 = make_stage(1024, width=512, blocks=3, stride=1, dilation=4)
        self.layer5 = Classifier(1024)
        self.layer6 = Classifier(2048)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.maxpool(self.relu(self.bn1(self.conv1(image))))
        features = self.layer3(self.layer2(self.layer1(x)))
        return self.layer5(features), self.layer6(self.layer4(features))


def make_stage(in_channels: int, width: int, blocks: int, stride: int, dilation: int) -> nn.Sequential:
    """Chain Bottlenecks; the first one alone changes the size and the channels."""
    first = Bottleneck(in_channels, width, stride, dilation, downsample=True)
    rest = [Bottleneck(4 * width, width, 1, dilation, downsample=False) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)


def read_state_dict(weights: Path) -> dict[str, torch.Tensor]:
    """Read a checkpoint: torch's zip or its old pickle format, bare or in a dict, with or without `module.`.

    Raises:
        InputError: the file is damaged, or holds anything but a state dict of tensors, which could run code.
    """
    if tuple(map(int, torch.__version__.split(".")[:2])) < (1, 13):  # has no weights_only
        raise InputError(f"torch {torch.__version__} is too old; expected 1.13 or later")
    state_dict = find_state_dict(load_checkpoint(weights))
    if not state_dict:
        raise InputError(f"{weights}: expected a state dict of tensors, bare or as the one dict of tensors in a dict")
    return {key[len("module.") :] if key.startswith("module.") else key: value for key, value in state_dict.items()}


def load_checkpoint(weights: Path) -> object:
    """Load a checkpoint's plain values after checking its checksums, which torch does not; or InputError."""
    with weights.open("rb") as file:
        start = file.read(4)
    is_zip = zipfile.is_zipfile(weights)
    if start == b"PK\x03\x04" and not is_zip:
        raise InputError(f"{weights}: truncated; copy or download it again")
    try:
        damaged = zipfile.ZipFile(weights).testzip() if is_zip else None
        if not damaged:
            return torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises nearly everything, and advises to load without weights_only
        other = re.search(r"(?:GLOBAL|Unsupported class) ([\w.]+)", str(error))
        if other:
            found = f"not loaded: holds {other[1]} beside the tensors, which could run code"
            remedy = 'save the weights alone, e.g. torch.save(torch.load(X, weights_only=False)["state_dict"], Y)'
            raise InputError(f"{weights}: {found}; if you trust the file, {remedy}") from None
        reason = "perhaps a web page saved in its place, an incomplete download, or another format"
        raise InputError(f"{weights}: not a checkpoint that torch can read: {reason}") from None
    raise InputError(f"{weights}: damaged at {damaged}; copy or download it again")


def find_state_dict(checkpoint: object) -> dict[str, torch.Tensor] | None:
    """Find the dict of tensors: the checkpoint, its `state_dict`, or the only one that it holds."""
    if is_state_dict(checkpoint):
        return checkpoint
    parts = checkpoint if isinstance(checkpoint, dict) else {}
    found = {key: part for key, part in parts.items() if is_state_dict(part)}
    return found.get("state_dict") or (next(iter(found.values())) if len(found) == 1 else None)


def is_state_dict(value: object) -> bool:
    if not isinstance(value, dict) or not value:
        return False
    return all(isinstance(key, str) and torch.is_tensor(tensor) for key, tensor in value.items())


def load_network(weights: Path) -> DeepLabV2:
    """Build the network with the weights of a checkpoint.

    torch 0.4 and earlier saved no `num_batches_tracked`; inference does not use it, so it may be absent.

    Raises:
        InputError: keys are missing or unexpected, or values of another shape or not finite; each kind with its first
            five keys.
    """
    network = DeepLabV2().eval()
    expected = {key: value for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")}
    found = {key: value for key, value in read_state_dict(weights).items() if not key.endswith("num_batches_tracked")}
    problems = {
        "missing": expected.keys() - found,
        "unexpected": found.keys() - expected,
        "of another shape": {key for key in expected.keys() & found if expected[key].shape != found[key].shape},
        "not finite floats": {
            key for key, value in found.items() if not (value.is_floating_point() and value.float().isfinite().all())
        },
    }
    described = [f"{kind}: {first_five(sorted(keys))}" for kind, keys in problems.items() if keys]
    if described:
        raise InputError(f"{weights}: not the weights of this network: {'; '.join(described)}")
    network.load_state_dict(found, strict=False)
    return network


def first_five(names: list[str], separator: str = ", ") -> str:
    """List at most five names and the count, to keep the message on one line."""
    return separator.join(names[:5]) + (f"{separator}... ({len(names)} in all)" if len(names) > 5 else "")


# ---------------------------------------------------------------------------------------------------- the ONNX graph


def write_graph(network: DeepLabV2) -> bytes:
    """Write the network as ONNX in memory; the same weights give the same bytes.

    Raises:
        InputError: weights that are not finite once batch norms are folded in.
    """
    model = helper.make_model(
        onnx.GraphProto(name="IntraDA"),  # filled in place, since every copy of the weights costs 180 MB
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=6,  # the oldest that has this opset, so that the oldest readers take it
        producer_name="intrada_pth2onnx.py",
    )
    helper.set_model_props(model, METADATA)
    make_value = helper.make_tensor_value_info
    model.graph.input.append(make_value("image", TensorProto.FLOAT, ["batch", 3, HEIGHT, WIDTH]))
    for output in ("output_0", "output_1"):
        shape = ["batch", NUM_CLASSES, LOGITS_HEIGHT, LOGITS_WIDTH]
        model.graph.output.append(make_value(output, TensorProto.FLOAT, shape))
    add_nodes(model.graph, network)
    return model.SerializeToString()


def add_nodes(graph: onnx.GraphProto, network: DeepLabV2) -> None:
    """Add what `forward` computes, in its order and with torch.fx's names, e.g. layer3_22_conv2."""
    modules = dict(network.named_modules())
    image, *nodes, result = torch.fx.symbolic_trace(network).graph.nodes
    names = {image: image.name, **{node: f"output_{i}" for i, node in enumerate(result.args[0])}}
    for node in nodes:
        module = modules.get(node.target)
        name = names.setdefault(node, node.name)
        inputs = [names[argument] for argument in node.args]
        if isinstance(module, nn.BatchNorm2d):
            names[node] = inputs[0]  # of the convolution that it is folded into
            continue
        if isinstance(module, nn.Conv2d):
            follower = modules.get(next(iter(node.users)).target)  # the only node that reads a convolution
            weight, bias = fold(module, follower if isinstance(follower, nn.BatchNorm2d) else None)
            inputs += [add_weights(graph, f"{name}.weight", weight), add_weights(graph, f"{name}.bias", bias)]
        operator_name, attributes = describe(node, module)
        graph.node.append(helper.make_node(operator_name, inputs, [name], name=name, **attributes))


def describe(node: torch.fx.Node, module: nn.Module | None) -> tuple[str, dict[str, object]]:
    """Return a node's ONNX operator and its attributes."""
    if isinstance(module, nn.Conv2d):
        return "Conv", {"kernel_shape": module.kernel_size, "strides": module.stride, "pads": module.padding * 2,
                        "dilations": module.dilation}  # fmt: skip
    if isinstance(module, nn.MaxPool2d):
        return "MaxPool", {"kernel_shape": [module.kernel_size] * 2, "strides": [module.stride] * 2,
                           "pads": [module.padding] * 4, "ceil_mode": int(module.ceil_mode)}  # fmt: skip
    if isinstance(module, nn.ReLU):
        return "Relu", {}
    if node.target is operator.add:
        return "Add", {}
    raise NotImplementedError(node)


def fold(conv: nn.Conv2d, norm: nn.BatchNorm2d | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Fold the batch norm that follows a convolution into its weight and bias, in float64."""
    if norm is None:
        return conv.weight, conv.bias
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return conv.weight.double() * scale[:, None, None, None], norm.bias.double() - norm.running_mean.double() * scale


def add_weights(graph: onnx.GraphProto, name: str, values: torch.Tensor) -> str:
    """Add a float32 tensor and return its name."""
    values = values.detach().float().contiguous()
    if not values.isfinite().all():
        raise InputError(f"{name}: not finite; a batch norm has a negative variance, or a value is too large")
    graph.initializer.append(onnx.numpy_helper.from_array(values.numpy(), name))
    return name


def verify(model: bytes, network: DeepLabV2) -> None:
    """Check the model with onnx.checker, and ONNX Runtime on two random images in a batch against torch on the second.

    So the images of a batch do not mix, either. The network is of no use afterwards.

    Raises:
        InputError: a logit differs by more than TOLERANCE of the largest logit.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime 1.29 and later report to Microsoft otherwise
    import onnxruntime  # only here, so that --skip_verify works without it

    print("verifying the export, which takes about 15 seconds on 2 cores", file=sys.stderr)
    onnx.checker.check_model(model, full_check=True)
    images = np.random.default_rng(0).uniform(-120, 150, (2, 3, HEIGHT, WIDTH)).astype(np.float32)
    with torch.inference_mode():  # in the layout in which torch's convolutions are fastest
        nhwc = {"memory_format": torch.channels_last}
        expected = [logits.numpy() for logits in network.to(**nhwc)(torch.from_numpy(images[1:]).to(**nhwc))]
    network.to("meta")  # drops the weights, since ONNX Runtime takes as much again
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    found = session.run(["output_0", "output_1"], {"image": images})
    error = np.max([np.abs(f[-1:] - e).max() / np.abs(e).max() for f, e in zip(found, expected)])
    print(f"ONNX Runtime differs from torch by at most {error:.1e} of the largest logit", flush=True)
    if not error <= TOLERANCE:  # also when it is NaN
        raise InputError("the export does not match the checkpoint; nothing was written")


def write(path: Path, content: bytes) -> None:
    """Write a file that is complete whenever it has its name; an OSError names it."""
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Export the IntraDA checkpoint to ONNX and verify the result.")
    parser.add_argument("weights", metavar="WEIGHTS", type=Path, help="checkpoint, .pth")
    parser.add_argument("onnx", metavar="ONNX", type=Path, help="file to write, .onnx")
    parser.add_argument("--skip_verify", action="store_true", help="do not compare ONNX Runtime with torch")
    args = parser.parse_args(argv)
    if args.onnx.suffix != ".onnx" or args.onnx.is_dir() or not args.onnx.parent.is_dir():
        parser.error(f"{args.onnx}: ONNX must be a file path that ends in .onnx, in an existing folder")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    network = load_network(args.weights)
    model = write_graph(network)
    if not args.skip_verify:
        verify(model, network)
    write(args.onnx, model)
    print(f"{args.onnx}: opset {OPSET}, {len(model) / 1e6:.1f} MB")
    return 0


def run_script(main: Callable[[], int], umask: int = 0o022) -> None:
    """Run main and exit: a mistake of the user is one line on stderr, and Ctrl-C ends a shell's loop too."""
    os.umask(os.umask(0) | umask)  # ais_bench rejects group- or world-writable files
    for name in ("stdin", "stdout", "stderr"):  # None if it is closed; another file would get its descriptor
        setattr(sys, name, getattr(sys, name) or os.fdopen(os.open(os.devnull, os.O_RDWR), "w"))
    if hasattr(sys.stdout, "reconfigure"):  # not in Jupyter, whose kernel Ctrl-C would end too
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that its encoding cannot hold
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        raise SystemExit(main())
    except (InputError, OSError) as error:
        reason = f"{error.filename or 'output'}: {error.strerror or error}" if isinstance(error, OSError) else error
        raise SystemExit(f"{Path(sys.argv[0]).name}: error: {reason}") from None


if __name__ == "__main__":
    run_script(main)
