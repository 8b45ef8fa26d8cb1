"""Tiny classifiers with heads of their own, samples for them, and plain access to a merge while it runs."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

from hf_merge import MergeConfig, Merger
from hf_merge.data.calibration import CalibrationData
from hf_merge.engines.choice import choose_engine
from hf_merge.engines.end_to_end import EndToEndEngine
from hf_merge.methods.model_base import ModelGroup


CLASSES = {"a": 2, "b": 4}
SIZE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}


def bert(classes: int, seed: int, **settings) -> BertForSequenceClassification:
    """A random tiny BERT in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BertForSequenceClassification(BertConfig(num_labels=classes, **SIZE, **settings)).eval()


def models(scale: float = 0.05) -> tuple[PreTrainedModel, dict[str, PreTrainedModel]]:
    """A base model and two fine-tunes of it, whose heads differ."""
    base = bert(2, 0)
    experts = {}
    for seed, (name, classes) in enumerate(CLASSES.items(), start=1):
        expert = bert(classes, seed)
        expert.bert.load_state_dict(base.bert.state_dict())
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)
            expert.classifier.weight.mul_(10)
        experts[name] = expert
    return base, experts


def samples(count: int = 6, labels: bool = False) -> dict[str, list[dict[str, Tensor]]]:
    """Token sequences of uneven length for every task, without padding."""
    generator = torch.Generator().manual_seed(7)
    drawn = {}
    for task, classes in CLASSES.items():
        lengths = torch.randint(3, 9, (count,), generator=generator).tolist()
        rows = [{"input_ids": torch.randint(1, 40, (length,), generator=generator)} for length in lengths]
        for row in rows if labels else ():
            row["labels"] = int(torch.randint(classes, (), generator=generator))
        drawn[task] = rows
    return drawn


def merger(config: MergeConfig, scale: float = 0.05) -> Merger:
    base, experts = models(scale)
    return Merger.from_pretrained(experts, config, base_model=base)


def probe(config: MergeConfig, data: dict, look: Callable[[ModelGroup], None], made: Merger | None = None) -> None:
    """Calls `look` with what the method would be given."""
    made = merger(config) if made is None else made
    engine = choose_engine(made.plan, made.placement, CalibrationData.of(data))
    assert isinstance(engine, EndToEndEngine)
    engine.method = copy.copy(engine.method)
    engine.method.merge = look
    engine._merge()


def backbone(model: PreTrainedModel, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The parameters that the experts share, by name."""
    named = model.named_parameters()
    return {name: value.detach().to(dtype) for name, value in named if not name.startswith("classifier")}


def assert_near(found: PreTrainedModel, expected: dict[str, Tensor], tolerance: float) -> None:
    for name, value in backbone(found).items():
        assert_entries_near(name, value, expected[name].double(), tolerance)


def assert_trained_alike(found: PreTrainedModel, expected: dict[str, Tensor], tolerance: float) -> None:
    """As `assert_near`, without the biases of keys: the softmax cancels them, and Adam magnifies the rounding that is left of
    their gradient."""
    for name, value in backbone(found).items():
        if not name.endswith("key.bias"):
            assert_entries_near(name, value, expected[name].double(), tolerance)


def assert_entries_near(name: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance, msg=lambda message: f"{name}: {message}")


def single_batch(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """All samples of a task, padded."""
    ids = [row["input_ids"] for row in rows]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in ids], batch_first=True)
    return {"input_ids": padded, "attention_mask": mask}
