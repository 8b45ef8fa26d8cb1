"""Compares hf_merge with mergekit, method by method, each through the same YAML recipe.

    python mergekit_agreement.py --mergekit-bin VENV/bin [--dtype float32]

mergekit (`pip install mergekit==0.1.5`) lives in an environment of its own, whose bin folder is given; its `mergekit-yaml` is run there.
The models are tiny ones that the script builds: a Llama, a BERT classifier and a Qwen3 with tied embeddings, a base and three experts
each. For deterministic methods the table has the largest difference relative to the largest entry of the parameter, over all parameters.
For random methods, which draw other masks, it has what the masks do: the density and the L1 norm of what is left of one task vector.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hf_merge import MergeConfig, Merger


SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(vocab_size=160, num_key_value_heads=2, **SIZES)),
    "bert": lambda: BertForSequenceClassification(BertConfig(vocab_size=160, num_labels=8, **SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(
        Qwen3Config(vocab_size=160, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, **SIZES)
    ),
}
EXPERTS = ("a", "b", "c")
WEIGHTED = [{"weight": 0.5}, {"weight": 0.3}, {"weight": 0.4}]
SPARSE = [{"weight": 0.5, "density": 0.5}, {"weight": 0.3, "density": 0.25}, {"weight": 0.4, "density": 0.75}]
PLAIN = [{}, {}, {}]
TOLERANCE = 1e-6


def of_models(
    method: str, experts: list[dict], *, base: bool = True, parameters: dict | None = None
) -> dict[str, Any]:
    """A recipe with `models`; the parameters of each expert, and of the merge."""
    models = [{"model": name, "parameters": one} for name, one in zip(EXPERTS, experts, strict=False)]
    recipe = {"merge_method": method, "models": models, "parameters": parameters or {}}
    return recipe | ({"base_model": "base"} if base else {})


def of_slices(method: str, slices: list[list[tuple]], *, base: bool = False, parameters: dict | None = None) -> dict:
    """A recipe with `slices`: for each the sources, as (model, first layer, end, parameters)."""
    sources = [
        [{"model": model, "layer_range": [first, end], "parameters": one} for model, first, end, one in sources]
        for sources in slices
    ]
    recipe = {"merge_method": method, "slices": [{"sources": one} for one in sources], "parameters": parameters or {}}
    return recipe | ({"base_model": "base"} if base else {})


BY_NAME = [{"filter": "att", "value": [0, 0.5, 0.3, 0.7, 1]}, {"filter": "orm", "value": 0.2}, {"value": 0.5}]
DETERMINISTIC = {
    "linear": of_models("linear", WEIGHTED, base=False),
    "linear, base listed": of_models("linear", WEIGHTED, parameters={"weight": 0.2}),
    "slerp": of_models("slerp", [{}], parameters={"t": 0.3}),
    "nuslerp": of_models("nuslerp", WEIGHTED[:2]),
    "nuslerp, not flat": of_models("nuslerp", WEIGHTED[:2], parameters={"nuslerp_flatten": False}),
    "nuslerp, row-wise": of_models(
        "nuslerp", WEIGHTED[:2], base=False, parameters={"nuslerp_flatten": False, "nuslerp_row_wise": True}
    ),
    "multislerp": of_models("multislerp", WEIGHTED),
    "multislerp, not normalised": of_models(
        "multislerp", WEIGHTED, base=False, parameters={"normalize_weights": False}
    ),
    "karcher": of_models("karcher", PLAIN, base=False),
    "task_arithmetic": of_models("task_arithmetic", WEIGHTED, parameters={"lambda": 0.8}),
    "task_arithmetic, normalised": of_models("task_arithmetic", WEIGHTED, parameters={"normalize": True}),
    "ties": of_models("ties", SPARSE, parameters={"lambda": 0.8}),
    "ties, rescaled sum": of_models("ties", SPARSE, parameters={"normalize": False, "rescale": True}),
    "dare_linear, density 1": of_models("dare_linear", WEIGHTED),
    "dare_ties, density 1": of_models("dare_ties", WEIGHTED),
    "della, density 1": of_models("della", WEIGHTED),
    "della_linear, density 1": of_models("della_linear", WEIGHTED),
    "breadcrumbs": of_models("breadcrumbs", SPARSE, parameters={"gamma": 0.125}),
    "breadcrumbs, defaults": of_models("breadcrumbs", WEIGHTED),
    "breadcrumbs_ties": of_models("breadcrumbs_ties", SPARSE, parameters={"gamma": 0.125}),
    "sce": of_models("sce", PLAIN, parameters={"select_topk": 0.5}),
    "ram": of_models("ram", PLAIN, parameters={"epsilon": 0.005}),
    "ramplus_tl": of_models("ramplus_tl", PLAIN, parameters={"epsilon": 0.005, "alpha": 0.6}),
    "model_stock": of_models("model_stock", PLAIN),
    "model_stock, filter-wise": of_models("model_stock", PLAIN, parameters={"filter_wise": True}),
    "nearswap": of_models("nearswap", [{}], parameters={"t": 0.002}),
    "arcee_fusion": of_models("arcee_fusion", [{}]),
    "passthrough": of_models("passthrough", [{"scale": 0.7}], base=False),
    "slerp, gradient by filter": of_models("slerp", [{}], parameters={"t": BY_NAME}),
    "linear, filters per model": of_models(
        "linear",
        [
            {"weight": [{"filter": "att", "value": 0.2}, {"value": 0.6}]},
            {"weight": [{"filter": "self", "value": [0.1, 0.9]}, {"filter": "weight", "value": 0.3}, {"value": 1}]},
            {"weight": 0.4},
        ],
        base=False,
    ),
    "passthrough, slices": of_slices(
        "passthrough",
        [[("a", 0, 3, {})], [("b", 1, 4, {"scale": [{"filter": "att", "value": 0.5}, {"value": 1.0}]})]],
    ),
    "slerp, slices": of_slices(
        "slerp",
        [[("base", 0, 2, {}), ("a", 0, 2, {})], [("base", 2, 4, {}), ("b", 1, 3, {})]],
        base=True,
        parameters={"t": BY_NAME},
    ),
}
RANDOM = {
    "dare_linear": of_models("dare_linear", [{"weight": 1.0, "density": 0.3}]),
    "dare_ties": of_models("dare_ties", [{"weight": 1.0, "density": 0.3}]),
    "della": of_models("della", [{"weight": 1.0, "density": 0.4, "epsilon": 0.2}]),
    "della_linear": of_models("della_linear", [{"weight": 1.0, "density": 0.4, "epsilon": 0.2}]),
}

_RUN = """
import json, sys, traceback
from mergekit.scripts.run_yaml import main
for recipe, out in json.load(open(sys.argv[1])):
    try:
        main([recipe, out, "--random-seed", "0"], standalone_mode=False)
    except Exception:
        traceback.print_exc()
