"""The model card: metadata, results, citations, and what people wrote into it stays."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_merge import (
    CheckpointError,
    DareConfig,
    Merger,
    OutputError,
    ProDistillConfig,
    SlerpConfig,
    SvcConfig,
    TaskArithmeticConfig,
    WudiConfig,
    available_merge_methods,
)
from hf_merge.card import model_card
from hf_merge.evaluation import EvaluationResult, TaskScore
from hf_merge.evaluation.cards import update_card
from hf_merge.papers import PAPERS, bibtex, papers_of

from .evaluation.helpers import build_adapters
from .methods.helpers_models import models


REFERENCES = {
    "spam": {"model": "me/spam", "revision": "0123abc"},
    "movies": {"model": "me/movies"},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base, experts = models()
    Merger.from_pretrained(experts, TaskArithmeticConfig(), base_model=base).save_pretrained(tmp_path / "merged")
    return tmp_path / "merged"


def test_metadata_name_the_parents_and_the_relation() -> None:
    config = WudiConfig(experts=REFERENCES, base_model={"model": "org/base"})
    text = model_card(config, ["spam", "movies"], "BertForSequenceClassification")
    card = ModelCard(text)
    data = card.data.to_dict()
    assert data["base_model"] == ["me/spam", "me/movies", "org/base"]
    assert data["base_model_relation"] == "merge"
    assert data["tags"] == ["merge", "hf_merge", "wudi"]
    assert "me/spam@0123abc" in card.text
    assert "model with the head of `spam`" in card.text, "which the plain class loads"
    assert 'task="movies"' in card.text


def test_card_cites_the_method() -> None:
    text = model_card(WudiConfig(experts=REFERENCES), [], "BertModel")
    assert "https://arxiv.org/abs/2503.08099" in text
    assert "@misc{cheng2025_2503_08099," in text
    plain = model_card(SlerpConfig(experts=REFERENCES), [], "BertModel")
    assert "## Citation" not in plain


def test_every_method_of_a_recipe_is_cited() -> None:
    config = TaskArithmeticConfig(rules=[{"match": "x", "merge_type": "ties"}], then=[{"merge_type": "wise_ft"}])
    assert papers_of(config) == ["2212.04089", "2306.01708", "2109.01903"]
    assert papers_of(SvcConfig(inner="ties"))[:2] == ["2602.05536", "2306.01708"]
    assert papers_of(ProDistillConfig(init="wudi"))[:2] == ["2502.12706", "2503.08099"]
    assert papers_of(DareConfig()) == ["2311.03099"]


WITHOUT_PAPER = {"arcee_fusion", "cat", "multislerp", "nearswap", "nuslerp", "passthrough", "slerp", "svd"}


@pytest.mark.parametrize("method", sorted(available_merge_methods()))
def test_every_method_names_its_paper(method: str) -> None:
    config_cls = available_merge_methods()[method].config_cls
    assert bool(config_cls.papers) == (method not in WITHOUT_PAPER)
    assert set(config_cls.papers) <= set(PAPERS)
    named = re.findall(r"arXiv (\d{4}\.\d{5})", config_cls.__doc__ or "")
    assert set(named) <= set(config_cls.papers), "the docstring names a paper that the card does not cite"


def test_bibtex_is_well_formed() -> None:
    text = bibtex([*PAPERS, "9999.00001"])
    assert text.count("@misc{") == len(PAPERS) + 1
    assert text.count("{") == text.count("}")
    keys = re.findall(r"@misc\{([\w.]+),", text)
    assert len(set(keys)) == len(PAPERS) + 1


def test_authors_are_complete_where_they_are_known() -> None:
    entry = bibtex(["2306.01708"])
    assert "author = {Prateek Yadav and Derek Tam and Leshem Choshen and Colin Raffel and Mohit Bansal}" in entry
    assert entry.startswith("@misc{yadav2023_2306_01708,")
    assert all(" " in name.strip() for paper in PAPERS.values() if paper.complete for name in paper.authors.split(","))


def test_results_appear_and_additions_stay(folder: Path) -> None:
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8")
    text = text.replace("---\n", "---\nlicense: mit\n", 1) + "\n## Limits\n\nWritten by hand.\n"
    card.write_text(text.replace("tags:\n", "tags:\n- mine\n"), encoding="utf-8")
    EvaluationResult({"a": TaskScore(0.75, "accuracy", 8, expert=1.0, normalized=0.75)}).save(folder)
    update_card(folder)
    update_card(folder)
    card_text = card.read_text(encoding="utf-8")
    assert "| a | accuracy | 0.750 | 1.000 | 0.750 | 8 |" in card_text
    assert card_text.count("# Merged model") == 1
    assert card_text.rstrip().endswith("Written by hand.")
    data = ModelCard(card_text).data.to_dict()
    assert data["license"] == "mit"
    assert set(data["tags"]) == {"merge", "hf_merge", "task_arithmetic", "mine"}
    assert data["base_model_relation"] == "merge"


def test_update_without_changes_gives_the_same_card(folder: Path) -> None:
    before = (folder / "README.md").read_text(encoding="utf-8")
    update_card(folder)
    assert (folder / "README.md").read_text(encoding="utf-8") == before


def test_parents_stay_as_they_were_when_merged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen from another folder, a relative path looks like a Hub id."""
    recipe = folder / "merge_config.json"
    recipe.write_text(recipe.read_text().replace('"model": null', '"model": "spam"'), encoding="utf-8")
    update_card(folder)
    assert ModelCard.load(folder / "README.md").data.base_model is None


def test_foreign_cards_are_kept(folder: Path) -> None:
    (folder / "README.md").write_text("# Mine\n", encoding="utf-8")
    with pytest.raises(OutputError, match="--force"):
        update_card(folder)
    assert (folder / "README.md").read_text(encoding="utf-8") == "# Mine\n"
    update_card(folder, force=True)
    assert "# Merged model" in (folder / "README.md").read_text(encoding="utf-8")


def test_broken_metadata_and_other_folders(folder: Path, tmp_path: Path) -> None:
    card = folder / "README.md"
    card.write_text(card.read_text(encoding="utf-8").replace("---\n", "---\n[: bad\n", 1), encoding="utf-8")
    with pytest.raises(OutputError, match="metadata"):
        update_card(folder)
    with pytest.raises(CheckpointError, match=r"merge_config\.json"):
        update_card(tmp_path)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="no merged model"):
        update_card(folder)


def test_card_of_an_adapter(tmp_path: Path) -> None:
    folder = build_adapters(tmp_path)
    before = (folder / "README.md").read_text(encoding="utf-8")
    data = ModelCard(before).data.to_dict()
    assert (data["base_model_relation"], data["library_name"]) == ("adapter", "peft")
    assert "from transformers import LlamaForCausalLM" in before
    assert "arxiv.org/abs/2212.04089" in before
    update_card(folder)
    assert (folder / "README.md").read_text(encoding="utf-8") == before
