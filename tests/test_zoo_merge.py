"""Every family of the zoo, merged from disk to disk and loaded again by plain transformers.

The oracle of `linear` is the plain average of the fully loaded models' state dicts, bit for bit; `ties` and `wudi` are compared
with the method applied to those dense tensors. The quick set runs every family with every method on plain checkpoints and gives each
family two more of the forms that checkpoints have in the wild; the full product is marked slow.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hf_merge import MergeConfig
from hf_merge.methods.base import ParameterKind, TensorGroup
from hf_merge.registry import get_merge_method

from .testing_utils import Bed, dense_average, load_clean, make_bed
from .zoo import ZOO, ZooEntry, tensors_on_disk, with_ties_changed


METHODS = ("linear", "ties", "wudi")
FAMILIES = tuple(ZOO)
LEGACY_FAMILIES = {"bert", "bert-mlm", "bert-qa", "roberta", "electra", "deberta", "deberta-v2"}


@dataclass(frozen=True)
class Form:
    """A form of checkpoint.

    Args:
        save (`Mapping`): Arguments of `save_zoo_model`.
        per_folder (`Mapping`): Arguments for single folders, by name.
        ties_changed (`bool`): Tied families untied and the other way round.
        max_shard_size (`str`): Of the output.
    """

    save: Mapping = field(default_factory=dict)
    per_folder: Mapping[str, Mapping] = field(default_factory=dict)
    ties_changed: bool = False
    max_shard_size: str = "5GB"

    @property
    def one_naming(self) -> bool:
        return not self.per_folder


FORMS = {
    "plain": Form(),
    "sharded": Form(save={"max_shard_size": "20KB"}, max_shard_size="30KB"),
    "bfloat16": Form(save={"dtype": torch.bfloat16}),
    "bin": Form(save={"weights": "bin"}),
    "module_names": Form(save={"names": "module"}),
    "legacy_names": Form(save={"names": "legacy"}),
    "mixed_names": Form(
        per_folder={"a": {"names": "module"}, "b": {"weights": "bin"}, "c": {"max_shard_size": "20KB"}},
        max_shard_size="30KB",
    ),
    "ties_changed": Form(ties_changed=True),
}


def applies(family: str, form: str) -> bool:
    if form == "legacy_names":
        return family in LEGACY_FAMILIES
    if form == "ties_changed":
        return with_ties_changed(ZOO[family]) is not None
    return True


def quick_forms(family: str) -> list[str]:
    """Two forms for each family, so that the families share out all forms."""
    fitting = [form for form in FORMS if form != "plain" and applies(family, form)]
    start = FAMILIES.index(family)
    return [fitting[start % len(fitting)], fitting[(start + len(fitting) // 2) % len(fitting)]]


def bed_of(entry: ZooEntry, form: Form, folder: Path) -> Bed:
    model = with_ties_changed(entry) if form.ties_changed else None
    return make_bed(entry, folder, model=model, options=lambda name: form.per_folder.get(name, {}), **form.save)


def dense_states(bed: Bed) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The base's and the experts' state dicts, in module names, fully loaded by transformers."""
    base, *experts = (load_clean(bed.model_class, path).state_dict() for path in (bed.base, *bed.experts.values()))
    return base, experts


def dense_merge(bed: Bed, config: MergeConfig, rows: Mapping[str, Mapping]) -> dict[str, Tensor]:
    """The method applied to the dense tensors, one call per parameter of the report; statistics are averaged."""
    base, experts = dense_states(bed)
    method = get_merge_method(config.merge_type).method_cls()
    groups = [
        TensorGroup(
            name=name,
            kind=ParameterKind(row["kind"]),
            stored_base=base[name],
            stored_experts=[state[name] for state in experts],
            expert_names=tuple(bed.experts),
            settings=config.resolve(name, 0.0, tuple(bed.experts)),
        )
        for name, row in rows.items()
        if base[name].is_floating_point()
    ]
    for round in range(method.rounds(config)):
        method.conclude(((group.name, method.observe(group, round)) for group in groups), round, config)
    averaged = {name for name, row in rows.items() if row["action"] == "mean"}
    assert all(rows[name]["kind"] == "buffer" for name in averaged)
    return {group.name: group.mean() if group.name in averaged else method(group) for group in groups}


def rows_of_report(out: Path) -> dict[str, dict]:
    """What the report of the merge says about every parameter."""
    return json.loads((out / "merge_report.json").read_text())["parameters"]


def assert_nothing_lost(bed: Bed, out: Path, one_naming: bool) -> None:
    """The output has the names of the input, every float tensor is merged, and integers are copied."""
    written, given = tensors_on_disk(out), tensors_on_disk(bed.base)
    if one_naming:
        tied = {name for name in given if name not in written}
        pointers = {tensor.data_ptr() for name, tensor in given.items() if name in written}
        assert all(given[name].data_ptr() in pointers for name in tied), f"lost: {sorted(tied)}"
        assert set(written) <= set(given), f"new names: {sorted(set(written) - set(given))}"
    for name, tensor in written.items():
        if name not in given:
            continue
        assert tensor.dtype == given[name].dtype
        assert torch.equal(tensor, given[name]) != tensor.is_floating_point(), name


def assert_states_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    wrong = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    assert not wrong, f"{len(wrong)} of {len(expected)} parameters differ: {wrong[:5]}"


