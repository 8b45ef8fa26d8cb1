"""`hf-merge inspect`: the numbers are those of the formulas, and no model is changed."""

from __future__ import annotations

import json

import pytest
import torch

from hf_merge import LinearConfig, Merger, TaskArithmeticConfig, WudiConfig
from hf_merge.engines.inspection import inspect_models

from .testing_utils import run_cli
from .zoo import ZOO, perturbed


@pytest.fixture(scope="module")
def models():
    base = ZOO["vit"].build()
    return base, {"a": perturbed(base, seed=1, scale=0.01), "b": perturbed(base, seed=2, scale=0.02)}


def test_numbers_equal_the_formulas(models):
    base, experts = models
    inspection = inspect_models(Merger.from_pretrained(experts, TaskArithmeticConfig(), base_model=base).check())
    start = torch.cat([p.detach().double().flatten() for p in base.parameters()])
    vectors = [torch.cat([p.detach().double().flatten() for p in m.parameters()]) - start for m in experts.values()]
    assert inspection.norms == pytest.approx([float(v.norm()) for v in vectors], rel=1e-4)
    cosine = float(torch.dot(*vectors) / (vectors[0].norm() * vectors[1].norm()))
    assert inspection.cosines[0][1] == pytest.approx(cosine, abs=1e-4)
    assert inspection.sign_conflict == pytest.approx(float((vectors[0] * vectors[1] < 0).double().mean()), abs=1e-3)


def test_wudi_explains_the_linear_layers_only(models):
    base, experts = models
    inspection = inspect_models(Merger.from_pretrained(experts, WudiConfig(), base_model=base).check())
    for layer in inspection.layers:
        if layer.kind == "linear":
            assert 0 <= layer.wudi_loss_after <= layer.wudi_loss_before
            assert layer.effective_rank >= 1
        else:
            assert layer.effective_rank is None


def test_without_a_base_only_the_models_are_described(models):
    inspection = inspect_models(Merger.from_pretrained(models[1], LinearConfig()).check())
    assert [model["name"] for model in inspection.models] == ["a", "b"]
    assert not inspection.layers
    assert "norms" not in inspection.to_dict()


def test_command_prints_json(models, tmp_path, capsys):
    base, experts = models
    base.save_pretrained(tmp_path / "base")
    for name, model in experts.items():
        model.save_pretrained(tmp_path / name)
    paths = [str(tmp_path / name) for name in experts]
    assert run_cli(["inspect", *paths, "--base", str(tmp_path / "base"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["experts"] == ["a", "b"]
    assert len(printed["layers"]) > 10
    for layer in printed["layers"]:
        (one, cosine), (same, other) = layer["cosines"]
        assert [one, other, same] == pytest.approx([1.0, 1.0, cosine])
        assert cosine * layer["norms"][0] * layer["norms"][1] == pytest.approx(layer["products"][0][1])
