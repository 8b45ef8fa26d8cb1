"""Small tokenizers with overlapping vocabularies, and models that have them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)


SIZE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
ENGLISH = ("the quick brown fox", "the lower the newer", "quicker than the fox")
GERMAN = ("der schnelle braune fuchs", "der fuchs ist schneller", "the fuchs")
CODE = ("def quick(fox): return fox", "return the fox", "def lower(): return newer")


def train_bpe(texts: Sequence[str], special: Sequence[str], size: int = 60) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer over the letters that occur in all texts here."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = sorted(set("".join((*ENGLISH, *GERMAN, *CODE)).replace(" ", "Ġ")))
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0], pad_token=special[0])


def word_piece(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer with BERT's special tokens in front of the words."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: index for index, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", **names)


def unigram(pieces: Sequence[str]) -> PreTrainedTokenizerFast:
    """A Unigram tokenizer whose later pieces are less likely."""
    scored = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    scored += [(piece, -float(index + 1)) for index, piece in enumerate(pieces)]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def save_llama(
    folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int, *, rows: int | None = None, **config
) -> LlamaForCausalLM:
    """A random Llama with a tokenizer, saved; with `rows` more rows than tokens."""
    rows = len(tokenizer) if rows is None else rows
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    return _save(folder, tokenizer, seed, LlamaForCausalLM, LlamaConfig(vocab_size=rows, **SIZE, **ids, **config))


def save_bert(folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int, **config) -> BertForMaskedLM:
    return _save(folder, tokenizer, seed, BertForMaskedLM, BertConfig(vocab_size=len(tokenizer), **SIZE, **config))


def save_t5(folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int) -> T5ForConditionalGeneration:
    sizes = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    return _save(folder, tokenizer, seed, T5ForConditionalGeneration, T5Config(vocab_size=len(tokenizer), **sizes))


def _save(folder: Path, tokenizer, seed: int, model_class, config) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def rows_by_token(folder: Path, matrix: Tensor) -> dict[str, Tensor]:
    """The rows of an embedding under the tokens of the tokenizer beside it."""
    table = AutoTokenizer.from_pretrained(folder).get_vocab()
    return {token: matrix[row].double() for token, row in table.items() if row < len(matrix)}


def filled(
    rows: dict[str, dict[str, Tensor]], base: str | None, tokens: Sequence[str]
) -> dict[str, dict[str, Tensor]]:
    """The rule in plain words: a row that a model lacks is the base model's, else the mean of those that have it."""
    complete: dict[str, dict[str, Tensor]] = {model: {} for model in rows}
    for token in tokens:
        known = [model for model in rows if token in rows[model]]
        if base in known:
            default = rows[base][token]
        else:
            default = sum(rows[model][token] for model in known) / len(known)
        for model, own in rows.items():
            complete[model][token] = own.get(token, default)
    return complete
