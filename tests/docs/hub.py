"""A stand-in for the Hub: tiny models in relative folders whose names are the ids that the documentation uses."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)


BERT_BASE = "sentence-transformers/all-MiniLM-L6-v2"
BERT_EXPERTS = {"me/minilm-spam": 2, "me/minilm-movies": 3, "me/minilm-langid": 5}
BERT_ADAPTERS = {"me/minilm-spam-lora": 2, "me/minilm-movies-lora": 3}
LLAMA_BASE = "me/llama-base"
LLAMA_EXPERTS = ("me/llama-code", "me/llama-math")
LLAMA_ADAPTERS = ("me/llama-code-lora", "me/llama-math-lora")
VIT_BASE = "me/vit-base"
VIT_EXPERTS = {"me/vit-cars": 4, "me/vit-flowers": 3}
ROWS = [{"text": "free money", "label": 1}, {"text": "the film was great", "label": 0}]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "film", "free", "great", "money", "the", "was", "##s"]
SIZE = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}


def build_hub(folder: Path) -> None:
    """Writes every model that the documentation names.

    Args:
        folder (`Path`): The folder that the ids are relative to.
    """
    torch.manual_seed(0)
    base = BertModel(BertConfig(**SIZE))
    _save(base, folder / BERT_BASE)
    for seed, (name, num_labels) in enumerate(BERT_EXPERTS.items(), start=1):
        torch.manual_seed(seed)
        expert = BertForSequenceClassification(BertConfig(num_labels=num_labels, **SIZE))
        expert.bert.load_state_dict(base.state_dict(), strict=False)
        _save(_perturbed(expert), folder / name)
    for seed, (name, num_labels) in enumerate(BERT_ADAPTERS.items(), start=1):
        torch.manual_seed(seed)
        classifier = BertForSequenceClassification.from_pretrained(folder / BERT_BASE, num_labels=num_labels)
        _save_adapter(classifier, BERT_BASE, folder / name, "SEQ_CLS", ["query", "value"])
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, bos_token_id=2, eos_token_id=3, **SIZE))
    _save(llama, folder / LLAMA_BASE)
    for seed, name in enumerate(LLAMA_ADAPTERS, start=1):
        torch.manual_seed(seed)
        model = LlamaForCausalLM.from_pretrained(folder / LLAMA_BASE)
        _save_adapter(model, LLAMA_BASE, folder / name, "CAUSAL_LM", ["q_proj", "v_proj"])
    for seed, name in enumerate(LLAMA_EXPERTS, start=1):
        torch.manual_seed(seed)
        expert = LlamaForCausalLM(llama.config)
        expert.load_state_dict(llama.state_dict())
        _save(_perturbed(expert), folder / name)
    _build_vision(folder)
    _build_data(folder / "data")


def _build_vision(folder: Path) -> None:
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    base = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **size))
    base.save_pretrained(folder / VIT_BASE)
    for seed, (name, num_labels) in enumerate(VIT_EXPERTS.items(), start=1):
        torch.manual_seed(seed)
        expert = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=num_labels, **size))
        expert.vit.load_state_dict(base.vit.state_dict())
        _perturbed(expert).save_pretrained(folder / name)


def _build_data(folder: Path) -> None:
    """Labelled rows of the tasks that pages measure."""
    folder.mkdir()
    for task in ("spam", "movies"):
        for name in (task, f"{task}_calibration"):
            text = "".join(json.dumps(row) + "\n" for row in ROWS * 4)
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def _save_adapter(model: PreTrainedModel, base: str, folder: Path, task_type: str, targets: list[str]) -> None:
    config = LoraConfig(task_type=task_type, r=2, target_modules=targets, init_lora_weights=False)
    adapted = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = base
    adapted.save_pretrained(folder)


def _perturbed(model: PreTrainedModel) -> PreTrainedModel:
    """Changes every parameter a little, in place."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    return model


def _save(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)
    BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)}).save_pretrained(folder)
