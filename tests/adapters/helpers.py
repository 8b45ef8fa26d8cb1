"""Tiny adapters of every kind, made by PEFT, and the oracle: PEFT's own merge into each model, as dense changes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import peft
import torch
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    C3AConfig,
    DeloraConfig,
    FourierFTConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    RandLoraConfig,
    ShiraConfig,
    TrainableTokensConfig,
    VBLoRAConfig,
    VeraConfig,
    WaveFTConfig,
    get_peft_model,
)
from torch import Tensor
from transformers import PreTrainedModel

from tests.zoo import ZOO, save_zoo_model


@dataclass(frozen=True)
class Kind:
    """One kind of adapter.

    Args:
        family (`str`): The model, a key of the zoo.
        config (`Callable`): The config of adapter number 0, 1, 2.
        exact (`bool`): Whether its changes are factors, so that the merged adapter is exact without a rank.
        holds (`bool`): Whether an adapter can hold them at all.
    """

    family: str
    config: Callable[[int], PeftConfig]
    exact: bool = True
    holds: bool = True


def lora(**settings) -> Callable[[int], LoraConfig]:
    """LoRA with random factors and ranks that differ."""

    def config(index: int) -> LoraConfig:
        chosen = {"r": 2 + index, "lora_alpha": 3, "init_lora_weights": False} | settings
        return LoraConfig(**{key: value(index) if callable(value) else value for key, value in chosen.items()})

    return config


def other(config_cls: type[PeftConfig], **settings) -> Callable[[int], PeftConfig]:
    return lambda index: config_cls(**settings)


LINEAR = ["q_proj", "down_proj"]
QUERY = ["q_proj"]
KINDS: dict[str, Kind] = {
    "lora": Kind("llama", lora(target_modules=LINEAR)),
    "lora_all_linear": Kind("llama", lora(target_modules="all-linear")),
    "lora_regex": Kind("llama", lora(target_modules=r".*\.layers\.[02]\..*(q|v)_proj")),
    "rslora": Kind("llama", lora(target_modules=LINEAR, use_rslora=True)),
    "rank_pattern": Kind(
        "llama",
        lora(
            target_modules=LINEAR, rank_pattern={"q_proj": 5, "layers.1.mlp.down_proj": 1}, alpha_pattern={"q_proj": 9}
        ),
    ),
    "rslora_patterns": Kind(
        "llama",
        lora(target_modules=LINEAR, use_rslora=True, rank_pattern={"down_proj": 4}, alpha_pattern={"down_proj": 7}),
    ),
    "layers_to_transform": Kind("llama", lora(target_modules=QUERY, layers_to_transform=lambda index: [index])),
    "different_targets": Kind(
        "llama", lora(target_modules=lambda index: [["q_proj"], ["v_proj", "q_proj"], ["up_proj"]][index])
    ),
    "scaling_zero": Kind("llama", lora(target_modules=QUERY, lora_alpha=lambda index: 3 * index)),
    "conv1d": Kind("gpt2", lora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "embedding": Kind("llama", lora(target_modules=["embed_tokens", "q_proj"])),
    "tied_embedding": Kind("gpt2", lora(target_modules=["wte"])),
    "lm_head": Kind("llama", lora(target_modules=["lm_head", "q_proj"])),
    "convolution": Kind("resnet", lora(target_modules=["convolution"])),
    "patch_convolution": Kind("vit", lora(target_modules=["projection", "query"])),
    "bias_lora_only": Kind("gpt2", lora(target_modules=["c_attn"], fan_in_fan_out=True, bias="lora_only")),
    "bias_all": Kind("bert", lora(target_modules=["query"], bias="all")),
    "lora_bias": Kind("bert", lora(target_modules=["query", "value"], lora_bias=True)),
    "modules_to_save": Kind("llama", lora(target_modules=QUERY, modules_to_save=["lm_head"])),
    "norms_to_save": Kind("llama", lora(target_modules=QUERY, modules_to_save=["norm"])),
    "target_parameter": Kind("llama", lora(target_modules=QUERY, target_parameters=["up_proj.weight"])),
    "mixture": Kind(
        "mixtral", lora(target_modules=QUERY, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    ),
    "transposed_mixture": Kind(
        "gpt-oss", lora(target_modules=QUERY, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    ),
    "adalora": Kind(
        "llama",
        other(AdaLoraConfig, init_r=4, target_r=2, total_step=10, target_modules=QUERY, init_lora_weights=False),
    ),
    "dora": Kind("llama", lora(target_modules=LINEAR, use_dora=True), exact=False),
    "trainable_tokens_in_lora": Kind(
        "llama", lora(target_modules=QUERY, trainable_token_indices=[52, 28]), exact=False
    ),
    "loha": Kind("llama", other(LoHaConfig, r=3, target_modules=QUERY, init_weights=False), exact=False),
    "lokr": Kind("llama", other(LoKrConfig, r=3, target_modules=QUERY, init_weights=False), exact=False),
    "oft": Kind("llama", other(OFTConfig, oft_block_size=8, target_modules=QUERY, init_weights=False), exact=False),
    "boft": Kind("llama", other(BOFTConfig, boft_block_size=4, target_modules=QUERY, init_weights=False), exact=False),
    "ia3": Kind(
        "llama",
        other(IA3Config, target_modules=LINEAR, feedforward_modules=["down_proj"], init_ia3_weights=False),
        exact=False,
    ),
    "vera": Kind("llama", other(VeraConfig, r=4, target_modules=QUERY, init_weights=False), exact=False),
    "hra": Kind("llama", other(HRAConfig, r=4, target_modules=QUERY, init_weights=False), exact=False),
    "miss": Kind("llama", other(MissConfig, r=4, target_modules=QUERY, init_weights=False), exact=False),
    "fourierft": Kind(
        "llama", other(FourierFTConfig, n_frequency=20, target_modules=QUERY, init_weights=False), exact=False
    ),
    "vblora": Kind(
        "llama", other(VBLoRAConfig, num_vectors=8, vector_length=8, r=4, target_modules=QUERY), exact=False
    ),
    "randlora": Kind("llama", other(RandLoraConfig, r=4, target_modules=QUERY, init_weights=False), exact=False),
    "shira": Kind("llama", other(ShiraConfig, r=2, target_modules=QUERY, init_weights=False), exact=False),
    "c3a": Kind("llama", other(C3AConfig, block_size=8, target_modules=QUERY), exact=False),
    "waveft": Kind(
        "llama", other(WaveFTConfig, n_frequency=20, target_modules=QUERY, init_weights=False), exact=False
    ),
    "delora": Kind("llama", other(DeloraConfig, r=4, target_modules=QUERY, init_weights=False), exact=False),
    "glora": Kind("llama", other(peft.GloraConfig, r=2, target_modules=QUERY), exact=False),
    "pvera": Kind("llama", other(peft.PveraConfig, r=2, target_modules=QUERY), exact=False),
    "road": Kind("llama", other(peft.RoadConfig, group_size=8, target_modules=QUERY), exact=False),
    "gralora": Kind("llama", other(peft.GraloraConfig, r=4, target_modules=QUERY), exact=False),
    "unilora": Kind("llama", other(peft.UniLoraConfig, r=2, target_modules=QUERY), exact=False),
    "ln_tuning": Kind("llama", other(LNTuningConfig), exact=False, holds=False),
    "trainable_tokens": Kind(
        "llama",
        other(TrainableTokensConfig, token_indices=[52, 28], target_modules=["embed_tokens"], init_weights=False),
        exact=False,
    ),
}


@dataclass
class AdapterBed:
    """A base model and adapters of it, on disk."""

    base: Path
    adapters: dict[str, Path] = field(default_factory=dict)
    model_class: type[PreTrainedModel] | None = None
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    _changes: dict[str, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    def first(self, count: int) -> AdapterBed:
        """The same bed with the first adapters only."""
        return replace(self, adapters=dict(list(self.adapters.items())[:count]))

    def load(self) -> PreTrainedModel:
        """The base model."""
        return self.model_class.from_pretrained(self.base).eval()

    def attached(self, folder: Path) -> PeftModel:
        """The base model with an adapter, as users load it."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return PeftModel.from_pretrained(self.load(), folder).eval()

    @torch.no_grad()
    def logits(self, model: torch.nn.Module) -> Tensor:
        inputs = dict(self.inputs)
        output = model.base_model.model(**inputs) if isinstance(model, PeftModel) else model(**inputs)
        return output.logits if "logits" in output else output.last_hidden_state

    def change(self, name: str) -> dict[str, Tensor]:
        """The dense change of every parameter, by PEFT's own merge of one adapter, tied parameters apart."""
        if name not in self._changes:
            self._changes[name] = self._merge_alone(name)
        return self._changes[name]

    def _merge_alone(self, name: str) -> dict[str, Tensor]:
        base = untied(self.load())
        state = {key: value.clone() for key, value in base.state_dict().items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = PeftModel.from_pretrained(base, self.adapters[name]).merge_and_unload().state_dict()
        return {
            key: merged[key].double() - value.double() for key, value in state.items() if value.is_floating_point()
        }

    def oracle(self, weights: Sequence[float]) -> PreTrainedModel:
        """θ_0 + Σ w_i Δ_i on dense weights."""
        model = untied(self.load())
        state = model.state_dict()
        for weight, name in zip(weights, self.adapters, strict=True):
            for key, delta in self.change(name).items():
                state[key].copy_((state[key].double() + weight * delta).to(state[key].dtype))
        return model


def untied(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with parameters of their own where some were tied: an adapter acts on one module, not on all that share
    its weight."""
    for target in list(getattr(model, "all_tied_weights_keys", None) or {}):
        module, _, leaf = target.rpartition(".")
        owner = model.get_submodule(module)
        setattr(owner, leaf, torch.nn.Parameter(getattr(owner, leaf).detach().clone()))
    model.config.tie_word_embeddings = False
    return model


def make_adapters(kind: Kind, folder: Path, count: int, **changes) -> AdapterBed:
    """Saves a base model and adapters with random values."""
    entry = ZOO[kind.family]
    base = entry.build()
    bed = AdapterBed(save_zoo_model(base, folder / "base"), model_class=type(base), inputs=entry.inputs())
    for index, name in enumerate("abc"[:count]):
        bed.adapters[name] = save_adapter(bed, kind.config(index), folder / name, seed=index + 1, **changes)
    return bed


def save_adapter(bed: AdapterBed, config: PeftConfig, folder: Path, seed: int, noise: float = 0.1) -> Path:
    """Attaches an adapter, moves its trainable parameters at random and saves it."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = get_peft_model(bed.load(), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += noise * torch.randn_like(parameter)
        model.peft_config["default"].base_model_name_or_path = str(bed.base)
        model.save_pretrained(folder, save_embedding_layers=False)
    return folder
