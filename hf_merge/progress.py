"""Progress bars. They are shown and hidden with those of transformers."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from tqdm import tqdm


def hides_bars() -> bool | None:
    """The argument `disable` of tqdm: as transformers says; before it is imported, as the Hub's library says, from which it has it.
    `None` leaves the decision to tqdm, which shows bars on terminals."""
    if "transformers" in sys.modules:
        from transformers.utils import logging

        return not logging.is_progress_bar_enabled() or None
    from huggingface_hub.utils import are_progress_bars_disabled

    return are_progress_bars_disabled() or None


def progress(total: int, phase: str) -> tqdm:
    """A progress bar in bytes."""
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=phase, unit="B", unit_scale=True, disable=hides_bars())
