"""The laws that every registered merge method obeys, found through the registry: a new method is tested by being registered.

Each law is checked on `TensorGroup`s directly, for every kind of parameter and the shapes that break careless code (no
dimension, one element, none at all, a class token, convolutions, the stacked experts of a mixture).
"""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from hf_merge.config import MergeConfig
from hf_merge.errors import ConfigError, MergeError
from hf_merge.methods.base import ParameterKind, TensorGroup, TensorMethod
from hf_merge.registry import available_merge_methods
from hf_merge.settings import Setting, settings_of


METHODS = available_merge_methods()
TENSOR_METHODS = sorted(name for name, entry in METHODS.items() if issubclass(entry.method_cls, TensorMethod))
RANDOM_METHODS = frozenset({"dare", "della"})

# Methods whose result depends on the order of the experts by definition, and those that are not homogeneous of degree 1 in
# the weights, each with the reason.
NOT_SYMMETRIC: dict[str, str] = {}
NOT_HOMOGENEOUS: dict[str, str] = {
    "arcee_fusion": "its importance is a divergence of softmaxes of the weights",
    "nearswap": "its setting t is an absolute change",
    "ram": "its setting epsilon is an absolute change",
}

PARAMETERS: dict[str, tuple[ParameterKind, tuple[int, ...]]] = {
    "linear_tall": (ParameterKind.LINEAR, (12, 5)),
    "linear_wide": (ParameterKind.LINEAR, (5, 12)),
    "linear_one_row": (ParameterKind.LINEAR, (1, 8)),
    "linear_one_column": (ParameterKind.LINEAR, (8, 1)),
    "transposed_linear": (ParameterKind.TRANSPOSED_LINEAR, (6, 9)),
    "expert_linear": (ParameterKind.EXPERT_LINEAR, (3, 6, 4)),
    "transposed_expert_linear": (ParameterKind.TRANSPOSED_EXPERT_LINEAR, (3, 4, 6)),
    "embedding": (ParameterKind.EMBEDDING, (17, 4)),
    "convolution": (ParameterKind.CONVOLUTION, (4, 3, 2, 2)),
    "norm": (ParameterKind.NORM, (8,)),
    "bias": (ParameterKind.BIAS, (8,)),
    "bias_one_label": (ParameterKind.BIAS, (1,)),
    "head": (ParameterKind.HEAD, (3, 8)),
    "head_one_label": (ParameterKind.HEAD, (1, 8)),
    "buffer": (ParameterKind.BUFFER, (8,)),
    "class_token": (ParameterKind.OTHER, (1, 1, 8)),
    "scalar": (ParameterKind.OTHER, ()),
    "empty": (ParameterKind.OTHER, (0, 4)),
}

every_method = pytest.mark.parametrize("name", sorted(METHODS))
every_tensor_method = pytest.mark.parametrize("name", TENSOR_METHODS)
every_parameter = pytest.mark.parametrize("parameter", PARAMETERS)


def expert_count(name: str) -> int:
    method = METHODS[name].method_cls
    return max(method.min_experts, min(3, method.max_experts or 3))


def random_tensors(
    shape: tuple[int, ...], count: int, dtype: torch.dtype = torch.float32, scale: float = 0.05
) -> list[Tensor]:
    """A base and `count` experts near it."""
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    base = torch.randn(shape, generator=generator)
    experts = [base + scale * torch.randn(shape, generator=generator) for _ in range(count)]
    return [tensor.to(dtype) for tensor in (base, *experts)]


def group_of(
    name: str, parameter: str, tensors: list[Tensor], config: MergeConfig | None = None, **changes
) -> TensorGroup:
    """The group of one parameter: `tensors` is the base and then the experts."""
    names = tuple(f"expert{index}" for index in range(len(tensors) - 1))
    config = METHODS[name].config_cls() if config is None else config
    group = TensorGroup(
        name=f"layer.{parameter}",
        kind=PARAMETERS[parameter][0],
        stored_base=tensors[0],
        stored_experts=tensors[1:],
        expert_names=names,
        settings=config.resolve(f"layer.{parameter}", 0.5, names),
    )
    return dataclasses.replace(group, **changes)


