"""What an attached adapter does to each parameter of its base model.

A change is exact and low-rank where the adapter is a product of two factors (LoRA in all its linear forms), a value of its own
where the adapter stores one (trained modules and biases), and what PEFT's own merge makes of the base weight everywhere else.
Factors are in the orientation that the parameter is stored in: the change is their product, reshaped.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, Embedding, Linear, LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..low_rank import Factors
from .attaching import ADAPTER, Attached


ReadBase = Callable[[str], Tensor]
"""The base model's value of a parameter, by its name in the model that the adapter was trained on."""

_MERGE_ERRORS = (NotImplementedError, ValueError, RuntimeError, TypeError, AttributeError)


class Delta(ABC):
    """The change of one parameter."""

    needs_base = True
    """Whether the change can only be told with the base model's value."""

    @property
    def factors(self) -> Factors | None:
        """The change as two factors, where it is one."""
        return None

    @abstractmethod
    def dense(self, read_base: ReadBase) -> Tensor:
        """The change in the shape of the parameter, in float32 or better."""


@dataclass
class LowRank(Delta):
    """A product of two factors, in the shape of the parameter."""

    product: Factors
    shape: torch.Size
    needs_base = False

    @property
    def factors(self) -> Factors:
        return self.product

    def dense(self, read_base: ReadBase) -> Tensor:
        return self.product.dense().reshape(self.shape)


@dataclass
class Added(Delta):
    """A change that is stored as such."""

    value: Tensor
    needs_base = False

    def dense(self, read_base: ReadBase) -> Tensor:
        return self.value


@dataclass
class Replaced(Delta):
    """A value that takes the place of the base model's."""

    name: str
    value: Tensor

    def dense(self, read_base: ReadBase) -> Tensor:
        return self.value.float() - read_base(self.name).float()


@dataclass
class Merged(Delta):
    """What PEFT's own merge makes of the base weight."""

    layer: BaseTunerLayer
    path: str
    leaf: str
    kind: str

    def dense(self, read_base: ReadBase) -> Tensor:
        layer = copy.deepcopy(self.layer)
        base = layer.get_base_layer()
        for leaf in _leaves(base):
            base._parameters[leaf] = nn.Parameter(
                read_base(f"{self.path}.{leaf}").float().clone(), requires_grad=False
            )
        before = base._parameters[self.leaf].detach().clone()
        try:
            layer.merge(safe_merge=False, adapter_names=[ADAPTER])
        except _MERGE_ERRORS as error:
            raise UnsupportedModelError(
                f"PEFT cannot merge the {self.kind} adapter of '{self.path}' into its weight ({error})."
            ) from error
        return layer.get_base_layer()._parameters[self.leaf].detach() - before


@dataclass
class Summed(Delta):
    """Several changes of one parameter."""

    parts: list[Delta]

    @property
    def needs_base(self) -> bool:
        return any(part.needs_base for part in self.parts)

    def dense(self, read_base: ReadBase) -> Tensor:
        return torch.stack([part.dense(read_base) for part in self.parts]).sum(dim=0)


def read_deltas(attached: Attached, kind: str) -> dict[str, Delta]:
    """The change of every parameter that an adapter touches, by name in the base model.

    Args:
        attached ([`Attached`]): The adapter.
        kind (`str`): What messages call a part of it that is no product of two factors.

    Raises:
        UnsupportedModelError: A part of the adapter cannot be expressed as a change of weights.
    """
    paths = {id(module): path for path, module in attached.modules.items()}
    found: dict[str, list[Delta]] = {}
    for name, delta in [*_wrapped(attached, paths, kind), *_replaced(attached)]:
        found.setdefault(name, []).append(delta)
    return {name: parts[0] if len(parts) == 1 else Summed(parts) for name, parts in found.items()}


def whole_modules(attached: Attached) -> list[str]:
    """The modules of the base model that an adapter saves whole."""
    paths = {id(module): path for path, module in attached.modules.items()}
    return [
        paths[id(module.original_module)]
        for module in attached.model.modules()
        if isinstance(module, ModulesToSaveWrapper) and ADAPTER in module.modules_to_save
    ]


def _wrapped(attached: Attached, paths: dict[int, str], kind: str) -> Iterator[tuple[str, Delta]]:
    for module in attached.model.modules():
        if isinstance(module, ModulesToSaveWrapper) and ADAPTER in module.modules_to_save:
            path = paths[id(module.original_module)]
            for name, value in module.modules_to_save[ADAPTER].state_dict().items():
                yield f"{path}.{name}", Replaced(f"{path}.{name}", value)
        elif isinstance(module, AdaLoraLayer):
            yield from _adalora_deltas(module, paths[id(module.get_base_layer())])
        elif isinstance(module, LoraLayer) and not kind:
            yield from _lora_deltas(module, paths[id(module.get_base_layer())])
        elif isinstance(module, BaseTunerLayer):
            path = paths[id(module.get_base_layer())]
            for leaf in _leaves(module.get_base_layer()):
                yield f"{path}.{leaf}", Merged(module, path, leaf, kind or type(module).__name__)


