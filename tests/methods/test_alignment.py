"""Alignment: a permuted model is the same model, and matching finds the permutation."""

import pytest
import torch

from hf_merge import AutoMergedModel, ConfigError, LinearConfig, Merger, PlanError, TiesConfig
from hf_merge.methods.alignment import GitRebasinConfig, OtFusionConfig, ZipItConfig
from hf_merge.methods.alignment.activations import zip_units
from hf_merge.methods.alignment.matching import WeightMatching, assign, transport
from hf_merge.methods.alignment.spaces import RESIDUAL, ExpertTransforms, HeadOrder, Spaces, Transform, head_groups
from hf_merge.methods.fs_merge import FsMergeConfig, KdConfig
from hf_merge.modeling.heads import find_attention, find_elementwise
from hf_merge.modeling.topology import backbone_of, trace
from tests.methods.test_fs_merge import FAMILIES, build, logits, merger_of, parameters, samples
from tests.zoo import ZOO


def spaces_of(model, family):
    inputs = ZOO[family].inputs()
    topology = trace(model, inputs)
    topology.attention = find_attention(model, topology, inputs)
    topology.elementwise = find_elementwise(model, topology, inputs)
    shapes = {name: value.shape for name, value in parameters(model).items()}
    return Spaces.of(topology, backbone_of(model).config.hidden_size, shapes)


def random_transforms(spaces: Spaces, model) -> ExpertTransforms:
    generator = torch.Generator().manual_seed(4)

    def permutation(count):
        return torch.randperm(count, generator=generator)

    transforms = ExpertTransforms(spaces)
    weights = parameters(model)
    transforms.units[RESIDUAL] = Transform.permutation(permutation(backbone_of(model).config.hidden_size))
    for name, space in spaces.hidden.items():
        site = spaces.topology.linears[space.writers[0]]
        count = weights[f"{space.writers[0]}.weight"].shape[1 if site.transposed else 0]
        transforms.units[name] = Transform.permutation(permutation(count))
    for name, site in spaces.attention.items():
        groups = len(head_groups(site))
        inner = torch.stack([permutation(site.head_size) for _ in range(groups)])
        matched = torch.arange(site.head_size).expand(groups, -1) if site.is_rotary else inner.flip(1)
        transforms.heads[name] = HeadOrder(permutation(groups), inner, matched)
    return transforms


def permuted(model, family):
    """The same function with other units. The head reads the units of the end of the backbone, which are renamed too."""
    spaces = spaces_of(model, family)
    transforms = random_transforms(spaces, model)
    other = build(family, 0)
    other.load_state_dict(model.state_dict())
    width = backbone_of(model).config.hidden_size
    with torch.no_grad():
        for name, value in transforms.apply(parameters(model), width).items():
            backbone_of(other).get_parameter(name).copy_(value)
        tap = spaces.topology.tap
        ends = [name for name in transforms.units if name.startswith("out:")]
        end = ends[-1] if tap.field == "pooler_output" else RESIDUAL
        for layer in tap.layers:
            module = other.get_submodule(layer)
            head = model.get_submodule(layer).weight.detach() @ transforms.units[end].to.mT
            module.weight = torch.nn.Parameter(head)
    return other