def merge(name: str, groups: list[TensorGroup], config: MergeConfig | None = None) -> list[Tensor]:
    """Merges as an engine does: all rounds of observation over all parameters first."""
    method = METHODS[name].method_cls()
    config = METHODS[name].config_cls() if config is None else config
    for round in range(method.rounds(config)):
        observations = [(group.name, method.observe(group, round)) for group in groups]
        method.conclude(iter(observations), round, config)
    return [method(group) for group in groups]


def merge_one(name: str, parameter: str, tensors: list[Tensor], **changes) -> Tensor:
    return merge(name, [group_of(name, parameter, tensors, **changes)])[0]


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


# -- the computation --------------------------------------------------------------------------------------------------


@every_parameter
@every_tensor_method
def test_result_is_finite_float32_of_the_same_shape(name: str, parameter: str):
    merged = merge_one(name, parameter, random_tensors(PARAMETERS[parameter][1], expert_count(name)))
    assert merged.shape == PARAMETERS[parameter][1]
    assert merged.dtype == torch.float32
    assert torch.isfinite(merged).all()


@every_parameter
@every_tensor_method
def test_inputs_are_not_changed_and_not_returned(name: str, parameter: str):
    tensors = random_tensors(PARAMETERS[parameter][1], expert_count(name))
    before = [bits(tensor) for tensor in tensors]
    merged = merge_one(name, parameter, tensors)
    merged.add_(1.0)  # a result that shares memory with an input would change it now
    assert [bits(tensor) for tensor in tensors] == before


@every_parameter
@every_tensor_method
def test_same_call_gives_the_same_bits(name: str, parameter: str):
    tensors = random_tensors(PARAMETERS[parameter][1], expert_count(name))
    torch.manual_seed(0)
    first = merge_one(name, parameter, tensors)
    torch.manual_seed(1)  # the global generator must not matter
    assert bits(first) == bits(merge_one(name, parameter, tensors))


@every_tensor_method
def test_threads_and_the_order_of_parameters_do_not_matter(name: str):
    tensors = {key: random_tensors(shape, expert_count(name)) for key, (_, shape) in PARAMETERS.items()}
    config = METHODS[name].config_cls()
    groups = [group_of(name, key, value) for key, value in tensors.items()]
    expected = [bits(merged) for merged in merge(name, groups)]
    method = METHODS[name].method_cls()
    backwards = groups[::-1]
    for round in range(method.rounds(config)):
        method.conclude(((group.name, method.observe(group, round)) for group in backwards), round, config)
    with ThreadPoolExecutor(4) as pool:
        found = [bits(merged) for merged in pool.map(method, backwards)]
    assert found[::-1] == expected


@every_parameter
@every_tensor_method
def test_experts_equal_to_the_base_give_the_base(name: str, parameter: str):
    base = random_tensors(PARAMETERS[parameter][1], 0)[0]
    merged = merge_one(name, parameter, [base] * (expert_count(name) + 1))
    torch.testing.assert_close(merged, base, rtol=1e-6, atol=1e-7)


@every_parameter
@every_tensor_method
def test_one_expert_equal_to_the_base_is_no_special_case(name: str, parameter: str):
    tensors = random_tensors(PARAMETERS[parameter][1], expert_count(name))
    tensors[1] = tensors[0].clone()
    assert torch.isfinite(merge_one(name, parameter, tensors)).all()


@every_parameter
@every_tensor_method
def test_all_zero_tensors_stay_zero(name: str, parameter: str):
    zeros = [torch.zeros(PARAMETERS[parameter][1])] * (expert_count(name) + 1)
    assert not merge_one(name, parameter, zeros).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@every_parameter
@every_tensor_method
def test_half_precision_is_only_storage(name: str, parameter: str, dtype: torch.dtype):
    stored = random_tensors(PARAMETERS[parameter][1], expert_count(name), dtype)
    merged = merge_one(name, parameter, stored)
    assert merged.dtype == torch.float32
    assert bits(merged) == bits(merge_one(name, parameter, [tensor.float() for tensor in stored]))


@every_parameter
@every_tensor_method
def test_float64_is_computed_in_float64(name: str, parameter: str):
    tensors = random_tensors(PARAMETERS[parameter][1], expert_count(name), torch.float64)
    merged = merge_one(name, parameter, tensors)
    assert merged.dtype == torch.float64
    assert torch.isfinite(merged).all()


