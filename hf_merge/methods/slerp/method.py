"""Spherical linear interpolation between two models."""

from __future__ import annotations

from torch import Tensor

from ..base import TensorGroup, TensorMethod
from ..spherical import slerp_rows


class Slerp(TensorMethod):
    """(sin((1−t)θ) x + sin(tθ) y) / sin θ for each parameter as one vector; see [`slerp_rows`].

    x and y are the two experts (the base model is not used then), or the base model and the only expert. A parameter that only
    the one expert has is taken from it.
    """

    max_experts = 2

    @classmethod
    def refusals(cls, name: str, experts: int, has_base: bool) -> list[str]:
        if experts == 1 and not has_base:
            return [
                f"The method '{name}' goes from one model to another: give two experts, or a base model and one expert."
            ]
        return super().refusals(name, experts, has_base)

    def merge(self, group: TensorGroup) -> Tensor:
        if len(group) == 1 and group.base is None:
            return group.mean()
        first, second = (group.base, group.expert(0)) if len(group) == 1 else group.experts()
        settings = group.settings
        merged = slerp_rows(settings.t, first.reshape(1, -1), second.reshape(1, -1), settings.threshold)
        return merged.view(group.shape)
