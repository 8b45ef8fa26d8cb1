"""Dense decoders, and the mixtures of experts whose layers are theirs but for the MLP.

A family is a pair of classes of transformers: the mixture computes what the dense model does when all its experts are the dense
model's MLP. That a mixture has a place for every weight is checked on the two shells; what their configs say besides is checked here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


_EXPERTS = {
    ".mlp.experts.gate_up_proj": (".mlp.gate_proj.weight", ".mlp.up_proj.weight"),
    ".mlp.experts.down_proj": (".mlp.down_proj.weight",),
}
_ROUTER = ".mlp.gate.weight"
_OWN = frozenset({"model_type", "architectures", "transformers_version", "_name_or_path", "dtype"})


@dataclass(frozen=True)
class MixtureFamily:
    """A dense class and its mixture.

    Args:
        dense (`str`): The class of the experts.
        mixture (`str`): The class of the result.
        settings (`Callable`): What the mixture's config says beside what the two have in common, from the dense config.
        refusal (`Callable`): Why a dense config has no counterpart, or `None`.
    """

    dense: str
    mixture: str
    settings: Callable[[PretrainedConfig], dict[str, Any]]
    refusal: Callable[[PretrainedConfig], str | None] = lambda config: None

    @property
    def mixture_class(self) -> type[PreTrainedModel]:
        import transformers

        return getattr(transformers, self.mixture)

    def mixture_config(self, config: PretrainedConfig, experts: int, experts_per_token: int) -> PretrainedConfig:
        """The config of the mixture.

        Args:
            config ([`~transformers.PretrainedConfig`]): The dense model's, which is not changed.
            experts (`int`): How many experts every layer has.
            experts_per_token (`int`): How many of them a token is sent to.
        """
        config_class = self.mixture_class.config_class
        known, values = config_class().to_dict().keys() - _OWN, copy.deepcopy(config.to_dict())
        common = {key: values[key] for key in known if key in values}
        own = {"num_local_experts": experts, "num_experts_per_tok": experts_per_token}
        return config_class(**{**common, **own, **self.settings(config)})


def _head_dim(config: PretrainedConfig) -> dict[str, Any]:
    return {"head_dim": getattr(config, "head_dim", None)}


def _qwen3(config: PretrainedConfig) -> dict[str, Any]:
    # Without norm_topk_prob the weights of the chosen experts do not sum to 1.
    width = {"moe_intermediate_size": config.intermediate_size, "norm_topk_prob": True}
    return _head_dim(config) | width | {"use_sliding_window": False, "sliding_window": None}


def _slides(config: PretrainedConfig) -> str | None:
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        return "some of its layers have a sliding window, and in a Qwen3MoeForCausalLM all layers have one or none"
    return None


FAMILIES = {
    family.dense: family
    for family in (
        MixtureFamily("LlamaForCausalLM", "MixtralForCausalLM", _head_dim),
        MixtureFamily("MistralForCausalLM", "MixtralForCausalLM", _head_dim),
        MixtureFamily("Qwen3ForCausalLM", "Qwen3MoeForCausalLM", _qwen3, _slides),
    )
}
"""By the name of the dense class."""


def mixture_refusal(model_class: type[PreTrainedModel], config: PretrainedConfig) -> str | None:
    """Why a model cannot become an expert of a mixture, as far as its class and config tell; `None` when it can."""
    family = FAMILIES.get(model_class.__name__)
    if family is None:
        return (
            f"a {model_class.__name__} has no mixture of experts that computes the same; experts can be "
            f"{', '.join(FAMILIES)}"
        )
    if config.hidden_act != "silu":
        return f"its hidden_act is '{config.hidden_act}', and the experts of a {family.mixture} use 'silu'"
    return family.refusal(config)


def expert_weights(name: str) -> list[str] | None:
    """The weights of the dense model that one expert's part of a mixture's parameter is made of, one below the other.

    Args:
        name (`str`): A parameter of the mixture.

    Returns:
        `list[str]` or `None`: Module names, (out, in) each; `None` for a parameter that is not an expert's.
    """
    for suffix, parts in _EXPERTS.items():
        if name.endswith(suffix):
            return [name.removesuffix(suffix) + part for part in parts]
    return None


def routed_module(name: str) -> str | None:
    """The module of the dense model whose input a router reads, where the mixture's parameter `name` is a router; else `None`."""
    return name.removesuffix(".gate.weight") if name.endswith(_ROUTER) else None
