"""Corrections of the features that a head reads (Representation Surgery, arXiv 2402.02705): as a module, in a model, and on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..errors import CheckpointError
from ..low_rank import Factors


SURGERY_NAME = "surgery.safetensors"


class FeatureSurgery(nn.Module):
    """Z − W_up ReLU(W_down Z), in the dtype and on the device of Z.

    Args:
        factors ([`Factors`]): W_up (channels, rank) and W_down (rank, channels).
    """

    def __init__(self, factors: Factors):
        super().__init__()
        self.up = nn.Parameter(factors.left, requires_grad=False)
        self.down = nn.Parameter(factors.right, requires_grad=False)

    def forward(self, features: Tensor) -> Tensor:
        down, up = self.down.to(features), self.up.to(features)
        return features - torch.relu(features @ down.mT) @ up.mT


@dataclass(frozen=True)
class HeadSurgery:
    """The correction of one task.

    Args:
        layers (`Sequence[str]`): The linear layers of the head that read the features, by module name.
        factors ([`Factors`]): W_up and W_down.
    """

    layers: Sequence[str]
    factors: Factors

    def install(self, model: nn.Module) -> None:
        """Corrects what the layers of a model read. The correction is a part of each layer, called `surgery`, and moves with it."""
        for name in self.layers:
            layer = model.get_submodule(name)
            layer.surgery = FeatureSurgery(self.factors)
            layer.register_forward_pre_hook(_corrected)

    def save(self, folder: Path) -> None:
        """Writes `surgery.safetensors`."""
        tensors = {"up": self.factors.left.contiguous(), "down": self.factors.right.contiguous()}
        content = save(tensors, metadata={"format": "pt", "layers": json.dumps(list(self.layers))})
        (folder / SURGERY_NAME).write_bytes(content)

    @classmethod
    def load(cls, folder: Path) -> HeadSurgery | None:
        """The correction that a head's folder holds, or `None`.

        Raises:
            CheckpointError: The file is damaged.
        """
        path = folder / SURGERY_NAME
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                layers = json.loads((file.metadata() or {})["layers"])
                return cls(layers, Factors(file.get_tensor("up"), file.get_tensor("down")))
        except (SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(f"'{path}' cannot be read as the correction of a head: {error}") from error


def _corrected(layer: nn.Module, args: tuple) -> tuple:
    return (layer.surgery(args[0]), *args[1:])
