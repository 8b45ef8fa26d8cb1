"""A model whose units are permuted to agree with another model's, as a source for a merge by any method.

The permuted model computes the same function. It is matched by weights (Git Re-Basin, arXiv 2209.04836) when its first parameter is
read; both models are in memory then, and the permuted one stays there.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..checkpoints.source import ModelSource
from ..errors import ConfigError, UnsupportedModelError
from ..methods.alignment.matching import WeightMatching
from ..methods.alignment.preparation import map_to_features
from ..methods.alignment.spaces import ExpertTransforms, Spaces
from ..methods.backbone_base import FeatureTap
from ..modeling.heads import find_attention, find_elementwise
from ..modeling.topology import backbone_of, example_inputs, trace
from .derived import DerivedSource
from .task_models import build_model, expert_values


if TYPE_CHECKING:
    from transformers import PreTrainedModel


_TOLERANCE = 1e-3
"""Of the outputs of the permuted model, relative to the largest one."""


def align_experts(experts: list[ModelSource], base: ModelSource | None) -> list[ModelSource]:
    """The experts in the units of the base model, or of the first expert where there is no base.

    Args:
        experts (`list[ModelSource]`): The experts.
        base ([`ModelSource`], *optional*): The base model.

    Raises:
        ConfigError: An expert has other shapes than what it is aligned with.
    """
    reference = experts[0] if base is None else base
    return [one if one is reference else AlignedSource.of(one, reference) for one in experts]


class AlignedSource(DerivedSource):
    """A model in the units of another one. Use [`AlignedSource.of`]."""

    reference_source: ModelSource

    @classmethod
    def of(cls, inner: ModelSource, reference: ModelSource) -> AlignedSource:
        """Args:
            inner ([`ModelSource`]): The model.
            reference ([`ModelSource`]): Whose units it gets.

        Raises:
            ConfigError: The backbones differ in shape.
        """
        _check_shapes(inner, reference)
        notes = [*inner.notes, f"the units of '{inner.name}' are permuted to agree with {reference}"]
        source = cls.derive(inner, notes=notes)
        source.reference_source = reference
        return source

    def fingerprint(self) -> list[Any]:
        return ["aligned", self.inner.fingerprint(), self.reference_source.fingerprint()]

    def read(self, name: str) -> Tensor:
        with self._lock:
            permuted = self._permuted.get(name)
        return self.inner.read(name) if permuted is None else permuted.to(self.parameters[name].dtype)

    @cached_property
    def _permuted(self) -> dict[str, Tensor]:
        """The parameters that change, float32, by module name. Permutations are exact in every dtype."""
        model, reference = _load(self.inner), _load(self.reference_source)
        inputs = example_inputs(model)
        with torch.no_grad():
            before = _outputs(model, inputs)
            _permute(model, reference, not _is_head_tied(self.inner, trace(model, inputs).tap))
            _check_function(str(self), before, _outputs(model, inputs))
        state = model.state_dict()
        return {name: state[name] for name in self.parameters if state[name].is_floating_point()}


def _load(source: ModelSource) -> PreTrainedModel:
    device = torch.device("cpu")
    return build_model(source.model_class, source.config, expert_values(source, device), device)


def _permute(model: PreTrainedModel, reference: PreTrainedModel, residual: bool) -> None:
    """Permutes the units of a model in place, with the layers of its head that read them."""
    topology = trace(reference, example_inputs(reference))
    topology.attention = find_attention(reference, topology)
    topology.elementwise = find_elementwise(reference, topology)
    ours, theirs = ({n: p.detach() for n, p in backbone_of(one).named_parameters()} for one in (reference, model))
    width = reference.config.hidden_size
    spaces = Spaces.of(topology, width, {name: value.shape for name, value in ours.items()})
    transforms = WeightMatching(spaces, ours, theirs, (width, width), residual=residual).run()
    for name, value in transforms.apply(theirs, width).items():
        backbone_of(model).get_parameter(name).copy_(value)
    tap = trace(model, example_inputs(model)).tap
    if tap is not None:
        _permute_head(model, tap, transforms)


def _permute_head(model: PreTrainedModel, tap: FeatureTap, transforms: ExpertTransforms) -> None:
    back = map_to_features(tap, transforms)
    inside = {id(parameter) for parameter in backbone_of(model).parameters()}
    for name in tap.layers:
        layer = model.get_submodule(name)
        if id(layer.weight) in inside:
            continue  # Tied to the table, which is permuted already.
        weight = layer.weight @ back if isinstance(layer, nn.Linear) else back.mT @ layer.weight
        layer.weight.copy_(weight)


def _is_head_tied(source: ModelSource, tap: FeatureTap | None) -> bool:
    """Whether a layer of the head that does not read the backbone's output shares its weights with the backbone: the units of
    such a head are those of the residual stream, which then has to stay as it is."""
    readers = tap.layers if tap is not None else ()
    prefix = source.anatomy.backbone_prefix
    outside = [name for name in source.anatomy.ties if prefix and not name.startswith(prefix)]
    return any(name.endswith("weight") and name.rpartition(".")[0] not in readers for name in outside)


def _outputs(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    return next(value for value in model(**inputs).values() if isinstance(value, Tensor))


def _check_function(model: str, before: Tensor, after: Tensor) -> None:
    deviation = float((before - after).abs().max() / before.abs().max().clamp_min(1e-12))
    if deviation > _TOLERANCE:
        raise UnsupportedModelError(
            f"{model} computes another function after its units were permuted (off by {deviation:.1e} of the largest output): its "
            "architecture cannot be aligned. Leave 'align' out."
        )


def _check_shapes(source: ModelSource, reference: ModelSource) -> None:
    ours = {reference.anatomy.canonical(name): info.shape for name, info in reference.parameters.items()}
    for name, info in source.parameters.items():
        expected = ours.get(source.anatomy.canonical(name))
        if expected is not None and expected != info.shape and not source.anatomy.parameters[name].is_task_head:
            raise ConfigError(
                f"align='git_rebasin' pairs units one by one, but '{name}' is {info.shape} in {source} and {expected} in "
                f"{reference}: use 'fs_merge'."
            )
