#!/usr/bin/env python3
"""Make a tiny synthetic data set in Cityscapes' layout and a checkpoint that segments it.

    OUT/leftImg8bit/val/<city>/<frame>_leftImg8bit.png   RGB, 2048 x 1024, three drawn street scenes in two cities
    OUT/gtFine/val/<city>/<frame>_gtFine_labelIds.png    uint8, 2048 x 1024, all 19 classes and some ignored ids
    OUT/tiny_intrada.pth                                 state dict of DeepLabV2, 640 tensors, FP32, about 180 MB

The scenes are in tiny/, in flat colors and as palette PNGs of label ids; each class gets its grain here. The checkpoint
is a random network whose two heads are fitted to these three frames. It shows that the stages fit together, since a
mistake in one of them lowers the mIoU; on any other image it means nothing. What was fitted is in tiny_fit.npz,
float16; --fit writes that again, after a change of the scenes or of the network.

    $ python3 tests/tiny_cityscapes.py OUT
    OUT: 3 frames, 19 classes, checkpoint tiny_intrada.pth
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from intrada_preprocess import to_input
from intrada_pth2onnx import LOGITS_HEIGHT, LOGITS_WIDTH, NUM_CLASSES, Classifier, DeepLabV2

FRAME_HEIGHT, FRAME_WIDTH = 1024, 2048
SEED = 0
WHITE = 255.2, 255.2, 257.4  # lane markings, brighter than a PNG can hold; the grain darkens them
BRANCH_GAIN, LOGIT_SCALE, RIDGE = 0.2, 10, 1e-4
CHECKPOINT = "tiny_intrada.pth"
SCENES = Path(__file__).resolve().with_name("tiny")
FIT = SCENES.with_name("tiny_fit.npz")

#    class           labelId  grain: blocks of width x height pixels, strength; train ids 0..18 come first
CLASSES = {
    "road":          (7,        4,   4,  5),
    "sidewalk":      (8,       32,   8,  9),
    "building":      (11,       8,   8,  6),
    "wall":          (12,      40,  20, 15),
    "fence":         (13,       8,  64, 14),
    "pole":          (17,       8,  64,  5),
    "traffic light": (19,       8,   8,  2),
    "traffic sign":  (20,       8,   8,  2),
    "vegetation":    (21,      12,  12, 22),
    "terrain":       (22,       6,   4, 14),
    "sky":          (23,     256,   4,  1),
    "person":        (24,       8,  16, 10),
    "rider":         (25,      16,   8, 10),
    "car":           (26,      64,   4,  4),
    "truck":         (27,      16, 256,  7),
    "bus":          (28,     256,   8,  5),
    "train":         (31,      64,  32,  5),
    "motorcycle":    (32,       6,   6, 12),
    "bicycle":       (33,       6,   6, 12),
    "ego vehicle":   (1,       64,   4,  2),
    "out of roi":    (3,        8,   8,  0),
    "static":        (4,        8,   8,  8),
    "dynamic":       (5,        8,   8,  8),
}  # fmt: skip
TRAIN_LABEL_IDS = [label_id for label_id, *_ in CLASSES.values()][:NUM_CLASSES]


def make_grain(label_id: int, width: int, height: int, strength: float) -> np.ndarray:
    """Make a class's texture, (1024, 2048) float32: blocks of random brightness."""
    blocks = FRAME_HEIGHT // height + 1, FRAME_WIDTH // width + 1
    noise = np.random.default_rng([SEED, label_id]).normal(0, strength, blocks).round().astype(np.float32)
    return noise.repeat(height, axis=0).repeat(width, axis=1)[:FRAME_HEIGHT, :FRAME_WIDTH]


def read_scenes() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Read the drawn scenes and add each class's grain to its pixels.

    Returns:
        By frame: its image, (1024, 2048, 3) RGB, and its labelIds, (1024, 2048), both uint8.
    """
    scenes = {}
    for path in sorted(SCENES.glob("*_flat.png")):
        frame = path.name[: -len("_flat.png")]
        image_hwc = np.asarray(Image.open(path).convert("RGB")).astype(np.float32)
        image_hwc[(image_hwc == 255).all(axis=2)] = WHITE
        label = np.asarray(Image.open(SCENES / f"{frame}_labelIds.png"))  # the palette's indices
        for label_id, *texture in CLASSES.values():
            inside = label == label_id
            image_hwc[inside] += make_grain(label_id, *texture)[inside][:, None]
        scenes[frame] = image_hwc.clip(0, 255).astype(np.uint8), label
    return scenes


def write_frame(out: Path, frame: str, image_hwc: np.ndarray, label: np.ndarray) -> None:
    city = frame.split("_")[0]
    image_path = out / "leftImg8bit" / "val" / city / f"{frame}_leftImg8bit.png"
    label_path = out / "gtFine" / "val" / city / f"{frame}_gtFine_labelIds.png"
    for path, pixels in ((image_path, image_hwc), (label_path, label)):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


def make_network() -> DeepLabV2:
    """Build the network with random weights and quiet residual branches, so that color and place get through.

    Its heads are zero until they are fitted.
    """
    network, generator = DeepLabV2(), torch.Generator().manual_seed(SEED)
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            module.weight.normal_(0, math.sqrt(2 / module.weight[0].numel()), generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, BRANCH_GAIN if name.endswith("bn3") else 1)
    for parameter in [*network.layer5.parameters(), *network.layer6.parameters()]:
        nn.init.zeros_(parameter)
    return network


def compute_features(network: DeepLabV2, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute what the auxiliary and the main head see; the batch norms take their statistics on the way."""
    for module in network.train().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # its running statistics are those of these images alone
    x = network.maxpool(network.relu(network.bn1(network.conv1(images))))
    features = network.layer3(network.layer2(network.layer1(x)))
    return features, network.layer4(features)