def _replaced(attached: Attached) -> Iterator[tuple[str, Delta]]:
    """Parameters of the base model that the adapter's file has values for: trained biases, embeddings saved along."""
    for path, module in attached.modules.items():
        for leaf, value in module._parameters.items():
            name = f"{path}.{leaf}" if path else leaf
            if value is not None and name in attached.hollow and value is not attached.hollow[name]:
                yield name, Replaced(name, value.detach())


def _leaves(module: nn.Module) -> Sequence[str]:
    return [leaf for leaf, value in module._parameters.items() if value is not None]


def _lora_deltas(layer: LoraLayer, path: str) -> Iterator[tuple[str, Delta]]:
    """The low-rank changes of one module under LoRA."""
    if ADAPTER not in layer.scaling:
        return
    base = layer.get_base_layer()
    scaling = layer.scaling[ADAPTER]
    leaf = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
    if ADAPTER in layer.lora_variant or not isinstance(
        layer, (Linear, Embedding, Conv1d, Conv2d, Conv3d, ParamWrapper)
    ):
        kind = type(layer.lora_variant.get(ADAPTER, layer)).__name__
        for leaf in _leaves(base):
            yield f"{path}.{leaf}", Merged(layer, path, leaf, kind)
        return
    if getattr(base, "groups", 1) > 1:
        raise UnsupportedModelError(
            f"'{path}' is a convolution with groups={base.groups}, whose LoRA is no product of two factors: PEFT cannot merge it."
        )
    yield f"{path}.{leaf}", LowRank(_oriented(layer, scaling), getattr(base, leaf).shape)
    if layer.lora_bias.get(ADAPTER) and not isinstance(layer, (Embedding, ParamWrapper)):
        if getattr(base, "bias", None) is None:
            raise UnsupportedModelError(
                f"The adapter has a bias for '{path}' (lora_bias=True), which has none in the base model: there is no "
                "parameter that it could be merged into."
            )
        yield f"{path}.bias", Added(layer.lora_B[ADAPTER].bias.detach() * scaling)


def is_transposed(layer: LoraLayer) -> bool:
    """Whether B A has the shape (out, in) and the parameter is stored as (in, out)."""
    if isinstance(layer, ParamWrapper):
        return layer.num_experts > 1 and getattr(layer.get_base_layer(), "is_transposed", False)
    return isinstance(layer, Embedding) or bool(getattr(layer, "fan_in_fan_out", False))


def _oriented(layer: LoraLayer, scaling: float) -> Factors:
    """s B A as the parameter is stored; a stack of it for the experts of a mixture."""
    if isinstance(layer, Embedding):
        first, second = layer.lora_embedding_A[ADAPTER], layer.lora_embedding_B[ADAPTER]
    else:
        first, second = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    first, second = first.detach(), second.detach()
    if isinstance(layer, ParamWrapper) and layer.num_experts > 1:
        first = first.reshape(layer.num_experts, -1, first.shape[-1])
        second = second.reshape(second.shape[0], -1, layer.num_experts).permute(2, 0, 1)
        product = Factors(second * scaling, first)
    else:
        product = Factors(second.flatten(1) * scaling, first.flatten(1))
    return product.mT if is_transposed(layer) else product


def lora_tensors(layer: LoraLayer, product: Factors) -> tuple[Tensor, Tensor]:
    """The inverse for a scaling of 1: A and B of a change in the orientation that the parameter is stored in."""
    product = product.mT if is_transposed(layer) else product
    if isinstance(layer, ParamWrapper) and layer.num_experts > 1:
        first = product.right.flatten(0, 1)
        return first, product.left.permute(1, 2, 0).flatten(1)
    if isinstance(layer, Embedding):
        return product.right, product.left
    shapes = layer.lora_A[ADAPTER].weight.shape, layer.lora_B[ADAPTER].weight.shape
    return product.right.reshape(shapes[0]), product.left.reshape(shapes[1])


def _adalora_deltas(layer: AdaLoraLayer, path: str) -> Iterator[tuple[str, Delta]]:
    """Δ = s B (A ∘ E) / (ranks + 1e-5), as PEFT merges it."""
    if ADAPTER not in layer.scaling:
        return
    scaling = layer.scaling[ADAPTER] / (layer.ranknum[ADAPTER].item() + 1e-5)
    product = Factors(
        layer.lora_B[ADAPTER].detach() * scaling, layer.lora_A[ADAPTER].detach() * layer.lora_E[ADAPTER].detach()
    )
    product = product.mT if layer.fan_in_fan_out else product
    yield f"{path}.weight", LowRank(product, layer.get_base_layer().weight.shape)
