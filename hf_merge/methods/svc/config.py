"""Settings of singular value calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...config import MergeConfig
from ...errors import ConfigError, suggest
from ...registry import get_merge_method
from ...settings import setting, settings_of


STRENGTHS = {"iso_cts": 0.2, "tsv_m": 1.0, "wudi": 1.0}
"""The paper's α by inner method; 0.1 for all others."""


@dataclass
class SvcConfig(MergeConfig):
    """Singular value calibration of another method's result (arXiv 2602.05536).

    Args:
        inner (`str`): The `merge_type` of the method whose result is calibrated.
        inner_settings (`dict`): Its settings.
        alpha (`float`, *optional*): α, the smallest factor by which an expert may count as over-represented: a direction is
            never amplified more than 1/α times. When not given, the paper's value for the inner method: 1 for `tsv_m` and
            `wudi`, 0.2 for `iso_cts`, 0.1 for the others.
    """

    merge_type: ClassVar[str] = "svc"
    papers: ClassVar[tuple[str, ...]] = ("2602.05536",)

    inner: str = setting("task_arithmetic", "The method whose result is calibrated.", scope="merge")
    inner_settings: dict[str, Any] = field(default_factory=dict, metadata={"help": "Settings of the inner method."})
    alpha: float | None = setting(
        None, "Smallest calibration factor; by the inner method if not given.", type=float, above=0
    )

    def __post_init__(self):
        super().__post_init__()
        self.inner_config = self._build_inner()

    def _build_inner(self) -> MergeConfig:
        where = type(self).__name__
        if self.inner == self.merge_type:
            raise ConfigError(f"{where}.inner='{self.inner}' calibrates itself: name the method to be calibrated.")
        entry = get_merge_method(self.inner)
        if entry.method_cls.requires_data:
            raise ConfigError(f"{where}.inner='{self.inner}' needs calibration samples: use a data-free method.")
        if not isinstance(self.inner_settings, dict):
            raise ConfigError(f"{where}.inner_settings must be a dictionary, got {self.inner_settings!r}.")
        known = sorted(set(settings_of(entry.config_cls)) - set(settings_of(MergeConfig)))
        for key in self.inner_settings:
            if key not in known:
                raise ConfigError(
                    f"{where}.inner_settings: '{key}' is not a setting of '{self.inner}'.{suggest(key, known)} "
                    f"It has: {', '.join(known) or 'none'}."
                )
        return entry.config_cls(seed=self.seed, **self.inner_settings)

    def inner_recipes(self) -> list[MergeConfig]:
        return [self.inner_config]

    def resolve_nested(self, name: str, depth: float, experts: Sequence[str]) -> None:
        self.inner_config = self.inner_config.resolve(name, depth, experts)

    @property
    def strength(self) -> float:
        """α."""
        return STRENGTHS.get(self.inner, 0.1) if self.alpha is None else self.alpha
