"""FS-Merge: what is folded is what the supernet computes, and the result is an ordinary model."""

import copy

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from hf_merge import (
    AutoMergedModel,
    CalibrationData,
    ConfigError,
    Merger,
    PlanError,
    ProDistillArguments,
    UnsupportedModelError,
)
from hf_merge.engines.backbone_plan import set_width
from hf_merge.methods.backbone_base import OutputMap
from hf_merge.methods.fs_merge import FsMergeConfig, KdConfig
from hf_merge.methods.fs_merge.factors import FORMS, HeadMixing, make_factor
from hf_merge.methods.fs_merge.states import MovingAverage
from hf_merge.methods.fs_merge.supernet import Supernet
from hf_merge.modeling.heads import find_attention
from hf_merge.modeling.topology import backbone_of, trace
from tests.zoo import ZOO


FAMILIES = ("vit", "bert", "roberta", "gpt2", "llama")


def build(family: str, seed: int, width: int | None = None):
    entry = ZOO[family]
    config = entry.config()
    if width is not None:
        set_width(config, width)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return getattr(transformers, entry.model_class)(config).eval()


def parameters(model) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in backbone_of(model).named_parameters()}


def randomise(module: nn.Module, scale: float = 0.2) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


class Literal(nn.Module):
    """Σ_i M_i (W_i U_i x + b_i), on activations."""

    def __init__(self, experts, name, site, outputs, inputs):
        super().__init__()
        self.terms = []
        for expert, output, factor in zip(experts, outputs, inputs, strict=True):
            weight = expert[f"{name}.weight"].mT if site.transposed else expert[f"{name}.weight"]
            self.terms.append((weight, expert.get(f"{name}.bias"), output.dense(), factor.dense()))

    def forward(self, x):
        total = 0
        for weight, bias, output, factor in self.terms:
            hidden = x @ factor.mT @ weight.mT
            total = total + (hidden if bias is None else hidden + bias) @ output.mT
        return total


class LiteralTable(nn.Module):
    """[E_1 .. E_n][token] Mᵀ."""

    def __init__(self, experts, name, outputs):
        super().__init__()
        self.terms = [(e[name], m.dense()) for e, m in zip(experts, outputs, strict=True)]

    def forward(self, tokens, *args):
        return sum(table[tokens] @ output.mT for table, output in self.terms)


class LiteralConvolution(nn.Module):
    """Σ_i M_i conv_i(x)."""

    def __init__(self, module, experts, name, outputs):
        super().__init__()
        self.stride = module.stride
        self.terms = [
            (e[f"{name}.weight"], e[f"{name}.bias"], m.dense()) for e, m in zip(experts, outputs, strict=True)
        ]
        self.weight = module.weight

    def forward(self, x):
        convolved = [
            torch.einsum("oc,bchw->bohw", m, nn.functional.conv2d(x, w, b, self.stride)) for w, b, m in self.terms
        ]
        return sum(convolved)


@torch.no_grad()
def literal_model(backbone, topology, experts, supernet):
    """The supernet written out on a stock backbone: layers are replaced, attention and norms are as they are."""
    literal = copy.deepcopy(backbone)
    for name, site in topology.linears.items():
        identity = [nn.Identity() for _ in experts]
        inputs = supernet.input(site.group) if site.group is not None else identity
        literal.set_submodule(name, Literal(experts, name, site, supernet.output(name), inputs))
    for name in topology.convolutions:
        module = literal.get_submodule(name)
        literal.set_submodule(name, LiteralConvolution(module, experts, name, supernet.output(name)))
    for name in topology.tables:
        path, _, leaf = name.rpartition(".")
        owner = literal.get_submodule(path)
        if isinstance(owner, nn.Embedding):
            literal.set_submodule(path, LiteralTable(experts, name, supernet.output(name)))
        else:
            value = sum(e[name] @ m.dense().mT for e, m in zip(experts, supernet.output(name), strict=True))
            owner._parameters[leaf] = nn.Parameter(value)
    for name in topology.direct:
        literal.get_parameter(name).copy_(supernet.vectors[name.replace(".", "/")])
    return literal


def fold_law(family, widths, merged_width, form, scales, head_aligned=False):
    models = [build(family, seed, width) for seed, width in enumerate(widths)]
    merged = backbone_of(build(family, 9, merged_width))
    experts = [parameters(model) for model in models]
    topology = trace(models[0], ZOO[family].inputs())
    shapes = {name: value.shape for name, value in merged.named_parameters()}
    sizes = {}
    if head_aligned:
        topology.attention = find_attention(models[0], topology, ZOO[family].inputs())
        sizes = {name: site.head_size for site in topology.attention for name in site.query_and_key}
        assert sizes
    supernet = Supernet(topology, experts, shapes, scales, form, rank=4, head_sizes=sizes)
    randomise(supernet)
    inputs = ZOO[family].inputs()
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    literal = literal_model(merged, topology, experts, supernet)
    with torch.no_grad():
        for name, value in supernet.fold().items():
            merged.get_parameter(name).copy_(value)
        expected = literal(**inputs).last_hidden_state
        found = merged(**inputs).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_folded_is_literal(family, form):
    fold_law(family, (None, None), None, form, (1.0, 0.0))


