#!/usr/bin/env python3
"""Make the benchmark's input from fixed seeds: pictures, labels, logits and a checkpoint.

    WORK/pictures/leftImg8bit/val/<city>/<frame>_leftImg8bit.png  RGB, 2048 x 1024, smooth fields with a sensor's noise
    WORK/labels/gtFine/val/<city>/<frame>_gtFine_labelIds.png     uint8, 2048 x 1024, all 19 classes and ignored ids
    WORK/logits/<frame>_leftImg8bit_1.bin                         float32, little-endian, (19, 65, 129), of those labels
    WORK/random.pth                                               state dict of DeepLabV2, random weights

Of each kind 8 differ; the other frames are hard links to these.

    $ python3 benchmarks/make_data.py WORK 96 240
    WORK: 96 pictures, 240 labels and logits, random.pth
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from intrada_pth2onnx import LOGITS_HEIGHT, LOGITS_WIDTH, DeepLabV2

HEIGHT, WIDTH = 1024, 2048
DISTINCT = 8
CITY = "bochum"
LABEL_IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
REGIONS = [7, 8, 11, 12, 13, 21, 22, 23, 26, 28, 4, 9]  # the labelIds that cover large areas; the last two are ignored
NOISE = 1.3  # grey levels; makes a PNG as large as those of Cityscapes


def smooth_field(rng: np.random.Generator, points: int, height: int, width: int) -> np.ndarray:
    """Draw normal values on a points x 2 points grid and bring them to (height, width) float32."""
    values = rng.standard_normal((points, 2 * points), np.float32)
    return np.asarray(Image.fromarray(values).resize((width, height), Image.BICUBIC))


def make_picture(rng: np.random.Generator) -> np.ndarray:
    """Make (1024, 2048, 3) uint8."""
    image_hwc = np.full((HEIGHT, WIDTH, 3), 110, np.float32)
    for points, contrast in ((4, 40), (16, 15), (64, 6), (256, 2)):
        image_hwc += contrast * smooth_field(rng, points, HEIGHT, WIDTH)[:, :, None]
    image_hwc += NOISE * rng.standard_normal(image_hwc.shape, np.float32)
    return image_hwc.clip(0, 255).astype(np.uint8)


def make_label(rng: np.random.Generator) -> np.ndarray:
    """Make (1024, 2048) uint8 labelIds: large regions with uneven borders, and small and thin objects on them."""
    scales = (3, 1.0), (12, 0.3), (48, 0.08)
    fields = [sum(scale * smooth_field(rng, n, HEIGHT, WIDTH) for n, scale in scales) for _ in REGIONS]
    label = Image.fromarray(np.array(REGIONS, np.uint8)[np.argmax(fields, axis=0)])
    draw = ImageDraw.Draw(label)
    for label_id in rng.permutation(LABEL_IDS * 5).tolist():
        x, y, size = rng.integers(WIDTH), rng.integers(HEIGHT), rng.integers(15, 90)
        draw.ellipse((x, y, x + size, y + size), label_id)
        draw.rectangle((x, y, x + size // 8, y + 4 * size), label_id)
    return np.asarray(label)


def make_logits(rng: np.random.Generator, label: np.ndarray) -> np.ndarray:
    """Make (19, 65, 129) float32 that segment the label about as well as a network: blurred, and at times confused."""
    rows = np.linspace(0, HEIGHT - 1, LOGITS_HEIGHT).round().astype(int)
    columns = np.linspace(0, WIDTH - 1, LOGITS_WIDTH).round().astype(int)
    logits = (label[np.ix_(rows, columns)] == np.array(LABEL_IDS)[:, None, None]).astype(np.float32)
    for axis in (1, 2):
        last = logits.shape[axis] - 1
        before, after = np.arange(-1, last).clip(0), np.arange(1, last + 2).clip(0, last)
        logits = (logits.take(before, axis) + 2 * logits + logits.take(after, axis)) / 4
    confusion = np.stack([smooth_field(rng, 9, LOGITS_HEIGHT, LOGITS_WIDTH) for _ in LABEL_IDS])
    return 8 * logits + 2 * confusion + 0.2 * rng.standard_normal(logits.shape, np.float32)


def make_network() -> DeepLabV2:
    """Make the network with weights after He et al., arXiv:1502.01852, so that no layer's values vanish."""
    torch.manual_seed(0)
    network = DeepLabV2()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return network


def name_frame(n: int) -> str:
    return f"{CITY}_000000_{n:06d}"


def link_frames(folder: Path, ending: str, frames: int) -> None:
    """Hard-link the distinct files to further frames."""
    for n in range(DISTINCT, frames):
        os.link(folder / f"{name_frame(n % DISTINCT)}{ending}", folder / f"{name_frame(n)}{ending}")


def write_frames(work: Path, pictures: int, labels: int) -> None:
    """Write the frames: the distinct ones, and links to them."""
    picture_dir = work / "pictures" / "leftImg8bit" / "val" / CITY
    label_dir, logits_dir = work / "labels" / "gtFine" / "val" / CITY, work / "logits"
    for folder in (picture_dir, label_dir, logits_dir):
        folder.mkdir(parents=True)
    for n in range(min(DISTINCT, pictures)):
        image_hwc = make_picture(np.random.default_rng([0, n]))
        Image.fromarray(image_hwc).save(picture_dir / f"{name_frame(n)}_leftImg8bit.png")
    for n in range(min(DISTINCT, labels)):
        rng = np.random.default_rng([1, n])
        label = make_label(rng)
        Image.fromarray(label).save(label_dir / f"{name_frame(n)}_gtFine_labelIds.png")
        make_logits(rng, label).tofile(logits_dir / f"{name_frame(n)}_leftImg8bit_1.bin")
    link_frames(picture_dir, "_leftImg8bit.png", pictures)
    link_frames(label_dir, "_gtFine_labelIds.png", labels)
    link_frames(logits_dir, "_leftImg8bit_1.bin", labels)


def main(argv: list[str]) -> int:
    work, pictures, labels = Path(argv[0]), int(argv[1]), int(argv[2])
    write_frames(work, pictures, labels)
    torch.save(make_network().state_dict(), work / "random.pth")
    print(f"{work}: {pictures} pictures, {labels} labels and logits, random.pth")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
