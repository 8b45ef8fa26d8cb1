"""Changes of images for [`CalibrationData`]: from a few samples many, which need no labels, since the experts say what they are.

Whatever gives an expert inputs like those of its task will do; these keep images near to what they were. Functions of torchvision
can be used in a function of one's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError


if TYPE_CHECKING:
    from .calibration import Augmentation


@dataclass(frozen=True)
class RandomShift:
    """Moves every image by a random number of pixels; the border is repeated.

    Args:
        pixels (`int`): By how many, at most, in each direction.
    """

    pixels: int = 2

    def __call__(self, task: int, arguments: dict[str, Tensor], generator: np.random.Generator) -> dict[str, Tensor]:
        images = _images(arguments)
        height, width = images.shape[-2:]
        padded = torch.nn.functional.pad(images, (self.pixels,) * 4, mode="replicate")
        corners = generator.integers(0, 2 * self.pixels + 1, (len(images), 2)).tolist()
        moved = [image[:, y : y + height, x : x + width] for image, (y, x) in zip(padded, corners, strict=True)]
        return {**arguments, "pixel_values": torch.stack(moved)}


@dataclass(frozen=True)
class Mixup:
    """Lays another image of the same task over every image, with a random weight (arXiv 1710.09412, without labels).

    Args:
        weight (`float`): Of the other image, at most.
    """

    weight: float = 0.5

    def __call__(self, task: int, arguments: dict[str, Tensor], generator: np.random.Generator) -> dict[str, Tensor]:
        images = _images(arguments)
        others = images[torch.from_numpy(generator.permutation(len(images)))]
        weights = torch.from_numpy(generator.uniform(0, self.weight, len(images))).to(images)
        return {**arguments, "pixel_values": torch.lerp(images, others, weights[:, None, None, None])}


@dataclass(frozen=True)
class Chain:
    """One augmentation after another.

    Args:
        steps (`Sequence`): Of augmentations.
    """

    steps: Sequence[Augmentation]

    def __call__(self, task: int, arguments: dict[str, Tensor], generator: np.random.Generator) -> dict[str, Tensor]:
        for step in self.steps:
            arguments = step(task, arguments, generator)
        return arguments


def _images(arguments: dict[str, Tensor]) -> Tensor:
    """The images, (count, channels, height, width)."""
    images = arguments.get("pixel_values")
    if images is None or images.dim() != 4:
        shape = "there are none" if images is None else f"they have the shape {tuple(images.shape)}"
        raise ConfigError(
            f"This augmentation changes images, 'pixel_values' (count, channels, height, width), and {shape}: give a function of "
            "your own for other samples."
        )
    return images
