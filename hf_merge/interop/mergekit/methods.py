"""The methods of mergekit in terms of hf_merge's: names, parameters, defaults, and what their inputs may be.

Every setting is given explicitly, with mergekit's default, so that a recipe gives the numbers that mergekit gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal


REQUIRED = object()
"""The default of a parameter that a recipe has to give."""


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Parameter:
    """A parameter of a mergekit method.

    Args:
        setting (`str`, *optional*): The setting of hf_merge that it becomes; `None` for one that has no effect.
        type (`type`): `float`, `int` or `bool`.
        default: mergekit's default, or `REQUIRED`.
        per_model (`bool`): Whether it may differ between models.
        convert (`Callable`): From mergekit's value to the setting's.
    """

    setting: str | None
    type: type
    default: Any = REQUIRED
    per_model: bool = False
    convert: Callable[[Any], Any] = _same


@dataclass(frozen=True)
class Method:
    """A method of mergekit.

    Args:
        merge_type (`str`): The method of hf_merge that computes it.
        base (`str`): `"required"`, `"optional"` (its task vectors are merged when there is one), or `"input"` (the base model is one
            of the models that are merged).
        parameters (`dict[str, Parameter]`): By mergekit's names.
        fixed (`dict`): Settings that the method implies.
        least, most (`int`, *optional*): How many models it merges, without the base.
    """

    merge_type: str
    base: Literal["required", "optional", "input"]
    parameters: dict[str, Parameter] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)
    least: int = 1
    most: int | None = None


def _double(half_width: float) -> float:
    return 2 * half_width


def _mean_or_sum(normalize: bool) -> str:
    return "mean" if normalize else "sum"


def _norm_or_none(rescale: bool) -> str:
    return "norm" if rescale else "none"


_WEIGHT = Parameter("weights", float, per_model=True)
_DENSITY = Parameter("density", float, 1.0, per_model=True)
_LAMBDA = Parameter("scaling", float, 1.0)
_INERT_BOOL = Parameter(None, bool, False)


def _task_vectors(normalize: bool, rescale: bool, **more: Parameter) -> dict[str, Parameter]:
    """The parameters that all methods on sparse task vectors have."""
    return {
        "weight": _WEIGHT,
        "density": _DENSITY,
        "lambda": _LAMBDA,
        "normalize": Parameter("normalize", bool, normalize),
        "rescale": Parameter("rescale", bool, rescale, convert=_norm_or_none),
        "int8_mask": _INERT_BOOL,
        **more,
    }


def _sparse(merge_type: str, combination: str, *, normalize: bool = False, rescale: bool = False, **more) -> Method:
    return Method(merge_type, "required", _task_vectors(normalize, rescale, **more), {"combination": combination})


_EPSILON = Parameter("epsilon", float, 0.15, per_model=True, convert=_double)
_GAMMA = Parameter("gamma", float, 0.01, per_model=True)

METHODS = {
    "linear": Method("linear", "input", {"weight": _WEIGHT, "normalize": Parameter("normalize", bool, True)}),
    "slerp": Method("slerp", "required", {"t": Parameter("t", float)}, most=1),
    "nuslerp": Method(
        "nuslerp",
        "optional",
        {
            "weight": _WEIGHT,
            # Together they say what one vector is; see `granularity`.
            "nuslerp_flatten": Parameter("flatten", bool, True),
            "nuslerp_row_wise": Parameter("row_wise", bool, False),
        },
        least=2,
        most=2,
    ),
    "multislerp": Method(
        "multislerp",
        "optional",
        {
            "weight": _WEIGHT,
            "normalize_weights": Parameter("normalize", bool, True),
            "eps": Parameter(None, float, 1e-8),
        },
    ),
    "karcher": Method(
        "karcher",
        "input",
        {"max_iter": Parameter("max_iter", int, 10), "tol": Parameter("tol", float, 1e-5)},
        {"weights": 1.0},
    ),
    "task_arithmetic": Method(
        "task_arithmetic",
        "required",
        _task_vectors(False, False) | {"density": Parameter(None, float, 1.0, per_model=True), "rescale": _INERT_BOOL},
    ),
    "ties": Method(
        "ties",
        "required",
        _task_vectors(True, False) | {"normalize": Parameter("merge", bool, True, convert=_mean_or_sum)},
        {"scope": "tensor", "majority_sign": "total"},
    ),
    "dare_linear": _sparse("dare", "linear", rescale=True),
    "dare_ties": _sparse("dare", "ties", rescale=True),
    "della": _sparse("della", "ties", normalize=True, rescale=True, epsilon=_EPSILON),
    "della_linear": _sparse("della", "linear", rescale=True, epsilon=_EPSILON),
    "breadcrumbs": _sparse("breadcrumbs", "linear", gamma=_GAMMA),
    "breadcrumbs_ties": _sparse("breadcrumbs", "ties", gamma=_GAMMA),
    "sce": Method("sce", "required", {"select_topk": Parameter("density", float, 1.0), "int8_mask": _INERT_BOOL}),
    "ram": Method("ram", "required", {"epsilon": Parameter("epsilon", float, 1e-5)}, {"rescale": "none"}),
    "ramplus_tl": Method(
        "ram",
        "required",
        {
            "epsilon": Parameter("epsilon", float, 1e-5),
            "r": Parameter("r", float, 0.1),
            "alpha": Parameter("alpha", float, 0.2),
        },
        {"rescale": "tensor"},
    ),
    "model_stock": Method("model_stock", "required", {"filter_wise": Parameter("filter_wise", bool, False)}, least=2),
    "nearswap": Method("nearswap", "required", {"t": Parameter("t", float)}, most=1),
    "arcee_fusion": Method("arcee_fusion", "required", most=1),
    "passthrough": Method("passthrough", "input", {"scale": Parameter("scaling", float, 1.0, per_model=True)}, most=1),
}
"""The methods of mergekit 0.1.5 by name."""

PARAMETERS = frozenset(name for method in METHODS.values() for name in method.parameters)
"""The parameters of all methods: mergekit ignores those of other methods than the recipe's."""
