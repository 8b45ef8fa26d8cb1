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
        blocks (`int`, *optional*): How many blocks are merged. The later ones, and what comes after them, stay apart for each task
            and are kept with its head: the partial zip of ZipIt!. All blocks when not given.
        repair (`bool`): Give the outputs of the averaged layers the mean and the deviation that they have in the experts (REPAIR,
            arXiv 2211.08403), on samples of all tasks.
        batch_size (`int`): Samples that run together, where samples are needed.
    """

    residual: bool = setting(True, "Also rearrange the residual stream.", scope="merge")
    blocks: int | None = setting(
        None, "How many blocks are merged; later ones are kept per task.", type=int, minimum=0, scope="merge"
    )
    repair: bool = setting(False, "Restore means and deviations of the layers' outputs.", scope="merge")
    batch_size: int = setting(16, "Samples that run together.", minimum=1, scope="merge")

    def __post_init__(self):
        super().__post_init__()
        for name in ("include", "exclude", "rules", "then", "align"):
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
    """

    merge_type: ClassVar[str] = "git_rebasin"
    papers: ClassVar[tuple[str, ...]] = ("2209.04836",)

    matching: str = setting(
        "weights", "'weights' or 'activations'.", choices=("weights", "activations"), scope="merge"
    )


@dataclass
class ZipItConfig(AlignmentConfig):
    """ZipIt! (arXiv 2305.03053): units are averaged in pairs that behave alike, across the two models or within one.

    Args:
        budget (`float`): The part of a model's units that may be paired with each other.
    """

    merge_type: ClassVar[str] = "zipit"
    papers: ClassVar[tuple[str, ...]] = ("2305.03053",)

    budget: float = setting(0.1, "Part of pairs within a model.", minimum=0, maximum=1, scope="merge")

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
    papers: ClassVar[tuple[str, ...]] = ("1910.05653",)

    regularization: float = setting(0.05, "Entropy of the transport.", above=0, scope="merge")
