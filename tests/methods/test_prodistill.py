"""ProDistill: equal to the published loop written plainly, deterministic, and what its settings do."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from hf_merge import Merger, ProDistillArguments, ProDistillConfig
from hf_merge.errors import ConfigError
from hf_merge.methods.groups import keyed_generator

from ..zoo import ZOO, Inputs, perturbed


FAMILIES = ["bert", "roberta", "vit", "clip-vision", "llama", "gemma3", "qwen3", "gpt2", "t5", "mixtral"]
TASKS = ("a", "b")


def models_of(family: str) -> tuple[PreTrainedModel, dict[str, PreTrainedModel]]:
    base = ZOO[family].build()
    return base, {task: perturbed(base, seed) for seed, task in enumerate(TASKS, start=1)}


def samples_of(family: str, repeats: int = 2) -> dict[str, list[dict[str, Tensor]]]:
    """A few samples for each task, of other content for each."""
    samples = {}
    for task_number, task in enumerate(TASKS):
        rows = []
        for repeat in range(repeats):
            inputs = shifted(ZOO[family].inputs(), task_number * repeats + repeat)
            count = len(next(iter(inputs.values())))
            rows += [{key: value[i] for key, value in inputs.items()} for i in range(count)]
        samples[task] = rows
    return samples


def shifted(inputs: Inputs, step: int) -> Inputs:
    moved = {}
    for key, value in inputs.items():
        if key.endswith("input_ids"):
            moved[key] = 5 + (value - 5 + step) % 90
        else:
            moved[key] = value + 0.1 * step if value.is_floating_point() else value
    return moved


def merge(family: str, config: ProDistillConfig, **kwargs) -> Merger:
    base, experts = models_of(family)
    merger = Merger.from_pretrained(experts, config, base_model=base)
    merger.merge(samples_of(family), **kwargs)
    return merger


# -- the published loop, literally ------------------------------------------------------------------------------------


class Literal:
    """The loop as published: all models in memory, α of every parameter's shape, the teachers run at every step."""

    def __init__(self, base: PreTrainedModel, experts: dict[str, PreTrainedModel], config: ProDistillConfig):
        self.config = config
        self.student = copy.deepcopy(base)
        self.base, self.experts = base, list(experts.values())
        with torch.no_grad():
            for name, parameter in self.student.named_parameters():
                for expert in self.experts:
                    vector = expert.get_parameter(name) - base.get_parameter(name)
                    parameter.add_(vector, alpha=config.init_scale)

    def run(self, blocks: Sequence[str], batches: list[list[Inputs]]) -> dict[str, list[float]]:
        return {block: self._train(block, batches) for block in blocks}

    def _call(self, model: nn.Module, block: str, inputs: Inputs) -> tuple[tuple, dict, Tensor]:
        """What a plain forward hands to a block, and what the block returns."""
        seen = {}

        def before(module, args, kwargs):
            seen["args"] = args
            seen["kwargs"] = {key: value for key, value in kwargs.items() if key != "past_key_values"}

        def after(module, args, output):
            seen["output"] = main(output)

        module = model.get_submodule(block)
        hooks = [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
        with torch.no_grad():
            model(**inputs, **({} if "pixel_values" in inputs else {"use_cache": False}))
        for hook in hooks:
            hook.remove()
        return seen["args"], seen["kwargs"], seen["output"]

    def _train(self, block: str, batches: list[list[Inputs]]) -> list[float]:
        module = self.student.get_submodule(block)
        theta = {name: value.detach().clone() for name, value in self.base.get_submodule(block).named_parameters()}
        vectors = [
            {name: value.detach() - theta[name] for name, value in expert.get_submodule(block).named_parameters()}
            for expert in self.experts
        ]
        alphas = [
            {name: torch.full_like(value, self.config.init_scale).requires_grad_() for name, value in theta.items()}
            for _ in self.experts
        ]
        merged = lambda: {  # noqa: E731
            name: theta[name] + sum(alpha[name] * vector[name] for alpha, vector in zip(alphas, vectors))
            for name in theta
        }
        optimizer = torch.optim.Adam([p for alpha in alphas for p in alpha.values()], lr=self.config.learning_rate)
        generator = keyed_generator(self.config.seed, block, "order")
        losses = []
        for _ in range(self.config.epochs):
            orders = [generator.permutation(len(one)) for one in batches]
            total = 0.0
            for step in range(max(len(one) for one in batches)):
                optimizer.zero_grad()
                loss = 0.0
                for task, order in enumerate(orders):
                    for index in order[step : step + 1]:
                        inputs = batches[task][index]
                        args, kwargs, _ = self._call(self.student, block, inputs)
                        target = self._call(self.experts[task], block, inputs)[2]
                        output = main(functional_call(module, merged(), args, kwargs))
                        error = (output - target).square()
                        mask = inputs.get("attention_mask")
                        if mask is not None and "decoder" not in block and mask.shape == error.shape[:2]:
                            error = error * mask.unsqueeze(-1)
                        loss = loss + error.sum()
                loss.backward()
                optimizer.step()
                total += loss.item()
            losses.append(total)
        with torch.no_grad():
            for name, value in merged().items():
                module.get_parameter(name).copy_(value)
        return losses


def main(output) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@pytest.mark.parametrize("family", ["bert", "vit", "llama", "t5"])
def test_equals_the_published_loop(family: str):
    config = ProDistillConfig(loss="sse", epochs=3, learning_rate=0.01, batch_size=2)
    merger = merge(family, config)
    base, experts = models_of(family)
    batches = [
        [{key: torch.stack([row[key] for row in rows[i : i + 2]]) for key in rows[0]} for i in range(0, len(rows), 2)]
        for rows in in_batch_order(samples_of(family))
    ]
    literal = Literal(base, experts, config)
    losses = literal.run(list(merger.report.blocks), batches)
    for block, report in merger.report.blocks.items():
        assert report["first_loss"] == pytest.approx(losses[block][0], rel=1e-4), block
    inputs = ZOO[family].inputs()
    found, expected = merger.model(**inputs).logits, literal.student(**inputs).logits
    assert float((found - expected).abs().max()) < 1e-4
    for name, parameter in literal.student.named_parameters():
        # The bias of the keys has no gradient but rounding errors (the softmax cancels it), which Adam makes steps of.
        if not name.endswith(("key.bias", "k_proj.bias")):
            torch.testing.assert_close(merger.model.get_parameter(name), parameter, rtol=0, atol=1e-4, msg=name)


def in_batch_order(samples: dict[str, list[dict[str, Tensor]]]) -> list[list[dict[str, Tensor]]]:
    """The rows in the order in which the library groups them: by length."""

    def length(row: dict[str, Tensor]) -> int:
        return int(row["attention_mask"].sum()) if "attention_mask" in row else 0

    return [sorted(rows, key=length) for rows in samples.values()]


# -- laws -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_fall_and_runs_repeat_bit_for_bit(family: str):
    config = ProDistillConfig(epochs=2)
    first, second = merge(family, config), merge(family, config)
    for block, report in first.report.blocks.items():
        assert report["last_loss"] < report["first_loss"], block
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name


@pytest.mark.parametrize("granularity", ["element", "tensor", "task"])
@pytest.mark.parametrize("loss", ["sse", "relative", "cosine"])
def test_every_loss_and_granularity_trains(loss: str, granularity: str):
    merger = merge("vit", ProDistillConfig(loss=loss, granularity=granularity, epochs=3, learning_rate=0.02))
    for report in merger.report.blocks.values():
        assert report["last_loss"] < report["first_loss"]


def test_experts_equal_to_the_base_change_nothing():
    base, _ = models_of("bert")
    merger = Merger.from_pretrained(dict.fromkeys(TASKS, base), ProDistillConfig(epochs=2), base_model=base)
    merged = merger.merge(samples_of("bert")).state_dict()
    for name, tensor in base.state_dict().items():
        assert torch.equal(merged[name], tensor), name


def test_coefficients_of_a_tensor_and_of_a_task_stay_in_the_span():
    base, experts = models_of("vit")
    merged = merge("vit", ProDistillConfig(granularity="task", epochs=2)).model
    name = "vit.layers.1.mlp.fc1.weight"
    vectors = torch.stack([(one.get_parameter(name) - base.get_parameter(name)).flatten() for one in experts.values()])
    change = (merged.get_parameter(name) - base.get_parameter(name)).flatten()
    fit = torch.linalg.lstsq(vectors.T, change.unsqueeze(1)).solution
    torch.testing.assert_close(vectors.T @ fit, change.unsqueeze(1), rtol=0, atol=1e-6)


def test_models_of_the_user_are_not_changed():
    base, experts = models_of("llama")
    before = [copy.deepcopy(model.state_dict()) for model in (base, *experts.values())]
    Merger.from_pretrained(experts, ProDistillConfig(epochs=1), base_model=base).merge(samples_of("llama"))
    for model, state in zip((base, *experts.values()), before):
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[name]), name


