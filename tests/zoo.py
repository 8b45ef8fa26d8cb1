"""Tiny models of every family, built from configs: no download, the whole zoo in seconds, the same bits for the same seed.

`ZOO` maps a family's name to a [`ZooEntry`]. [`perturbed`] makes a fine-tuned copy of a model and [`save_zoo_model`] writes a
checkpoint in one of the forms that checkpoints have in the wild. Nothing here knows hf_merge.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel


VOCAB = 99
SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
IMAGE = {"image_size": 16, "patch_size": 8}
DECODER = {"vocab_size": VOCAB, "num_key_value_heads": 2, "max_position_embeddings": 64, **SIZE}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
T5 = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 3, "num_heads": 4, "decoder_start_token_id": 0}
CLIP_TEXT = {"max_position_embeddings": 32, "eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1, **SIZE}
NO_SPECIAL_TOKENS = {"bos_token_id": None, "eos_token_id": None}

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class ZooEntry:
    """One family.

    Args:
        name (`str`): The key in `ZOO`.
        model_class (`str`): The class, by its name in transformers.
        config (`Callable`): Makes the config.
        inputs (`Callable`): Makes a batch, the same one at every call.
    """

    name: str
    model_class: str
    config: Callable[[], transformers.PreTrainedConfig]
    inputs: Callable[[], Inputs]

    def build(self, seed: int = 0) -> PreTrainedModel:
        """The model with random weights, in eval mode. The global generator is left as it was."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return getattr(transformers, self.model_class)(self.config()).eval()


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def _tokens(length: int = 7) -> Tensor:
    return torch.randint(5, VOCAB, (2, length), generator=_generator())


def _text() -> Inputs:
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": _tokens(), "attention_mask": mask}


def _images() -> Inputs:
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=_generator())}


def _text_and_images() -> Inputs:
    return {**_text(), **_images()}


def _sequence_pair() -> Inputs:
    return {**_text(), "decoder_input_ids": _tokens(5)}


def _spectrogram() -> Inputs:
    return {"input_features": torch.randn(2, 8, 40, generator=_generator()), "decoder_input_ids": _tokens(5)}


def _audio() -> Inputs:
    return {"input_values": torch.randn(2, 400, generator=_generator())}


def _image_tokens() -> Inputs:
    return {"input_ids": torch.cat([torch.full((2, 4), 3), _tokens(5)], 1), **_images()}


ZOO: dict[str, ZooEntry] = {}


def _add(name: str, model_class: str, config_class: str, inputs: Callable[[], Inputs], **settings) -> None:
    def config() -> transformers.PreTrainedConfig:
        return getattr(transformers, config_class)(**copy.deepcopy(settings))

    ZOO[name] = ZooEntry(name, model_class, config, inputs)


