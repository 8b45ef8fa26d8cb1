"""Representation Surgery: adapters of features, learnt by the distance to the experts' features."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ...low_rank import Factors
from ..after_base import FeatureGroup, FeatureMethod


class Surgery(FeatureMethod):
    """Ẑ = Z − W_up ReLU(W_down Z), with min E ‖Ẑ − Z_expert‖_1 over unlabelled samples (arXiv 2402.02705, equations 3 to 5).

    W_up begins at zero, so that training begins at the merged model; W_down as a linear layer of torch does, uniform in ±1/√d.
    """

    def correct(self, group: FeatureGroup) -> Factors:
        settings, width = group.settings, group.merged.shape[1]
        bound = 1 / math.sqrt(width)
        start = group.random("start").uniform(-bound, bound, (settings.rank, width)).astype(np.float32)
        down = torch.nn.Parameter(torch.from_numpy(start).to(group.merged.device))
        up = torch.nn.Parameter(torch.zeros(width, settings.rank, device=down.device))
        with torch.enable_grad():
            group.train(
                torch.nn.ParameterList([up, down]),
                len(group.merged),
                lambda rows: l1_distance(group.merged[rows], group.expert[rows], up, down),
            )
        with torch.no_grad():
            before = float((group.merged - group.expert).abs().mean())
            after = float(l1_distance(group.merged, group.expert, up, down))
        group.report.update(distance_before=before, distance_after=after)
        return Factors(up.detach(), down.detach())


def l1_distance(merged: Tensor, expert: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Mean of |Z − W_up ReLU(W_down Z) − Z_expert|.

    Args:
        merged, expert (`torch.Tensor`): Z and Z_expert, (rows, channels).
        up (`torch.Tensor`): W_up, (channels, rank).
        down (`torch.Tensor`): W_down, (rank, channels).
    """
    return (merged - torch.relu(merged @ down.mT) @ up.mT - expert).abs().mean()
