#!/usr/bin/env python3
"""Make a tiny synthetic data set in Cityscapes' layout and a checkpoint that segments it.

    OUT/leftImg8bit/val/<city>/<frame>_leftImg8bit.png   RGB, 2048 x 1024, three drawn street scenes in two cities
    OUT/gtFine/val/<city>/<frame>_gtFine_labelIds.png    uint8, 2048 x 1024, all 19 classes and some ignored ids
    OUT/tiny_intrada.pth                                 state dict of DeepLabV2, 640 tensors, FP32, about 180 MB

The checkpoint is a random network whose two heads are fitted to these three frames. It shows that the stages fit
together, since a mistake in one of them lowers the mIoU; on any other image it means nothing. What was fitted is in
tiny_fit.npz, float16; --fit writes that again, after a change of the scenes or of the network.

    $ python3 tests/tiny_cityscapes.py OUT
    OUT: 3 frames, 19 classes, checkpoint tiny_intrada.pth
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from intrada_preprocess import to_input
from intrada_pth2onnx import LOGITS_HEIGHT, LOGITS_WIDTH, NUM_CLASSES, Classifier, DeepLabV2

FRAME_HEIGHT, FRAME_WIDTH = 1024, 2048
HORIZON, FOCAL, EYE = 400, 1000, 1.6  # row, pixels, metres above the road: the camera that sees the scenes
SEED = 0
BRANCH_GAIN, LOGIT_SCALE, RIDGE = 0.2, 10, 1e-4
CHECKPOINT = "tiny_intrada.pth"
FIT = Path(__file__).resolve().with_name("tiny_fit.npz")

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


class Part(NamedTuple):
    """A box, or a regular polygon that fills the box's front (depth 0) or its side (width 0).

    x is its middle, y its bottom and z its front, in metres from the object's own place.
    """

    label: str
    color: str
    x: float
    y: float
    z: float
    width: float
    height: float
    depth: float = 0
    corners: int = 0


def make_person(label: str, coat: str, foot: float) -> list[Part]:
    """Build someone whose feet are `foot` metres above the road."""
    return [
        Part(label, "#2c2440", 0, foot, 0, 0.36, 0.9),
        Part(label, coat, 0, foot + 0.7, 0, 0.62, 0.8, 0, 8),
        Part(label, coat, 0, foot + 0.75, 0, 0.54, 0.5),
        Part(label, "#e0a585", 0, foot + 1.42, 0, 0.32, 0.36, 0, 16),
        Part(label, "#50301c", 0, foot + 1.62, 0, 0.32, 0.18, 0, 16),
    ]


def make_two_wheeler(label: str, color: str, spokes: str, tank: float) -> list[Part]:
    """Build a bicycle or a motorcycle, which differ in what is between the wheels."""
    rings = ("#18181c", 0.8, 0), (spokes, 0.62, 0.09), (color, 0.2, 0.3)
    return [
        *(Part(label, ring, x, y, 0, size, size, 0, 24) for x in (-0.65, 0.65) for ring, size, y in rings),
        Part(label, color, 0, 0.4, 0, 1.2, 0.14),
        Part(label, color, 0, 0.3, 0, 1.0, 0.7, 0, 3),
        Part(label, color, -0.1, 0.6, 0, 0.9, tank),
        Part(label, color, -0.55, 0.4, 0, 0.16, 0.65),
        Part(label, "#18181c", -0.5, 0.98, 0, 0.45, 0.14),
        Part(label, "#18181c", 0.4, 0.85, 0, 0.5, 0.16),
    ]


def make_long_vehicle(label: str, color: str, height: float, depth: float) -> list[Part]:
    """Build a bus or a tram, which shows its face, and on its side a row of windows and wheels."""
    return [
        Part(label, color, 0, 0.3, 0, 2.6, height - 0.3, depth),
        Part(label, "#f2ead8", -1.3, 0.3, 0, 0, 0.5, depth),
        *(Part(label, "#28384a", -1.3, 1.5, z + 0.3, 0, 1.0, 1.6) for z in range(0, int(depth), 2)),
        *(Part(label, "#18181c", -1.3, 0, z * depth, 0, 0.8, 0.9, 24) for z in (0.1, 0.7)),
        Part(label, "#28384a", 0, 1.3, 0, 2.3, 1.0),
        Part(label, "#ffc830", 0, height - 0.45, 0, 1.5, 0.3),
        Part(label, "#f2ead8", 0, 0.3, 0, 2.6, 0.35),
        *(Part(label, "#fff6c0", x, 0.75, 0, 0.35, 0.3, 0, 16) for x in (-0.9, 0.9)),
    ]


def make_front(label: str, wall: str, pane: str, z: float, depth: float, height: float, rows: int) -> list[Part]:
    """Build a house, wall or fence along the street, with rows of panes and a light coping."""
    pitch = (height - 0.4) / rows
    feet = [
        (0.4 + (row + 0.2) * pitch, z + (i + 0.2) * pitch) for row in range(rows) for i in range(int(depth / pitch))
    ]
    return [
        Part(label, wall, 0, 0, z, 2, height, depth),
        *(Part(label, pane, -1, y, along, 0, 0.6 * pitch, 0.6 * pitch) for y, along in feet),
        Part(label, "#e8e0d4", -1, height - 0.3, z, 0, 0.3, depth),
    ]


#    z   height storeys  wall
HOUSES = [
    (48, 13,    5,      "#b98a5c"),
    (36,  8,    3,      "#a8683e"),
    (24, 14,    5,      "#c8a06c"),
    (12,  9,    3,      "#b8784a"),
    (0,  13,    5,      "#b98a5c"),
]  # fmt: skip

OBJECTS = {
    #        class            color       x     y     z     width height depth corners
    "sky": [
        Part("sky", f"rgb({60 + row // 4},{132 + row // 6},{200 + row // 9})", 0, HORIZON - row - 10, 0, 2100, 12)
        for row in range(0, HORIZON, 10)
    ],
    "cloud": [
        Part("sky",           "#eef3f8",  -90,   0,    0,    200,  50,    0,    24),
        Part("sky",           "#f4f8fb",   0,    10,   0,    170,  75,    0,    24),
        Part("sky",           "#eef3f8",   90,   0,    0,    170,  45,    0,    24),
    ],
    "street": [
        Part("terrain",       "#8c9a40",   0,    0,    0.8,  300,  0,     999),
        Part("sidewalk",      "#b49a94",   0,    0,    0.8,  17,   0,     79),
        Part("sidewalk",      "#cfc4bc",   0,    0,    0.8,  10.5, 0,     79),
        Part("road",          "#5e5c64",   0,    0,    0.8,  10,   0,     79),
        *(Part("road",        "#e8e8ea",   0,    0,    z,    0.2,  0,     2.5) for z in range(3, 60, 6)),
        *(Part("road",        "#d0d0d4",   x,    0,    0.8,  0.16, 0,     79) for x in (-4.5, 4.5)),
    ],
    "zebra":        [Part("road", "#e4e4e8", x, 0, 0, 0.6, 0, 2.4) for x in range(-4, 5)],
    "rails":        [Part("road", "#3c3a40", x, 0, 0, 0.14, 0, 70) for x in (-0.75, 0.75)],
    "verge":        [Part("terrain", "#8c9a40", 0, 0, 0, 2.6, 0, 40)],
    "houses": [
        part
        for z, height, storeys, wall in HOUSES
        for part in make_front("building", wall, "#33424f", z, 12, height, storeys)
    ],
    "wall":         make_front("wall", "#857c98", "#6a6080", 0, 48, 2.6, 1),
    "fence":        make_front("fence", "#a06a38", "#5a3818", 0, 36, 1.9, 2),
    "tree": [
        Part("vegetation",    "#5a4630",   0,    0,    0,    0.5,  2.6),
        Part("vegetation",    "#2f6a24",  -0.9,  2.0,  0,    2.6,  2.4,   0,    12),
        Part("vegetation",    "#37762a",   0.9,  2.1,  0,    2.6,  2.5,   0,    12),
        Part("vegetation",    "#428534",   0,    2.8,  0,    3.0,  2.8,   0,    12),
    ],
    "bush": [
        Part("vegetation",    "#37762a",  -0.6,  0,    0,    1.8,  1.3,   0,    12),
        Part("vegetation",    "#428534",   0.6,  0,    0,    1.8,  1.6,   0,    12),
    ],
    "bus":          make_long_vehicle("bus", "#d83a2c", 3.1, 10),
    "tram":         make_long_vehicle("train", "#0f8a8c", 3.5, 24),
    "truck": [
        *(Part("truck",       "#1a1a1c",   x,    0,    0,    0.5,  0.9,   1.0) for x in (-0.8, 0.8)),
        Part("truck",         "#3a3a40",   0,    0.5,  0,    2.4,  0.4,   7.0),
        Part("truck",         "#e0a020",   0,    0.9,  0,    2.5,  2.7,   7.0),
        Part("truck",         "#e8dcc8",   0,    1.9,  0,    1.5,  0.9,   0,    4),
        *(Part("truck",       "#ff4030",   x,    0.6,  0,    0.35, 0.2) for x in (-1.0, 1.0)),
    ],
    "car": [
        *(Part("car",         "#141418",   x,    0,    0.2,  0.3,  0.5,   0.6) for x in (-0.7, 0.7)),
        Part("car",           "#2450b8",   0,    0.25, 0,    1.9,  0.7,   4.2),
        Part("car",           "#2450b8",   0,    0.95, 0.5,  1.6,  0.6,   2.4),
        Part("car",           "#24323e",  -0.8,  1.0,  0.7,  0,    0.45,  2.0),
        Part("car",           "#24323e",   0,    1.0,  0.5,  1.4,  0.45),
        *(Part("car",         "#ff4030",   x,    0.65, 0,    0.3,  0.2) for x in (-0.75, 0.75)),
        Part("car",           "#f0f0e8",   0,    0.5,  0,    0.55, 0.14),
    ],
    "lamp": [
        Part("pole",          "#8d99a8",   0,    0,    0,    0.34, 6.0),
        Part("pole",          "#8d99a8",  -0.8,  5.6,  0,    1.9,  0.3),
        Part("pole",          "#76828f",   0,    0,    0,    0.5,  0.6),
    ],
    "traffic light": [
        Part("pole",          "#8d99a8",   0,    0,    0,    0.32, 2.4),
        Part("traffic light", "#16181a",   0,    2.0,  0,    0.72, 1.75),
        Part("traffic light", "#ff2a20",   0,    3.2,  0,    0.46, 0.46,  0,    24),
        Part("traffic light", "#5a4408",   0,    2.65, 0,    0.46, 0.46,  0,    24),
        Part("traffic light", "#0c4420",   0,    2.1,  0,    0.46, 0.46,  0,    24),
    ],
    "priority sign": [
        Part("pole",          "#8d99a8",   0,    0,    0,    0.3,  2.4),
        Part("traffic sign",  "#f8f8f4",   0,    2.0,  0,    1.3,  1.3,   0,    4),
        Part("traffic sign",  "#ffc400",   0,    2.15, 0,    1.0,  1.0,   0,    4),
    ],
    "crossing sign": [
        Part("pole",          "#8d99a8",   0,    0,    0,    0.3,  2.4),
        Part("traffic sign",  "#1450d0",   0,    1.9,  0,    1.1,  1.1),
        Part("traffic sign",  "#f8f8f4",   0,    1.8,  0,    1.0,  1.1,   0,    3),
        Part("traffic sign",  "#16181a",   0,    2.15, 0,    0.16, 0.45),
    ],
    "woman":        make_person("person", "#c02a8c", 0),
    "man":          make_person("person", "#8c2ac0", 0),
    "rider":        make_person("rider", "#f0682c", 0.4),
    "bicycle":      make_two_wheeler("bicycle", "#c8d818", "#a8b0a0", 0.12),
    "motorcycle":   make_two_wheeler("motorcycle", "#a81420", "#60646c", 0.34),
    "bin": [
        Part("static",        "#40484a",   0,    0,    0,    0.7,  1.0),
        Part("static",        "#2c3234",   0,    1.0,  0,    0.8,  0.14),
    ],
    "dog": [
        *(Part("dynamic",     "#7a4e28",   x,    0,    0,    0.12, 0.3) for x in (-0.3, 0.3)),
        Part("dynamic",       "#9a6a3c",   0,    0.25, 0,    0.8,  0.3),
        Part("dynamic",       "#9a6a3c",  -0.4,  0.4,  0,    0.3,  0.3,   0,    8),
    ],
    "own car": [
        Part("ego vehicle",   "#202226",   0,    0.86, 1,    3.0,  0.24,  0,    48),
        Part("ego vehicle",   "#3a3e46",   0,    0.86, 1,    1.6,  0.19,  0,    48),
        Part("ego vehicle",   "#202226",   0,    0.86, 1,    1.6,  0.17,  0,    48),
        *(Part("out of roi",  "#000000",   0,    y,    1,    2.1,  0.012) for y in (0.97, 1.994)),
        *(Part("out of roi",  "#000000",   x,    0.9,  1,    0.012, 1.2) for x in (-1.023, 1.023)),
    ],
}  # fmt: skip

#   object, metres to the right of the camera, metres ahead of it; from back to front
SCENES = {
    "frankfurt_000000_000001": [
        ("sky", 0, 1000), ("cloud", -420, 1000), ("cloud", 120, 1000), ("street", 0, 0), ("zebra", 0, 11),
        ("bush", -3, 78), ("bush", 3, 78), ("houses", -9.5, 2), ("houses", 9.5, 8), ("tree", 7, 22), ("tree", -7, 20),
        ("bus", -2.8, 13), ("car", 1.8, 12), ("car", 3.6, 8), ("man", -6, 8.5), ("woman", -6.8, 8), ("bin", 6.3, 9),
        ("traffic light", 5.6, 7.6), ("crossing sign", -5.2, 7), ("woman", 5.6, 6.4), ("lamp", -5.4, 5.7),
    ],
    "frankfurt_000001_000002": [
        ("sky", 0, 1000), ("cloud", 300, 1000), ("street", 0, 0), ("verge", -7, 3), ("rails", -3.2, 1),
        ("tree", -2, 79), ("tree", 2, 79), ("houses", 9.5, 5), ("tree", 6.8, 16),
        ("tree", -12, 40), ("tree", -12, 30), ("tree", -12, 24), ("tree", -12, 18), ("fence", -9.5, 3),
        ("tram", -3.2, 12), ("truck", 2.2, 14), ("car", 1.6, 7), ("priority sign", 5.7, 10), ("man", 6.6, 9),
        ("dog", 5.7, 8), ("woman", 6.2, 7), ("traffic light", -5.4, 7.2),
    ],
    "munster_000000_000001": [
        ("sky", 0, 1000), ("cloud", -200, 1000), ("cloud", 500, 1000), ("street", 0, 0), ("verge", 7, 3),
        ("tree", 0, 79), ("houses", -9.5, 6), ("tree", 13, 40), ("tree", 13, 28), ("tree", 13, 20), ("wall", 9.5, 3),
        ("bush", 7.3, 15), ("truck", -3, 22), ("car", 2.4, 18), ("woman", -6.4, 10), ("motorcycle", 2.6, 8.6),
        ("rider", 2.6, 8.6), ("priority sign", 5.6, 8), ("bicycle", -1.5, 7), ("rider", -1.5, 7), ("lamp", -6.2, 7.2),
        ("bicycle", -4.9, 6), ("motorcycle", 4.2, 5.6),
    ],
}  # fmt: skip


def find_faces(part: Part, x: float, z: float) -> Iterator[tuple[np.ndarray, float]]:
    """Yield the polygons that the camera sees of a part, (N, 3) metres, each with its brightness: side, top, front."""
    x += -part.x if x < 0 else part.x  # mirrored on the left, so that an object turns the same side to the street
    left, right, low, high = x - part.width / 2, x + part.width / 2, part.y, part.y + part.height
    near, far = z + part.z, z + part.z + part.depth
    if part.corners:
        angles = math.pi / 2 + 2 * math.pi * np.arange(part.corners) / part.corners
        across, up = np.cos(angles) / 2, np.sin(angles) / 2 + 0.5
        yield np.stack([x + part.width * across, low + part.height * up, near + part.depth * (across + 0.5)], 1), 1.0
        return
    if part.height and part.depth and left * right > 0:
        side = left if left > 0 else right
        yield np.array([(side, low, near), (side, high, near), (side, high, far), (side, low, far)]), 0.85
    if part.width and part.depth and high < EYE:
        yield np.array([(left, high, near), (right, high, near), (right, high, far), (left, high, far)]), 1.1
    if part.width and part.height:
        yield np.array([(left, low, near), (right, low, near), (right, high, near), (left, high, near)]), 1.0


class Canvas:
    """An image, (1024, 2048, 3) RGB, and its labelIds, (1024, 2048), both uint8, that are only painted together."""

    def __init__(self, grains: dict[str, np.ndarray]) -> None:
        self.grains = grains
        self.frame_hwc = np.zeros((FRAME_HEIGHT, FRAME_WIDTH, 3), np.uint8)
        self.label = np.zeros((FRAME_HEIGHT, FRAME_WIDTH), np.uint8)

    def paint(self, label: str, corners_xyz: np.ndarray, color: np.ndarray) -> None:
        """Fill a polygon, given in metres, with a class, its grain and a color."""
        x, y, z = corners_xyz.T
        points = np.stack([FRAME_WIDTH / 2 + FOCAL * x / z, HORIZON + FOCAL * (EYE - y) / z], axis=1)
        left, top = np.clip(points.min(axis=0), 0, (FRAME_WIDTH, FRAME_HEIGHT)).astype(int)
        right, bottom = np.clip(points.max(axis=0) + 2, 0, (FRAME_WIDTH, FRAME_HEIGHT)).astype(int)
        mask = Image.new("1", (right - left, bottom - top))
        ImageDraw.Draw(mask).polygon([tuple(point) for point in (points - (left, top)).tolist()], fill=1)
        window, inside = (slice(top, bottom), slice(left, right)), np.asarray(mask)
        shades = self.grains[label][window][inside][:, None] + color
        self.frame_hwc[window][inside] = np.clip(shades, 0, 255)
        self.label[window][inside] = CLASSES[label][0]


def make_grain(label_id: int, width: int, height: int, strength: float) -> np.ndarray:
    """Make a class's texture, (1024, 2048) float32: blocks of random brightness."""
    blocks = FRAME_HEIGHT // height + 1, FRAME_WIDTH // width + 1
    noise = np.random.default_rng([SEED, label_id]).normal(0, strength, blocks).round().astype(np.float32)
    return noise.repeat(height, axis=0).repeat(width, axis=1)[:FRAME_HEIGHT, :FRAME_WIDTH]


