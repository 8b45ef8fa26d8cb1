"""Batches of samples of similar length, and which of their tokens are real."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


Sample = Mapping[str, Tensor]
MASKS = {
    "input_ids": "attention_mask",
    "inputs_embeds": "attention_mask",
    "input_values": "attention_mask",
    "decoder_input_ids": "decoder_attention_mask",
}


@dataclass(frozen=True)
class Batch:
    """Samples that run through a model together.

    Args:
        inputs (`dict[str, torch.Tensor]`): Arguments of the model's forward.
        count (`int`): How many samples.
    """

    inputs: dict[str, Tensor]
    count: int

    def rows(self, first: int, end: int) -> Batch:
        """Samples `first` to `end`, padded as they are here."""
        return Batch({name: value[first:end] for name, value in self.inputs.items()}, end - first)

    def token_mask(self, shape: Sequence[int], decoder: bool) -> Tensor | None:
        """Which of the tokens of hidden states are real.

        Args:
            shape (`Sequence[int]`): The shape of the hidden states, (samples, tokens, ...).
            decoder (`bool`): Whether they belong to the decoder of an encoder-decoder model.

        Returns:
            `torch.Tensor` or `None`: Bool, (samples, tokens); `None` when all are, or when no mask has that shape.
        """
        mask = self.inputs.get("decoder_attention_mask" if decoder else "attention_mask")
        if mask is None or tuple(mask.shape) != tuple(shape[:2]) or bool(mask.all()):
            return None
        return mask.bool()


def make_batches(samples: Sequence[Sample], batch_size: int, padding: Mapping[str, int | float]) -> list[Batch]:
    """Groups samples of equal layout and similar length. Deterministic: ties are in the order given.

    Args:
        samples (`Sequence[Sample]`): Without a batch dimension.
        batch_size (`int`): Samples per batch, at most.
        padding (`Mapping[str, int]`): What each one-dimensional argument is padded with; 0 when not named.
    """
    groups: dict[tuple, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(_layout(sample), []).append(sample)
    batches = []
    for members in groups.values():
        members.sort(key=_lengths)
        for start in range(0, len(members), batch_size):
            batches.append(collate(members[start : start + batch_size], padding))
    return batches


def collate(samples: Sequence[Sample], padding: Mapping[str, int | float]) -> Batch:
    """Stacks samples; one-dimensional arguments are padded on the right, with a mask where none was given."""
    inputs: dict[str, Tensor] = {}
    for key in samples[0]:
        values = [sample[key] for sample in samples]
        uneven = values[0].dim() == 1 and len({len(value) for value in values}) > 1
        if uneven:
            inputs[key] = torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=padding.get(key, 0))
            mask = MASKS.get(key)
            if mask is not None and mask not in samples[0]:
                inputs[mask] = torch.nn.utils.rnn.pad_sequence(
                    [torch.ones(len(value), dtype=torch.long) for value in values], batch_first=True
                )
        else:
            inputs[key] = torch.stack(values)
    return Batch(inputs, len(samples))


def without_padding(sample: Sample) -> dict[str, Tensor]:
    """Cuts the padding at the end of a sample's sequences, so that samples can be batched by their real length. Padding at the
    beginning is kept: without it the tokens would have other positions."""
    trimmed = dict(sample)
    for main, name in MASKS.items():
        mask = sample.get(name)
        if mask is None or main not in sample or mask.dim() != 1 or not bool(mask.any()):
            continue
        end, length = int(mask.nonzero()[-1]) + 1, len(mask)
        prefix = "decoder_" if main.startswith("decoder_") else ""
        for key, value in trimmed.items():
            is_sequence = (value.dim() == 1 or key == "inputs_embeds") and value.shape[0] == length
            if is_sequence and key.startswith("decoder_") == bool(prefix):
                trimmed[key] = value[:end]
    return trimmed


def _layout(sample: Sample) -> tuple:
    """What must be equal for samples to be stacked."""
    return tuple(
        (key, value.dtype, value.dim() if value.dim() == 1 else tuple(value.shape)) for key, value in sample.items()
    )


def _lengths(sample: Sample) -> tuple[int, ...]:
    return tuple(len(value) for value in sample.values() if value.dim() == 1)
