"""Methods that train the whole model start from a block-wise merge where `init` says so."""

from __future__ import annotations

import pytest
import torch

from hf_merge import ConfigError, DirectDistillConfig, DistillMergeConfig, Merger, RegMeanPlusPlusConfig

from ..zoo import ZOO, perturbed


def merge(family: str, config):
    base = ZOO[family].build()
    experts = {task: perturbed(base, seed) for seed, task in enumerate("ab", start=1)}
    merger = Merger.from_pretrained(experts, config, base_model=base)
    merger.merge(dict.fromkeys(experts, ZOO[family].inputs()))
    return merger


@pytest.mark.parametrize("config_class", [DirectDistillConfig, DistillMergeConfig])
@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_training_starts_where_the_blocks_ended(family: str, config_class):
    start = {"merge_type": "regmean_pp", "ridge": 0.1}
    found = merge(family, config_class(init=start, epochs=1, learning_rate=1e-12))
    expected = merge(family, RegMeanPlusPlusConfig(ridge=0.1)).model.state_dict()
    assert {"model", *merge(family, RegMeanPlusPlusConfig()).report.blocks} == set(found.report.blocks)
    for name, tensor in found.model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("config_class", [DirectDistillConfig, DistillMergeConfig])
def test_predictions_can_be_distilled(config_class):
    report = merge("bert", config_class(loss="logits", epochs=5)).report.blocks["model"]
    assert report["last_loss"] < report["first_loss"]


def test_a_start_that_trains_itself_is_refused():
    with pytest.raises(ConfigError, match="init names 'direct_distill', which needs data itself"):
        DirectDistillConfig(init="direct_distill")
