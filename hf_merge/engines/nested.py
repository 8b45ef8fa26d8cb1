"""A model that does not exist yet: the result of a merge, as a source for another merge.

Its parameters are merged one by one when they are read, so that recipes can be composed without intermediate folders.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..checkpoints.names import NameMap
from ..checkpoints.source import ModelReference, ModelSource
from ..checkpoints.storage import TensorInfo
from ..errors import ConfigError
from ..methods.base import TensorMethod
from ..registry import get_merge_method
from .adapters import tensor_engine
from .placement import Placement
from .plan import MergePlan
from .sealing import processor_source
from .streaming import StreamingEngine


if TYPE_CHECKING:
    from ..checkpoints.conversion import Converter


class MergedSource(ModelSource):
    """The result of a plan, parameter by parameter. Use [`MergedSource.of_plan`]."""

    plan: MergePlan

    @classmethod
    def of_plan(cls, name: str, plan: MergePlan) -> MergedSource:
        """Args:
            name (`str`): What messages call the model.
            plan ([`MergePlan`]): A checked plan of a data-free method.

        Raises:
            ConfigError: The method needs data.
        """
        method = get_merge_method(plan.config.merge_type).method_cls
        if not issubclass(method, TensorMethod):
            raise ConfigError(
                f"'{name}': a recipe inside another one must merge parameter by parameter, without data; "
                f"'{plan.config.merge_type}' does not."
            )
        target = plan.target
        source = cls(
            name=name,
            reference=ModelReference(None),
            config=target.config,
            model_class=target.model_class,
            storage=target.storage,
            folder=target.folder,
            generation_config=target.generation_config,
            live=target.live,
        )
        processors = processor_source(plan)
        source.processors = processors.processor_folder if processors is not None else None
        source.plan = plan
        source.notes = [f"in '{name}': {note}" for note in plan.notes]
        if plan.heads:
            source.notes.append(f"in '{name}': only the head of '{target.name}' is used, the others are left out")
        return source

    @cached_property
    def converter(self) -> Converter:
        return self.plan.target.converter

    def __str__(self) -> str:
        return f"'{self.name}' (merged by '{self.plan.config.merge_type}')"

    def recipe_entry(self) -> dict[str, Any]:
        return {"merge": self.plan.resolved_recipe().to_dict()}

    def fingerprint(self) -> list[Any]:
        return [self.plan.config.to_dict(), *(source.fingerprint() for source in self.plan.sources)]

    @cached_property
    def names(self) -> NameMap:
        own = self.plan.target.names
        present = set(self.plan.outputs)
        groups = [group for group in own.groups if present.issuperset(group.targets)]
        return NameMap(groups, [], [name for name in own.missing if name not in present], [])

    @cached_property
    def parameters(self) -> dict[str, TensorInfo]:
        return self.plan.outputs

    @cached_property
    def duplicates(self) -> dict[str, str]:
        return {}

    @cached_property
    def _engine(self) -> StreamingEngine:
        engine = tensor_engine(self.plan, Placement())
        engine.survey()
        return engine

    def read(self, name: str) -> Tensor:
        return self._engine.merge_parameter(name)