def draw_scenes() -> dict[str, Canvas]:
    """Draw every frame, and the driver's own car over it."""
    grains = {label: make_grain(*facts) for label, facts in CLASSES.items()}
    canvases = {frame: Canvas(grains) for frame in SCENES}
    for frame, canvas in canvases.items():
        for name, x, z in [*SCENES[frame], ("own car", 0, 0)]:
            for part in OBJECTS[name]:
                for corners_xyz, brightness in find_faces(part, x, z):
                    canvas.paint(part.label, corners_xyz, brightness * np.array(ImageColor.getrgb(part.color)))
    return canvases


def write_frame(out: Path, frame: str, canvas: Canvas) -> None:
    city = frame.split("_")[0]
    image = out / "leftImg8bit" / "val" / city / f"{frame}_leftImg8bit.png"
    label = out / "gtFine" / "val" / city / f"{frame}_gtFine_labelIds.png"
    for path, pixels in ((image, canvas.frame_hwc), (label, canvas.label)):
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


def fit(network: DeepLabV2, canvases: dict[str, Canvas]) -> dict[str, np.ndarray]:
    """Take the batch norms' statistics and fit both heads; return these values by their keys, float16."""
    print("fitting both heads to the frames, which takes half a minute on two cores", file=sys.stderr)
    frames = [Image.fromarray(canvas.frame_hwc) for canvas in canvases.values()]
    images = torch.from_numpy(np.stack([to_input(frame) for frame in frames]))
    images = images.contiguous(memory_format=torch.channels_last)  # saves a quarter of the time
    truths = torch.stack([make_truth(canvas.label) for canvas in canvases.values()])
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
    canvases = draw_scenes()
    for frame, canvas in canvases.items():
        write_frame(args.out, frame, canvas)
    if args.fit:
        np.savez_compressed(FIT, **fit(make_network(), canvases))
    network = make_network()
    network.load_state_dict({key: torch.from_numpy(value) for key, value in np.load(FIT).items()}, strict=False)

    part = args.out / f"{CHECKPOINT}.part"
    torch.save(dict(network.state_dict()), part)
    part.replace(args.out / CHECKPOINT)
    print(f"{args.out}: {len(canvases)} frames, {NUM_CLASSES} classes, checkpoint {CHECKPOINT}")
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except OSError as error:
        raise SystemExit(f"{Path(__file__).name}: error: {error}") from None