@pytest.mark.parametrize("parameter", [key for key, (_, shape) in PARAMETERS.items() if len(shape) > 1])
@every_tensor_method
def test_memory_layout_does_not_matter(name: str, parameter: str):
    shape = PARAMETERS[parameter][1]
    tensors = random_tensors(shape, expert_count(name))
    strided = [tensor.mT.contiguous().mT for tensor in tensors]
    torch.testing.assert_close(
        merge_one(name, parameter, strided), merge_one(name, parameter, tensors), rtol=1e-5, atol=1e-6
    )


@every_parameter
@every_tensor_method
def test_permuting_the_experts_changes_nothing(name: str, parameter: str):
    if name in NOT_SYMMETRIC:
        pytest.skip(NOT_SYMMETRIC[name])
    base, *experts = random_tensors(PARAMETERS[parameter][1], expert_count(name))
    names = tuple(f"expert{index}" for index in range(len(experts)))
    straight = merge_one(name, parameter, [base, *experts])
    turned = merge_one(name, parameter, [base, *experts[::-1]], expert_names=names[::-1])
    torch.testing.assert_close(turned, straight, rtol=1e-5, atol=1e-6)


@every_parameter
@every_tensor_method
def test_scaling_all_models_scales_the_result(name: str, parameter: str):
    if name in NOT_HOMOGENEOUS:
        pytest.skip(NOT_HOMOGENEOUS[name])
    tensors = random_tensors(PARAMETERS[parameter][1], expert_count(name))
    factor = 2.0**-12  # exact in floating point; small enough to reveal an absolute epsilon
    merged = merge_one(name, parameter, [tensor * factor for tensor in tensors])
    torch.testing.assert_close(merged / factor, merge_one(name, parameter, tensors), rtol=1e-4, atol=1e-5)


@every_tensor_method
def test_only_declared_methods_draw_random_numbers(name: str):
    tensors = random_tensors((32, 16), expert_count(name))
    found = {bits(merge_one(name, "linear_tall", tensors, seed=seed)) for seed in range(3)}
    assert len(found) == (3 if name in RANDOM_METHODS else 1)


@every_tensor_method
def test_without_a_base_the_method_works_or_declares_that_it_needs_one(name: str):
    tensors = random_tensors((12, 5), expert_count(name))
    merged = merge_one(name, "linear_tall", tensors, stored_base=None)
    assert merged.shape == (12, 5)
    assert torch.isfinite(merged).all()


# -- the declaration --------------------------------------------------------------------------------------------------


@every_method
def test_limits_on_the_number_of_experts_make_sense(name: str):
    method = METHODS[name].method_cls
    assert method.min_experts >= 1
    assert method.max_experts is None or method.max_experts >= method.min_experts


@every_method
def test_config_is_documented(name: str):
    config_cls = METHODS[name].config_cls
    inherited = {field.name for field in dataclasses.fields(MergeConfig)}
    texts = "\n".join(parent.__doc__ or "" for parent in config_cls.__mro__)
    for field in dataclasses.fields(config_cls):
        assert field.metadata.get("help"), f"{field.name} has no help text"
        assert field.name in inherited or f"{field.name} (" in texts, f"{field.name} is not in the docstring"
    assert METHODS[name].method_cls.__doc__


# -- the config -------------------------------------------------------------------------------------------------------


def other_value(spec: Setting, default):
    """A valid value other than the default where there is one."""
    if spec.choices is not None:
        return next((choice for choice in spec.choices if choice != default), default)
    if spec.type is bool:
        return not default
    if spec.type is str:
        return "word"
    candidates = [0.25, 0.125, 0.75, 1, 2, 3, 10, 0]
    candidates = [spec.type(value) for value in candidates]
    return next((value for value in candidates if spec.accepts(value) and value != default), default)


def bad_values(spec: Setting) -> list:
    """Values that the setting must refuse."""
    bad: list = [{"gradient": []}, {"gradient": [0.1], "slope": 1}]
    if spec.choices is not None or spec.type is str:
        bad += [3, "no such word"] if spec.choices is not None else [3]
    elif spec.type is bool:
        bad += ["yes", 1]
    else:
        bad += ["0.5", True, float("nan"), float("inf"), -float("inf")]
        bad += [] if spec.type is float else [0.5]
        bad += [] if spec.minimum is None else [spec.minimum - 1]
        bad += [] if spec.maximum is None else [spec.maximum + 1]
        bad += [] if spec.above is None else [spec.above]
        bad += [] if spec.below is None else [spec.below]
    if not spec.optional:
        bad.append(None)
    if spec.scope != "expert":
        bad += [[], {"expert0": 0.5}]
    return bad


