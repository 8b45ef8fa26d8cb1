"""Augmentations of images, and copies made with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_merge import CalibrationData, Chain, ConfigError, Mixup, RandomShift

from .test_calibration import load


def images(count: int = 5) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.randn(count, 3, 6, 8, generator=torch.Generator().manual_seed(0)),
        "other": torch.ones(count),
    }


def apply(augmentation, arguments, seed: int = 0):
    return augmentation(0, arguments, np.random.default_rng(seed))


@pytest.mark.parametrize("augmentation", [RandomShift(), Mixup(), Chain([RandomShift(1), Mixup(0.3)])], ids=repr)
def test_shapes_stay_and_seeds_decide(augmentation):
    given = images()
    before = given["pixel_values"].clone()
    first, again, other = (apply(augmentation, given, seed)["pixel_values"] for seed in (0, 0, 1))
    assert first.shape == before.shape and torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(given["pixel_values"], before)
    assert apply(augmentation, given)["other"] is given["other"]


def test_a_shift_moves_the_inner_pixels():
    given = images(20)["pixel_values"]
    moved = apply(RandomShift(1), {"pixel_values": given})["pixel_values"]
    for before, after in zip(given, moved, strict=True):
        offsets = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
        matches = [torch.equal(after[:, 1:-1, 1:-1], before[:, 1 + y : 5 + y, 1 + x : 7 + x]) for y, x in offsets]
        assert sum(matches) == 1


def test_no_shift_and_no_weight_change_nothing():
    given = images()
    assert torch.equal(apply(RandomShift(0), given)["pixel_values"], given["pixel_values"])
    assert torch.equal(apply(Mixup(0.0), given)["pixel_values"], given["pixel_values"])


def test_mixup_lies_between_two_images_of_the_task():
    given = torch.stack([torch.full((1, 2, 2), float(value)) for value in (0, 100)])
    mixed = apply(Mixup(0.4), {"pixel_values": given}, 3)["pixel_values"]
    assert 0 <= mixed[0].min() and mixed[0].max() <= 40 and mixed[1].min() >= 60 and mixed[1].max() <= 100


def test_texts_are_refused():
    with pytest.raises(ConfigError, match="changes images.*there are none"):
        apply(Mixup(), {"input_ids": torch.zeros(2, 3, dtype=torch.long)})


def test_copies_of_equal_shapes_are_changed_together():
    seen = []

    def look(task, arguments, generator):
        seen.append(tuple(arguments["pixel_values"].shape))
        return arguments

    samples = [{"pixel_values": torch.zeros(3, 4, size)} for size in (4, 5, 4)]
    loaded = load(samples, augment=look, copies=2)
    assert seen == [(2, 3, 4, 4), (1, 3, 4, 5)]
    assert [sample["pixel_values"].shape[-1] for sample in loaded.samples[0]] == [4, 5, 4, 4, 5, 4]


def test_copies_are_the_same_for_the_same_seed():
    def drawn(seed):
        return CalibrationData({"a": images()["pixel_values"]}, augment=Mixup(), copies=2, seed=seed)

    assert repr(drawn(0).augment) == "Mixup(weight=0.5)"
