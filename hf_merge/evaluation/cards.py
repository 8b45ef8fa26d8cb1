"""Writing the model card of a merged folder again, with what was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ..card import CARD_NAME, adapter_card, combine_cards, model_card
from ..config import MergeConfig
from ..errors import CheckpointError, OutputError
from ..hub import ADAPTER_CONFIG_NAME, HEADS_FOLDER, merged_folder
from .results import RESULT_HEADER, EvaluationResult
from .tables import markdown_table


def update_card(folder: str | Path, *, force: bool = False) -> Path:
    """Writes the card of a merged folder again, with the results that `hf-merge eval` has saved there.

    Args:
        folder (`str` or `Path`): A merged folder.
        force (`bool`): Replace the known card altogether, also one that has no generated part.

    Returns:
        `Path`: The card.

    Raises:
        CheckpointError: The folder is no merged model.
        OutputError: The card was written by somebody else, or cannot be written.
    """
    is_adapter = (Path(folder) / ADAPTER_CONFIG_NAME).is_file()
    folder = merged_folder(folder, *(() if is_adapter else ("config.json",)))
    config = MergeConfig.from_pretrained(folder)
    evaluation = EvaluationResult.load(folder)
    results = markdown_table(RESULT_HEADER, evaluation.rows()) if evaluation is not None else None
    class_name = _adapted_class(folder) if is_adapter else _class_of(folder)
    write = adapter_card if is_adapter else model_card
    card = write(config, _tasks(folder, config), class_name, results)
    path = folder / CARD_NAME
    try:
        if path.is_file() and not force:
            card = combine_cards(path.read_text(encoding="utf-8"), card, path)
        path.write_text(card, encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"The model card '{path}' cannot be written: {error}") from error
    return path


def _tasks(folder: Path, config: MergeConfig) -> list[str]:
    """The tasks whose heads are kept, in the order of the experts."""
    heads = folder / HEADS_FOLDER
    present = {path.name for path in heads.iterdir() if path.is_dir()} if heads.is_dir() else set()
    return [name for name in config.experts or {} if name in present]


def _class_of(folder: Path) -> str:
    """The class that a folder's config names."""
    try:
        architectures = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"'{folder}' is no merged model: its config.json cannot be read ({error}).") from error
    return architectures[0] if architectures else "AutoModel"


def _adapted_class(folder: Path) -> str:
    """The class of the model that an adapter is for: as the known card says it, or the general one."""
    card = folder / CARD_NAME
    found = re.search(r"from transformers import (\w+)", card.read_text(encoding="utf-8")) if card.is_file() else None
    return found[1] if found else "AutoModel"
