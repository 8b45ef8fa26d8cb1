"""FS-Merge block by block: one block in memory, resumable, and the result is an ordinary model."""

import gc

import pytest
import torch

from hf_merge import AutoMergedModel, CalibrationData, ConfigError, Merger, PlanError, ProDistillArguments
from hf_merge.engines.block_runner import BlockRunner
from hf_merge.methods.fs_merge import FsMerge, FsMergeConfig
from hf_merge.methods.fs_merge.least_squares import LeastSquares
from tests.methods.test_fs_merge import FAMILIES, build, logits, merger_of, samples


def block_wise(**settings) -> FsMergeConfig:
    return FsMergeConfig(**({"block_wise": True, "epochs": 2, "batch_size": 4, "rank": 2} | settings))


@pytest.mark.parametrize("family", FAMILIES)
def test_result_is_an_ordinary_model_with_a_head_for_each_task(family, tmp_path):
    merger, data = merger_of(family, block_wise(learning_rate=0.01))
    merger.save_pretrained(tmp_path / "out", data=data)
    assert len(merger.report.blocks) == 4
    merged = merger_of(family, block_wise(learning_rate=0.01))[0]
    merged.merge(data)
    for task in data:
        found = AutoMergedModel.from_pretrained(tmp_path / "out", task=task)
        torch.testing.assert_close(logits(found, family), logits(merged.model_for(task), family))


@pytest.mark.parametrize("family", FAMILIES)
def test_untrained_result_is_the_first_expert(family):
    merger, data = merger_of(family, block_wise(epochs=1, learning_rate=1e-9))
    merger.merge(data)
    first = merger.experts[0].live
    torch.testing.assert_close(logits(merger.model_for("task0"), family), logits(first, family), atol=1e-4, rtol=1e-3)


def test_equal_experts_stay_what_they_are():
    model, data = build("vit", 0), samples("vit", 24)
    merger = Merger.from_pretrained({"a": model, "b": build("vit", 0)}, block_wise(init="average", learning_rate=1e-9))
    merger.merge({"a": data, "b": data})
    for task in "ab":
        torch.testing.assert_close(logits(merger.model_for(task), "vit"), logits(model, "vit"), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("form", ("diagonal_low_rank", "full"))
def test_training_brings_blocks_nearer_to_the_experts(form):
    merger, _ = merger_of("bert", block_wise(epochs=20, batch_size=32, form=form, learning_rate=0.01, rank=8))
    merger.merge({task: samples("bert", 96) for task in ("task0", "task1")})
    blocks = [report for name, report in merger.report.blocks.items() if "layer" in name]
    assert all(report["last_loss"] < report["first_loss"] for report in blocks)


def test_one_block_of_every_model_is_in_memory(monkeypatch):
    resident = []

    def blocks_with_weights(runner: BlockRunner) -> int:
        blocks = runner.reentry.blocks.values()
        return sum(any(p.device.type != "meta" for p in block.parameters()) for block in blocks)

    def merge_block(self, block):
        runners = [one for one in gc.get_objects() if isinstance(one, BlockRunner) and one.batches]
        resident.append([blocks_with_weights(runner) for runner in runners])

    monkeypatch.setattr(FsMerge, "merge_block", merge_block)
    gc.collect()
    merger, data = merger_of("vit", block_wise())
    merger.merge(data)
    assert resident == [[1, 1, 1]] * 3


def test_a_killed_merge_goes_on(tmp_path, monkeypatch):
    data = {task: samples("vit", 8) for task in "ab"}
    for seed, task in enumerate(data):
        build("vit", seed).save_pretrained(tmp_path / task)
    experts = {task: str(tmp_path / task) for task in data}
    args = ProDistillArguments(str(tmp_path), work_dir=str(tmp_path / "work"), use_cpu=True, disable_tqdm=True)
    expected = Merger.from_pretrained(experts, block_wise()).merge(data).state_dict()
    merge_block, count = FsMerge.merge_block, []

    def killed(self, block):
        count.append(block.name)
        if len(count) == 2:
            raise KeyboardInterrupt
        merge_block(self, block)

    monkeypatch.setattr(FsMerge, "merge_block", killed)
    with pytest.raises(KeyboardInterrupt):
        Merger.from_pretrained(experts, block_wise()).merge(data, args=args)
    found = Merger.from_pretrained(experts, block_wise()).merge(data, args=args).state_dict()
    assert count == ["vit.layers.0", "vit.layers.1", "vit.layers.1", "vit.layers.2"]
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_experts_of_different_width():
    merger, data = merger_of("vit", block_wise(merged_width=64), (48, None))
    assert merger.merge(data).config.hidden_size == 64
    assert torch.isfinite(logits(merger.model_for("task1"), "vit")).all()


def test_fitted_map_is_the_least_squares_solution():
    generator = torch.Generator().manual_seed(0)
    x, true = torch.randn(200, 6, generator=generator), torch.randn(5, 6, generator=generator)
    y = x @ true.mT + 0.3
    fit = LeastSquares(6, 5, True, ridge=1e-9)
    fit.add(x[:50], y[:50])
    fit.add(x[50:], y[50:])
    matrix, bias = fit.solve(torch.zeros(5, 6))
    torch.testing.assert_close(matrix, true, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(bias, torch.full((5,), 0.3), atol=1e-4, rtol=1e-4)
    fit = LeastSquares(6, 6)
    fit.add(x, x)
    torch.testing.assert_close(fit.solve(torch.eye(6))[0], torch.eye(6), atol=1e-5, rtol=1e-5)


def test_recipes_say_what_is_wrong():
    for settings in ({"refine_epochs": 1}, {"logit_weight": 1.0}, {"init": "zipit"}, {"sequential": True}):
        with pytest.raises(ConfigError, match=f"{next(iter(settings))}.*block_wise"):
            block_wise(**settings)
    merger, data = merger_of("vit", block_wise())
    with pytest.raises(PlanError, match="copies"):
        merger.merge(CalibrationData(data, augment=lambda task, arguments, generator: arguments))