def check_merge(family: str, form_name: str, method: str, folder: Path) -> None:
    form, entry = FORMS[form_name], ZOO[family]
    bed = bed_of(entry, form, folder)
    config = MergeConfig.from_merge_type(method)
    out = bed.merge(config, max_shard_size=form.max_shard_size)
    assert_nothing_lost(bed, out, form.one_naming)
    merged = load_clean(bed.model_class, out)
    state = merged.state_dict()
    stored = form.save.get("dtype", torch.float32)  # some parameters are loaded in float32 whatever they are stored in
    if method == "linear":
        expected = dense_average(dense_states(bed)[1])
        assert_states_equal(
            state, {name: tensor.to(stored).to(state[name].dtype) for name, tensor in expected.items()}
        )
    else:
        for name, tensor in dense_merge(bed, config, rows_of_report(out)).items():
            assert torch.allclose(state[name].float(), tensor.to(stored).float(), rtol=1e-6, atol=1e-6), name
    with torch.no_grad():
        outputs = merged.float()(**entry.inputs())
    tensors = [value for value in outputs.to_tuple() if isinstance(value, Tensor)]
    assert all(torch.isfinite(value).all() for value in tensors)


def product(forms_of: Callable[[str], list[str]], methods: Sequence[str]) -> list:
    cells = itertools.chain.from_iterable(itertools.product([name], forms_of(name), methods) for name in FAMILIES)
    return [pytest.param(*cell, id="-".join(cell)) for cell in cells]


@pytest.mark.parametrize(("family", "form", "method"), product(lambda family: ["plain"], METHODS))
def test_every_family_with_every_method(family: str, form: str, method: str, tmp_path):
    check_merge(family, form, method, tmp_path)


@pytest.mark.parametrize(("family", "form", "method"), product(quick_forms, ["linear"]))
def test_every_form_of_checkpoint(family: str, form: str, method: str, tmp_path):
    check_merge(family, form, method, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "form", "method"),
    product(lambda family: [f for f in FORMS if f != "plain" and applies(family, f)], METHODS),
)
def test_every_family_with_every_form_and_method(family: str, form: str, method: str, tmp_path):
    check_merge(family, form, method, tmp_path)


def test_the_zoo_is_broad_and_the_quick_set_covers_every_form():
    assert len(ZOO) >= 35
    used = {form for family in FAMILIES for form in quick_forms(family)}
    assert used == set(FORMS) - {"plain"}


@pytest.mark.parametrize("family", ["vit", "llama", "mixtral", "t5", "resnet"])
def test_merge_in_memory_equals_the_streamed_one(family: str, tmp_path):
    from hf_merge import Merger

    bed = make_bed(ZOO[family], tmp_path)
    config = MergeConfig.from_merge_type("ties")
    in_memory = Merger.from_pretrained(bed.experts, config, base_model=bed.base).merge()
    assert type(in_memory) is bed.model_class
    streamed = load_clean(bed.model_class, bed.merge(config))
    assert_states_equal(in_memory.state_dict(), streamed.state_dict())


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "mixtral", "resnet", "bart"])
def test_weights_of_the_experts(family: str, tmp_path):
    bed = make_bed(ZOO[family], tmp_path)
    weights = [0.5, 0.125, 2.0]
    out = bed.merge(MergeConfig.from_merge_type("linear", weights=weights), base=False)
    assert_states_equal(load_clean(bed.model_class, out).state_dict(), dense_average(dense_states(bed)[1], weights))


@pytest.mark.parametrize("family", ["bart", "gemma3", "t5", "whisper", "opt"])
def test_one_untied_expert_unties_the_result(family: str, tmp_path):
    """The tied experts' shared tensor stands for both; nobody's output embedding is lost."""
    bed = make_bed(ZOO[family], tmp_path)
    untied = make_bed(ZOO[family], tmp_path / "untied", model=with_ties_changed(ZOO[family]), names=["b"])
    bed.experts["b"] = untied.experts["b"]
    out = bed.merge(MergeConfig.from_merge_type("linear"))
    assert_states_equal(load_clean(bed.model_class, out).state_dict(), dense_average(dense_states(bed)[1]))


def test_shards_are_no_larger_than_asked(tmp_path):
    bed = make_bed(ZOO["llama"], tmp_path)
    out = bed.merge(MergeConfig.from_merge_type("linear"), max_shard_size="30KB")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in out.glob("*.safetensors")}
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors_on_disk(out).values())
    assert max(path.stat().st_size for path in out.glob("*.safetensors")) < 40_000


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtype_of_the_output(dtype: str, tmp_path):
    bed = make_bed(ZOO["llama"], tmp_path, dtype=torch.bfloat16)
    out = bed.merge(MergeConfig.from_merge_type("linear"), dtype=dtype)
    assert {tensor.dtype for tensor in tensors_on_disk(out).values()} == {getattr(torch, dtype)}
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype
    reloaded = load_clean(bed.model_class, out)
    assert reloaded.dtype == getattr(torch, dtype)
    average = dense_average([{k: v.float() for k, v in state.items()} for state in dense_states(bed)[1]])
    assert_states_equal(reloaded.state_dict(), {name: tensor.to(reloaded.dtype) for name, tensor in average.items()})
