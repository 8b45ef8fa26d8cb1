"""A model without weights, and reading off it what `anatomy.py` describes.

The shell is the real transformers class on the meta device. Kinds come from module types, never from names or shapes: an
embedding table is two-dimensional too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import UnsupportedModelError
from ..kinds import ParameterKind
from .anatomy import Anatomy, ParameterInfo
from .blocks import find_block_lists


if TYPE_CHECKING:
    from transformers import PretrainedConfig


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.RMSNorm)


def model_class_of(config: PretrainedConfig, where: str, trust_remote_code: bool = False) -> type[PreTrainedModel]:
    """The class that a config names: `architectures[0]` in transformers, or its `auto_map` when remote code is trusted.

    Raises:
        UnsupportedModelError: There is no such class, or it is remote code and `trust_remote_code` is false.
    """
    import transformers

    names = getattr(config, "architectures", None) or []
    auto_map = getattr(config, "auto_map", None) or {}
    remote = next((reference for key, reference in auto_map.items() if key.startswith("AutoModel")), None)
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise UnsupportedModelError(
            f"{where}: 'architectures' in config.json must be a list of class names, got {names!r}."
        )
    if names:
        found = getattr(transformers, names[0], None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    if remote is not None:
        return _remote_class(remote, names, auto_map, config, where, trust_remote_code)
    raise UnsupportedModelError(
        f"{where}: config.json names the architecture(s) {names or 'none'}, which transformers does not have "
        f"(model_type '{config.model_type}'). Set 'architectures' to a class of transformers."
    )


def _remote_class(remote, names, auto_map, config, where, trust_remote_code) -> type[PreTrainedModel]:
    if not trust_remote_code:
        raise UnsupportedModelError(
            f"{where} is defined by code in its own repository ({remote}). Read it, then pass trust_remote_code=True."
        )
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    reference = next((ref for ref in auto_map.values() if names and ref.rpartition(".")[2] == names[0]), remote)
    found = get_class_from_dynamic_module(reference, config._name_or_path or where)
    if not issubclass(found, PreTrainedModel):
        raise UnsupportedModelError(f"{where}: '{reference}', which its config.json names, is no PreTrainedModel.")
    return found


def build_shell(model_class: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model on the meta device, without weights, in evaluation mode.

    Args:
        model_class (`type`): Its class.
        config ([`~transformers.PretrainedConfig`]): Its config, which is not changed.
        dtype (`torch.dtype`): What `shell.dtype` says.
    """
    with torch.device("meta"):
        return model_class._from_config(config, dtype=dtype).eval()


def read_anatomy(shell: PreTrainedModel) -> Anatomy:
    """What the modules of a shell say about its parameters.

    Args:
        shell ([`~transformers.PreTrainedModel`]): A model, usually on the meta device.
    """
    prefix = shell.base_model_prefix
    backbone = f"{prefix}." if prefix and isinstance(getattr(shell, prefix, None), nn.Module) else ""
    return Anatomy(
        backbone_prefix=backbone,
        parameters=_parameters(shell, backbone),
        ties=dict(getattr(shell, "all_tied_weights_keys", None) or {}),
        absent=list(getattr(shell, "_keys_to_ignore_on_load_missing", None) or []),
        float32={
            str(dtype): [pattern.replace("*", ".*") for pattern in shell._get_dtype_plan(dtype)]
            for dtype in (torch.float16, torch.bfloat16)
        },
    )


def _parameters(shell: PreTrainedModel, backbone: str) -> dict[str, ParameterInfo]:
    owners = {
        (f"{path}.{name}" if path else name): (module, name)
        for path, module in shell.named_modules()
        for name in [*module._parameters, *module._buffers]
    }
    depths, poolers, output = _depths(shell, list(owners)), _poolers(shell), output_embeddings(shell)
    infos = {}
    for name, tensor in shell.state_dict(keep_vars=True).items():
        module, leaf = owners.get(name, (None, name))
        is_output = output is not None and module is output
        outside = bool(backbone) and not name.startswith(backbone)
        is_readout = outside or is_output or name.startswith(poolers)
        kind = ParameterKind.HEAD if is_readout else _kind(module, leaf, tensor)
        if not isinstance(tensor, nn.Parameter):
            kind = ParameterKind.BUFFER
        infos[name] = ParameterInfo(name, kind, depths.get(name, 0.0), tuple(tensor.shape), outside and not is_output)
    return infos


def _depths(shell: PreTrainedModel, names: list[str]) -> dict[str, float]:
    lists = find_block_lists(shell)
    seen: set[str] = set()
    depths = {}
    for name in names:
        owner = next((path for path in lists if name.startswith(f"{path}.")), None)
        if owner is not None:
            seen.add(owner)
            index, count = int(name[len(owner) + 1 :].split(".", 1)[0]), len(lists[owner])
            depths[name] = index / (count - 1) if count > 1 else 0.0
        else:
            near = [path for path in lists if name.startswith(path.rpartition(".")[0] + ".")] or list(lists)
            depths[name] = 1.0 if any(path in seen for path in near) else 0.0
    return depths


def _poolers(shell: PreTrainedModel) -> tuple[str, ...]:
    """The prefixes of poolers. They belong to the readout: BERT's pooler does what the first layer of RoBERTa's head does, and
    merging it as one of the backbone's linear layers costs accuracy."""
    return tuple(
        f"{path}." for path, module in shell.named_modules() if type(module).__name__.endswith("Pooler") and path
    )


def output_embeddings(shell: PreTrainedModel) -> nn.Module | None:
    """The module that turns hidden states into logits over the vocabulary, where a model has one."""
    try:
        return shell.get_output_embeddings()
    except (NotImplementedError, AttributeError):
        return None


def _kind(module: nn.Module | None, leaf: str, tensor: Any) -> ParameterKind:
    """The kind of a parameter from the module that owns it."""
    if leaf == "bias" or leaf.endswith("_bias"):
        return ParameterKind.BIAS
    if isinstance(module, Conv1D):
        return ParameterKind.TRANSPOSED_LINEAR
    if isinstance(module, nn.Linear):
        return ParameterKind.LINEAR
    if isinstance(module, nn.Embedding):
        return ParameterKind.EMBEDDING
    if isinstance(module, _CONVOLUTIONS):
        return ParameterKind.CONVOLUTION
    if isinstance(module, _NORMS) or (module is not None and type(module).__name__.endswith("Norm")):
        return ParameterKind.NORM
    if isinstance(module, nn.MultiheadAttention) and leaf == "in_proj_weight":
        return ParameterKind.LINEAR
    if module is not None and type(module).__name__.endswith("Router") and tensor.ndim == 2 and leaf == "weight":
        return ParameterKind.LINEAR
    if tensor.ndim == 3 and hasattr(module, "is_transposed") and hasattr(module, "num_experts"):
        return ParameterKind.TRANSPOSED_EXPERT_LINEAR if module.is_transposed else ParameterKind.EXPERT_LINEAR
    if tensor.ndim == 3 and module is not None and type(module).__name__.endswith("Experts"):
        return ParameterKind.EXPERT_LINEAR
    return ParameterKind.OTHER
