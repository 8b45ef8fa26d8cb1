"""Extracting an adapter from a fine-tune: rank, energy, what factors cannot hold, and the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_merge import ConfigError, MergeError
from hf_merge.engines.extraction import Extraction, extract_lora
from hf_merge.errors import NonFiniteError
from tests.testing_utils import run_cli
from tests.zoo import ZOO, perturbed, save_zoo_model

from .helpers import KINDS, AdapterBed, make_adapters


FAMILIES = ["llama", "gpt2", "bert", "resnet", "t5"]


def bed_of(family: str, folder: Path) -> tuple[AdapterBed, torch.nn.Module]:
    """A base model and a fine-tune, on disk."""
    entry = ZOO[family]
    base = entry.build()
    tuned = perturbed(base, 1)
    bed = AdapterBed(save_zoo_model(base, folder / "base"), model_class=type(base), inputs=entry.inputs())
    save_zoo_model(tuned, folder / "tuned")
    return bed, tuned


@pytest.mark.parametrize("family", FAMILIES)
def test_full_energy_gives_the_fine_tune_back(family: str, tmp_path: Path):
    bed, tuned = bed_of(family, tmp_path)
    report = extract_lora(tmp_path / "tuned", bed.base, tmp_path / "out", Extraction(energy=1.0))
    named = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(named) == Path(bed.base)
    logits = bed.logits(bed.attached(tmp_path / "out"))
    assert torch.allclose(logits, bed.logits(tuned), atol=2e-4), (logits - bed.logits(tuned)).abs().max()
    assert all(row["discarded_energy"] < 1e-9 for row in report.parameters.values())


@pytest.mark.parametrize("exact", [True, False])
def test_an_adapter_is_found_again(exact: bool, tmp_path: Path):
    """A fine-tune that is an adapter merged into its base has exactly that rank, and no change anywhere else."""
    bed = make_adapters(KINDS["lora"], tmp_path / "bed", 1)
    merged = bed.attached(bed.adapters["a"]).merge_and_unload()
    report = extract_lora(merged, bed.base, tmp_path / "out", Extraction(energy=1 - 1e-6, exact=exact))
    assert {row["rank"] for row in report.parameters.values()} == {2}
    assert {name.split(".")[-2] for name in report.parameters} == {"q_proj", "down_proj"}
    assert torch.allclose(bed.logits(bed.attached(tmp_path / "out")), bed.logits(merged), atol=1e-5)


def test_rank_and_energy_are_optimal(tmp_path: Path):
    bed, tuned = bed_of("llama", tmp_path)
    base, state = bed.load().state_dict(), tuned.state_dict()
    for number, settings in enumerate((Extraction(rank=5, exact=True), Extraction(energy=0.7, exact=True))):
        report = extract_lora(tmp_path / "tuned", bed.base, tmp_path / f"out{number}", settings)
        for name, row in report.parameters.items():
            values = torch.linalg.svdvals((state[name] - base[name]).double()).square()
            kept = values.cumsum(0) / values.sum()
            assert row["discarded_energy"] == pytest.approx(1 - kept[row["rank"] - 1].item(), abs=1e-5)
            expected = 5 if settings.rank else int((kept < 0.7).sum()) + 1
            assert row["rank"] == expected


def test_include_and_factors_only(tmp_path: Path):
    bed, _ = bed_of("bert", tmp_path)
    settings = Extraction(rank=2, include=["attention"], exclude=["value"], keep_others=False)
    report = extract_lora(tmp_path / "tuned", bed.base, tmp_path / "out", settings)
    assert all("attention" in name and "value" not in name for name in report.parameters)
    assert any("left out" in note for note in report.notes)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["bias"] == "none" and not config["modules_to_save"]


@pytest.mark.parametrize("settings", [{}, {"rank": 0}, {"energy": 0.0}, {"energy": 1.1}])
def test_settings_are_checked(settings: dict):
    with pytest.raises(ConfigError, match="rank|energy"):
        Extraction(**settings)


def test_models_that_do_not_differ(tmp_path: Path):
    bed, _ = bed_of("llama", tmp_path)
    with pytest.raises(MergeError, match="do not differ"):
        extract_lora(bed.base, bed.base, tmp_path / "out", Extraction(rank=2))
    assert not (tmp_path / "out").exists()


def test_command_line(tmp_path: Path, capsys):
    bed, _ = bed_of("llama", tmp_path)
    command = ["extract-lora", str(tmp_path / "tuned"), "--base", str(bed.base), "--out", str(tmp_path / "out")]
    assert run_cli([*command, "--rank", "3"]) == 0
    shown = capsys.readouterr().out
    assert "model.layers.0.mlp.up_proj.weight: rank 3, keeps" in shown
    assert run_cli(command) == 2
    assert "rank=16" in capsys.readouterr().err


def test_an_unchanged_bias_stays(tmp_path: Path):
    """The second factor's bias is the change of the module's, not its value."""
    bed = make_adapters(KINDS["lora_bias"], tmp_path / "bed", 1)
    path = bed.adapters["a"] / "adapter_model.safetensors"
    tensors = load_file(path)
    spared = next(key for key in tensors if key.endswith("lora_B.bias"))
    perturbed(bed.load(), 7).save_pretrained(bed.base)  # with biases that are not zero
    save_file(tensors | {spared: torch.zeros_like(tensors[spared])}, path)
    extract_lora(bed.adapters["a"], bed.base, tmp_path / "out", Extraction(energy=1.0))
    assert not load_file(tmp_path / "out" / "adapter_model.safetensors")[spared].any()
    expected = bed.logits(bed.attached(bed.adapters["a"]))
    assert torch.allclose(bed.logits(bed.attached(tmp_path / "out")), expected, atol=1e-4)


@pytest.mark.parametrize("leaf", ["layernorm.weight", "q_proj.weight"])
def test_nan_is_refused_by_name(leaf: str, tmp_path: Path):
    bed, tuned = bed_of("llama", tmp_path)
    name = next(name for name, _ in tuned.named_parameters() if name.endswith(leaf))
    tuned.get_parameter(name).data.view(-1)[0] = float("nan")
    with pytest.raises(NonFiniteError, match=name):
        extract_lora(tuned, bed.base, tmp_path / "out", Extraction(rank=2))
    assert not (tmp_path / "out").exists()
