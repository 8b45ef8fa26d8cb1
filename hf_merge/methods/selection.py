"""The largest entries of a tensor by magnitude, found by selection and never by sorting.

For IEEE floats |x| grows with the bit pattern of |x| read as an integer, and integers are selected faster than floats. On a CPU a
sample of the entries says between which two magnitudes the k-th largest one is; one pass over the data counts what is above them,
and keeps the few entries between them, of which the k-th largest is the one that is looked for. Elsewhere two histograms, of the high
and of the low 16 bits, find it in two passes. Both are exact. Histograms add up, so that they find a threshold over all parameters
of a model without ever holding two of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


HIGH_BINS = 1 << 15  # the sign bit is gone
LOW_BINS = 1 << 16

_SAMPLE = 1 << 14
_DEVIATIONS = 4.0  # of the sample's quantile from that of all entries: farther off in one of 16,000 cases, which take another pass
_CHUNK = 1 << 18


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
        last (`int`, *optional*): Of the entries of exactly this magnitude those up to this place are kept. `None`: all.
    """

    threshold: float
    last: int | None = None

    @classmethod
    def nothing(cls) -> Cut:
        """The cut that keeps no entry."""
        return cls(math.inf, last=-1)

    def mask(self, values: Tensor) -> Tensor:
        """The entries of `values` that are kept (bool, same shape)."""
        magnitudes = values.abs()
        if self.last is None:
            return ~(magnitudes < self.threshold)  # NaN is kept, and noticed
        mask = (magnitudes > self.threshold).contiguous()
        head = slice(0, self.last + 1)
        mask.view(-1)[head] |= magnitudes.reshape(-1)[head] == self.threshold
        return mask

    def trim(self, values: Tensor, offset: int = 0) -> Tensor:
        """The values that are kept, 0 elsewhere.

        Args:
            values (`torch.Tensor`): float32 or float64; they may be changed in place.
            offset (`int`): How many entries of the tensor that the cut was made for come before them.
        """
        last = values.numel() - 1 if self.last is None else min(self.last - offset, values.numel() - 1)
        if last < 0:
            return _larger(values, self.threshold)
        # One pass instead of four: |x| >= threshold is |x| > the float below it.
        number = {torch.float32: np.float32, torch.float64: np.float64}[values.dtype]
        below = float(np.nextafter(number(self.threshold), number(0.0)))
        if last == values.numel() - 1:
            return values if self.threshold == 0.0 else _larger(values, below)
        flat = values.reshape(-1)
        head = flat[: last + 1] if self.threshold == 0.0 else _larger(flat[: last + 1], below)
        return torch.cat([head, _larger(flat[last + 1 :], self.threshold)]).view(values.shape)


def _larger(values: Tensor, threshold: float) -> Tensor:
    """The values of magnitude above a threshold, 0 elsewhere."""
    if threshold == 0.0:
        return values
    return torch.zeros_like(values) if threshold == math.inf else torch.nn.functional.hardshrink(values, threshold)


@dataclass(frozen=True)
class Parts:
    """A flat tensor that need not be there as a whole.

    Args:
        make (`Callable`): Makes its parts, in order, each time that it is called.
        at (`Callable`): Makes its entries at some places (int64, rising).
    """

    make: Callable[[], Iterable[Tensor]]
    at: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, values: Tensor) -> Parts:
        """A tensor that is there."""
        flat = values.reshape(-1)
        return cls(lambda: flat.split(_CHUNK), lambda places: flat[places])


def cut_largest(values: Tensor, k: int) -> Cut:
    """The cut that keeps exactly the `k` largest magnitudes of a float32 or float64 tensor without NaN; among equals the lowest
    index wins.

    Cuts of the same tensor are nested: what k keeps, k + 1 keeps too.
    """
    return cuts_of_parts(Parts.of(values), values.numel(), [k])[0]


def cuts_of_parts(parts: Parts, size: int, counts: Sequence[int]) -> list[Cut]:
    """[`cut_largest`] for several numbers of entries, of a tensor that is given in parts.

    Args:
        parts ([`Parts`]): The tensor.
        size (`int`): The number of entries.
        counts (`Sequence[int]`): How many are kept.
    """
    inside = [k for k in counts if 0 < k < size]
    found = dict(zip(inside, _select(parts, size, inside), strict=True)) if inside else {}
    return [found[k] if k in found else Cut.nothing() if k <= 0 else Cut(0.0) for k in counts]


