"""Mixed precision: near to float32, and only where it is asked for."""

from __future__ import annotations

import pytest
import torch

from hf_merge.modeling.precision import mixed_precision

from ..zoo import ZOO


@pytest.mark.parametrize("family", ["bert", "vit", "llama", "t5"])
def test_outputs_and_gradients_are_near_to_those_of_float32(family: str):
    found = []
    for enabled in (False, True):
        model = ZOO[family].build().eval()
        with mixed_precision(torch.device("cpu"), enabled):
            logits = model(**ZOO[family].inputs()).logits
        logits.float().square().mean().backward()
        found.append((logits.float(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    for exact, near in zip(*found, strict=True):
        assert 0 < float((exact - near).norm() / exact.norm()) < 0.05


def test_attention_is_fused_again_afterwards():
    before = torch.backends.cuda.flash_sdp_enabled()
    with mixed_precision(torch.device("cpu"), True):
        assert not torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled() == before
    with mixed_precision(torch.device("cpu"), False):
        assert torch.backends.cuda.flash_sdp_enabled() == before
        assert not torch.is_autocast_enabled("cpu")
