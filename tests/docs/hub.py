"""A stand-in for the Hub: tiny models in relative folders whose names are the ids that the documentation uses."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)


BERT_BASE = "sentence-transformers/all-MiniLM-L6-v2"
BERT_EXPERTS = {"me/minilm-spam": 2, "me/minilm-movies": 3, "me/minilm-langid": 5}
LLAMA_BASE = "me/llama-base"
LLAMA_EXPERTS = ("me/llama-code", "me/llama-math")
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
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, bos_token_id=2, eos_token_id=3, **SIZE))
    _save(llama, folder / LLAMA_BASE)
    for seed, name in enumerate(LLAMA_EXPERTS, start=1):
        torch.manual_seed(seed)
        expert = LlamaForCausalLM(llama.config)
        expert.load_state_dict(llama.state_dict())
        _save(_perturbed(expert), folder / name)


def _perturbed(model: PreTrainedModel) -> PreTrainedModel:
    """Changes every parameter a little, in place."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    return model


def _save(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)
    BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)}).save_pretrained(folder)
