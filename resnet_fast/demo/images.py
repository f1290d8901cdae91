# SPDX-License-Identifier: BSD-3-Clause
"""Photographs as ImageNet models want them: shipped ones, or a folder of the user's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnet_fast.cli import UserError, need

# In the wheel of scikit-image; its other pictures would be downloaded.
SKIMAGE = ("astronaut", "camera", "chelsea", "coffee", "rocket")
SKLEARN = ("china.jpg", "flower.jpg")
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"}
MOST = 256
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Named = tuple[str, Any]  # name, PIL.Image.Image


def shipped_photos() -> list[Named]:
    """The photographs inside the wheels of scikit-image and scikit-learn: (name, PIL image)."""
    purpose = "the demo's photographs"
    image = need("PIL.Image", "pillow", purpose)
    skimage = need("skimage.data", "scikit-image", purpose)
    sklearn = need("sklearn.datasets", "scikit-learn", purpose)
    photos = [(name, image.fromarray(getattr(skimage, name)())) for name in SKIMAGE]
    photos += [
        (name.partition(".")[0], image.fromarray(sklearn.load_sample_image(name)))
        for name in SKLEARN
    ]
    return photos


def folder_photos(folder: Path) -> list[Named]:
    """Every picture directly in ``folder``, by name, at most 256.

    UserError where the folder is missing, holds no picture, or a picture cannot be read.
    """
    image = need("PIL.Image", "pillow", "--images")
    if not folder.is_dir():
        raise UserError(f"--images {folder}: there is no such folder")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)[:MOST]
    if not files:
        raise UserError(
            f"--images {folder}: no pictures in it (looked for {', '.join(sorted(SUFFIXES))})"
        )
    photos = []
    for path in files:
        try:
            with image.open(path) as opened:
                photos.append((path.name, opened.convert("RGB")))
        except (OSError, ValueError) as error:
            raise UserError(f"--images {folder}: {path.name} cannot be read: {error}") from None
    return photos


def preprocess(photo: Any, size: int) -> Tensor:
    """A PIL image as (3, size, size) float32: ImageNet's evaluation preprocessing.

    The shorter side to size * 256 / 224 (bilinear, antialiased), the centre cut out, mean and
    standard deviation of ImageNet. The same numbers as torchvision's Resize, CenterCrop, ToTensor,
    Normalize on PIL images.
    """
    image = need("PIL.Image", "pillow", "preprocessing")
    shorter = size * 256 // 224
    width, height = photo.size
    if width <= height:
        scaled = (shorter, int(shorter * height / width))
    else:
        scaled = (int(shorter * width / height), shorter)
    photo = photo.convert("RGB").resize(scaled, image.Resampling.BILINEAR)
    left, top = (round((side - size) / 2.0) for side in photo.size)
    photo = photo.crop((left, top, left + size, top + size))
    values = torch.frombuffer(bytearray(photo.tobytes()), dtype=torch.uint8)
    pixels = values.view(size, size, 3).permute(2, 0, 1).float() / 255
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (pixels - mean) / std
