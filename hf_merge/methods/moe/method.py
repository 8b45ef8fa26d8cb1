"""Routers of a mixture of experts: random, or from the hidden states of samples."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..mixture_base import MixtureMethod, RouterGroup


_ALIKE = 0.99
"""The cosine above which two experts get the same tokens' logits, but for noise."""


class Moe(MixtureMethod):
    """The rows r_e of each router, whose logits for a hidden state h are r_e · h (Branch-Train-MiX, arXiv 2403.07816).

    - random: r_e ~ N(0, σ²), drawn per expert and layer.
    - hidden: r_e = v_e / ‖v_e‖ with v_e = E[h on the samples of expert e] − E[h on its negative samples], as mergekit's `hidden`.
    """

    min_experts = 2

    def __init__(self):
        self._alike: dict[tuple[str, str], list[str]] = {}

    @classmethod
    def needs_data(cls, settings: Any) -> bool:
        return settings.gate_mode == "hidden"

    def router(self, group: RouterGroup) -> Tensor:
        if group.settings.gate_mode == "random":
            width, std = group.shape[1], group.settings.router_init_std
            rows = [group.random(e).standard_normal(width, dtype=np.float32) for e in range(group.shape[0])]
            return torch.from_numpy(np.stack(rows)) * std
        direction = group.states if group.negatives is None else group.states - group.negatives
        rows = torch.nn.functional.normalize(direction, dim=-1, eps=1e-8)
        self._compare(group, rows)
        return rows

    def _compare(self, group: RouterGroup, rows: Tensor) -> None:
        pairs = {(i, j): float(rows[i] @ rows[j]) for i, j in combinations(range(len(rows)), 2)}
        group.report["largest_cosine"] = max(pairs.values())
        for (i, j), cosine in pairs.items():
            if cosine > _ALIKE:
                self._alike.setdefault((group.expert_names[i], group.expert_names[j]), []).append(group.name)

    def remarks(self) -> list[str]:
        return [
            f"The routers hardly tell '{first}' and '{second}' apart in {len(names)} layer(s), such as '{names[0]}': give samples that "
            "differ more, or negative_prompts='others'."
            for (first, second), names in self._alike.items()
        ]
