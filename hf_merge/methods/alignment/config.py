"""Settings of the alignment methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...config import MergeConfig
from ...errors import ConfigError
from ...settings import setting


@dataclass
class AlignmentConfig(MergeConfig):
    """What the recipes of the alignment methods have in common. The aligned experts are averaged.

    Args:
        residual (`bool`): Also rearrange the residual stream; otherwise only what is inside of blocks.
    """

    residual: bool = setting(True, "Also rearrange the residual stream.", scope="merge")

    def __post_init__(self):
        super().__post_init__()
        for name in ("include", "exclude", "rules", "then"):
            if getattr(self, name):
                raise ConfigError(
                    f"{type(self).__name__}.{name} is not possible: the channels of all layers are mapped together."
                )


@dataclass
class GitRebasinConfig(AlignmentConfig):
    """Git Re-Basin (arXiv 2209.04836): hidden units, heads of attention and the residual stream are permuted so that they agree
    best with the first expert's, then averaged.

    Args:
        matching (`str`): `"weights"`, without data, or `"activations"` on samples of all tasks.
        batch_size (`int`): Samples that run together.
    """

    merge_type: ClassVar[str] = "git_rebasin"

    matching: str = setting(
        "weights", "'weights' or 'activations'.", choices=("weights", "activations"), scope="merge"
    )
    batch_size: int = setting(16, "Samples that run together.", minimum=1, scope="merge")


@dataclass
class ZipItConfig(AlignmentConfig):
    """ZipIt! (arXiv 2305.03053): units are averaged in pairs that behave alike, across the two models or within one.

    Args:
        budget (`float`): The part of a model's units that may be paired with each other.
        batch_size (`int`): Samples that run together.
    """

    merge_type: ClassVar[str] = "zipit"

    budget: float = setting(0.1, "Part of pairs within a model.", minimum=0, maximum=1, scope="merge")
    batch_size: int = setting(16, "Samples that run together.", minimum=1, scope="merge")

    def __post_init__(self):
        super().__post_init__()
        if not self.residual:
            raise ConfigError(
                "ZipItConfig.residual=False is not possible: pairs within a model need the whole network."
            )


@dataclass
class OtFusionConfig(AlignmentConfig):
    """Model fusion by optimal transport (arXiv 1910.05653): units are mixtures of the other expert's units, by entropic
    transport between their weights. Heads of attention are paired one by one.

    Args:
        regularization (`float`): Of the transport; small values come near to an assignment.
    """

    merge_type: ClassVar[str] = "ot_fusion"

    regularization: float = setting(0.05, "Entropy of the transport.", above=0, scope="merge")
