"""Parameters that are read and written piece by piece: the bytes are those of whole ones, held or read again."""

from __future__ import annotations

import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_merge import (
    BreadcrumbsConfig,
    DareConfig,
    DellaConfig,
    LinearConfig,
    MergeConfig,
    Merger,
    ModelStockConfig,
    NonFiniteError,
    SceConfig,
    SlerpConfig,
    TaskArithmeticConfig,
    TiesConfig,
)
from hf_merge.checkpoints import stored
from hf_merge.checkpoints.source import ModelSource
from hf_merge.checkpoints.storage import SafetensorsStorage
from hf_merge.engines import reading, results
from hf_merge.methods import groups

from ..processes import contents
from ..testing_utils import Bed, assert_nothing_left, llama_bed


pytestmark = pytest.mark.skipif(not stored.CAN_READ_PARTS, reason="the system has no positioned reads into memory")

CONFIGS = {
    "linear": LinearConfig(weights=[0.3, 0.7, -0.1]),
    "task_arithmetic": TaskArithmeticConfig(scaling=0.4),
    "slerp": SlerpConfig(t=0.3),
    "model_stock": ModelStockConfig(),
    "model_stock by rows": ModelStockConfig(filter_wise=True),
    "dare": DareConfig(combination="ties", rescale="norm"),
    "della": DellaConfig(rescale="norm"),
    "ties": TiesConfig(density=0.6, majority_sign="frequency"),
    "ties over the model": TiesConfig(density=0.3, scope="model"),
    "breadcrumbs": BreadcrumbsConfig(combination="ties"),
    "sce": SceConfig(density=0.5),
}


@pytest.fixture(scope="module")
def bed(tmp_path_factory) -> Bed:
    """Models in bfloat16, whose task vectors have many entries that cancel."""
    found = llama_bed(tmp_path_factory.mktemp("reading"))
    for folder in (found.base, *found.experts.values()):
        for path in Path(folder).glob("*.safetensors"):
            tensors = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
            save_file(tensors, path, {"format": "pt"})
    return found


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that parameters of small models have several."""
    monkeypatch.setattr(groups, "PIECE", 300)
    monkeypatch.setattr(results, "PIECE", 300)


def merged(bed: Bed, config: MergeConfig, out: Path) -> dict[str, bytes]:
    experts = dict(list(bed.experts.items())[: 2 if config.merge_type == "slerp" else None])
    Merger.from_pretrained(experts, config, base_model=bed.base).save_pretrained(out, max_shard_size="20KB")
    return {name: content for name, content in contents(out).items() if name.endswith(".safetensors")}


@pytest.mark.parametrize("case", CONFIGS)
def test_whole_or_held_or_read_again(bed: Bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    found = merged(bed, CONFIGS[case], tmp_path / "found")
    with mock.patch.object(reading, "HELD", 0):
        assert merged(bed, CONFIGS[case], tmp_path / "again") == found
    with mock.patch.object(ModelSource, "stored", lambda self, name: None):
        assert merged(bed, CONFIGS[case], tmp_path / "whole") == found
    monkeypatch.setattr(reading, "is_piecewise", lambda parameter, device: False)
    assert merged(bed, CONFIGS[case], tmp_path / "written whole") == found


@pytest.mark.parametrize(
    "dtypes", [[torch.float64] * 3, [torch.float16] * 3, [torch.float32, torch.bfloat16, torch.float64]]
)
@pytest.mark.parametrize("case", ["linear", "slerp", "model_stock", "della", "ties"])
def test_models_in_any_dtypes(bed: Bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, dtypes: list):
    folders = {}
    for (name, folder), dtype in zip({"base": bed.base, **bed.experts}.items(), [*dtypes, dtypes[0]]):
        folders[name] = shutil.copytree(folder, tmp_path / name)
        for path in folders[name].glob("*.safetensors"):
            save_file({key: tensor.to(dtype) for key, tensor in load_file(path).items()}, path, {"format": "pt"})
    base = folders.pop("base")
    some = Bed(**(vars(bed) | {"base": base, "experts": folders}))
    found = merged(some, CONFIGS[case], tmp_path / "found")
    with mock.patch.object(ModelSource, "stored", lambda self, name: None):
        assert merged(some, CONFIGS[case], tmp_path / "whole") == found


@pytest.mark.parametrize("case", CONFIGS)
def test_what_is_not_finite_is_noticed(bed: Bed, tmp_path: Path, case: str):
    name = list(bed.experts)[1]
    broken = shutil.copytree(bed.experts[name], tmp_path / "broken")
    for path in broken.glob("*.safetensors"):
        tensors = load_file(path)
        if "model.embed_tokens.weight" in tensors:
            tensors["model.embed_tokens.weight"].view(-1)[-1] = float("nan")
        save_file(tensors, path, {"format": "pt"})
    experts = {key: broken if key == name else folder for key, folder in bed.experts.items()}
    (tmp_path / "merges").mkdir()
    with pytest.raises(NonFiniteError, match=r"model\.embed_tokens\.weight"):
        merged(Bed(**(vars(bed) | {"experts": experts})), CONFIGS[case], tmp_path / "merges" / "out")
    assert_nothing_left(tmp_path / "merges" / "out")


def test_nothing_is_read_whole(bed: Bed, tmp_path: Path) -> None:
    with mock.patch.object(SafetensorsStorage, "read", side_effect=AssertionError("read")):
        merged(bed, LinearConfig(), tmp_path / "out")


def test_an_entry_that_is_too_large_for_the_file_is_noticed(bed: Bed, tmp_path: Path) -> None:
    (tmp_path / "merges").mkdir()
    out = tmp_path / "merges" / "out"
    config = LinearConfig(weights=1e6, normalize=False)
    merger = Merger.from_pretrained(bed.experts, config, base_model=bed.base, dtype=torch.float16)
    with pytest.raises(NonFiniteError, match="too large for float16"):
        merger.save_pretrained(out)
    assert_nothing_left(out)