def test_padding_has_no_say():
    """Tokens behind the mask do not change the result."""
    base, experts = models_of("bert")
    results = []
    for filler in (7, 42):
        samples = samples_of("bert")
        for rows in samples.values():
            for row in rows:
                row["input_ids"] = torch.where(row["attention_mask"].bool(), row["input_ids"], filler)
        merger = Merger.from_pretrained(experts, ProDistillConfig(epochs=2), base_model=base)
        results.append(merger.merge(samples).state_dict())
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["linear", "wudi", {"merge_type": "ties", "density": 0.5}, "regmean_pp"])
def test_init_is_where_training_starts(init):
    start = {"merge_type": init} if isinstance(init, str) else init
    config = ProDistillConfig(init=init, epochs=1, learning_rate=1e-12)
    merged = merge("vit", config).model.state_dict()
    base, experts = models_of("vit")
    merger = Merger.from_pretrained(experts, _config(start), base_model=base)
    expected = merger.merge(samples_of("vit") if init == "regmean_pp" else None).state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-5, msg=name)


def _config(recipe: dict):
    from hf_merge import MergeConfig

    return MergeConfig.from_dict(recipe)


def test_init_that_does_not_exist_is_named():
    with pytest.raises(ConfigError, match="Unknown merge method 'wodi'. Did you mean 'wudi'"):
        ProDistillConfig(init="wodi")


