"""How tensors are laid out in safetensors files: which shard, which offset. Decided before a byte is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from ..errors import ConfigError
from .storage import DTYPE_NAMES, SAFE_INDEX, SAFE_WEIGHTS, TensorInfo


_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(size: int | str) -> int:
    """Bytes from an integer or a string such as `"5GB"` or `"500MiB"`.

    Raises:
        ConfigError: The size is not positive or not understood.
    """
    text = str(size).strip().upper()
    for unit in sorted(_UNITS, key=len, reverse=True):
        if text.endswith(unit):
            number, factor = text[: -len(unit)], _UNITS[unit]
            break
    else:
        number, factor = text, 1
    try:
        value = int(float(number) * factor)
    except (ValueError, OverflowError):
        value = 0
    if value <= 0:
        raise ConfigError(
            f"Invalid max_shard_size: {size!r}. It must be a positive number of bytes or like '5GB' or '500MB'."
        )
    return value


@dataclass(frozen=True)
class ShardLayout:
    """One safetensors file.

    Args:
        filename (`str`): Its name.
        infos (`dict[str, TensorInfo]`): Its tensors.
    """

    filename: str
    infos: Mapping[str, TensorInfo]

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Offset of each tensor's data from the end of the header, largest alignment first as safetensors writes them."""
        offsets, position = {}, 0
        for key in sorted(self.infos, key=lambda key: (-self.infos[key].dtype.itemsize, key)):
            offsets[key] = position
            position += self.infos[key].nbytes
        return offsets

    @cached_property
    def header(self) -> bytes:
        """The length and the JSON header, padded to eight bytes."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        for key, start in self.offsets.items():
            info = self.infos[key]
            entries[key] = {
                "dtype": DTYPE_NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [start, start + info.nbytes],
            }
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def nbytes(self) -> int:
        """The size of the file."""
        return len(self.header) + sum(info.nbytes for info in self.infos.values())


@dataclass(frozen=True)
class CheckpointLayout:
    """All weight files of a model: one, or shards and their index.

    Args:
        shards (`list[ShardLayout]`): In order.
    """

    shards: list[ShardLayout]

    @cached_property
    def shard_of(self) -> dict[str, ShardLayout]:
        """The file that each tensor is in."""
        return {key: shard for shard in self.shards for key in shard.infos}

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)

    def index(self) -> dict | None:
        """The content of `model.safetensors.index.json`, or `None` for a single file."""
        if len(self.shards) == 1:
            return None
        infos = [info for shard in self.shards for info in shard.infos.values()]
        metadata = {
            "total_parameters": sum(info.numel for info in infos),
            "total_size": sum(info.nbytes for info in infos),
        }
        return {
            "metadata": metadata,
            "weight_map": {key: shard.filename for shard in self.shards for key in shard.infos},
        }


def plan_layout(infos: Mapping[str, TensorInfo], max_shard_size: int | str) -> CheckpointLayout:
    """Splits tensors into files of at most `max_shard_size` (a larger tensor gets its own), in the order given.

    Args:
        infos (`Mapping[str, TensorInfo]`): The tensors by their names on disk.
        max_shard_size (`int` or `str`): Bytes, or a string such as `"5GB"`.
    """
    limit = parse_size(max_shard_size)
    parts: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for key, info in infos.items():
        if parts[-1] and size + info.nbytes > limit:
            parts.append({})
            size = 0
        parts[-1][key] = info
        size += info.nbytes
    if len(parts) == 1:
        return CheckpointLayout([ShardLayout(SAFE_WEIGHTS, parts[0])])
    stem = SAFE_WEIGHTS.removesuffix(".safetensors")
    names = [f"{stem}-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    return CheckpointLayout([ShardLayout(name, part) for name, part in zip(names, parts, strict=True)])


__all__ = ["SAFE_INDEX", "CheckpointLayout", "ShardLayout", "parse_size", "plan_layout"]
