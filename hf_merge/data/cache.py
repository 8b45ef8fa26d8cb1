"""Where activations are kept between the blocks of a model: in memory, on a device, or in memory-mapped files."""

from __future__ import annotations

import tempfile
import weakref
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ConfigError


class CachedTensor:
    """A tensor in an [`ActivationCache`]. Its memory or file is freed with this object."""

    def __init__(self, stored: Tensor | Path, stored_dtype: torch.dtype, like: Tensor):
        self._stored = stored
        self._stored_dtype = stored_dtype
        self._shape = like.shape
        self._dtype = like.dtype

    def load(self, device: torch.device | str = "cpu") -> Tensor:
        """The tensor in its own dtype. It may share memory with the cache: do not change it in place."""
        if isinstance(self._stored, Tensor):
            return self._stored.to(device, self._dtype)
        count = self._shape.numel()
        mapped = torch.from_file(str(self._stored), shared=False, size=count, dtype=self._stored_dtype)
        return mapped.view(self._shape).to(device, self._dtype)


class ActivationCache:
    """Keeps tensors until nobody refers to them.

    Args:
        where (`str` or `torch.device`): `"memory"`, `"disk"`, or the name of a device.
        limit (`int`, *optional*): Bytes that may be held in memory or on the device; what exceeds them goes to disk.
        folder (`Path`, *optional*): Where files are made; the system's temporary folder by default.
        dtype (`torch.dtype`, *optional*): What hidden states are rounded to while they are kept, such as `torch.bfloat16`.
            They are kept as they are when not given.

    Raises:
        ConfigError: The limit is negative.
    """

    def __init__(
        self,
        where: str | torch.device = "memory",
        limit: int | None = None,
        folder: Path | None = None,
        dtype: torch.dtype | None = None,
    ):
        if limit is not None and limit < 0:
            raise ConfigError(f"The limit of the activation cache must not be negative, got {limit}.")
        self.where = where
        self.limit = limit
        self.dtype = dtype
        self.used = 0
        self.files = 0
        self._parent = folder
        self._folder: tempfile.TemporaryDirectory | None = None

    def put(self, tensor: Tensor, rounded: bool = False) -> CachedTensor:
        """Keeps a tensor.

        Args:
            tensor (`torch.Tensor`): It is not copied where it can stay as it is: do not change it in place afterwards.
            rounded (`bool`): Whether it may be rounded to the cache's dtype.
        """
        stored = tensor.detach()
        if rounded and self.dtype is not None and tensor.is_floating_point():
            stored = stored.to(self.dtype)
        nbytes = stored.numel() * stored.element_size()
        if nbytes and (self.where == "disk" or (self.limit is not None and self.used + nbytes > self.limit)):
            return self._put_on_disk(stored, tensor)
        place = "cpu" if self.where in ("memory", "disk") else self.where
        cached = CachedTensor(stored.to(place), stored.dtype, tensor)
        self.used += nbytes
        weakref.finalize(cached, self._release, nbytes)
        return cached

    def _put_on_disk(self, stored: Tensor, tensor: Tensor) -> CachedTensor:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(
                prefix="hf_merge_", dir=self._parent, ignore_cleanup_errors=True
            )
        path = Path(self._folder.name) / f"{self.files}.bin"
        self.files += 1
        with open(path, "wb") as file:
            file.write(memoryview(stored.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
        cached = CachedTensor(path, stored.dtype, tensor)
        weakref.finalize(cached, path.unlink, missing_ok=True)
        return cached

    def _release(self, nbytes: int) -> None:
        self.used -= nbytes

    def close(self) -> None:
        """Removes what is on disk."""
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
