"""Running block by block gives what a plain forward gives, on every family, or says why it cannot."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import BertConfig, BertModel
from transformers.cache_utils import DynamicCache

from hf_merge.errors import UnsupportedModelError
from hf_merge.modeling.reentry import Reentry, compare_outputs, main_output, map_structure, without_caches
from hf_merge.modeling.residency import build_runnable_shell, entries_of, materialise, release

from ..zoo import ZOO


def sharpened(family: str) -> nn.Module:
    """Larger weights, so that attention is not uniform and errors show."""
    model = ZOO[family].build()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model


def run_by_blocks(reentry: Reentry, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The main output of every block."""
    found: dict[str, Tensor] = {}
    outputs: dict[str, object] = {}
    while (call := reentry.next_call(inputs, Latest(reentry, outputs, found))) is not None:
        output = without_caches(reentry.blocks[call.block](*call.args, **call.kwargs))
        outputs[call.block if reentry.keeps_all else reentry.list_of(call.block)] = output
        found[call.block] = main_output(output)
    return found


class Latest(dict):
    """One output for each list of blocks, as the engine keeps them."""

    def __init__(self, reentry: Reentry, outputs: dict, found: dict):
        super().__init__({name: outputs[name if reentry.keeps_all else reentry.list_of(name)] for name in found})


@pytest.mark.parametrize("family", ZOO)
def test_blocks_give_what_a_plain_forward_gives(family: str):
    model, inputs = sharpened(family), ZOO[family].inputs()
    with torch.no_grad():
        reentry = Reentry(model)
        expected = reentry.plain_outputs(inputs, lambda name: nullcontext())
        found = run_by_blocks(reentry, inputs)
    assert list(found) == list(expected)
    for name, output in expected.items():
        torch.testing.assert_close(found[name], output, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_the_model_is_left_as_it_was(family: str):
    model, inputs = ZOO[family].build(), ZOO[family].inputs()
    with torch.no_grad():
        before = model(**inputs)[0]
        run_by_blocks(Reentry(model), inputs)
        assert torch.equal(model(**inputs)[0], before)
    assert not any("forward" in vars(module) for module in model.modules())


def test_an_error_in_a_forward_leaves_the_model_as_it_was():
    model = ZOO["bert"].build()
    with pytest.raises(IndexError):
        Reentry(model).next_call({"input_ids": torch.full((1, 4), 10**6)}, {})
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_block_that_is_called_twice_is_refused():
    config = transformers.AlbertConfig(
        vocab_size=99,
        embedding_size=16,
        hidden_size=32,
        num_attention_heads=4,
        intermediate_size=64,
        num_hidden_layers=3,
    )
    model = transformers.AlbertModel(config).eval()
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match=r"calls its block '.*' more than once"):
        run_by_blocks(Reentry(model), ZOO["bert"].inputs())


def test_shared_keys_and_values_are_refused():
    model = ZOO["llama"].build()
    model.config.num_kv_shared_layers = 1
    with pytest.raises(UnsupportedModelError, match="shares keys and values between its blocks"):
        Reentry(model)


def test_a_model_without_blocks_is_refused():
    class Flat(BertModel):
        def __init__(self, config):
            super().__init__(config)
            self.encoder = nn.Identity()

    with pytest.raises(UnsupportedModelError, match="has no list of blocks"):
        Reentry(Flat(BertConfig(num_hidden_layers=1)))


def test_a_side_channel_is_found_by_comparison():
    expected = torch.randn(2, 3, 4)
    compare_outputs("m", "b", expected.clone(), expected)
    with pytest.raises(UnsupportedModelError, match="the output of 'b' differs from that of a plain forward by"):
        compare_outputs("m", "b", expected + 1, expected)
    with pytest.raises(UnsupportedModelError, match="in shape"):
        compare_outputs("m", "b", expected[:1], expected)


def test_caches_are_removed_wherever_they_are():
    cache = DynamicCache()
    assert without_caches((1, [cache, {"a": cache}])) == (1, [None, {"a": None}])


def test_structures_keep_their_types():
    value = {"a": (1, [2]), "b": 3}
    assert map_structure(lambda x: x, value) == value
    assert isinstance(map_structure(lambda x: x, value)["a"], tuple)


# -- weights that come and go ---------------------------------------------------------------------------------------------


def test_a_shell_computes_what_the_model_computes_once_its_weights_are_there():
    model, inputs = ZOO["llama"].build(), ZOO["llama"].inputs()
    shell = build_runnable_shell(type(model), model.config)
    assert all(parameter.device.type == "meta" for parameter in shell.parameters())
    state = model.state_dict()
    with torch.no_grad():
        materialise(shell, entries_of(shell), state.get, torch.device("cpu"))
        assert torch.equal(shell(**inputs).logits, model(**inputs).logits)
    release(shell, entries_of(shell))
    assert all(parameter.device.type == "meta" for parameter in shell.parameters())