@pytest.mark.parametrize("family", ("llama", "bert"))
def test_folded_is_literal_when_whole_heads_are_mixed(family):
    fold_law(family, (None, None), None, "diagonal_low_rank", (0.5, 0.5), head_aligned=True)


def test_mixing_heads_commutes_with_what_all_heads_have_in_common():
    """(C ⊗ I) (I ⊗ R) = (I ⊗ R) (C ⊗ I): rotary positions turn all heads alike."""
    factor = HeadMixing(12, 8, 1.0, 4)
    randomise(factor)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))[0]
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))
    turned = (turn @ x.reshape(2, 4, 5)).reshape(8, 5)
    expected = (turn @ factor.left(x).reshape(3, 4, 5)).reshape(12, 5)
    torch.testing.assert_close(factor.left(turned), expected)
    torch.testing.assert_close(factor.right(torch.eye(12)), factor.dense())


@pytest.mark.parametrize("family", FAMILIES)
def test_folded_is_literal_for_three_experts_of_different_width(family):
    fold_law(family, (None, 48, 16), 32, "diagonal_low_rank", (1 / 3,) * 3)


@pytest.mark.parametrize("merged_width", (16, 48))
def test_folded_is_literal_in_another_width(merged_width):
    fold_law("vit", (None, 48), merged_width, "full", (0.5, 0.5))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_untrained_supernet_is_the_first_expert(family, form):
    first, second = parameters(build(family, 0)), parameters(build(family, 1))
    topology = trace(build(family, 0), ZOO[family].inputs())
    supernet = Supernet(topology, [first, second], {n: v.shape for n, v in first.items()}, (1.0, 0.0), form)
    folded = supernet.fold()
    assert set(folded) == set(first)
    for name, value in first.items():
        assert torch.equal(folded[name], value), name


def test_untrained_average_is_the_average():
    first, second = parameters(build("bert", 0)), parameters(build("bert", 1))
    topology = trace(build("bert", 0), ZOO["bert"].inputs())
    folded = Supernet(topology, [first, second], {n: v.shape for n, v in first.items()}, (0.5, 0.5)).fold()
    for name in first:
        torch.testing.assert_close(folded[name], (first[name] + second[name]) / 2)


@pytest.mark.parametrize(("family", "groups"), (("llama", 4), ("bert", 4), ("gpt2", 4)))
def test_layers_that_read_one_tensor_share_a_group(family, groups):
    topology = trace(build(family, 0), ZOO[family].inputs())
    readers = [names for names in topology.readers().values() if ".0." in names[0]]
    assert len(readers) == groups
    if family != "gpt2":
        assert max(map(len, readers)) == 3


def test_output_map_folds_into_a_layer():
    torch.manual_seed(0)
    output_map, layer, features = OutputMap(6, 4, True), nn.Linear(4, 3), torch.randn(5, 6)
    randomise(output_map)
    weight, bias = output_map.fold_into(layer.weight.detach(), layer.bias.detach())
    torch.testing.assert_close(features @ weight.mT + bias, layer(output_map(features)))


# -- through the library ---------------------------------------------------------------------------------------------


def samples(family, count=4):
    inputs = ZOO[family].inputs()
    generator = torch.Generator().manual_seed(5)
    if "input_ids" in inputs:
        return {"input_ids": torch.randint(5, 99, (count, 7), generator=generator)}
    return {"pixel_values": torch.randn(count, 3, 16, 16, generator=generator)}


def merger_of(family, config, widths=(None, None)):
    experts = {f"task{i}": build(family, i, width) for i, width in enumerate(widths)}
    return Merger.from_pretrained(experts, config), {name: samples(family) for name in experts}


def logits(model, family):
    with torch.no_grad():
        return model(**samples(family)).logits