def _add_encoders() -> None:
    bert = {"vocab_size": VOCAB, **SIZE}
    relative = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], **bert}
    shared = {"position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True}
    local = {"pad_token_id": 0, "global_attn_every_n_layers": 2, "local_attention": 4}
    small = {"vocab_size": VOCAB, "dim": 32, "hidden_dim": 64, "n_layers": 3, "n_heads": 4}
    _add("bert", "BertForSequenceClassification", "BertConfig", _text, **bert)
    _add("bert-mlm", "BertForMaskedLM", "BertConfig", _text, **bert)
    _add("bert-qa", "BertForQuestionAnswering", "BertConfig", _text, **bert)
    _add("roberta", "RobertaForSequenceClassification", "RobertaConfig", _text, max_position_embeddings=64, **bert)
    _add("distilbert", "DistilBertForSequenceClassification", "DistilBertConfig", _text, **small)
    _add("electra", "ElectraForTokenClassification", "ElectraConfig", _text, embedding_size=16, **bert)
    _add("deberta", "DebertaForSequenceClassification", "DebertaConfig", _text, **relative)
    _add("deberta-v2", "DebertaV2ForSequenceClassification", "DebertaV2Config", _text, **shared, **relative)
    _add("modernbert", "ModernBertForSequenceClassification", "ModernBertConfig", _text, **local, **bert)


def _add_vision_and_audio() -> None:
    layers = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    windows = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
    stages = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic"}
    waves = {"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    towers = {"text_config": {"vocab_size": VOCAB, **CLIP_TEXT}, "vision_config": {**IMAGE, **SIZE}}
    _add("vit", "ViTForImageClassification", "ViTConfig", _images, **IMAGE, **SIZE)
    _add("dinov2", "Dinov2ForImageClassification", "Dinov2Config", _images, **IMAGE, **layers)
    _add("swin", "SwinForImageClassification", "SwinConfig", _images, window_size=2, **windows)
    _add("resnet", "ResNetForImageClassification", "ResNetConfig", _images, **stages)
    _add("clip", "CLIPModel", "CLIPConfig", _text_and_images, projection_dim=16, **towers)
    _add(
        "clip-vision", "CLIPVisionModelWithProjection", "CLIPVisionConfig", _images, projection_dim=16, **IMAGE, **SIZE
    )
    _add("wav2vec2", "Wav2Vec2ForCTC", "Wav2Vec2Config", _audio, vocab_size=VOCAB, **waves, **positions, **SIZE)


def _add_decoders() -> None:
    heads = {"head_dim": 8, **DECODER}
    window = {"sliding_window": 4}
    alternating = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    hybrid = {
        "shared_expert_intermediate_size": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    }
    few = {"num_local_experts": 4, "num_experts_per_tok": 2}
    gpt2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
    short = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    opt = {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64, **short}
    qwen2 = {"use_sliding_window": True, "max_window_layers": 1, **window}
    _add("llama", "LlamaForCausalLM", "LlamaConfig", _text, **DECODER)
    _add("mistral", "MistralForCausalLM", "MistralConfig", _text, **window, **DECODER)
    _add("qwen2", "Qwen2ForCausalLM", "Qwen2Config", _text, **qwen2, **DECODER)
    _add("qwen3", "Qwen3ForCausalLM", "Qwen3Config", _text, **heads)
    _add("qwen3-next", "Qwen3NextForCausalLM", "Qwen3NextConfig", _text, **MOE, **hybrid, **heads)
    _add("gemma2", "Gemma2ForCausalLM", "Gemma2Config", _text, **window, **heads)
    _add("gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig", _text, **window, **alternating, **heads)
    _add("phi3", "Phi3ForCausalLM", "Phi3Config", _text, pad_token_id=0, **NO_SPECIAL_TOKENS, **DECODER)
    _add("gpt2", "GPT2LMHeadModel", "GPT2Config", _text, vocab_size=VOCAB, **NO_SPECIAL_TOKENS, **gpt2)
    _add(
        "gpt-neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", _text, vocab_size=VOCAB, max_position_embeddings=64, **SIZE
    )
    _add("opt", "OPTForCausalLM", "OPTConfig", _text, vocab_size=VOCAB, **opt)
    _add("bloom", "BloomForCausalLM", "BloomConfig", _text, vocab_size=VOCAB, hidden_size=32, n_layer=3, n_head=4)
    _add("falcon", "FalconForCausalLM", "FalconConfig", _text, vocab_size=VOCAB, **NO_SPECIAL_TOKENS, **short)
    _add("mixtral", "MixtralForCausalLM", "MixtralConfig", _text, **few, **DECODER)
    _add("qwen3-moe", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", _text, **MOE, **heads)
    _add("gpt-oss", "GptOssForCausalLM", "GptOssConfig", _text, eos_token_id=None, **few, **window, **heads)
    mamba = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 4}
    _add("mamba", "MambaForCausalLM", "MambaConfig", _text, **mamba)


def _add_pairs() -> None:
    gated = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    whisper = {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 32}
    suppressed = {"suppress_tokens": [], "begin_suppress_tokens": []}
    rotary = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
    qwen_text = {**rotary, **NO_SPECIAL_TOKENS, **DECODER}
    qwen_vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 8}
    _add("t5", "T5ForConditionalGeneration", "T5Config", _sequence_pair, vocab_size=VOCAB, **T5)
    _add("t5-v1.1", "T5ForConditionalGeneration", "T5Config", _sequence_pair, vocab_size=VOCAB, **gated, **T5)
    bart = {"vocab_size": VOCAB, "max_position_embeddings": 64}
    _add("bart", "BartForConditionalGeneration", "BartConfig", _sequence_pair, **bart, **SEQ2SEQ)
    listener = {"vocab_size": VOCAB, **whisper, **special, **suppressed, **SEQ2SEQ}
    _add("whisper", "WhisperForConditionalGeneration", "WhisperConfig", _spectrogram, **listener)
    qwen_vl = {"text_config": qwen_text, "vision_config": qwen_vision}
    _add("qwen2-vl", "Qwen2VLForConditionalGeneration", "Qwen2VLConfig", _text, **qwen_vl)
    llava_text = {"model_type": "llama", **DECODER}
    llava_vision = {"model_type": "clip_vision_model", **IMAGE, **SIZE}
    llava = {"text_config": llava_text, "vision_config": llava_vision, "image_token_index": 3}
    _add("llava", "LlavaForConditionalGeneration", "LlavaConfig", _image_tokens, **llava)


_add_encoders()
_add_vision_and_audio()
_add_decoders()
_add_pairs()


# -- fine-tuned copies ------------------------------------------------------------------------------------------------


def perturbed(model: PreTrainedModel, seed: int, scale: float = 0.05, only_float: bool = True) -> PreTrainedModel:
    """A fine-tuned copy: Gaussian noise of standard deviation `scale` on every float tensor that is saved. Ties stay ties.

    Args:
        model (`PreTrainedModel`): Left as it is.
        seed (`int`): Of the noise.
        scale (`float`): Standard deviation of the noise.
        only_float (`bool`): When false, integer buffers (`num_batches_tracked`) are changed too, by adding `seed`.
    """
    generator = torch.Generator().manual_seed(seed)
    tuned = copy.deepcopy(model)
    saved = set(tuned.state_dict())
    with torch.no_grad():
        for name, tensor in [*tuned.named_parameters(), *tuned.named_buffers()]:
            if name not in saved:
                continue
            if not tensor.is_floating_point():
                if not only_float:
                    tensor.add_(seed)
                continue
            noise = torch.randn(tensor.shape, generator=generator) * scale
            noise = noise.abs() if name.endswith("running_var") else noise  # a variance stays positive
            tensor.copy_((tensor.float() + noise).to(tensor.dtype))
    return tuned


def with_ties_changed(entry: ZooEntry, seed: int = 0) -> PreTrainedModel | None:
    """The family's model with its input and output embeddings untied when they are tied by default, and tied when they are
    not. `None` for a family without output embeddings."""
    model = entry.build(seed)
    if not model._tied_weights_keys:
        return None
    source, target = model.get_input_embeddings(), model.get_output_embeddings()
    tied = source.weight.data_ptr() == target.weight.data_ptr()
    config = entry.config()
    text_config = config.get_text_config(decoder=True)
    config.tie_word_embeddings = text_config.tie_word_embeddings = not tied
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = type(model)(config).eval()
    source, target = model.get_input_embeddings(), model.get_output_embeddings()
    if tied and source.weight.data_ptr() == target.weight.data_ptr():
        # T5 and its relatives tie whatever the config says; a checkpoint that holds both tensors is untied at load.
        target.weight = torch.nn.Parameter(perturbed(target, seed=99, scale=0.05).weight.detach().clone())
    return model


# -- checkpoints on disk ----------------------------------------------------------------------------------------------


def save_zoo_model(
    model: PreTrainedModel,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
    names: str = "original",
    weights: str = "safetensors",
) -> Path:
    """Writes a checkpoint folder.

    Args:
        model (`PreTrainedModel`): Left as it is.
        folder (`Path`): Made when missing.
        dtype (`torch.dtype`, *optional*): The dtype on disk.
        max_shard_size (`str`): As in `save_pretrained`.
        names (`str`): `"original"`: the names of the Hub's checkpoints. `"module"`: those of `state_dict()`. `"legacy"`:
            LayerNorm's parameters are called gamma and beta, as before 2020.
        weights (`str`): `"safetensors"` or `"bin"`; the latter repeats tied tensors, as checkpoints of that age do.
    """
    if dtype is not None:
        model = copy.deepcopy(model).to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size, save_original_format=names != "module")
    if names == "legacy":
        _rewrite(folder, _legacy_name)
    if weights == "bin":
        _to_bin(folder, model)
    return folder


def tensors_on_disk(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's weight files, by its name on disk."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
    for path in sorted(folder.glob("pytorch_model*.bin")):
        tensors.update(torch.load(path, weights_only=True))
    return tensors


def edit_json(path: Path, **changes) -> None:
    """Changes keys of a JSON file; a value of `None` removes the key."""
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def _legacy_name(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def _rewrite(folder: Path, rename: Callable[[str], str]) -> None:
    for path in folder.glob("*.safetensors"):
        save_file({rename(name): tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_text())["weight_map"]
        edit_json(index, weight_map={rename(name): file for name, file in weight_map.items()})


def _to_bin(folder: Path, model: PreTrainedModel) -> None:
    tensors = tensors_on_disk(folder)
    for target, source in model.all_tied_weights_keys.items():
        if source in tensors and target in model.state_dict():
            tensors.setdefault(target, tensors[source])
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]:
        path.unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
