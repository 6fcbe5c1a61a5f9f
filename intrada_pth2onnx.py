#!/usr/bin/env python3
"""Export the IntraDA checkpoint to ONNX and prove that both compute the same.

   WEIGHTS    state dict of DeepLabv2 (ResNet-101), 640 tensors, FP32, about 180 MB
-> ONNX       opset 11; input  image              float32 (batch, 3, 512, 1024)
                        output output_0, output_1 float32 (batch, 19, 65, 129), auxiliary and main logits
              only Conv, Relu, MaxPool and Add (batch norm is folded), only the batch is dynamic

   $ python3 intrada_pth2onnx.py cityscapes_easy2hard_intrada_with_norm.pth intraDA_deeplabv2.onnx
   batch 1: ONNX Runtime differs from torch by at most 1.9e-06 of the largest logit
   batch 2: ONNX Runtime differs from torch by at most 1.9e-06 of the largest logit
   intraDA_deeplabv2.onnx: opset 11, 178.2 MB
"""

from __future__ import annotations

import argparse
import filecmp
import inspect
import os
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

HEIGHT, WIDTH = 512, 1024
LOGITS_HEIGHT, LOGITS_WIDTH = 65, 129
NUM_CLASSES = 19
TRACE_SIZE = 32, 64  # tracing needs no picture; this one costs a quarter of the time and memory of a full-size one
TOLERANCE = 1e-3  # of the largest logit, between torch and ONNX Runtime


class InputError(Exception):
    """What the user can mend; told in one line, without a traceback."""


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
    """Read a checkpoint: torch's zip or its old pickle format, bare or under `state_dict`, with or without `module.`.

    Raises:
        InputError: the file holds no state dict of tensors, or anything that only running code could load.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoint = torch.load(weights, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # torch's readers raise nearly everything; their texts advise to load without weights_only
        raise InputError(
            f"{weights}: not a torch checkpoint of plain tensors, or cut short; "
            "anything else could run code and is not loaded"
        ) from None
    if isinstance(checkpoint, dict):
        checkpoint = checkpoint.get("state_dict", checkpoint)
    tensors = isinstance(checkpoint, dict) and all(
        isinstance(key, str) and torch.is_tensor(value) for key, value in checkpoint.items()
    )
    if not tensors:
        raise InputError(f"{weights}: expected a state dict of tensors, bare or under `state_dict`")
    return {key[len("module.") :] if key.startswith("module.") else key: value for key, value in checkpoint.items()}


def load_network(weights: Path) -> DeepLabV2:
    """Build the network with the weights of a checkpoint.

    torch 0.4 and earlier saved no `num_batches_tracked`; inference does not use it, so its absence is no fault.

    Raises:
        InputError: keys are missing, unexpected or misshapen, each kind told with its count and its first five.
    """
    state_dict = read_state_dict(weights)
    with torch.device("meta"):  # the weights come from the file; none is made up first
        network = DeepLabV2().eval()
    expected = network.state_dict()
    faults = {
        "missing": [key for key in expected if key not in state_dict and not key.endswith("num_batches_tracked")],
        "unexpected": [key for key in state_dict if key not in expected],
        "misshapen": [
            f"{key} {tuple(state_dict[key].shape)} instead of {tuple(tensor.shape)}"
            for key, tensor in expected.items()
            if key in state_dict and state_dict[key].shape != tensor.shape
        ],
    }
    faults["not finite numbers"] = [
        key
        for key, tensor in state_dict.items()
        if not (tensor.is_floating_point() and tensor.isfinite().all()) and not key.endswith("num_batches_tracked")
    ]
    told = [f"{len(keys)} {kind} ({first_five(keys)})" for kind, keys in faults.items() if keys]
    if told:
        raise InputError(f"{weights}: not the weights of this network: {'; '.join(told)}")
    unused = {key: torch.tensor(0) for key in expected if key.endswith("num_batches_tracked")}
    network.load_state_dict({**unused, **state_dict}, assign=True)
    return network.float()


def first_five(names: list, separator: str = ", ") -> str:
    """Name the first five, so that a message stays one readable line."""
    return separator.join(map(str, names[:5])) + (f"{separator}..." if len(names) > 5 else "")


def export(network: DeepLabV2, path: Path, opset: int) -> None:
    """Write the network as ONNX; the same weights and versions give the same bytes.

    The trace runs on a small picture: a convolutional graph does not depend on the size, and a full-size trace
    takes 20 s and 5 GB. The size of DATA_DIR's frames is declared afterwards.
    """
    arguments = {
        "opset_version": opset,
        "input_names": ["image"],
        "output_names": ["output_0", "output_1"],
        "dynamic_axes": {"image": {0: "batch"}, "output_0": {0: "batch"}, "output_1": {0: "batch"}},
    }
    if "dynamo" in inspect.signature(torch.onnx.export).parameters:
        arguments["dynamo"] = False  # the newer exporter knows no opset below 18, which ATC of CANN 6 cannot read
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(network, (torch.zeros(1, 3, *TRACE_SIZE),), str(path), **arguments)
    model = onnx.load(path)
    remove_identities(model)
    declare_max_pool(model)
    declare_size(model.graph.input[0], (3, HEIGHT, WIDTH))
    for output in model.graph.output:
        declare_size(output, (NUM_CLASSES, LOGITS_HEIGHT, LOGITS_WIDTH))
    del model.graph.value_info[:]
    onnx.save(model, path)


def remove_identities(model: onnx.ModelProto) -> None:
    """Take out Identity, by which torch lets two convolutions share equal weights, and which ATC need not know."""
    sources = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Identity"}
    nodes = [node for node in model.graph.node if node.op_type != "Identity"]
    for node in nodes:
        node.input[:] = [sources.get(name, name) for name in node.input]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def declare_max_pool(model: onnx.ModelProto) -> None:
    """Write the max pool as it is: torch 2.1 puts padding for ceil_mode, which ONNX Runtime refuses."""
    (pool,) = (node for node in model.graph.node if node.op_type == "MaxPool")
    attributes = {"ceil_mode": 1, "kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [2, 2]}
    del pool.attribute[:]
    pool.attribute.extend(onnx.helper.make_attribute(name, value) for name, value in attributes.items())


def declare_size(value: onnx.ValueInfoProto, sizes: tuple[int, int, int]) -> None:
    """Set the dimensions behind the batch."""
    for dimension, size in zip(value.type.tensor_type.shape.dim[1:], sizes):
        dimension.dim_value = size


def verify(network: DeepLabV2, path: Path) -> None:
    """Check the file with onnx.checker, and ONNX Runtime against torch on one random full-size input.

    Raises:
        InputError: a logit differs by more than TOLERANCE of the largest logit.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime 1.29 and later report to Microsoft otherwise
    import onnxruntime  # only here, so that --skip_verify does without it

    onnx.checker.check_model(str(path), full_check=True)
    image = np.random.default_rng(0).uniform(-120, 150, (2, 3, HEIGHT, WIDTH)).astype(np.float32)
    with torch.inference_mode():  # in the layout that torch's convolutions are fastest in
        nhwc = {"memory_format": torch.channels_last}
        expected = [logits.numpy() for logits in network.to(**nhwc)(torch.from_numpy(image).to(**nhwc))]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch in (1, 2):
        found = session.run(["output_0", "output_1"], {"image": image[:batch]})
        error = max(np.abs(f - e[:batch]).max() / np.abs(e).max() for f, e in zip(found, expected))
        print(f"batch {batch}: ONNX Runtime differs from torch by at most {error:.1e} of the largest logit")
        if not error <= TOLERANCE:  # also when it is not a number
            raise InputError(f"{path}: the export computes something else than the checkpoint")


