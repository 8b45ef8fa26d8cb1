"""The contract of the methods for experts that share no base model: [`BackboneMethod`].

Such a method merges backbones as a whole: which channels of one expert correspond to which of another is part of what it
finds. An engine gives it the experts' weights and what is known of how tensors flow between them; the result is the merged
backbone, and for each expert a map from the merged features to those that its head expects.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from .base import MergeMethod
from .block_base import BlockMonitor
from .groups import keyed_generator


if TYPE_CHECKING:
    from .backbone_blocks import BackboneBlock, BackbonePart


@dataclass(frozen=True)
class LinearSite:
    """A linear layer of the backbone.

    Args:
        name (`str`): Its module name within the backbone.
        group (`int`, *optional*): Layers with one number read the same tensor. `None`: the layer reads the model's input.
        transposed (`bool`): Whether the weight is stored as (in, out).
        has_bias (`bool`): Whether it has a bias.
    """

    name: str
    group: int | None
    transposed: bool
    has_bias: bool


@dataclass(frozen=True)
class FeatureTap:
    """What a head reads.

    Args:
        field (`str`): The field of the backbone's output.
        token (`int`, *optional*): The one token that is read; all of them when `None`.
        layers (`tuple[str]`): The linear layers of the head that read it, by module name within the whole model.
    """

    field: str
    token: int | None
    layers: tuple[str, ...]

    def read(self, output: Any) -> Tensor:
        """The features in the output of a backbone, (samples, tokens, channels) or (samples, channels)."""
        value = getattr(output, self.field)
        return value if self.token is None else value[:, self.token]


@dataclass(frozen=True)
class HeadPart:
    """Where the heads of queries, keys or values lie in the output of a linear layer.

    Args:
        layer (`str`): Its module name within the backbone.
        starts (`tuple[int]`): The first channel of each head; heads that share keys and values have one start.
    """

    layer: str
    starts: tuple[int, ...]


@dataclass(frozen=True)
class AttentionSite:
    """An attention layer.

    Args:
        output (`str`): The linear layer that reads the concatenated heads.
        head_size (`int`): Channels per head.
        matched (`tuple[HeadPart]`): Queries and keys: a head's channels are multiplied with each other.
        values (`HeadPart`): Of the values.
        is_rotary (`bool`): Whether positions turn queries and keys.
    """

    output: str
    head_size: int
    matched: tuple[HeadPart, ...]
    values: HeadPart
    is_rotary: bool

    @property
    def query_and_key(self) -> list[str]:
        """The layers that give queries and keys and nothing else."""
        return [part.layer for part in self.matched if part.layer != self.values.layer]

    def renamed(self, rename: Callable[[str], str]) -> AttentionSite:
        """The same with other names of layers."""
        parts = [replace(part, layer=rename(part.layer)) for part in (*self.matched, self.values)]
        return replace(self, output=rename(self.output), matched=tuple(parts[:-1]), values=parts[-1])


@dataclass
class Topology:
    """The parameters of a backbone by the way they take part in a folded model; names are within the backbone.

    **Attributes**:
        - **linears** (`dict[str, LinearSite]`) -- By module name, in the order of the forward.
        - **convolutions** (`dict[str, bool]`) -- Convolutions on the model's input: whether they have a bias.
        - **tables** (`list[str]`) -- Parameters whose last dimension is the residual stream: embeddings, positions, class tokens.
        - **direct** (`list[str]`) -- Trained as they are: norms and other vectors.
        - **attention** (`list[AttentionSite]`) -- The attention layers, where their heads could be found.
        - **elementwise** (`dict[str, list[str]]`) -- Layers that read, channel by channel, a function of other layers' outputs, and
          these layers: the inside of MLPs.
        - **tap** ([`FeatureTap`], *optional*) -- What the head reads; `None` without a head.
    """

    linears: dict[str, LinearSite] = field(default_factory=dict)
    convolutions: dict[str, bool] = field(default_factory=dict)
    tables: list[str] = field(default_factory=list)
    direct: list[str] = field(default_factory=list)
    tap: FeatureTap | None = None
    attention: list[AttentionSite] = field(default_factory=list)
    elementwise: dict[str, list[str]] = field(default_factory=dict)

    def readers(self) -> dict[int, list[str]]:
        """The linear layers that read one tensor, by group."""
        groups: dict[int, list[str]] = {}
        for site in self.linears.values():
            if site.group is not None:
                groups.setdefault(site.group, []).append(site.name)
        return groups

    def parameters(self) -> list[str]:
        """The names of all parameters."""
        biased = {name: site.has_bias for name, site in self.linears.items()} | self.convolutions
        weights = [f"{name}.weight" for name in biased]
        return [*self.tables, *self.direct, *weights, *(f"{name}.bias" for name, has in biased.items() if has)]

    def head_sizes(self, aligned: bool | None) -> dict[str, int]:
        """The linear layers of queries and keys, and the size of their heads, where heads must not be mixed channel by channel.

        Args:
            aligned (`bool`, *optional*): Whether they must; where positions are rotary when `None`.
        """
        if aligned is False:
            return {}
        return {
            name: site.head_size for site in self.attention for name in site.query_and_key if aligned or site.is_rotary
        }

    def within(self, prefix: str) -> Topology:
        """The topology of one module, without what the head reads.

        Args:
            prefix (`str`): Its name and a dot; the names in the result are without it.
        """
        return self._part(lambda name: name.startswith(prefix), prefix)

    def without(self, prefix: str) -> Topology:
        """The topology of everything but one module."""
        return self._part(lambda name: not name.startswith(prefix), "")

    def _part(self, selects: Callable[[str], bool], prefix: str) -> Topology:
        def inner(name: str) -> str:
            return name.removeprefix(prefix)

        return Topology(
            linears={inner(n): replace(site, name=inner(n)) for n, site in self.linears.items() if selects(n)},
            convolutions={inner(n): has_bias for n, has_bias in self.convolutions.items() if selects(n)},
            tables=[inner(n) for n in self.tables if selects(n)],
            direct=[inner(n) for n in self.direct if selects(n)],
            attention=[site.renamed(inner) for site in self.attention if selects(site.output)],
            elementwise={inner(n): [inner(w) for w in ws] for n, ws in self.elementwise.items() if selects(n)},
        )


def linear_matrix(site: LinearSite, weight: Tensor) -> Tensor:
    """The weight as (out, in)."""
    return weight.mT if site.transposed else weight


class OutputMap(nn.Linear):
    """What maps the merged features to those of an expert, x → U x + c; it starts as the identity, with zeros where the widths
    differ, and is folded into the expert's head in the end.

    Args:
        merged, expert (`int`): The two widths.
        bias (`bool`): Whether there is c; only where the layer of the head has a bias to fold it into.
    """

    def __init__(self, merged: int, expert: int, bias: bool):
        super().__init__(merged, expert, bias=bias)
        nn.init.eye_(self.weight)
        if bias:
            nn.init.zeros_(self.bias)

    @torch.no_grad()
    def set_values(self, weight: Tensor, bias: Tensor | None) -> None:
        """Gives the map its values.

        Args:
            weight (`torch.Tensor`): U, (expert, merged).
            bias (`torch.Tensor`, *optional*): c, (expert,); not used where the map has none.
        """
        self.weight.copy_(weight)
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

    @torch.no_grad()
    def fold_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The layer of a head that reads the merged features: W (U x + c) + b = (W U) x + (W c + b).

        Args:
            weight (`torch.Tensor`): W, (out, expert).
            bias (`torch.Tensor`, *optional*): b.
        """
        own = self.weight.to(weight.device, torch.float32)
        folded = weight.float() @ own
        if bias is None or self.bias is None:
            return folded, bias
        return folded, bias.float() + weight.float() @ self.bias.to(weight.device, torch.float32)


