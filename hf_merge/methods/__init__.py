"""The merge methods: WHAT is computed. One folder per method or close family, which registers what it holds when it is imported."""

from __future__ import annotations

import importlib
from collections.abc import Iterable


BUILT_IN = {
    "ace": "ace",
    "adamerging": "adamerging",
    "adamerging_pp": "adamerging",
    "arcee_fusion": "arcee_fusion",
    "breadcrumbs": "breadcrumbs",
    "cat": "concatenation",
    "consensus_ta": "consensus_ta",
    "core_space": "knots",
    "dare": "dare",
    "della": "della",
    "direct_distill": "distill_merge",
    "direct_train": "direct_train",
    "distill_merge": "distill_merge",
    "ensemble": "ensemble",
    "fisher": "fisher",
    "fs_merge": "fs_merge",
    "git_rebasin": "alignment",
    "iso_c": "isotropic",
    "iso_cts": "isotropic",
    "karcher": "karcher",
    "kd": "fs_merge",
    "knots": "knots",
    "linear": "linear",
    "localize_and_stitch": "localize_and_stitch",
    "magmax": "magmax",
    "mats": "mats",
    "model_stock": "model_stock",
    "moe": "moe",
    "multislerp": "multislerp",
    "nearswap": "nearswap",
    "nuslerp": "nuslerp",
    "ot_fusion": "alignment",
    "passthrough": "passthrough",
    "pcb": "pcb",
    "prodistill": "prodistill",
    "ram": "ram",
    "regmean": "regmean",
    "regmean_pp": "regmean",
    "sce": "sce",
    "slerp": "slerp",
    "surgery": "surgery",
    "svc": "svc",
    "svd": "concatenation",
    "task_arithmetic": "task_arithmetic",
    "ties": "ties",
    "tsv_m": "tsv_m",
    "twin": "twin",
    "wise_ft": "wise_ft",
    "wudi": "wudi",
    "zipit": "alignment",
}
"""Name -> folder of every method of the library."""


def load_methods(names: Iterable[str] = BUILT_IN) -> None:
    """Imports methods, which registers them.

    Args:
        names (`Iterable[str]`): Of built-in methods; all of them by default.
    """
    for name in names:
        importlib.import_module(f".{BUILT_IN[name]}", __name__)