"""


def build_models(family: str, folder: Path) -> None:
    """Saves a base and three experts, whose task vectors have a part in common and are large enough for mergekit's guards."""
    torch.manual_seed(0)
    base = FAMILIES[family]()
    with torch.no_grad():
        for parameter in base.parameters():  # biases that are all zero have no direction
            parameter += 0.02 * torch.randn_like(parameter)
    base.save_pretrained(folder / "base")
    common = {name: 0.01 * torch.randn_like(value) for name, value in base.named_parameters()}
    for seed, name in enumerate(EXPERTS, start=1):
        torch.manual_seed(seed)
        expert = FAMILIES[family]()
        expert.load_state_dict(base.state_dict())
        with torch.no_grad():
            for key, parameter in expert.named_parameters():
                parameter += common[key] + 0.005 * seed * torch.randn_like(parameter)
        expert.save_pretrained(folder / name)


def write_recipes(folder: Path, dtype: str) -> dict[str, Path]:
    """The recipes as YAML files with the models' folders; by title."""
    paths = {}
    for number, (title, recipe) in enumerate(
        (DETERMINISTIC | {f"{key}, random": r for key, r in RANDOM.items()}).items()
    ):
        paths[title] = folder / f"recipe_{number:02d}.yaml"
        text = yaml.safe_dump(_with_folders(recipe, folder) | {"dtype": dtype}, sort_keys=False)
        paths[title].write_text(text, encoding="utf-8")
    return paths


def _with_folders(value: Any, folder: Path) -> Any:
    """The recipe with folders for models."""
    if isinstance(value, dict):
        return {
            key: str(folder / one) if key in ("model", "base_model") else _with_folders(one, folder)
            for key, one in value.items()
        }
    return [_with_folders(one, folder) for one in value] if isinstance(value, list) else value