def selection_memory(entries: int) -> int:
    """Bytes that are held on a CPU while the largest of so many float32 entries are looked for: places and bits of the few that are
    compared, the sample, and a chunk."""
    return 12 * (entries if entries <= _SAMPLE else _SAMPLE + entries // 16) + 16 * min(entries, _CHUNK)


def _select(parts: Parts, size: int, counts: Sequence[int]) -> list[Cut]:
    places = _sampled_places(size) if size > _SAMPLE else torch.empty(0, dtype=torch.int64)
    sample = parts.at(places)
    if sample.dtype == torch.float32 and sample.device.type != "cpu":
        return _select_by_histograms(parts, counts)
    brackets = [_Bracket(k, size, _bits(sample.cpu())) for k in counts]
    while any(bracket.cut is None for bracket in brackets):
        _look(parts, [bracket for bracket in brackets if bracket.cut is None])
    return [bracket.cut for bracket in brackets]


@lru_cache(maxsize=64)
def _sampled_places(size: int) -> Tensor:
    """Places all over a tensor, rising, without a pattern, the same in every process: int64, (_SAMPLE,)."""
    within = np.random.Generator(np.random.Philox(key=size)).random(_SAMPLE)
    return torch.from_numpy(((np.arange(_SAMPLE) + within) * (size / _SAMPLE)).astype(np.int64))


def _kth_largest(bits: np.ndarray, k: int) -> np.unsignedinteger:
    """The k-th largest of some bit patterns that are near each other, k from 1. A histogram is several times as fast as a partition."""
    least = bits.min()
    shift = bits.dtype.type(max(0, int(bits.max() - least).bit_length() - 16))
    bins = (bits - least) >> shift
    from_top = np.bincount(bins.astype(np.int64))[::-1].cumsum()
    index = int(np.searchsorted(from_top, k))
    chosen = bits.dtype.type(len(from_top) - 1 - index)
    if shift == 0:
        return least + chosen
    rank = k - (int(from_top[index - 1]) if index else 0)
    return np.sort(bits[bins == chosen])[-rank]


def _bits(values: Tensor) -> np.ndarray:
    """The bit patterns of the magnitudes, unsigned, flat."""
    unsigned = np.dtype(f"u{values.element_size()}")
    return np.bitwise_and(values.numpy().view(unsigned), np.iinfo(unsigned).max >> 1)


class _Bracket:
    """Looks for the k-th largest magnitude between two bit patterns, both included.

    Args:
        k (`int`): From 1.
        size (`int`): The number of entries.
        sample (`np.ndarray`): The bit patterns of some entries, or of none.
    """

    def __init__(self, k: int, size: int, sample: np.ndarray):
        self.k = k
        self.cut: Cut | None = None
        self._falling = np.sort(sample)[::-1]
        fraction, count = k / size, len(sample)
        self._spread = _DEVIATIONS * math.sqrt(count * fraction * (1 - fraction)) + 1
        self._between(count * fraction - self._spread, count * fraction + self._spread)

    def _between(self, first: float, last: float) -> None:
        """Begins to look between two ranks of the sample, or at everything beyond it."""
        unsigned, self._ranks = self._falling.dtype, (first, last)
        self.low = self._falling[math.ceil(last)] if math.ceil(last) < len(self._falling) else unsigned.type(0)
        self.high = self._falling[math.floor(first)] if first >= 0 else unsigned.type(np.iinfo(unsigned).max)
        # Where one of the two has many entries they are counted, else kept as those between them.
        self._keeps_high, self._keeps_low = self._is_rare(self.high), self._is_rare(self.low)
        self._above = self._at_high = self._at_low = 0
        self._places: list[np.ndarray] = []
        self._inside: list[np.ndarray] = []

    def _is_rare(self, pattern: np.unsignedinteger) -> bool:
        is_last = pattern == np.iinfo(pattern.dtype).max  # nothing is as large, and there is no next one
        return not is_last and np.count_nonzero(self._falling == pattern) <= 2 * self._spread

    def _farther(self) -> float:
        """By how many ranks to go on: four times as far each time."""
        self._spread *= 4
        return self._spread

    def see(self, bits: np.ndarray, start: int) -> None:
        """Looks at entries, of which `start` come before."""
        self._above += np.count_nonzero(bits > self.high)
        if not self._keeps_high:
            self._at_high += np.count_nonzero(bits == self.high)
        if self.high > self.low and not self._keeps_low:
            self._at_low += np.count_nonzero(bits == self.low)
        one = self.low.dtype.type(1)
        first = self.low if self._keeps_low else self.low + one
        end = self.high + one if self._keeps_high else self.high
        if end > first:
            # For what is smaller than the first the difference wraps around.
            places = np.flatnonzero(bits - first < end - first)
            self._places.append(places + start)
            self._inside.append(bits[places])

    def conclude(self, parts: Parts) -> None:
        """Finds the cut when all entries were seen, or where else to look."""
        rank = self.k - self._above
        inside = np.concatenate(self._inside) if self._inside else np.empty(0, self.low.dtype)
        between, below = rank - self._at_high, rank - self._at_high - len(inside)
        if rank < 1:
            self._between(self._ranks[0] - self._farther(), self._ranks[0])
        elif between < 1:
            self.cut = _edge_cut(parts, self.high, rank, self._at_high)
        elif below < 1:
            self.cut = _inner_cut(inside, np.concatenate(self._places), between)
        elif below <= self._at_low:
            self.cut = _edge_cut(parts, self.low, below, self._at_low)
        else:
            self._between(self._ranks[1], self._ranks[1] + self._farther())


def _look(parts: Parts, brackets: Sequence[_Bracket]) -> None:
    """One pass over the tensor."""
    start = 0
    for part in parts.make():
        bits = _bits(part.cpu())
        for bracket in brackets:
            bracket.see(bits, start)
        start += len(bits)
    for bracket in brackets:
        bracket.conclude(parts)


def _inner_cut(bits: np.ndarray, places: np.ndarray, k: int) -> Cut:
    """The cut after the `k` largest of some bit patterns at rising places."""
    pattern = _kth_largest(bits, k)
    equal = np.flatnonzero(bits == pattern)
    ties = k - int(np.count_nonzero(bits > pattern))
    return Cut(_magnitude(pattern), None if ties == len(equal) else int(places[equal[ties - 1]]))


def _edge_cut(parts: Parts, pattern: np.unsignedinteger, ties: int, equal: int) -> Cut:
    """The cut after the first `ties` of the `equal` entries of one magnitude, whose places were not kept, as they may be many."""
    return Cut(_magnitude(pattern), _last_kept(parts, _magnitude(pattern), ties, equal))


def _magnitude(pattern: np.unsignedinteger) -> float:
    return float(pattern.view(f"f{pattern.itemsize}"))


def _select_by_histograms(parts: Parts, counts: Sequence[int]) -> list[Cut]:
    highs = sum(high_histogram(part) for part in parts.make())
    chosen = [locate(highs, k) for k in counts]
    lows = {high: sum(low_histogram(part, high) for part in parts.make()) for high in {high for high, _ in chosen}}
    cuts = []
    for high, rank in chosen:
        low, ties = locate(lows[high], rank)
        threshold = magnitude_of(high, low)
        cuts.append(Cut(threshold, _last_kept(parts, threshold, ties, int(lows[high][low]))))
    return cuts


def _last_kept(parts: Parts, threshold: float, ties: int, equal: int) -> int | None:
    """`last` of a [`Cut`] that keeps `ties` of the `equal` entries of its threshold. Where the threshold is NaN, everything is kept,
    and whoever checks the result notices."""
    return None if ties == equal or math.isnan(threshold) else _place_of_equal(parts, threshold, ties)


def _place_of_equal(parts: Parts, magnitude: float, count: int) -> int:
    """The index of the `count`-th entry (from 1) of exactly this magnitude."""
    start = 0
    for part in parts.make():
        values = part.cpu().numpy()
        equal = (values == magnitude) | (values == -magnitude)
        inside = np.count_nonzero(equal)
        if inside >= count:
            return start + int(np.flatnonzero(equal)[count - 1])
        count -= inside
        start += len(part)
    raise ValueError(f"fewer entries of magnitude {magnitude} than were counted")


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
    size = _CHUNK if values.device.type == "cpu" else 1 << 26
    for chunk in values.reshape(-1).split(size):
        yield chunk.view(torch.int32) & 0x7FFFFFFF
