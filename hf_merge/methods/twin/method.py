"""Twin-Merging: exclusive knowledge at a small rank, and the router that mixes it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ...low_rank import Factors
from ..after_base import ExclusiveMethod, RoutingGroup, TaskRouter
from ..linalg import singular_triplets, solve_dtype


class Twin(ExclusiveMethod):
    """θ = θ* + Σ_t w_t SVD_r(θ_t − θ*), w = softmax(router(features)) (arXiv 2406.15479, equations 4 to 6).

    The router is a perceptron with one hidden layer, trained by cross-entropy to tell which task a sample is of. Its inputs are
    standardised.
    """

    min_experts = 2

    def compress(self, part: Tensor, settings: Any) -> Factors:
        return singular_triplets(part.to(solve_dtype(part))).top(settings.rank).factors(1.0, torch.float32)

    def router(self, group: RoutingGroup) -> TaskRouter:
        settings, features = group.settings, group.features
        router = TaskRouter(features.shape[1], settings.router_width, group.count).to(features.device)
        router.mean.copy_(features.mean(0))
        router.scale.copy_(features.std(0, correction=0).clamp_min(1e-6))
        generator = group.random("start")
        for layer in (router.hidden, router.output):
            bound = 1 / math.sqrt(layer.in_features)
            for parameter in layer.parameters():
                drawn = generator.uniform(-bound, bound, tuple(parameter.shape))
                parameter.data.copy_(torch.from_numpy(drawn))
        with torch.enable_grad():
            losses = group.train(
                router,
                len(features),
                lambda rows: nn.functional.cross_entropy(router.logits(features[rows]), group.tasks[rows]),
            )
        with torch.no_grad():
            hits = router(features).argmax(-1) == group.tasks
        group.report.update(first_loss=losses[0], last_loss=losses[-1], accuracy=float(hits.float().mean()))
        return router.requires_grad_(False).eval()