@pytest.mark.parametrize("family", (*FAMILIES, "gpt-neox", "distilbert", "qwen2"))
def test_permuted_model_is_the_same_function(family):
    model = build(family, 0)
    torch.testing.assert_close(logits(permuted(model, family), family), logits(model, family), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "config", (GitRebasinConfig(), GitRebasinConfig(matching="activations"), ZipItConfig(budget=0.0))
)
@pytest.mark.parametrize("family", ("vit", "bert", "gpt2", "llama"))
def test_matching_undoes_a_permutation(family, config):
    model = build(family, 0)
    other = permuted(model, family)
    merger = Merger.from_pretrained({"plain": model, "permuted": other}, config)
    needs_data = not isinstance(config, GitRebasinConfig) or config.matching == "activations"
    data = {name: samples(family, 24) for name in ("plain", "permuted")} if needs_data else None
    merger.merge(data)
    if needs_data and family != "vit":
        # Random weights make units of text models that no sample tells apart.
        return
    for task in ("plain", "permuted"):
        torch.testing.assert_close(logits(merger.model_for(task), family), logits(model, family), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", ("vit", "bert", "gpt2", "llama"))
def test_later_blocks_are_kept_for_each_task(family, tmp_path):
    """Partial zip: what comes after the merged blocks is every expert's own, in the merged residual stream."""
    model = build(family, 0)
    spoilt = permuted(model, family)
    last = [p for name, p in backbone_of(spoilt).named_parameters() if ".1." in name and p.ndim == 2]
    merger = Merger.from_pretrained({"plain": model, "other": spoilt}, GitRebasinConfig(blocks=1))
    merger.save_pretrained(tmp_path / "exact")
    for task in ("plain", "other"):
        found = AutoMergedModel.from_pretrained(tmp_path / "exact", task=task)
        torch.testing.assert_close(logits(found, family), logits(model, family), atol=1e-4, rtol=1e-3)
    with torch.no_grad():
        last[0].add_(0.1 * torch.randn(last[0].shape, generator=torch.Generator().manual_seed(0)))
    merger = Merger.from_pretrained({"plain": model, "other": spoilt}, GitRebasinConfig(blocks=1))
    merger.merge()
    assert torch.equal(logits(merger.model_for("plain"), family), logits(model, family))
    torch.testing.assert_close(logits(merger.model_for("other"), family), logits(spoilt, family), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", ("vit", "bert", "gpt2"))
def test_repaired_layers_have_the_experts_moments(family):
    """Means and deviations of a layer's outputs are the experts' averages; a model merged with itself stays what it is."""
    model = build(family, 0)
    data = {name: samples(family, 24) for name in ("plain", "permuted")}
    merger = Merger.from_pretrained(
        {"plain": model, "permuted": permuted(model, family)}, GitRebasinConfig(repair=True)
    )
    merger.merge(data)
    torch.testing.assert_close(logits(merger.model_for("plain"), family), logits(model, family), atol=1e-3, rtol=1e-2)
    experts = {"a": build(family, 0), "b": build(family, 1)}
    merger = Merger.from_pretrained(experts, GitRebasinConfig(repair=True, residual=False))
    merger.merge({name: samples(family, 24) for name in experts})
    plain = Merger.from_pretrained(experts, GitRebasinConfig(residual=False))
    plain.merge()
    last = list(trace(model, ZOO[family].inputs()).linears)[2]
    inputs = samples(family, 24)
    wanted = sum(moments(one, last, inputs)[1].sum() for one in experts.values()) / 2
    assert abs(moments(plain.model, last, inputs)[1].sum() - wanted) > 0.1 * wanted
    torch.testing.assert_close(moments(merger.model, last, inputs)[1].sum(), wanted, rtol=0.02, atol=0)


@torch.no_grad()
def moments(model, layer: str, inputs) -> tuple[torch.Tensor, torch.Tensor]:
    outputs = []
    handle = backbone_of(model).get_submodule(layer).register_forward_hook(lambda m, a, out: outputs.append(out))
    model(**inputs)
    handle.remove()
    rows = outputs[0].flatten(0, -2)
    return rows.mean(0), rows.std(0, correction=0)


def test_partial_zip_keeps_what_is_not_merged():
    merger, data = merger_of("vit", ZipItConfig(blocks=0))
    merger.merge(data)
    whole, _ = merger_of("vit", ZipItConfig())
    whole.merge(data)
    names = merger.plan.heads["task1"].names
    assert "vit.layernorm.weight" in names and "vit.embeddings.cls_token" not in names
    assert any(".layers.0." in name for name in names)
    assert len(names) > len(whole.plan.heads["task1"].names)


@pytest.mark.parametrize("merge", (lambda: LinearConfig(align="git_rebasin"), lambda: TiesConfig(align="git_rebasin")))
@pytest.mark.parametrize("family", FAMILIES)
def test_any_method_can_merge_aligned_experts(family, merge):
    """A model and its permuted twin are one and the same model after alignment, with and without a base."""
    config, model = merge(), build(family, 0)
    config.heads = "per_task"
    experts = {"plain": model, "permuted": permuted(model, family)}
    base = build(family, 0) if config.merge_type == "ties" else None
    merger = Merger.from_pretrained(experts, config, base_model=base)
    merger.merge()
    for task in experts:
        torch.testing.assert_close(logits(merger.model_for(task), family), logits(model, family), atol=1e-4, rtol=1e-3)


def test_average_of_other_heads_is_not_the_model():
    """The law above is not empty: without matching the average of the two is another function."""
    model = build("vit", 0)
    spaces = spaces_of(model, "vit")
    ours, theirs = parameters(model), parameters(permuted(model, "vit"))
    matched = WeightMatching(spaces, ours, theirs, (32, 32)).run().apply(theirs, 32)
    assert all(torch.allclose(matched[name], ours[name], atol=1e-5) for name in ours)
    assert not torch.allclose(theirs["layers.0.mlp.fc1.weight"], ours["layers.0.mlp.fc1.weight"])


def test_rotary_heads_and_grouped_queries_are_respected():
    spaces = spaces_of(build("llama", 0), "llama")
    for site in spaces.attention.values():
        assert site.is_rotary
        assert len(head_groups(site)) == 2
        assert site.query_and_key == [part.layer for part in site.matched]


def test_transport_of_a_permutation_is_the_permutation():
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    similarity = torch.eye(6)[order]
    assert torch.equal(assign(similarity), order)
    soft = transport(similarity, 0.02)
    torch.testing.assert_close(soft.to, torch.eye(6)[order], atol=1e-3, rtol=0)
    torch.testing.assert_close(soft.back, soft.to.mT, atol=1e-3, rtol=0)


def test_transport_between_widths_takes_means():
    plan = transport(torch.randn(4, 7, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(plan.to.sum(1), torch.ones(4))
    torch.testing.assert_close(plan.back.sum(0), torch.ones(4))


def test_zip_pairs_every_unit_once():
    values = torch.randn(12, 100, generator=torch.Generator().manual_seed(0))
    for budget in (0.0, 0.5, 1.0):
        ours, theirs = zip_units(torch.corrcoef(values), budget)
        both = torch.cat([ours.to, theirs.to], 1)
        assert (both.sum(1) == 2).all()
        assert (both.sum(0) == 1).all()
    ours, theirs = zip_units(torch.corrcoef(values), 0.0)
    assert (ours.to.sum(1) == 1).all()


@pytest.mark.parametrize("family", ("vit", "bert"))
def test_transport_of_a_model_and_itself_is_near_the_model(family):
    model = build(family, 0)
    config = OtFusionConfig(regularization=0.01)
    merger = Merger.from_pretrained({"plain": model, "same": build(family, 0)}, config)
    merger.merge()
    torch.testing.assert_close(logits(merger.model_for("same"), family), logits(model, family), atol=0.02, rtol=0.05)


@pytest.mark.parametrize("config_cls", (FsMergeConfig, KdConfig))
def test_training_starts_from_aligned_experts(config_cls):
    config = config_cls(init="git_rebasin", epochs=1, learning_rate=1e-6)
    model = build("vit", 0)
    merger = Merger.from_pretrained({"plain": model, "permuted": permuted(model, "vit")}, config)
    merger.merge({name: samples("vit", 24) for name in ("plain", "permuted")})
    (report,) = merger.report.blocks["backbone"].values()
    assert report["first_loss"] < 0.2


def test_refusals():
    merger, data = merger_of("vit", FsMergeConfig(init="git_rebasin", epochs=1), (None, 48))
    with pytest.raises(ConfigError, match="one by one"):
        merger.merge(data)
    merger, _ = merger_of("vit", GitRebasinConfig(), (None, 48))
    with pytest.raises(PlanError, match="hidden_size"):
        merger.check()
    with pytest.raises(ConfigError, match="residual"):
        ZipItConfig(residual=False)
    with pytest.raises(PlanError, match="blocks=9"):
        merger_of("vit", GitRebasinConfig(blocks=9))[0].check()
    with pytest.raises(ConfigError, match="align"):
        FsMergeConfig(align="git_rebasin")
    with pytest.raises(ConfigError, match="one by one"):
        merger_of("vit", LinearConfig(align="git_rebasin"), (None, 48))
