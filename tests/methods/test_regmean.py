"""RegMean and RegMean++ against their formulas in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hf_merge import Merger, RegMeanConfig, RegMeanPlusPlusConfig, TaskArithmeticConfig
from hf_merge.methods.base import ParameterKind, TensorGroup
from hf_merge.methods.linalg import solve_symmetric
from hf_merge.methods.regmean.products import Product, ProductWatcher

from ..zoo import ZOO, perturbed


TASKS = ("a", "b")


def models_of(family: str, scale: float = 0.05):
    base = ZOO[family].build()
    return {task: perturbed(base, seed, scale) for seed, task in enumerate(TASKS, start=1)}


def samples_of(family: str) -> dict[str, dict[str, Tensor]]:
    inputs = ZOO[family].inputs()
    turned = {
        k: v if k.endswith("mask") else v.flip(-1) if not v.is_floating_point() else -v for k, v in inputs.items()
    }
    return {"a": inputs, "b": turned}


def merge(family: str, config, experts=None, samples=None):
    merger = Merger.from_pretrained(experts or models_of(family), config)
    merger.merge(samples or samples_of(family))
    return merger


def recorded_inputs(model: nn.Module, path: str, inputs: dict[str, Tensor]) -> Tensor:
    """What a layer reads in a plain forward, float64, as (tokens, in), padding left out."""
    seen: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    rows = seen[0].double()
    mask = inputs.get("attention_mask")
    if mask is not None and rows.dim() == 3:
        return rows[mask.bool()]
    return rows.reshape(-1, rows.shape[-1]) if mask is None else rows[mask.flatten().bool()]


def regmean(weights: list[Tensor], rows: list[Tensor], alpha: float) -> Tensor:
    """(Σ W_i G̃_i)(Σ G̃_i)⁻¹ with G̃_i = (α + (1 − α) I) ∘ G_i / tokens.  W_i: (out, in)."""
    grams = []
    for one in rows:
        gram = one.mT @ one / len(one)
        grams.append(alpha * gram + (1 - alpha) * torch.diag(gram.diagonal()))
    left = sum(weight.double() @ gram for weight, gram in zip(weights, grams))
    return left @ torch.linalg.pinv(sum(grams), rtol=1e-12)


LAYERS = {
    "bert": "bert.encoder.layer.1.output.dense",
    "vit": "vit.layers.1.attention.q_proj",
    "gpt2": "transformer.h.2.mlp.c_fc",
    "llama": "model.layers.1.mlp.gate_proj",
}


@pytest.mark.parametrize("alpha", [0.5, 0.9])
@pytest.mark.parametrize("family", LAYERS)
def test_regmean_is_the_formula(family: str, alpha: float):
    path, experts, samples = LAYERS[family], models_of(family), samples_of(family)
    merged = merge(family, RegMeanConfig(alpha=alpha, ridge=1e-12)).model
    transposed = family == "gpt2"
    weights = [model.get_parameter(f"{path}.weight").detach() for model in experts.values()]
    rows = [recorded_inputs(model, path, samples[task]) for task, model in experts.items()]
    expected = regmean([w.mT if transposed else w for w in weights], rows, alpha)
    expected = expected.mT if transposed else expected
    torch.testing.assert_close(merged.get_parameter(f"{path}.weight").double(), expected, rtol=1e-4, atol=1e-5)


def test_regmean_of_a_mixture_uses_the_routed_tokens():
    experts, samples = models_of("mixtral"), samples_of("mixtral")
    merged = merge("mixtral", RegMeanConfig(alpha=0.5, ridge=1e-12)).model
    path = "model.layers.0.mlp"
    states, chosen = [], []
    for task, model in experts.items():
        rows = recorded_inputs(model, path, samples[task])
        router = model.get_submodule(f"{path}.gate")
        states.append(rows)
        chosen.append(router(rows.float())[2])
    name = f"{path}.experts.gate_up_proj"
    for index in range(4):
        routed = [rows[(choice == index).any(-1)] for rows, choice in zip(states, chosen)]
        if any(len(rows) == 0 for rows in routed):
            continue
        expected = regmean([model.get_parameter(name)[index].detach() for model in experts.values()], routed, 0.5)
        torch.testing.assert_close(merged.get_parameter(name)[index].double(), expected, rtol=1e-4, atol=1e-5)


def test_everything_else_is_merged_by_init():
    experts = models_of("bert")
    merged = merge("bert", RegMeanConfig()).model
    name = "bert.encoder.layer.0.output.LayerNorm.weight"
    mean = sum(model.get_parameter(name) for model in experts.values()) / 2
    torch.testing.assert_close(merged.get_parameter(name), mean)


@pytest.mark.parametrize("config", [RegMeanConfig(), RegMeanPlusPlusConfig(), RegMeanPlusPlusConfig(targets="merged")])
def test_equal_experts_stay_what_they_are(config):
    expert = ZOO["bert"].build()
    merged = merge("bert", config, dict.fromkeys(TASKS, expert)).model
    for name, tensor in expert.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], tensor, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("config", [RegMeanConfig(), RegMeanPlusPlusConfig(), RegMeanPlusPlusConfig(targets="merged")])
def test_the_order_of_the_experts_does_not_matter(config):
    experts, samples = models_of("vit"), samples_of("vit")
    straight = merge("vit", config, experts, samples).model.vit.state_dict()
    turned = merge("vit", config, dict(reversed(experts.items())), samples).model.vit.state_dict()
    for name, tensor in straight.items():
        torch.testing.assert_close(turned[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", ["bert", "mixtral"])
@pytest.mark.parametrize("config", [RegMeanConfig(), RegMeanPlusPlusConfig()])
def test_padding_has_no_say(family: str, config):
    results = []
    for filler in (7, 42):
        samples = samples_of(family)
        for inputs in samples.values():
            inputs["input_ids"] = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], filler)
        rows = {task: [{k: v[i] for k, v in one.items()} for i in range(2)] for task, one in samples.items()}
        results.append(merge(family, config, samples=rows).model.state_dict())
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_alpha_zero_weights_the_features_one_by_one():
    path, experts, samples = LAYERS["vit"], models_of("vit"), samples_of("vit")
    merged = merge("vit", RegMeanConfig(alpha=0.0, ridge=0)).model
    energies = [recorded_inputs(experts[t], path, samples[t]).square().mean(0) for t in TASKS]
    weights = [experts[task].get_parameter(f"{path}.weight").double() for task in TASKS]
    expected = sum(w * e for w, e in zip(weights, energies)) / sum(energies)
    torch.testing.assert_close(merged.get_parameter(f"{path}.weight").double(), expected, rtol=1e-4, atol=1e-5)


def test_own_targets_bring_the_output_nearer_to_the_experts():
    experts, samples = models_of("vit", 0.1), samples_of("vit")
    errors = {}
    for targets in ("own", "merged"):
        merged = merge("vit", RegMeanPlusPlusConfig(targets=targets, alpha=1.0, ridge=1e-3), experts, samples).model
        with torch.no_grad():
            errors[targets] = sum(
                float((merged.vit(**samples[task])[0] - experts[task].vit(**samples[task])[0]).square().sum())
                for task in TASKS
            )
    assert errors["own"] < errors["merged"]


def test_products_are_recognised_however_they_are_made():
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(3, 4))
    module.experts = nn.Parameter(torch.randn(2, 3, 4))
    groups = {
        "weight": group("weight", ParameterKind.LINEAR, module.weight),
        "experts": group("experts", ParameterKind.EXPERT_LINEAR, module.experts),
    }
    seen: list[Product] = []
    rows = torch.randn(5, 4)
    with ProductWatcher(module, groups, seen.append):
        torch.nn.functional.linear(rows, module.weight)
        torch.nn.functional.linear(rows, module.experts[1])
        rows @ module.weight.mT
        torch.addmm(torch.zeros(3), rows, module.weight.mT)
        rows @ torch.randn(4, 3)
    assert [(one.name, one.index) for one in seen] == [
        ("weight", None),
        ("experts", 1),
        ("weight", None),
        ("weight", None),
    ]


def group(name: str, kind: ParameterKind, tensor: Tensor) -> TensorGroup:
    return TensorGroup(name, kind, None, [tensor], ("a",), RegMeanConfig())


def test_layers_without_any_token_keep_the_mean():
    """An expert of a mixture that no token is routed to has nothing to be fitted to."""
    experts = models_of("mixtral")
    with torch.no_grad():
        for model in experts.values():
            model.model.layers[0].mlp.gate.weight.zero_()
            model.model.layers[0].mlp.gate.weight[:2] += 0.0
    merged = merge("mixtral", RegMeanConfig(), experts).model
    name = "model.layers.0.mlp.experts.down_proj"
    mean = sum(model.get_parameter(name) for model in experts.values()) / 2
    # Equal router logits choose the same two of the four experts for every token.
    kept = [torch.allclose(merged.get_parameter(name)[i], mean[i], atol=1e-6) for i in range(4)]
    assert sum(kept) >= 2


def test_the_ridge_pulls_towards_init():
    """A layer without a say of the samples (a very large ridge) is that of the recipe of `init`."""
    init = {"merge_type": "task_arithmetic", "scaling": 0.7}
    base, experts = ZOO["vit"].build(), models_of("vit")
    start = Merger.from_pretrained(experts, TaskArithmeticConfig(scaling=0.7), base_model=base).merge().state_dict()
    for config in (RegMeanConfig(init=init, ridge=1e8), RegMeanPlusPlusConfig(init=init, ridge=1e8)):
        merger = Merger.from_pretrained(experts, config, base_model=base)
        for name, tensor in merger.merge(samples_of("vit")).state_dict().items():
            torch.testing.assert_close(tensor, start[name], rtol=0, atol=1e-5, msg=name)


def test_a_tiny_ridge_survives_dependent_inputs():
    """Rounded sums of fewer tokens than features are not quite positive definite."""
    rows = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    system = (rows.mT @ rows).double() - 1e-7 * torch.eye(40, dtype=torch.float64)
    wanted = torch.randn(40, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.linalg.cholesky_ex(system).info
    solved = solve_symmetric(system, system @ wanted)
    torch.testing.assert_close(system @ solved, system @ wanted, rtol=0, atol=1e-4)
    assert solved.norm() <= wanted.norm()
