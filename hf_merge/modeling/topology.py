"""How tensors flow between the parameters of a backbone, found from one traced forward and from module types: which linear
layers read the same tensor, which tables and biases are in the channels of the merged model, and what the head reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import UnsupportedModelError
from ..methods.backbone_base import FeatureTap, LinearSite, Topology


if TYPE_CHECKING:
    from transformers import PreTrainedModel


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
FEATURES = ("last_hidden_state", "pooler_output")


def backbone_of(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a model that is merged: everything but the task's head."""
    prefix = model.base_model_prefix
    return getattr(model, prefix) if prefix and isinstance(getattr(model, prefix, None), nn.Module) else model


def example_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """A small input for tracing.

    Raises:
        UnsupportedModelError: The model reads neither text nor images.
    """
    config, device = model.config, model.device
    if model.main_input_name == "input_ids":
        return {"input_ids": (torch.arange(12, device=device) % min(config.vocab_size, 7)).reshape(2, 6)}
    if model.main_input_name == "pixel_values" and getattr(config, "image_size", None):
        size = config.image_size if isinstance(config.image_size, (list, tuple)) else (config.image_size,) * 2
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(2, config.num_channels, *size, generator=generator)
        return {"pixel_values": images.to(device)}
    raise UnsupportedModelError(
        f"{type(model).__name__} reads '{model.main_input_name}': models without a shared base are merged for text and images only."
    )


def trace(model: PreTrainedModel, inputs: Mapping[str, Tensor] | None = None) -> Topology:
    """The topology of a model.

    Args:
        model ([`~transformers.PreTrainedModel`]): With weights, in evaluation mode.
        inputs (`Mapping`, *optional*): Arguments of its forward.

    Raises:
        UnsupportedModelError: A part of the model cannot be folded; names it and says why.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise _unsupported(model, "it is an encoder-decoder, whose two stacks have no common residual stream")
    record = _Record(model)
    record.run(example_inputs(model) if inputs is None else inputs)
    backbone = backbone_of(model)
    topology = Topology()
    owners = {id(module): path for path, module in backbone.named_modules()}
    groups: dict[Any, int] = {}
    for module, key in record.calls:
        if id(module) in owners and isinstance(module, (nn.Linear, Conv1D)):
            path = owners[id(module)]
            group = None if key is None else groups.setdefault(key, len(groups))
            bias = module.bias is not None
            topology.linears[path] = LinearSite(path, group, isinstance(module, Conv1D), bias)
    _sort_parameters(model, backbone, topology, record)
    if backbone is not model:
        topology.tap = _find_tap(model, backbone, record)
    return topology


def _sort_parameters(model: nn.Module, backbone: nn.Module, topology: Topology, record: _Record) -> None:
    width = getattr(backbone.config, "hidden_size", None)
    if not isinstance(width, int):
        raise _unsupported(model, "its config has no single 'hidden_size', the width of a residual stream")
    for path, module in backbone.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = f"{path}.{leaf}" if path else leaf
            if path in topology.linears or path in topology.convolutions:
                continue
            if isinstance(module, (nn.Linear, Conv1D)):
                group = len(record.calls) + len(topology.linears)
                bias = module.bias is not None
                topology.linears[path] = LinearSite(path, group, isinstance(module, Conv1D), bias)
            elif isinstance(module, CONVOLUTIONS):
                _check_convolution(model, path, module, record)
                topology.convolutions[path] = module.bias is not None
            elif (
                type(module).__name__.endswith(("Experts", "Router")) or parameter.ndim == 3 and parameter.shape[0] > 1
            ):
                raise _unsupported(model, f"'{name}' belongs to a mixture of experts, whose routing is not linear")
            elif isinstance(module, nn.MultiheadAttention):
                raise _unsupported(model, f"'{name}' is the fused projection of torch's own attention")
            elif isinstance(module, nn.Embedding) or parameter.ndim >= 2 and parameter.shape[-1] == width:
                topology.tables.append(name)
            else:
                topology.direct.append(name)


def _check_convolution(model: nn.Module, path: str, module: nn.Module, record: _Record) -> None:
    if module.groups != 1 or any(key is not None for called, key in record.calls if called is module):
        raise _unsupported(model, f"'{path}' is a convolution inside of the network, not one on its input")


def _find_tap(model: nn.Module, backbone: nn.Module, record: _Record) -> FeatureTap | None:
    outputs = {name: getattr(record.output, name, None) for name in FEATURES}
    inside = {id(module) for module in backbone.modules()}
    names = {id(module): path for path, module in model.named_modules()}
    found: dict[tuple[str, int | None], list[str]] = {}
    for module, value in record.inputs:
        if id(module) in inside:
            continue
        tap = next((tap for name, known in outputs.items() if (tap := _tap_of(name, known, value)) is not None), None)
        if tap is None:
            continue
        if not isinstance(module, (nn.Linear, Conv1D)):
            kind = type(module).__name__
            raise _unsupported(
                model, f"its head reads the features with a {kind} ('{names[id(module)]}'), which is not linear"
            )
        found.setdefault(tap, []).append(names[id(module)])
    if len(found) != 1:
        raise _unsupported(model, "no linear layer of its head reads the backbone's output as it is")
    (((name, token), layers),) = found.items()
    return FeatureTap(name, token, tuple(layers))


def _tap_of(name: str, known: Tensor | None, value: Tensor) -> tuple[str, int | None] | None:
    """Which part of a field of the backbone's output a tensor is a view of."""
    if known is None or known.untyped_storage().data_ptr() != value.untyped_storage().data_ptr():
        return None
    if value.ndim == known.ndim:
        return (name, None) if value.shape == known.shape else None
    token = (value.storage_offset() - known.storage_offset()) // known.stride(1)
    return name, token