def is_same_file(part: Path, path: Path) -> bool:
    """Tell whether the export came out as before; then the old file stays, and results newer than it stay current."""
    return path.exists() and filecmp.cmp(part, path, shallow=False)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Export the IntraDA checkpoint to ONNX and prove that both compute the same."
    )
    parser.add_argument("weights", metavar="WEIGHTS", type=Path, help="checkpoint, .pth")
    parser.add_argument("onnx", metavar="ONNX", type=Path, help="file to write, .onnx")
    parser.add_argument(
        "--opset",
        type=int,
        choices=range(11, 18),
        default=11,
        help="ATC of CANN 5 to 8 takes 11 (default: %(default)s)",
    )
    parser.add_argument("--skip_verify", action="store_true", help="do not compare ONNX Runtime with torch")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.onnx.is_dir() or not args.onnx.parent.is_dir():
        raise InputError(f"{args.onnx}: ONNX is a file to write, in a folder that is there")
    network = load_network(args.weights)
    part = args.onnx.with_name(args.onnx.name + ".part")
    try:
        export(network, part, args.opset)
        if not args.skip_verify:
            verify(network, part)
        if not is_same_file(part, args.onnx):
            os.replace(part, args.onnx)
    finally:
        part.unlink(missing_ok=True)
    print(f"{args.onnx}: opset {args.opset}, {args.onnx.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except (InputError, OSError) as error:
        raise SystemExit(f"{Path(__file__).name}: error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