@pytest.mark.parametrize("family", (*FAMILIES, "bert-mlm"))
def test_result_is_an_ordinary_model_with_a_head_for_each_task(family, tmp_path):
    config = FsMergeConfig(epochs=2, batch_size=4, rank=2, learning_rate=0.01)
    merger, data = merger_of(family, config)
    before = [{n: v.clone() for n, v in live.live.state_dict().items()} for live in merger.experts]
    merger.merge(data)
    for source, state in zip(merger.experts, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in source.live.state_dict().items())
    expected = {task: logits(merger.model_for(task), family) for task in data}
    assert not torch.allclose(expected["task0"], expected["task1"])
    merger.save_pretrained(tmp_path / "out")
    for task in data:
        found = logits(AutoMergedModel.from_pretrained(tmp_path / "out", task=task), family)
        torch.testing.assert_close(found, expected[task])
    plain = getattr(transformers, ZOO[family].model_class).from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(plain, family), expected["task0"])


@pytest.mark.parametrize("config_cls", (FsMergeConfig, KdConfig))
def test_training_reduces_the_loss(config_cls):
    merger, data = merger_of("bert", config_cls(epochs=15, batch_size=4, learning_rate=0.01))
    merger.merge(data)
    (report,) = merger.report.blocks["backbone"].values()
    assert report["last_loss"] < 0.7 * report["first_loss"]


def test_same_recipe_same_bits():
    results = []
    for _ in range(2):
        merger, data = merger_of("vit", FsMergeConfig(epochs=2, batch_size=2, rank=2, validation_split=0.25))
        results.append(merger.merge(data).state_dict())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_experts_of_different_width(tmp_path):
    config = FsMergeConfig(epochs=2, batch_size=4, rank=2, inner_weight=0.1, logit_weight=0.1)
    merger, data = merger_of("vit", config, (48, None))
    merger.save_pretrained(tmp_path / "out", data=data)
    for task in data:
        model = AutoMergedModel.from_pretrained(tmp_path / "out", task=task)
        assert model.config.hidden_size == 48
        assert torch.isfinite(logits(model, "vit")).all()
    merger, data = merger_of("vit", FsMergeConfig(epochs=1, merged_width=64), (48, None))
    assert merger.merge(data).config.hidden_size == 64


def test_three_experts_one_after_another_then_refined():
    config = FsMergeConfig(epochs=2, batch_size=4, rank=2, sequential=True, refine_epochs=1)
    merger, data = merger_of("bert", config, (None, None, None))
    merger.merge(data)
    assert list(merger.report.blocks["backbone"]) == ["fs_merge 1 of 2", "fs_merge 2 of 2", "refine"]