def test_skipped_blocks_are_those_with_the_smallest_task_vectors():
    base, experts = models_of("vit")
    with torch.no_grad():
        for expert in experts.values():
            for parameter, start in zip(expert.vit.layers[1].parameters(), base.vit.layers[1].parameters()):
                parameter.copy_(start + 0.1 * (parameter - start))
    merger = Merger.from_pretrained(experts, ProDistillConfig(epochs=2, skip_blocks=1), base_model=base)
    merger.merge(samples_of("vit"))
    assert [name for name, report in merger.report.blocks.items() if report.get("skipped")] == ["vit.layers.1"]
    plain = Merger.from_pretrained(experts, _config({"merge_type": "task_arithmetic"}), base_model=base).merge()
    name = "vit.layers.1.mlp.fc1.weight"
    assert torch.equal(merger.model.get_parameter(name), plain.get_parameter(name))


def test_early_stopping_ends_a_block():
    config = ProDistillConfig(epochs=50, learning_rate=1e-9, early_stopping_patience=2)
    reports = merge("vit", config).report.blocks.values()
    assert [report["epochs"] for report in reports] == [3, 3, 3]


def test_excluded_parameters_and_rules_are_left_alone():
    base, experts = models_of("vit")
    config = ProDistillConfig(
        epochs=1, exclude=["layernorm"], rules=[{"match": r"layers\.0\.mlp\.fc1", "merge_type": "linear"}]
    )
    merged = Merger.from_pretrained(experts, config, base_model=base).merge(samples_of("vit"))
    name = "vit.layers.0.layernorm_before.weight"
    assert torch.equal(merged.get_parameter(name), base.get_parameter(name))
    name = "vit.layers.0.mlp.fc1.weight"
    mean = sum(expert.get_parameter(name) for expert in experts.values()) / 2
    torch.testing.assert_close(merged.get_parameter(name), mean)


def test_gradient_accumulation_of_all_batches_is_one_large_batch():
    small = merge(
        "vit", ProDistillConfig(epochs=2, batch_size=1), args=ProDistillArguments(gradient_accumulation_steps=4)
    )
    large = merge("vit", ProDistillConfig(epochs=2, batch_size=4))
    inputs = ZOO["vit"].inputs()
    torch.testing.assert_close(small.model(**inputs).logits, large.model(**inputs).logits, rtol=0, atol=1e-4)


def test_bf16_is_near():
    full = merge("vit", ProDistillConfig(epochs=2))
    half = merge("vit", ProDistillConfig(epochs=2), args=ProDistillArguments(bf16=True))
    inputs = ZOO["vit"].inputs()
    torch.testing.assert_close(half.model(**inputs).logits, full.model(**inputs).logits, rtol=0, atol=2e-2)
    assert not torch.equal(half.model(**inputs).logits, full.model(**inputs).logits)
