"""Task heads: experts that differ in them, a base without one, and what is stored beside the backbone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import BertForSequenceClassification, BertModel

from hf_merge import MergeConfig, Merger, PlanError

from .testing_utils import TASK_LABELS, Bed, classifier_bed, dense_average, load_clean
from .zoo import ZOO, perturbed, save_zoo_model


@pytest.fixture
def bed(tmp_path: Path) -> Bed:
    return classifier_bed(tmp_path)


def backbones(bed: Bed) -> dict[str, torch.Tensor]:
    states = [load_clean(bed.model_class, path).bert.state_dict() for path in bed.experts.values()]
    return dense_average(states)


def inputs() -> dict[str, torch.Tensor]:
    return ZOO["bert"].inputs()


@pytest.mark.parametrize("method", ["linear", "ties", "wudi"])
def test_folder_loads_with_the_first_head(bed: Bed, method: str):
    out = bed.merge(MergeConfig.from_merge_type(method))
    merged = load_clean(BertForSequenceClassification, out)
    first = load_clean(BertForSequenceClassification, bed.experts["spam"])
    assert merged.num_labels == 2
    assert merged.config.id2label == first.config.id2label
    assert torch.equal(merged.classifier.weight, first.classifier.weight)
    assert torch.equal(merged.classifier.bias, first.classifier.bias)


def test_backbone_is_the_average(bed: Bed):
    merged = load_clean(BertForSequenceClassification, bed.merge(MergeConfig.from_merge_type("linear")))
    for name, tensor in backbones(bed).items():
        assert torch.equal(merged.bert.state_dict()[name], tensor), name


def test_every_head_is_stored(bed: Bed):
    out = bed.merge(MergeConfig.from_merge_type("linear"))
    assert {path.name for path in (out / "heads").iterdir()} == set(TASK_LABELS)


@pytest.mark.parametrize("task", TASK_LABELS)
def test_model_for_has_the_shared_backbone_and_the_own_head(bed: Bed, task: str):
    merger = Merger.from_pretrained(bed.experts, MergeConfig.from_merge_type("linear"), base_model=bed.base)
    model = merger.model_for(task)
    expert = load_clean(BertForSequenceClassification, bed.experts[task])
    assert torch.equal(model.classifier.weight, expert.classifier.weight)
    assert model.config.id2label == expert.config.id2label
    for name, tensor in backbones(bed).items():
        assert torch.equal(model.bert.state_dict()[name], tensor), name
    assert model(**inputs()).logits.shape == (2, TASK_LABELS[task])


@pytest.mark.parametrize("task", TASK_LABELS)
def test_heads_after_reload(bed: Bed, task: str):
    from hf_merge import AutoMergedModelForSequenceClassification

    out = bed.merge(MergeConfig.from_merge_type("linear"))
    reloaded = AutoMergedModelForSequenceClassification.from_pretrained(out, task=task)
    merger = Merger.from_pretrained(bed.experts, MergeConfig.from_merge_type("linear"), base_model=bed.base)
    with torch.no_grad():
        assert torch.equal(reloaded(**inputs()).logits, merger.model_for(task)(**inputs()).logits)


def test_unknown_task_is_refused_with_the_nearest(bed: Bed):
    from hf_merge import AutoMergedModelForSequenceClassification, MergeError

    out = bed.merge(MergeConfig.from_merge_type("linear"))
    with pytest.raises(MergeError, match="movies"):
        AutoMergedModelForSequenceClassification.from_pretrained(out, task="movie")


@pytest.mark.parametrize("policy", ["error", "merge"])
def test_policies_that_refuse_different_heads(bed: Bed, policy: str):
    with pytest.raises(PlanError, match="classifier"):
        bed.merge(MergeConfig.from_merge_type("linear", heads=policy))
    assert not bed.out.exists()


def test_policy_first_stores_no_other_head(bed: Bed):
    out = bed.merge(MergeConfig.from_merge_type("linear", heads="first"))
    assert not (out / "heads").exists()
    assert load_clean(BertForSequenceClassification, out).num_labels == 2


def test_equal_heads_are_merged_and_equal_shapes_of_other_labels_are_not(bed: Bed, tmp_path: Path):
    twin = load_clean(BertForSequenceClassification, bed.experts["spam"])
    bed.experts = {"spam": bed.experts["spam"], "ham": save_zoo_model(perturbed(twin, 8), tmp_path / "ham")}
    merged = load_clean(BertForSequenceClassification, bed.merge(MergeConfig.from_merge_type("linear")))
    heads = [load_clean(BertForSequenceClassification, path).classifier.weight for path in bed.experts.values()]
    assert torch.equal(merged.classifier.weight, (heads[0] + heads[1]) / 2)

    config = json.loads((tmp_path / "ham" / "config.json").read_text())
    config |= {"id2label": {"0": "polite", "1": "rude"}, "label2id": {"polite": 0, "rude": 1}}
    (tmp_path / "ham" / "config.json").write_text(json.dumps(config))
    out = bed.merge(MergeConfig.from_merge_type("linear"), tmp_path / "out2")
    kept = load_clean(BertForSequenceClassification, out)
    assert torch.equal(kept.classifier.weight, heads[0])
    assert {path.name for path in (out / "heads").iterdir()} == {"spam", "ham"}


def test_base_with_another_head_is_no_obstacle(bed: Bed, tmp_path: Path):
    """A masked language model is the usual base of classifiers."""
    from transformers import BertForMaskedLM

    base = BertForMaskedLM(ZOO["bert"].config())
    base.bert.load_state_dict(load_clean(BertModel, bed.base).state_dict(), strict=False)
    bed.base = save_zoo_model(base, tmp_path / "mlm")
    merged = load_clean(BertForSequenceClassification, bed.merge(MergeConfig.from_merge_type("wudi")))
    assert all(torch.isfinite(tensor).all() for tensor in merged.state_dict().values())