def run_mergekit(bin_folder: Path, recipes: dict[str, Path]) -> None:
    """Runs `mergekit-yaml` on every recipe, in one process of its environment. Failures leave no weights."""
    jobs = [[str(path), str(path.with_suffix(".mergekit"))] for path in recipes.values()]
    listing = next(iter(recipes.values())).with_name("jobs.json")
    listing.write_text(json.dumps(jobs), encoding="utf-8")
    with open(listing.with_suffix(".log"), "w", encoding="utf-8") as log:
        subprocess.run([bin_folder / "python", "-c", _RUN, listing], check=True, stdout=log, stderr=log)


def run_hf_merge(recipes: dict[str, Path]) -> None:
    for path in recipes.values():
        merger = Merger.from_pretrained(config=MergeConfig.from_mergekit(path))
        merger.save_pretrained(path.with_suffix(".hf_merge"))


def state_of(folder: Path, family: str) -> dict[str, Tensor] | None:
    """The parameters of a merged model by module name, float64; `None` when there are none."""
    if not (folder / "config.json").is_file():
        return None
    loader = AutoModelForSequenceClassification if family == "bert" else AutoModelForCausalLM
    model, info = loader.from_pretrained(folder, output_loading_info=True)
    if info["missing_keys"] or info["unexpected_keys"]:
        raise RuntimeError(f"{folder} does not load: {info}")
    return {name: value.detach().double() for name, value in model.named_parameters()}


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference relative to the parameter's largest entry, and where it is."""
    differences = {
        name: (ours[name] - value).abs() / value.abs().max().clamp(min=1e-30) for name, value in theirs.items()
    }
    worst = max(differences, key=lambda name: differences[name].max())
    count = sum(int((one > TOLERANCE).sum()) for one in differences.values())
    total = sum(one.numel() for one in differences.values())
    beyond = f" ({count} of {total} entries of the model differ)" if count else ""
    return differences[worst].max().item(), worst + beyond


def mask_statistics(merged: dict[str, Tensor], base: dict[str, Tensor], expert: dict[str, Tensor]) -> dict[str, float]:
    """The density, the L1 norm of what is left over that of the task vector, and the largest relative deviation of what is kept from
    the task vector times one factor per parameter, the quotient of the L1 norms."""
    kept = total = 0
    ratios, deviations = [], [0.0]
    for name, before in base.items():
        vector, left = expert[name] - before, merged[name] - before
        # θ_0 + τ̂ was rounded: what is smaller than that is 0.
        mask = left.abs() > 4 * torch.finfo(torch.float32).eps * before.abs().clamp(min=1e-3)
        kept, total = kept + int(mask.sum()), total + mask.numel()
        if mask.any():
            ratios.append((left[mask].abs().sum() / vector.abs().sum()).item())
            factor = vector.abs().sum() / vector[mask].abs().sum()
            deviations.append(((left - factor * vector)[mask].abs().max() / vector.abs().max()).item())
    return {"density": kept / total, "norm": sum(ratios) / len(ratios), "deviation": max(deviations)}


def compare(family: str, bin_folder: Path, dtype: str) -> list[list[str]]:
    """The rows of the table for one family: title, mergekit, hf_merge, difference."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build_models(family, folder)
        recipes = write_recipes(folder, dtype)
        run_mergekit(bin_folder, recipes)
        run_hf_merge(recipes)
        base, expert = (state_of(folder / name, family) for name in ("base", "a"))
        for title, path in recipes.items():
            theirs, ours = (
                state_of(path.with_suffix(".mergekit"), family),
                state_of(path.with_suffix(".hf_merge"), family),
            )
            if theirs is None:
                rows.append([family, title, "mergekit failed", ""])
            elif title.endswith(", random"):
                found = [mask_statistics(state, base, expert) for state in (theirs, ours)]
                rows += [
                    [family, f"{title}: {key}", f"{found[0][key]:.4g}", f"{found[1][key]:.4g}"] for key in found[0]
                ]
            else:
                difference, where = largest_difference(ours, theirs)
                rows.append([family, title, f"{difference:.1e}", where])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mergekit-bin", type=Path, required=True, help="the bin folder of mergekit's environment")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--dtype", default="float32", help="the recipes' dtype; mergekit computes in it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| model | recipe | difference, or mergekit | parameter, or hf_merge |")
    print("| --- | --- | --- | --- |")
    for family in arguments.families:
        for row in compare(family, arguments.mergekit_bin, arguments.dtype):
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
