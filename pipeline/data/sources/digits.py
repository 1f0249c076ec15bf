"""The digits that scikit-learn brings: small, real, and there without a download."""

import functools
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge, Le
from torch import Tensor
from torch.nn.functional import interpolate

from pipeline.data.samples import Content, Dataset, PixelSamples, fingerprint

SIZES = 1437, 360


def digits(root: Path, seed: int, size: Annotated[int, Ge(4), Le(1024)] = 28) -> Dataset:
    """Return the 8x8 digits, enlarged to `size` pixels a side."""

    def enlarge(images: Tensor, labels: Tensor) -> Content:
        pixels = interpolate(images[:, None], (size, size), mode="bilinear", align_corners=False).round()
        # Of the images before: the last bits of floats may differ between processors.
        return pixels.to(torch.uint8), labels, f"{size} {fingerprint(images, labels)}"

    return Dataset(
        name="digits",
        train=PixelSamples(SIZES[0], lambda: enlarge(*_read()[:2])),
        validation=PixelSamples(SIZES[1], lambda: enlarge(*_read()[2:])),
        classes=tuple("0123456789"),
        channels=1,
        image_size=size,
        mean=(0.3054,),
        std=(0.3247,),
        origin="scikit-learn load_digits (UCI optical recognition of handwritten digits), 8x8, enlarged; validation is "
        "a fifth of them",
        note="this is the embedded digits data (1,797 real 8x8 images); data.dataset=mnist trains on MNIST",
    )


@functools.cache
def _read() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return images, float32 [N, 8, 8] in 0..255, and labels for training, then those for validation."""
    # Imported here because it takes over a second, which runs on other data need not pay.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    stored = load_digits()
    images, labels = (stored.images * (255 / 16)).astype(np.float32), stored.target  # stored as 0..16
    parts = train_test_split(images, labels, test_size=SIZES[1], random_state=0, stratify=labels)
    train, validation, train_labels, validation_labels = (torch.from_numpy(part) for part in parts)
    return train, train_labels.long(), validation, validation_labels.long()


SOURCES = {"digits": digits}
