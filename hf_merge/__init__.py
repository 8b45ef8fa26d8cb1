"""hf_merge: merge HuggingFace models. The public names and nothing else; each is imported on first use."""

from __future__ import annotations

import importlib


__version__ = "0.1.0"

_EXPORTS = {
    "config": ["LinearLayersConfig", "MergeConfig"],
    "errors": [
        "CheckpointError",
        "ConfigError",
        "MergeError",
        "MissingDependencyError",
        "NonFiniteError",
        "OutputError",
        "PlanError",
        "UnsupportedModelError",
    ],
    "registry": ["available_merge_methods", "register_merge_method"],
    "methods.linear": ["LinearConfig"],
    "methods.task_arithmetic": ["TaskArithmeticConfig"],
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'hf_merge' has no attribute '{name}'")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
