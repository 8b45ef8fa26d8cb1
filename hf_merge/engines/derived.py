"""A model that is another one with some of its weights changed, as a source for a merge."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from typing_extensions import Self

from ..checkpoints.names import ConversionGroup, NameMap
from ..checkpoints.source import ModelSource
from ..checkpoints.storage import TensorInfo


if TYPE_CHECKING:
    from ..checkpoints.conversion import Converter


class DerivedSource(ModelSource):
    """Everything but `read` is the inner model's; subclasses say what differs.

    **Attributes**:
        - **inner** ([`ModelSource`]) -- The model as it is stored.
    """

    inner: ModelSource

    @classmethod
    def derive(cls, inner: ModelSource, **changes: Any) -> Self:
        """Args:
        inner ([`ModelSource`]): The model as it is stored.
        changes: Fields of [`ModelSource`] that differ from its.
        """
        fields = {
            "name": inner.name,
            "reference": inner.reference,
            "config": inner.config,
            "model_class": inner.model_class,
            "storage": inner.storage,
            "folder": inner.folder,
            "generation_config": inner.generation_config,
            "live": inner.live,
            "notes": inner.notes,
            "processors": inner.processors,
        }
        source = cls(**fields | changes)
        source.inner = inner
        return source

    def __str__(self) -> str:
        return str(self.inner)

    def recipe_entry(self) -> dict[str, Any]:
        return self.inner.recipe_entry()

    def fingerprint(self) -> list[Any]:
        return self.inner.fingerprint()

    @property
    def quantization(self) -> str | None:
        return self.inner.quantization

    @property
    def layout(self) -> list[ConversionGroup]:
        return self.inner.layout

    @cached_property
    def converter(self) -> Converter:
        return self.inner.converter

    @cached_property
    def names(self) -> NameMap:
        return self.inner.names

    @cached_property
    def parameters(self) -> dict[str, TensorInfo]:
        return self.inner.parameters

    @cached_property
    def duplicates(self) -> dict[str, str]:
        return self.inner.duplicates
