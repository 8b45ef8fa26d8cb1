"""What a merge is told from other merges by: to continue one that was killed, and to see that all ranks mean the same one."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from .. import __version__
from ..checkpoints.layout import CheckpointLayout
from .plan import MergePlan


ARITHMETIC = 2
"""Counts the changes after which a recipe gives other bits, so that no merge continues with shards from before."""


def fingerprint(plan: MergePlan, layout: CheckpointLayout, identity: str) -> str:
    """Identifies recipe, inputs and layout: equal fingerprints give equal bytes, so finished shards can be kept.

    Args:
        plan ([`MergePlan`]): What is merged.
        layout ([`CheckpointLayout`]): The weight files.
        identity (`str`): What the result depends on beside the plan, such as samples.
    """
    sources = [source.fingerprint() for source in plan.sources]
    return _digest([*_content(plan, plan.config.to_dict(), layout), sources, identity])


def outline(plan: MergePlan, layout: CheckpointLayout) -> str:
    """Identifies recipe and layout, wherever the models are: it is the same on hosts that have copies of their own."""
    recipe = {key: value for key, value in plan.config.to_dict().items() if key not in ("experts", "base_model")}
    return _digest(_content(plan, recipe, layout))


def _content(plan: MergePlan, recipe: dict[str, Any], layout: CheckpointLayout) -> list[Any]:
    shards = [[shard.filename, shard.nbytes] for shard in layout.shards]
    return [__version__, ARITHMETIC, recipe, plan.to_dict()["parameters"], shards]


def _digest(content: list[Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