def make_truth(label: np.ndarray) -> torch.Tensor:
    """Turn labelIds into train ids 0..18, (1024, 2048) int64; 19 where there is no class."""
    train_ids = np.full(256, NUM_CLASSES)
    train_ids[TRAIN_LABEL_IDS] = range(NUM_CLASSES)
    train_ids[CLASSES["ego vehicle"][0]] = 0  # as road: it is not scored, but untrained it would be predicted as noise
    return torch.from_numpy(train_ids[label])


def shrink_truth(truth: torch.Tensor) -> torch.Tensor:
    """Find the logits, (19, 65, 129), whose bilinear enlargement comes nearest to the classes as 0 and 1."""
    classes_chw = nn.functional.one_hot(truth, NUM_CLASSES + 1)[:, :, :NUM_CLASSES].permute(2, 0, 1).float()
    return make_shrinking(FRAME_HEIGHT, LOGITS_HEIGHT) @ classes_chw @ make_shrinking(FRAME_WIDTH, LOGITS_WIDTH).T


def make_shrinking(size: int, logits_size: int) -> torch.Tensor:
    """Invert the linear enlargement from logits_size to size values, ends on ends, in the least-squares sense."""
    unit = torch.eye(logits_size, dtype=torch.float64)[None]
    enlarging = nn.functional.interpolate(unit, size, mode="linear", align_corners=True)[0].T
    return torch.linalg.pinv(enlarging).float()


def fit_head(head: Classifier, features: torch.Tensor, truths: torch.Tensor, balance: float) -> None:
    """Write ridge regression from features to logits into the centre tap of the head's first convolution.

    Args:
        features: (N, C, 65, 129) float32.
        truths: (N, 1024, 2048) int64.
        balance: a class that is k times rarer than another weighs k ** balance times more.
    """
    logits = torch.stack([LOGIT_SCALE * shrink_truth(truth) for truth in truths]).permute(0, 2, 3, 1).flatten(0, 2)
    classes = nn.functional.interpolate(truths[:, None].float(), features.shape[2:])[:, 0].long().flatten()
    weights = classes.bincount(minlength=NUM_CLASSES + 1).clamp(min=1).pow(-balance)
    weights[NUM_CLASSES] = 0
    root = weights[classes].sqrt()[:, None]
    samples = nn.functional.pad(features.permute(0, 2, 3, 1).flatten(0, 2), (0, 1), value=1.0) * root
    gram = (samples.T @ samples).double()
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    solution = torch.linalg.solve(gram, (samples.T @ (logits * root)).double()).float()
    head.conv2d_list[0].weight[:, :, 1, 1] = solution[:-1].T
    head.conv2d_list[0].bias[:] = solution[-1]


def fit(network: DeepLabV2, scenes: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    """Take the batch norms' statistics and fit both heads; return these values by their keys, float16."""
    print("fitting both heads to the frames, which takes half a minute on two cores", file=sys.stderr)
    images = torch.from_numpy(np.stack([to_input(Image.fromarray(image_hwc)) for image_hwc, _ in scenes.values()]))
    images = images.contiguous(memory_format=torch.channels_last)  # saves a quarter of the time
    truths = torch.stack([make_truth(label) for _, label in scenes.values()])
    auxiliary_features, main_features = compute_features(network, images)
    fit_head(network.layer5, auxiliary_features, truths, balance=0.25)  # worse on purpose, to tell the two apart
    fit_head(network.layer6, main_features, truths, balance=0.5)
    fitted = ("running_mean", "running_var", "conv2d_list.0.weight", "conv2d_list.0.bias")
    return {k: value.half().numpy() for k, value in network.state_dict().items() if k.endswith(fitted)}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Make a tiny synthetic data set in Cityscapes' layout and a checkpoint that segments it."
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write to")
    parser.add_argument("--fit", action="store_true", help=f"fit the checkpoint again and write {FIT.name}")
    return parser.parse_args(argv)


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    scenes = read_scenes()
    others = [path for path in args.out.glob("*/*/*/*.png") if not path.name.startswith(tuple(scenes))]
    if others:
        raise SystemExit(f"{Path(__file__).name}: error: {others[0]}: is another frame; pass a folder of its own")
    for frame, (image_hwc, label) in scenes.items():
        write_frame(args.out, frame, image_hwc, label)
    if args.fit:
        np.savez_compressed(FIT, **fit(make_network(), scenes))
    network = make_network()
    network.load_state_dict({key: torch.from_numpy(value) for key, value in np.load(FIT).items()}, strict=False)

    part = args.out / f"{CHECKPOINT}.part"
    torch.save(dict(network.state_dict()), part)
    part.replace(args.out / CHECKPOINT)
    print(f"{args.out}: {len(scenes)} frames, {NUM_CLASSES} classes, checkpoint {CHECKPOINT}")
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except OSError as error:
        raise SystemExit(f"{Path(__file__).name}: error: {error}") from None
