"""The supernet of FS-Merge as weights: every parameter of the merged backbone as a function of the experts' parameters and of
trained factors (arXiv 2410.01483, section 3). It is evaluated once per update, whatever the number of tokens; what runs is an
ordinary model with the folded weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..backbone_base import LinearSite, Topology
from .factors import Factor, make_factor


class Supernet(nn.Module):
    """W = Σ_i M_i W_i U_i for linear layers, M_i b_i for their biases, E_i M_iᵀ for tables, W = Σ_i M_i W_i for convolutions on
    the input; norms and other vectors are trained as they are. Linear layers that read the same tensor share U.

    Args:
        topology ([`Topology`]): Of the backbone.
        experts (`Sequence[Mapping[str, torch.Tensor]]`): Parameters of the experts' backbones, float32.
        shapes (`Mapping[str, Sequence[int]]`): Of the merged backbone's parameters.
        scales (`Sequence[float]`): The multiple of the identity that each expert's M starts as: (1, 0, ...) starts as the first
            expert, (1/n, ...) as the average.
        form (`str`): Of the factors, see `FORMS`.
        rank (`int`): Of their low-rank parts.
        head_sizes (`Mapping[str, int]`): Linear layers whose outputs are heads that M must keep apart, and the size of a head.
        seed (`int`): Of the random parts.
    """

    def __init__(
        self,
        topology: Topology,
        experts: Sequence[Mapping[str, Tensor]],
        shapes: Mapping[str, Sequence[int]],
        scales: Sequence[float],
        form: str = "diagonal_low_rank",
        rank: int = 16,
        head_sizes: Mapping[str, int] | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.topology = topology
        self.experts = experts
        self.scales = tuple(scales)
        self._make = {"form": form, "rank": rank, "generator": torch.Generator().manual_seed(seed)}
        self._shapes = shapes
        self.outputs = nn.ModuleDict()
        """M, by the name of the layer or table: one factor for each expert."""
        self.inputs = nn.ModuleDict()
        """U, by group."""
        self.vectors = nn.ParameterDict()
        """Parameters that are trained as they are."""
        for site in topology.linears.values():
            self._add_linear(site, (head_sizes or {}).get(site.name))
        for name in [*topology.tables, *topology.convolutions]:
            channels = -1 if name in topology.tables else 0
            weight = name if name in topology.tables else f"{name}.weight"
            self._add_output(name, weight, channels)
        for name in topology.direct:
            self.vectors[_key(name)] = nn.Parameter(self._initial_vector(name))

    def _add_linear(self, site: LinearSite, head_size: int | None) -> None:
        self._add_output(site.name, f"{site.name}.weight", 1 if site.transposed else 0, head_size)
        group = str(site.group)
        if site.group is None or group in self.inputs:
            return
        axis = 0 if site.transposed else 1
        weight = f"{site.name}.weight"
        width = self._shapes[weight][axis]
        self.inputs[group] = nn.ModuleList(
            make_factor(rows=expert[weight].shape[axis], columns=width, scale=1.0, **self._make)
            for expert in self.experts
        )

    def _add_output(self, name: str, weight: str, axis: int, head_size: int | None = None) -> None:
        width = self._shapes[weight][axis]
        self.outputs[_key(name)] = nn.ModuleList(
            make_factor(rows=width, columns=expert[weight].shape[axis], scale=scale, head_size=head_size, **self._make)
            for expert, scale in zip(self.experts, self.scales, strict=True)
        )

    @torch.no_grad()
    def _initial_vector(self, name: str) -> Tensor:
        """The weighted sum of the experts' vectors. Where an expert is narrower, the merged vector's further channels are as
        those of a fresh norm: the mean of the expert's values."""
        shape = tuple(self._shapes[name])
        total = torch.zeros(shape)
        for expert, scale in zip(self.experts, self.scales, strict=True):
            if scale:
                total += scale * _resized(expert[name], shape)
        return total

    def output(self, name: str) -> Sequence[Factor]:
        """M of a layer or table."""
        return self.outputs[_key(name)]

    def input(self, group: int) -> Sequence[Factor]:
        """U of the layers that read one tensor."""
        return self.inputs[str(group)]

    def fold(self) -> dict[str, Tensor]:
        """The merged backbone's parameters, differentiable."""
        folded = {_name(key): value for key, value in self.vectors.items()}
        for name in self.topology.tables:
            tables = [expert[name] for expert in self.experts]
            flat = [table.reshape(-1, table.shape[-1]) for table in tables]
            total = _total(m.left(table.mT) for m, table in zip(self.output(name), flat, strict=True)).mT
            folded[name] = total.reshape(*tables[0].shape[:-1], total.shape[-1])
        for name, has_bias in self.topology.convolutions.items():
            folded |= self._fold_convolution(name, has_bias)
        for site in self.topology.linears.values():
            folded |= self._fold_linear(site)
        return folded

    def _fold_convolution(self, name: str, has_bias: bool) -> dict[str, Tensor]:
        weights = [expert[f"{name}.weight"] for expert in self.experts]
        total = _total(m.left(w.flatten(1)) for m, w in zip(self.output(name), weights, strict=True))
        folded = {f"{name}.weight": total.reshape(-1, *weights[0].shape[1:])}
        if has_bias:
            folded[f"{name}.bias"] = self._fold_bias(name)
        return folded

    def _fold_linear(self, site: LinearSite) -> dict[str, Tensor]:
        products = []
        for index, expert in enumerate(self.experts):
            weight = expert[f"{site.name}.weight"]
            weight = weight.mT if site.transposed else weight
            if site.group is not None:
                weight = self.input(site.group)[index].right(weight)
            products.append(self.output(site.name)[index].left(weight))
        total = _total(products)
        folded = {f"{site.name}.weight": total.mT if site.transposed else total}
        if site.has_bias:
            folded[f"{site.name}.bias"] = self._fold_bias(site.name)
        return folded

    def _fold_bias(self, name: str) -> Tensor:
        biases = [expert[f"{name}.bias"] for expert in self.experts]
        return _total(m.left(bias[:, None]) for m, bias in zip(self.output(name), biases, strict=True))[:, 0]

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The trained tensors by the learning rate that suits them: `"vector"` (diagonals, norms) and `"matrix"`."""
        groups: dict[str, list[nn.Parameter]] = {"matrix": [], "vector": list(self.vectors.values())}
        for parameter in [*self.outputs.parameters(), *self.inputs.parameters()]:
            groups["vector" if parameter.ndim == 1 else "matrix"].append(parameter)
        return groups


def _total(products) -> Tensor:
    first, *others = products
    for other in others:
        first = first + other
    return first


def _resized(vector: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A vector of another width: cut, or filled up with its mean."""
    if tuple(vector.shape) == shape:
        return vector.float()
    result = torch.full(shape, float(vector.float().mean()))
    overlap = tuple(slice(0, min(a, b)) for a, b in zip(shape, vector.shape, strict=True))
    result[overlap] = vector.float()[overlap]
    return result


def _key(name: str) -> str:
    """Module dictionaries take no dots."""
    return name.replace(".", "/")


def _name(key: str) -> str:
    return key.replace("/", ".")