class _Record:
    """What one forward calls: every leaf module with parameters, and the tensor that it reads."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.calls: list[tuple[nn.Module, Any]] = []
        self.inputs: list[tuple[nn.Module, Tensor]] = []
        self.output: Any = None

    def run(self, inputs: Mapping[str, Tensor]) -> None:
        leaves = [module for module in self.model.modules() if module._parameters and not list(module.children())]
        backbone = backbone_of(self.model)
        handles = [module.register_forward_pre_hook(self._before) for module in leaves]
        handles.append(backbone.register_forward_hook(lambda module, args, output: setattr(self, "output", output)))
        flags = {parameter: parameter.requires_grad for parameter in self.model.parameters()}
        try:
            # Whether a tensor depends on a parameter tells the network's own tensors from its input.
            self.model.requires_grad_(True)
            with torch.enable_grad():
                self.model(**inputs, **_without_cache(self.model))
        finally:
            for handle in handles:
                handle.remove()
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)
        self._check_calls(backbone)

    def _before(self, module: nn.Module, args: tuple) -> None:
        if not args or not isinstance(args[0], Tensor):
            return
        value = args[0]
        # The tensors are kept until the end of the run: a storage that is freed could be used again for another tensor.
        self.inputs.append((module, value))
        key = (value.untyped_storage().data_ptr(), value.storage_offset(), tuple(value.shape), value.stride())
        self.calls.append((module, key if value.requires_grad else None))

    def _check_calls(self, backbone: nn.Module) -> None:
        names = {id(module): path for path, module in backbone.named_modules()}
        counts = Counter(id(module) for module, _ in self.calls if isinstance(module, (nn.Linear, Conv1D)))
        repeated = [names[key] for key, count in counts.items() if count > 1 and key in names]
        if repeated:
            raise _unsupported(
                self.model, f"'{repeated[0]}' is used more than once in a forward: it reads several tensors"
            )


def _without_cache(model: nn.Module) -> dict[str, bool]:
    return {"use_cache": False} if getattr(model.config, "use_cache", None) is not None and _takes_cache(model) else {}


def _takes_cache(model: nn.Module) -> bool:
    import inspect

    return "use_cache" in inspect.signature(model.forward).parameters


def _unsupported(model: nn.Module, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(model).__name__} cannot be merged without a shared base: {reason}. Experts that were fine-tuned from one base "
        "can be merged by 'wudi', 'ties' or 'linear'."
    )