class FeatureSource:
    """The calibration samples of all tasks and the models that run on them, as an engine provides them.

    **Attributes**:
        - **counts** (`list[int]`) -- How many samples each task has.
    """

    counts: list[int]

    def inputs(self, task: int, rows: Sequence[int], generator: np.random.Generator | None) -> dict[str, Tensor]:
        """The arguments of a forward for some samples; augmented where there is a hook and `generator` is given."""
        raise NotImplementedError(f"{type(self).__name__} does not implement inputs")

    def run_student(self, inputs: Mapping[str, Tensor]) -> Any:
        """The output of the merged backbone, differentiable."""
        raise NotImplementedError(f"{type(self).__name__} does not implement run_student")

    def run_expert(self, task: int, inputs: Mapping[str, Tensor]) -> Any:
        """The output of an expert's backbone, without gradients."""
        raise NotImplementedError(f"{type(self).__name__} does not implement run_expert")

    def predict(self, task: int, inputs: Mapping[str, Tensor], output: Any, features: Tensor) -> Tensor:
        """What an expert's own head makes of features, float32 and differentiable in them.

        Args:
            task (`int`): The expert.
            inputs (`Mapping`): The batch.
            output: Of the expert's backbone, for whatever else the head reads.
            features (`torch.Tensor`): In the expert's channels.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement predict")


@dataclass
class BackboneGroup:
    """The backbones of the experts, the one that they are merged into, and what connects them.

    Args:
        topology ([`Topology`]): Of the backbone.
        student (`torch.nn.Module`): The merged backbone, float32, of the ordinary class: a method gives its parameters their
            values in place.
        experts (`list[dict]`): The parameters of the experts' backbones, float32, by name within the backbone.
        modules (`Sequence[torch.nn.Module]`): The experts' backbones.
        taps (`list[FeatureTap | None]`): What each expert's head reads; `None` for experts without a head.
        maps (`list[OutputMap | None]`): To each expert's features, where it has a head.
        expert_names (`tuple[str]`): The experts' names.
        settings ([`MergeConfig`]): The recipe.
        source ([`FeatureSource`], *optional*): Samples, for methods that need some.
        monitor ([`BlockMonitor`]): Is told about training.
        seed (`int`): Of all randomness.
        accumulation (`int`): How many batches of each task make one update.
        report (`dict`): What the method wants to say.
        apart (`list[dict]`): The parameters of the backbone that are kept per task, of each expert, by name within the backbone: a
            method that knows such parameters gives them their values.
    """

    topology: Topology
    student: nn.Module
    experts: list[dict[str, Tensor]]
    modules: Sequence[nn.Module]
    taps: list[FeatureTap | None]
    maps: list[OutputMap | None]
    expert_names: tuple[str, ...]
    settings: Any
    source: FeatureSource | None = None
    monitor: BlockMonitor = field(default_factory=BlockMonitor)
    seed: int = 0
    accumulation: int = 1
    report: dict[str, Any] = field(default_factory=dict)
    apart: list[dict[str, Tensor]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.experts)

    def shapes(self) -> dict[str, torch.Size]:
        """The shapes of the merged backbone's parameters."""
        return {name: parameter.shape for name, parameter in self.student.named_parameters()}

    @torch.no_grad()
    def assign(self, values: Mapping[str, Tensor]) -> None:
        """Gives the merged backbone's parameters their values."""
        for name, value in values.items():
            self.student.get_parameter(name).copy_(value)

    def features(self, task: int, output: Any) -> Tensor:
        """What the task's head reads, float32; the last hidden states where there is no head."""
        tap = self.taps[task]
        return (output.last_hidden_state if tap is None else tap.read(output)).float()

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return next(self.student.parameters()).device

    def width(self, index: int) -> int:
        """The width of an expert's residual stream."""
        return self.modules[index].config.hidden_size

    def first(self, count: int) -> BackboneGroup:
        """The same merge with the first `count` experts only."""
        return replace(
            self,
            experts=self.experts[:count],
            modules=self.modules[:count],
            taps=self.taps[:count],
            maps=self.maps[:count],
            expert_names=self.expert_names[:count],
            report={},
        )

    def random(self, *words: str) -> np.random.Generator:
        """A counter-based generator keyed by the seed and the words."""
        return keyed_generator(self.seed, *words)


class BackboneMethod(MergeMethod):
    """A method that merges whole backbones and needs no shared base. One instance serves the whole merge."""

    min_experts = 2
    changes_width: ClassVar[bool] = False
    """Whether experts may differ in width, and the result from them."""

    def merge(self, group: BackboneGroup) -> None:
        """Merges the backbones into `group.student`, and finds the maps to the experts' features."""
        raise NotImplementedError(f"{type(self).__name__} does not implement merge")

    def start(
        self,
        topology: Topology,
        experts: Sequence[Mapping[str, Tensor]],
        shapes: Mapping[str, torch.Size],
        settings: Any,
    ) -> dict[str, Tensor]:
        """Block by block: the merged parameters outside of the blocks, before anything is trained."""
        raise NotImplementedError(f"{type(self).__name__} does not implement start")

    def merge_block(self, block: BackboneBlock) -> None:
        """Block by block: merges one block into `block.student`, and changes its maps."""
        raise NotImplementedError(f"{type(self).__name__} does not implement merge_block")

    def merge_tail(self, tail: BackbonePart) -> None:
        """Block by block: fits what comes after the last block and the maps to the experts' features."""
        raise NotImplementedError(f"{type(self).__name__} does not implement merge_tail")
