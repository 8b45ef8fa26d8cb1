"""How a merge that needs data is run, as far as it does not change what is computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..data.cache import ActivationCache
from ..methods.block_base import BlockMonitor
from .ranks import Ranks


@dataclass
class EngineOptions:
    """Options of the engines that need data.

    Args:
        work_dir (`Path`, *optional*): Finished blocks are written there, and a merge that was killed goes on from them.
        output (`Path`, *optional*): Where the result goes, for the check that disks are large enough.
        bf16 (`bool`): Blocks run in bfloat16 (autocast); weights and updates stay in float32.
        gradient_accumulation_steps (`int`): Batches of each task per update.
        cache (`str`): Where activations are kept: `"memory"`, `"disk"` or a device.
        cache_limit (`int`, *optional*): Bytes of activations in memory; the rest goes to disk.
        cache_dtype (`str`, *optional*): `"bfloat16"` halves the activations that are kept.
        self_check (`bool`): Compare running block by block with a plain forward before the merge.
        seed (`int`, *optional*): Of the order of the batches; the recipe's when not given.
        monitor ([`BlockMonitor`]): Is told about training.
        ranks ([`Ranks`]): The processes that hold the samples together, each a part of them. All are given all samples.
    """

    work_dir: Path | None = None
    output: Path | None = None
    bf16: bool = False
    gradient_accumulation_steps: int = 1
    cache: str = "memory"
    cache_limit: int | None = None
    cache_dtype: str | None = None
    self_check: bool = True
    seed: int | None = None
    monitor: BlockMonitor = field(default_factory=BlockMonitor)
    ranks: Ranks = field(default_factory=Ranks)

    def open_cache(self) -> ActivationCache:
        """A cache for the activations of one run."""
        dtype = getattr(torch, self.cache_dtype) if self.cache_dtype else None
        return ActivationCache(self.cache, self.cache_limit, self.work_dir and self.work_dir.parent, dtype)
