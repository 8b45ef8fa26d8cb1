"""Settings of spherical interpolation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...config import MergeConfig
from ...settings import setting


@dataclass
class SlerpConfig(MergeConfig):
    """Spherical linear interpolation between two models: two experts, or the base model and one expert.

    Args:
        t (`float`): The position on the arc: 0 is the first model (the base model, when there is one expert), 1 the second.
        threshold (`float`): Above this |cosine| of the angle between the two, interpolation is linear.
    """

    merge_type: ClassVar[str] = "slerp"

    t: float = setting(0.5, "Position between the first model (0) and the second (1).", minimum=0.0, maximum=1.0)
    threshold: float = setting(0.9995, "Cosine above which interpolation is linear.", minimum=0.0, maximum=1.0)