def default_config(name: str) -> MergeConfig:
    return METHODS[name].config_cls()


@every_method
def test_config_survives_json(name: str, tmp_path):
    config = default_config(name)
    changed = {"include": ["layer"], "exclude": ["bias$"], "seed": 5}
    for key, spec in settings_of(config).items():
        candidate = other_value(spec, getattr(config, key))
        try:  # some pairs of settings exclude each other: change one at a time
            type(config)(**changed, **{key: candidate} if key not in changed else {})
        except ConfigError:
            continue
        one = type(config)(**{**changed, key: candidate})
        one.save_pretrained(tmp_path)
        loaded = MergeConfig.from_pretrained(tmp_path)
        assert type(loaded) is type(config)
        assert loaded == one


@every_method
def test_config_refuses_values_out_of_range(name: str):
    config_cls = METHODS[name].config_cls
    for key, spec in settings_of(config_cls).items():
        for value in bad_values(spec):
            with pytest.raises(ConfigError, match=key):
                config_cls(**{key: value})


@every_method
def test_config_refuses_unknown_keys_and_names_the_nearest(name: str):
    for key in settings_of(METHODS[name].config_cls):
        misspelt = key[:-1] + "_x" if len(key) > 3 else key + "x"
        with pytest.raises(ConfigError, match=misspelt):
            MergeConfig.from_merge_type(name, **{misspelt: 1})
    with pytest.raises(ConfigError, match="Did you mean 'exclude'"):
        MergeConfig.from_merge_type(name, exclud=["x"])
    with pytest.raises(TypeError):
        METHODS[name].config_cls(no_such_key=1)


@every_method
def test_rules_reach_the_parameter_and_are_checked(name: str):
    config_cls = METHODS[name].config_cls
    experts = [f"expert{index}" for index in range(expert_count(name))]
    for key, spec in settings_of(config_cls).items():
        if spec.scope == "merge":
            with pytest.raises(ConfigError, match=key):
                config_cls(rules=[{"match": "layer", key: getattr(config_cls(), key)}])
            continue
        value = other_value(spec, getattr(config_cls(), key))
        config = config_cls(rules=[{"match": r"^first\.", key: value}])
        expected = [value] * len(experts) if spec.scope == "expert" else value
        assert getattr(config.resolve("first.weight", 0.0, experts), key) == expected
        default = getattr(config_cls().resolve("second.weight", 0.0, experts), key)
        assert getattr(config.resolve("second.weight", 0.0, experts), key) == default


@pytest.mark.filterwarnings("ignore:The task vector of")
@every_tensor_method
def test_each_setting_can_be_used(name: str):
    config_cls = METHODS[name].config_cls
    tensors = random_tensors((12, 5), expert_count(name))
    for key, spec in settings_of(config_cls).items():
        if spec.scope == "merge" and key in {"heads", "dtype", "tokenizer"}:
            continue
        values = spec.choices if spec.choices is not None else [other_value(spec, getattr(config_cls(), key))]
        for value in values:
            try:
                config = config_cls(**{key: value})
            except ConfigError:
                continue  # needs another setting beside it
            merged = merge(name, [group_of(name, "linear_tall", tensors, config)], config)[0]
            assert torch.isfinite(merged).all(), f"{key}={value!r}"


@pytest.mark.parametrize(
    "name", [name for name in TENSOR_METHODS if "weights" in settings_of(METHODS[name].config_cls)]
)
def test_weights_that_cancel_are_refused_or_harmless(name: str):
    config_cls, count = METHODS[name].config_cls, expert_count(name)
    weights = [1.0, -1.0] + [0.0] * (count - 2)
    tensors = random_tensors((12, 5), count)
    try:
        config = config_cls(weights=weights)
        merged = merge(name, [group_of(name, "linear_tall", tensors, config)], config)[0]
    except MergeError:
        return
    assert torch.isfinite(merged).all()
