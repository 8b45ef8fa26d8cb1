"""The plan of a merge, made from headers alone: every output parameter with its kind, its sources, its method and settings.

Everything after the plan only executes it. Problems are gathered, not raised one by one: [`MergePlan.check`] reports all
of them at once, before a weight is read.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from ..checkpoints.names import SaveGroup
from ..checkpoints.source import ModelSource
from ..checkpoints.storage import TensorInfo
from ..config import MergeConfig
from ..errors import PlanError
from ..methods.base import ParameterKind
from ..registry import get_merge_method
from .heads import HeadPlan


Action = Literal["merge", "mean", "copy", "stack", "route"]


@dataclass
class PlannedParameter:
    """One parameter of the merged model.

    Args:
        name (`str`): Its module name in the merged model.
        kind ([`ParameterKind`]): What it is.
        depth (`float`): 0 at the input, 1 at the output.
        action (`str`): `"merge"`: by the method; `"mean"`: the experts' mean; `"copy"`: from one model; `"stack"`: the weights of
            all experts become those of a mixture of experts; `"route"`: the router of such a mixture.
        experts (`list[str]`): Its module name in each expert; for `"stack"` the names of the first expert's weights that it is
            put together from, then those of the second expert, and so on.
        base (`str`, *optional*): Its module name in the base model.
        info ([`TensorInfo`]): Shape and dtype of the result.
        settings ([`MergeConfig`]): The method's settings for this parameter.
        copy_from (`str`, *optional*): For `"copy"`: the name of the model.
        reason (`str`): Why it is not merged, empty for `"merge"`.
        then (`list[MergeConfig]`): The settings of the recipes that are applied to the result.
    """

    name: str
    kind: ParameterKind
    depth: float
    action: Action
    experts: list[str]
    base: str | None
    info: TensorInfo
    settings: MergeConfig
    copy_from: str | None = None
    reason: str = ""
    then: list[MergeConfig] = field(default_factory=list)

    @property
    def treatment(self) -> str:
        """What is done with the parameter, in words."""
        if self.action != "merge":
            return self.action
        kinds = getattr(get_merge_method(self.settings.merge_type).method_cls, "kinds", None)
        if kinds is None or self.kind in kinds:
            return f"merged by {self.settings.merge_type}"
        policy = getattr(self.settings, "other_parameters", "mean")
        return f"{policy} (other_parameters of {self.settings.merge_type})"


@dataclass
class Dropped:
    """A stored tensor that is not used, and why."""

    model: str
    name: str
    reason: str


@dataclass
class MergePlan:
    """What will happen, parameter by parameter. Print it to read it.

    Args:
        config ([`MergeConfig`]): The recipe.
        experts (`list[ModelSource]`): The experts; the first one gives class, config and file layout.
        base ([`ModelSource`], *optional*): The base model.
        parameters (`list[PlannedParameter]`): In the model's order.
        heads (`dict[str, HeadPlan]`): The heads that are kept per task.
        dropped (`list[Dropped]`): Stored tensors that are not used.
        notes (`list[str]`): What a careful user wants to know.
        problems (`list[str]`): What prevents the merge.
        adapter ([`AdapterLayout`], *optional*): The files of the result, where it is an adapter.
        twin ([`TwinParts`], *optional*): What an engine keeps of every expert beside the merged weights.
        members (`dict[str, MergePlan]`): The experts that are kept whole beside the result, each by the plan that copies it.
        merged ([`ModelSource`], *optional*): The result's class, config and parameters, where they are not the first expert's.
        estimate ([`Estimate`], *optional*): What the merge is expected to take, when it was asked for.
    """

    config: MergeConfig
    experts: list[ModelSource]
    base: ModelSource | None
    parameters: list[PlannedParameter] = field(default_factory=list)
    heads: dict[str, HeadPlan] = field(default_factory=dict)
    dropped: list[Dropped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    merged: ModelSource | None = None
    adapter: Any = None
    twin: Any = None
    members: dict[str, MergePlan] = field(default_factory=dict)
    estimate: Any = None

    @property
    def target(self) -> ModelSource:
        """The model whose class, config and file layout the result has: the first expert, unless the merge changes its shapes."""
        return self.experts[0] if self.merged is None else self.merged

    @property
    def sources(self) -> list[ModelSource]:
        """All models, experts first."""
        return [*self.experts, *([self.base] if self.base is not None else [])]

    @property
    def outputs(self) -> dict[str, TensorInfo]:
        """Shape and dtype of every parameter of the result."""
        return {parameter.name: parameter.info for parameter in self.parameters}

    @property
    def groups(self) -> list[SaveGroup]:
        """The parameters one by one under their module names, for results that stay in memory."""
        return [SaveGroup([name], {name: info}, True) for name, info in self.outputs.items()]

    @property
    def nbytes(self) -> int:
        """The size of the result, heads and members included."""
        if self.adapter is not None:
            return (1 + len(self.heads)) * sum(info.nbytes for info in self.adapter.infos.values())
        heads = sum(info.nbytes for head in self.heads.values() for info in head.outputs.values())
        members = sum(member.nbytes for member in self.members.values())
        return heads + members + sum(parameter.info.nbytes for parameter in self.parameters)

    def resolved_recipe(self) -> MergeConfig:
        """The recipe with the models that it is carried out on, their revisions resolved to commits."""
        recipe = copy.deepcopy(self.config)
        recipe.experts = {source.name: source.recipe_entry() for source in self.experts}
        recipe.base_model = self.base.recipe_entry() if self.base is not None else None
        return recipe

    def check(self) -> MergePlan:
        """Returns itself, or raises [`PlanError`] with every problem."""
        if self.problems:
            raise PlanError(self.problems)
        return self

    def __str__(self) -> str:
        lines = [
            f"Merge of {len(self.experts)} models with '{self.config.merge_type}' -> {self.target.description.class_name}"
        ]
        lines += [f"  expert {source}: {source.dtype}".replace("torch.", "") for source in self.experts]
        lines.append(f"  base   {self.base}" if self.base is not None else "  no base model")
        lines.append(f"  result: {len(self.parameters)} parameters, {self.nbytes / 2**20:,.1f} MiB")
        if self.adapter is not None:
            lines.append(f"  as a PEFT adapter: {self.adapter}")
        treated = Counter((p.kind.value, p.treatment) for p in self.parameters if p.action != "copy")
        for (kind, treatment), count in sorted(treated.items()):
            lines.append(f"    {count:6d} x {kind}: {treatment}")
        for reason, count in Counter(p.reason for p in self.parameters if p.reason).items():
            lines.append(f"    {count:6d} x not merged: {reason}")
        for step in self.config.next_recipes():
            lines.append(f"    then '{step.merge_type}' on the result")
        for task, head in self.heads.items():
            whole = ", with the whole adapter" if self.adapter is not None else ""
            lines.append(f"  head of '{task}': {', '.join(head.outputs)} -> heads/{task}/{whole}")
        for name, member in self.members.items():
            lines.append(f"  member '{name}': {len(member.parameters)} parameters -> members/{name}/")
        for (model, reason), count in Counter((d.model, d.reason) for d in self.dropped).items():
            lines.append(f"  not used: {count} tensor(s) of '{model}': {reason}")
        lines += [f"  note: {note}" for note in self.notes]
        lines += [str(self.estimate)] if self.estimate is not None else []
        lines += [f"  PROBLEM: {problem}" for problem in self.problems]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready data."""
        return {
            "merge_type": self.config.merge_type,
            "class": self.target.description.class_name,
            "experts": {source.name: source.recipe_entry() for source in self.experts},
            "base_model": self.base.recipe_entry() if self.base is not None else None,
            "nbytes": self.nbytes,
            "parameters": [
                {
                    "name": p.name,
                    "kind": p.kind.value,
                    "shape": list(p.info.shape),
                    "dtype": str(p.info.dtype).removeprefix("torch."),
                    "action": p.action,
                    "method": p.settings.merge_type if p.action == "merge" else None,
                    "reason": p.reason,
                }
                for p in self.parameters
            ],
            "heads": {task: list(head.outputs) for task, head in self.heads.items()},
            "members": list(self.members),
            "dropped": [vars(entry) for entry in self.dropped],
            "notes": self.notes,
            "problems": self.problems,
            "estimate": self.estimate.to_dict() if self.estimate is not None else None,
        }
