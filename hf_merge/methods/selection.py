"""The largest entries of a tensor by magnitude, found by selection and never by sorting.

For IEEE floats |x| grows with the bit pattern of |x| read as an integer. Two histograms, of the high and of the low 16 bits,
therefore find the k-th largest magnitude exactly, in two passes over the data with a fixed amount of extra memory. Histograms
add up, so that the same code finds a threshold over all parameters of a model without ever holding two of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


HIGH_BINS = 1 << 15  # the sign bit is gone
LOW_BINS = 1 << 16


def count_kept(density: float, size: int) -> int:
    """How many of `size` entries a density keeps: ⌊density · size⌋, at least one unless the density is 0.

    The floor forgives the rounding of the product: 0.29 of 100 entries are 29, although `int(0.29 * 100)` is 28.
    """
    if density <= 0.0 or size == 0:
        return 0
    return min(size, max(1, math.floor(density * size * (1 + 1e-12))))


@dataclass(frozen=True)
class Cut:
    """What separates the entries that are kept from the others.

    Args:
        threshold (`float`): Entries of larger magnitude are kept.
        ties (`int`, *optional*): How many entries of exactly this magnitude are kept, those of lowest index first. `None`: all.
    """

    threshold: float
    ties: int | None = None

    @classmethod
    def nothing(cls) -> Cut:
        """The cut that keeps no entry."""
        return cls(math.inf, ties=0)

    def mask(self, values: Tensor) -> Tensor:
        """The entries of `values` that are kept (bool, same shape)."""
        magnitudes = values.abs()
        if self.ties is None:
            return magnitudes >= self.threshold
        mask = magnitudes > self.threshold
        if self.ties > 0:
            mask |= _first_true((magnitudes == self.threshold).contiguous(), self.ties)
        return mask

    def trim(self, values: Tensor) -> Tensor:
        """The values that are kept, 0 elsewhere. `values` may be changed in place."""
        if self.ties is None and self.threshold == 0.0:
            return values
        if self.ties is None and values.dtype == torch.float32:
            # One pass instead of four: |x| >= threshold is |x| > the float below it.
            below = np.nextafter(np.float32(self.threshold), np.float32(0.0))
            return torch.nn.functional.hardshrink(values, float(below))
        return values.mul_(self.mask(values))


def cut_largest(values: Tensor, k: int) -> Cut:
    """The cut that keeps exactly the `k` largest magnitudes of a float32 or float64 tensor without NaN.

    Cuts of the same tensor are nested: what k keeps, k + 1 keeps too.
    """
    if k <= 0:
        return Cut.nothing()
    if k >= values.numel():
        return Cut(0.0)
    if values.dtype == torch.float64:
        threshold = values.abs().reshape(-1).kthvalue(values.numel() - k + 1).values.item()
        return Cut(threshold, k - int(torch.count_nonzero(values.abs() > threshold)))
    high, rank = locate(high_histogram(values), k)
    histogram = low_histogram(values, high)
    low, ties = locate(histogram, rank)
    return Cut(magnitude_of(high, low), None if ties == int(histogram[low]) else ties)


def kth_largest_magnitude(values: Tensor, k: int) -> float:
    """The k-th largest magnitude, k from 1 to the number of entries."""
    return cut_largest(values, k).threshold if k < values.numel() else values.abs().min().item()


def largest_mask(values: Tensor, k: int) -> Tensor:
    """The mask (bool) of exactly the `k` entries of largest magnitude; among equals the lowest index wins."""
    return cut_largest(values, k).mask(values)


# -- histograms of the bit patterns -----------------------------------------------------------------------------------


def high_histogram(values: Tensor) -> Tensor:
    """How many magnitudes of a float32 tensor have each pattern of the high 16 bits: int64, (HIGH_BINS,)."""
    histogram = torch.zeros(HIGH_BINS, dtype=torch.int64, device=values.device)
    for bits in _magnitude_bits(values):
        histogram += torch.bincount(bits.bitwise_right_shift_(16), minlength=HIGH_BINS)
    return histogram


def low_histogram(values: Tensor, high: int) -> Tensor:
    """The same for the low 16 bits, of the magnitudes whose high bits are `high`: int64, (LOW_BINS,)."""
    histogram = torch.zeros(LOW_BINS, dtype=torch.int64, device=values.device)
    for bits in _magnitude_bits(values):
        inside = bits[(bits >> 16) == high]
        histogram += torch.bincount(inside.bitwise_and_(LOW_BINS - 1), minlength=LOW_BINS)
    return histogram


def locate(histogram: Tensor, k: int) -> tuple[int, int]:
    """The bin that holds the k-th largest magnitude (k from 1), and which of the bin's entries, counted from the top, it is."""
    from_top = histogram.flip(0).cumsum(0)
    index = int(torch.searchsorted(from_top, k))
    found = histogram.numel() - 1 - index
    return found, k - int(from_top[index] - histogram[found])


def magnitude_of(high: int, low: int) -> float:
    """The float32 whose bits are `high` and `low`, as an (exact) Python float."""
    return torch.tensor((high << 16) | low, dtype=torch.int32).view(torch.float32).item()


def _magnitude_bits(values: Tensor):
    # Chunks that stay in the cache make this three times as fast on a CPU; elsewhere launches cost more than memory.
    size = 1 << 18 if values.device.type == "cpu" else 1 << 26
    for chunk in values.reshape(-1).split(size):
        yield chunk.view(torch.int32) & 0x7FFFFFFF


def _first_true(mask: Tensor, count: int) -> Tensor:
    """Keeps the first `count` (at least one) true entries of a contiguous mask, in index order; changes it in place."""
    flat = mask.view(-1)
    start = 0
    for chunk in flat.split(1 << 18):
        inside = int(torch.count_nonzero(chunk))
        if inside >= count:
            flat[start + int(chunk.nonzero()[count - 1, 0]) + 1 :] = False
            return mask
        count -= inside
        start += chunk.numel()
    return mask
