"""How tensors flow in a model that is not loaded: traced on a model of the same config with two layers and random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..checkpoints.source import ModelSource
from ..errors import UnsupportedModelError
from ..methods.backbone_base import FeatureTap, Topology
from ..modeling.blocks import find_block_lists
from ..modeling.heads import find_attention, find_elementwise
from ..modeling.topology import backbone_of, example_inputs, trace
from .slices import config_for_layers


if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class BackboneShape:
    """The topology of a backbone in two parts.

    Args:
        outside ([`Topology`]): Of what is outside of the blocks; names are within the backbone.
        block ([`Topology`]): Of a block; names are within it.
        tap ([`FeatureTap`], *optional*): What the head reads.
    """

    outside: Topology
    block: Topology
    tap: FeatureTap | None

    @classmethod
    def of(cls, source: ModelSource) -> BackboneShape:
        """Traces a model.

        Args:
            source ([`ModelSource`]): Weights are not read.

        Raises:
            UnsupportedModelError: It cannot be folded, or has not exactly one list of blocks.
        """
        model = _shallow_model(source)
        inputs = example_inputs(model)
        topology = trace(model, inputs)
        topology.attention = find_attention(model, topology, inputs)
        topology.elementwise = find_elementwise(model, topology, inputs)
        lists = list(find_block_lists(backbone_of(model)))
        if len(lists) != 1:
            raise UnsupportedModelError(
                f"{source} has {len(lists)} lists of blocks ({', '.join(lists) or 'none'}), and block_wise=True needs exactly one: "
                "merge it with block_wise=False."
            )
        return cls(topology.without(f"{lists[0]}."), topology.within(f"{lists[0]}.0."), topology.tap)


def _shallow_model(source: ModelSource) -> PreTrainedModel:
    layers = range(min(2, source.config.num_hidden_layers))
    config = config_for_layers(source.config, [(source.config, index) for index in layers])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return source.model_class._from_config(config, dtype=torch.float32).eval()
