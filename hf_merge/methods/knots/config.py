"""Settings of the methods that bring task vectors into a common basis and let another method merge them there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...config import LinearLayersConfig, MergeConfig
from ...errors import ConfigError, suggest
from ...registry import get_merge_method
from ...settings import setting, settings_of


@dataclass
class AlignedConfig(LinearLayersConfig):
    """Settings of methods that merge in a common basis.

    Args:
        inner (`str`): The `merge_type` of the method that merges the aligned parts.
        inner_settings (`dict`): Its settings.
    """

    inners: ClassVar[tuple[str, ...]] = ()

    inner: str = setting("ties", "The method that merges the aligned parts.", scope="merge")
    inner_settings: dict[str, Any] = field(default_factory=dict, metadata={"help": "Settings of the inner method."})

    def __post_init__(self):
        super().__post_init__()
        where = type(self).__name__
        if self.inner not in self.inners:
            raise ConfigError(
                f"Invalid value for {where}.inner: {self.inner!r}. It must be one of {', '.join(map(repr, self.inners))}."
            )
        config_cls = get_merge_method(self.inner).config_cls
        known = sorted(
            name
            for name, spec in settings_of(config_cls).items()
            if spec.scope != "merge" and name not in settings_of(LinearLayersConfig)
        )
        for key in self.inner_settings:
            if key not in known:
                raise ConfigError(
                    f"{where}.inner_settings: '{key}' is not a setting of '{self.inner}'.{suggest(key, known)} "
                    f"It has: {', '.join(known) or 'none'}."
                )
        self.inner_config = config_cls(seed=self.seed, **self.inner_settings)

    def inner_recipes(self) -> list[MergeConfig]:
        return [self.inner_config]

    def resolve_nested(self, name: str, depth: float, experts: Sequence[str]) -> None:
        self.inner_config = self.inner_config.resolve(name, depth, experts)


@dataclass
class KnotsConfig(AlignedConfig):
    """KnOTS: merging in the common left basis of all task vectors (arXiv 2410.19735).

    Args:
        inner (`str`): The method that merges the aligned parts V_i: `"ties"`, `"dare"`, `"linear"`, `"task_arithmetic"`, `"della"`,
            `"breadcrumbs"`, `"magmax"` or `"consensus_ta"`.
        inner_settings (`dict`): Its settings.
        scaling (`float`): The coefficient λ of the merged task vector.
    """

    merge_type: ClassVar[str] = "knots"
    papers: ClassVar[tuple[str, ...]] = ("2410.19735",)
    inners: ClassVar[tuple[str, ...]] = (
        "ties",
        "dare",
        "linear",
        "task_arithmetic",
        "della",
        "breadcrumbs",
        "magmax",
        "consensus_ta",
    )

    scaling: float = setting(1.0, "Scaling coefficient of the merged task vector.")


@dataclass
class CoreSpaceConfig(AlignedConfig):
    """Core Space: merging in the common left and right bases of all adapters (arXiv 2509.17786).

    Args:
        inner (`str`): The method that merges the core matrices M_i: one of KnOTS' or `"tsv_m"`, `"iso_c"`, `"iso_cts"`, `"svd"`.
        inner_settings (`dict`): Its settings.
        scaling (`float`): The coefficient λ of the merged task vector.
    """

    merge_type: ClassVar[str] = "core_space"
    papers: ClassVar[tuple[str, ...]] = ("2509.17786",)
    inners: ClassVar[tuple[str, ...]] = (*KnotsConfig.inners, "tsv_m", "iso_c", "iso_cts", "svd")

    inner: str = setting("iso_c", "The method that merges the core matrices.", scope="merge")
    scaling: float = setting(1.0, "Scaling coefficient of the merged task vector.")