def test_gradients_of_factors_are_those_of_a_direct_computation():
    """Gradients that go back through the fold once equal those of autograd through the whole computation."""
    models = [build("bert", seed) for seed in range(2)]
    experts = [parameters(model) for model in models]
    topology = trace(models[0], ZOO["bert"].inputs())
    backbone, inputs = backbone_of(build("bert", 7)), ZOO["bert"].inputs()
    supernet = Supernet(topology, experts, {n: v.shape for n, v in experts[0].items()}, (0.5, 0.5), rank=2)
    randomise(supernet)
    output = torch.func.functional_call(backbone, supernet.fold(), (), inputs)
    output.last_hidden_state.square().mean().backward()
    expected = {name: p.grad.clone() for name, p in supernet.named_parameters() if p.grad is not None}
    supernet.zero_grad()

    from hf_merge.methods.backbone_base import BackboneGroup
    from hf_merge.methods.fs_merge.weights import FoldedWeights

    group = BackboneGroup(topology, backbone, experts, [], [], [], ("a", "b"), None)
    weights = FoldedWeights(group, supernet)
    weights.refresh()
    backbone(**inputs).last_hidden_state.square().mean().backward()
    weights.collect()
    for name, gradient in expected.items():
        torch.testing.assert_close(dict(supernet.named_parameters())[name].grad, gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_fitted_maps_leave_the_first_expert_as_it_is(form):
    """Least-squares maps at the start lower the loss; the first expert's features are still its own."""
    losses = []
    for fit_maps in (False, True):
        config = FsMergeConfig(form=form, fit_maps=fit_maps, epochs=1, batch_size=4, learning_rate=1e-9)
        merger, data = merger_of("bert", config)
        merger.merge(data)
        (report,) = merger.report.blocks["backbone"].values()
        losses.append(report["first_loss"])
    assert losses[1] < 0.7 * losses[0]
    first = merger.experts[0].live
    torch.testing.assert_close(logits(merger.model_for("task0"), "bert"), logits(first, "bert"), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_factors_take_the_values_nearest_to_a_matrix(form):
    generator = torch.Generator().manual_seed(0)
    factor = make_factor(form, 6, 4, 1.0, 4, generator)
    matrix = torch.randn(6, 4, generator=generator)
    factor.fit(matrix)
    if form == "diagonal":
        torch.testing.assert_close(factor.dense().diagonal(), matrix.diagonal())
    else:
        torch.testing.assert_close(factor.dense(), matrix, atol=1e-5, rtol=1e-5)


def test_moving_average():
    """The average follows the plain recursion, may be applied for a while, and is kept in the end."""
    tensor = nn.Parameter(torch.zeros(3))
    average, expected = MovingAverage([tensor], 0.5), torch.zeros(3)
    for update in range(1, 30):
        with torch.no_grad():
            tensor.add_(1.0)
        average.update()
        decay = min(0.5, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * tensor.detach()
    own = tensor.detach().clone()
    with average.applied():
        torch.testing.assert_close(tensor.detach(), expected)
    assert torch.equal(tensor.detach(), own)
    average.keep()
    torch.testing.assert_close(tensor.detach(), expected)


@pytest.mark.parametrize("config_cls", (FsMergeConfig, KdConfig))
def test_averaged_weights_differ_from_the_last_ones(config_cls):
    settings = {"epochs": 4, "batch_size": 4, "learning_rate": 0.01, "validation_split": 0.25}
    results = []
    for decay in (0.0, 0.9):
        merger, data = merger_of("vit", config_cls(ema_decay=decay, **settings))
        results.append(merger.merge(data).state_dict())
    assert not torch.equal(results[0]["vit.layers.0.mlp.fc1.weight"], results[1]["vit.layers.0.mlp.fc1.weight"])


def test_augmentation_sees_training_batches():
    seen = []

    def augment(task, arguments, generator):
        seen.append((task, float(generator.random())))
        return arguments

    merger, data = merger_of("vit", KdConfig(epochs=2, batch_size=4))
    merger.merge(CalibrationData(data, augment=augment))
    assert [task for task, _ in seen] == [0, 1, 0, 1]
    assert len({value for _, value in seen}) == 4


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "word"),
    (
        ("t5", "encoder-decoder"),
        ("mixtral", "mixture of experts"),
        ("mamba", "convolution"),
        ("deberta-v2", "more than once"),
        ("clip", "hidden_size"),
        ("dinov2", "head"),
    ),
)
def test_unsupported_architectures_are_refused_with_the_reason(family, word):
    merger = Merger.from_pretrained({"a": ZOO[family].build(0), "b": ZOO[family].build(1)}, KdConfig(epochs=1))
    data = {
        name: [dict(zip(ZOO[family].inputs(), values, strict=True)) for values in zip(*ZOO[family].inputs().values())]
        for name in "ab"
    }
    with pytest.raises((PlanError, UnsupportedModelError), match=word):
        merger.merge(data)


def test_different_depths_name_both():
    deep = ZOO["bert"].config()
    deep.num_hidden_layers = 4
    experts = {"shallow": build("bert", 0), "deep": transformers.BertForSequenceClassification(deep).eval()}
    with pytest.raises(PlanError, match=r"'shallow'.* has 3 layers and 'deep'.* has 4"):
        Merger.from_pretrained(experts, KdConfig()).check()


def test_recipes_say_what_is_wrong():
    with pytest.raises(ConfigError, match="validation_split"):
        FsMergeConfig(early_stopping_patience=2)
    with pytest.raises(ConfigError, match="include"):
        FsMergeConfig(include=["x"])
    with pytest.raises(ConfigError, match="form"):
        FsMergeConfig(form="diag")
    merger, _ = merger_of("vit", FsMergeConfig(merged_width=33))
    with pytest.raises(PlanError, match="merged_width=33"):
        merger.check()


def test_head_folder_holds_the_folded_layer(tmp_path):
    merger, data = merger_of("vit", FsMergeConfig(epochs=1, batch_size=4))
    merger.save_pretrained(tmp_path / "out", data=data)
    stored = load_file(tmp_path / "out" / "heads" / "task1" / "model.safetensors")
    assert not torch.equal(stored["classifier.weight"], merger.experts[1].live.classifier.weight)


def test_callbacks_see_every_update_and_batches_are_accumulated(tmp_path):
    class Counter(transformers.TrainerCallback):
        steps = epochs = 0

        def on_step_end(self, *args, **kwargs):
            self.steps += 1

        def on_epoch_end(self, *args, **kwargs):
            self.epochs += 1

    counter = Counter()
    config = FsMergeConfig(epochs=20, batch_size=1, rank=2, validation_split=0.25, early_stopping_patience=1)
    args = ProDistillArguments(
        str(tmp_path), gradient_accumulation_steps=3, use_cpu=True, bf16=True, disable_tqdm=True
    )
    merger, data = merger_of("vit", config)
    merger.merge(data, callbacks=[counter], args=args)
    (report,) = merger.report.blocks["backbone"].values()
    assert counter.epochs == counter.steps == report["epochs"]
    assert report["held_out_loss"] < 100
