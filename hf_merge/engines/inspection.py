"""What explains a merge before it is made: sizes and directions of task vectors, and where their signs disagree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.source import ModelSource
from ..progress import progress
from .placement import Placement
from .plan import MergePlan, PlannedParameter
from .streaming import StreamingEngine


@dataclass
class LayerInspection:
    """One parameter: the norm of each task vector, their products and cosines, the entries whose signs conflict.

    Args:
        name (`str`): The module name.
        kind (`str`): The kind of parameter.
        base_norm (`float`): ‖θ_0‖.
        norms (`list[float]`): ‖τ_i‖ for each expert.
        products (`list[list[float]]`): ⟨τ_i, τ_j⟩.
        conflicts (`int`), count (`int`): Entries where two experts' non-zero changes have opposite signs; entries in all.
        wudi_loss_before, wudi_loss_after (`float`, *optional*): The interference of the summed and of the merged task vectors.
        effective_rank (`float`, *optional*): Of the task vectors' Gram matrix.
    """

    name: str
    kind: str
    base_norm: float
    norms: list[float]
    products: list[list[float]]
    conflicts: int
    count: int
    wudi_loss_before: float | None = None
    wudi_loss_after: float | None = None
    effective_rank: float | None = None

    @property
    def cosines(self) -> list[list[float]]:
        """cos(τ_i, τ_j); 0 where one of them is zero."""
        return _cosines(self.products, self.norms)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        return vars(self) | {"cosines": self.cosines}


@dataclass
class Inspection:
    """The models side by side; without a base model only what they are."""

    models: list[dict[str, Any]]
    expert_names: list[str]
    layers: list[LayerInspection] = field(default_factory=list)

    @property
    def norms(self) -> list[float]:
        """‖τ_i‖ over all parameters."""
        return [sum(layer.norms[i] ** 2 for layer in self.layers) ** 0.5 for i in range(len(self.expert_names))]

    @property
    def relative_norms(self) -> list[float]:
        """‖τ_i‖ / ‖θ_0‖ over all parameters."""
        base = sum(layer.base_norm**2 for layer in self.layers) ** 0.5
        return [norm / base if base else 0.0 for norm in self.norms]

    @property
    def cosines(self) -> list[list[float]]:
        """cos(τ_i, τ_j) over all parameters."""
        count = range(len(self.expert_names))
        sums = [[sum(layer.products[i][j] for layer in self.layers) for j in count] for i in count]
        return _cosines(sums, self.norms)

    @property
    def sign_conflict(self) -> float:
        """The share of entries that two experts change in opposite directions."""
        total = sum(layer.count for layer in self.layers)
        return sum(layer.conflicts for layer in self.layers) / total if total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        summary = {"models": self.models, "experts": self.expert_names}
        if not self.layers:
            return summary
        return summary | {
            "norms": self.norms,
            "relative_norms": self.relative_norms,
            "cosines": self.cosines,
            "sign_conflict": self.sign_conflict,
            "layers": [layer.to_dict() for layer in self.layers],
        }

    def __str__(self) -> str:
        lines = [f"{m['name']:>12}  {m['class']}  {m['parameters']:,} parameters  {m['dtype']}" for m in self.models]
        if not self.layers:
            return "\n".join(lines)
        width = max(len(name) for name in self.expert_names)
        lines += ["", "task vectors (norm, relative to the base model, cosine to the others)"]
        for name, norm, relative, row in zip(
            self.expert_names, self.norms, self.relative_norms, self.cosines, strict=True
        ):
            cosines = " ".join(f"{value:6.3f}" for value in row)
            lines.append(f"  {name:>{width}}  {norm:10.4g}  {relative:8.3%}  {cosines}")
        lines += [f"sign conflict: {self.sign_conflict:.1%} of the entries", "", "by layer (norms, sign conflict)"]
        name_width = max(len(layer.name) for layer in self.layers)
        for layer in self.layers:
            norms = " ".join(f"{norm:9.3g}" for norm in layer.norms)
            line = f"  {layer.name:<{name_width}}  {norms}  {layer.conflicts / max(layer.count, 1):6.1%}"
            if layer.effective_rank is not None:
                loss = f"{layer.wudi_loss_before:.3g} -> {layer.wudi_loss_after:.3g}"
                line += f"  WUDI loss {loss}, effective rank {layer.effective_rank:g}"
            lines.append(line)
        return "\n".join(lines)


def inspect_models(plan: MergePlan) -> Inspection:
    """Reads every parameter once and describes the task vectors.

    Args:
        plan ([`MergePlan`]): A checked plan. Without a base model only the models themselves are described. With the method
            `wudi` each linear layer is also merged, for its interference and effective rank.
    """
    inspection = Inspection([_describe(source) for source in plan.sources], [source.name for source in plan.experts])
    if plan.base is None:
        return inspection
    merged = [p for p in plan.parameters if p.action == "merge" and p.base is not None]
    engine = StreamingEngine(plan, Placement()) if plan.config.merge_type == "wudi" else None
    with progress(sum(p.info.nbytes for p in merged), "Inspecting") as bar:
        for parameter in merged:
            layer = _inspect_parameter(plan, parameter)
            if engine is not None:
                engine.merge_parameter(parameter.name)
                row = engine.report.parameters[parameter.name]
                for key in ("wudi_loss_before", "wudi_loss_after", "effective_rank"):
                    setattr(layer, key, row.get(key))
            inspection.layers.append(layer)
            bar.update(parameter.info.nbytes)
    return inspection


def _cosines(products: list[list[float]], norms: list[float]) -> list[list[float]]:
    return [
        [product / (one * other) if one and other else 0.0 for product, other in zip(row, norms, strict=True)]
        for row, one in zip(products, norms, strict=True)
    ]


def _describe(source: ModelSource) -> dict[str, Any]:
    counts = [info.numel for info in source.parameters.values()]
    return {
        "name": source.name,
        "model": source.reference.model,
        "class": source.description.class_name,
        "model_type": source.description.model_type,
        "tensors": len(counts),
        "parameters": sum(counts),
        "dtype": str(source.dtype).removeprefix("torch."),
    }


def _inspect_parameter(plan: MergePlan, parameter: PlannedParameter) -> LayerInspection:
    base = plan.base.read(parameter.base).float()
    vectors = list(_task_vectors(plan.experts, parameter.experts, base))
    products = [[float(torch.dot(a, b)) for b in vectors] for a in vectors]
    signs = [torch.sign(vector).to(torch.int8) for vector in vectors]
    highest, lowest = signs[0].clone(), signs[0].clone()
    for sign in signs[1:]:
        torch.maximum(highest, sign, out=highest)
        torch.minimum(lowest, sign, out=lowest)
    return LayerInspection(
        name=parameter.name,
        kind=parameter.kind.value,
        base_norm=float(torch.linalg.vector_norm(base)),
        norms=[products[i][i] ** 0.5 for i in range(len(vectors))],
        products=products,
        conflicts=int(((highest > 0) & (lowest < 0)).sum()),
        count=base.numel(),
    )


def _task_vectors(experts: Sequence[ModelSource], names: Sequence[str], base: Tensor) -> Iterator[Tensor]:
    for source, name in zip(experts, names, strict=True):
        yield (source.read(name).float() - base).flatten()
