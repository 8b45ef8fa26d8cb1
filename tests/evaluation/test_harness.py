"""lm-evaluation-harness as a backend: a local task, the real package; skipped where it is not installed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_merge import ConfigError, LinearConfig, Merger, MissingDependencyError
from hf_merge.evaluation.harness import evaluate_with_harness

from ..docs.hub import SIZE, WORDS, _save
from ..zoo import perturbed


@pytest.fixture
def merger(tmp_path: Path) -> Merger:
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, bos_token_id=2, eos_token_id=3, **SIZE))
    for seed, name in enumerate(("code", "math"), start=1):
        _save(perturbed(base, seed), tmp_path / name)
    return Merger.from_pretrained([tmp_path / "code", tmp_path / "math"], LinearConfig())


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A task with two choices."""
    rows = [{"text": "the film was", "label": 0}, {"text": "free", "label": 1}, {"text": "a great", "label": 0}]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    lines = [
        "task: tiny_choice",
        "dataset_path: json",
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.json'}}}}}",
        "test_split: test",
        "output_type: multiple_choice",
        'doc_to_text: "{{text}}"',
        "doc_to_target: label",
        'doc_to_choice: ["great", "money"]',
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]",
    ]
    (tmp_path / "tiny.yaml").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


def share_of_right_choices(model: LlamaForCausalLM, rows: list[dict]) -> float:
    """By the probability of the next word."""
    ids = {word: index for index, word in enumerate(WORDS)}
    hits = []
    for row in rows:
        context = torch.tensor([[ids[word] for word in row["text"].split()]])
        with torch.no_grad():
            following = model(input_ids=context).logits[0, -1]
        hits.append(int(following[ids["money"]] > following[ids["great"]]) == row["label"])
    return sum(hits) / len(hits)


def test_a_local_task(merger: Merger, task: Path) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(task), include_defaults=False)
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="[SEP]", pad_token="[PAD]")
    options = {"tokenizer": tokenizer, "task_manager": manager, "bootstrap_iters": 0}
    result = evaluate_with_harness(merger, ["tiny_choice"], experts={"tiny_choice": "math"}, **options)
    score = result.tasks["tiny_choice"]
    assert (score.metric, score.count) == ("acc", 3)
    rows = [json.loads(line) for line in (task / "rows.json").read_text().splitlines()]
    expert = LlamaForCausalLM.from_pretrained(task / "math")
    assert score.value == pytest.approx(share_of_right_choices(merger.model, rows))
    assert score.expert == pytest.approx(share_of_right_choices(expert, rows))
    with pytest.raises(ConfigError, match="no metric 'f1'"):
        evaluate_with_harness(merger, ["tiny_choice"], metric="f1", **options)


def test_absent_package_and_bad_arguments(merger: Merger, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="at least one name"):
        evaluate_with_harness(merger, [])
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingDependencyError, match="pip install lm_eval"):
        evaluate_with_harness(merger, ["hellaswag"])
