"""Which units of one model correspond to which of another: assignments by weights or activations (Git Re-Basin, arXiv
2209.04836), pairs within and across models (ZipIt!, arXiv 2305.03053), optimal transport (arXiv 1910.05653)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..backbone_base import AttentionSite, Topology, linear_matrix
from .spaces import RESIDUAL, ExpertTransforms, HeadOrder, Space, Spaces, Transform, head_groups


def assign(similarity: Tensor) -> Tensor:
    """The permutation that maximises Σ_k similarity[k, order[k]].

    Args:
        similarity (`torch.Tensor`): (reference's units, expert's units), square.
    """
    _, order = linear_sum_assignment(similarity.detach().cpu().double().numpy(), maximize=True)
    return torch.from_numpy(order).to(similarity.device)


def transport(similarity: Tensor, regularization: float = 0.05, iterations: int = 200) -> Transform:
    """Soft assignment: entropic optimal transport between uniform measures, by Sinkhorn's iteration in the log domain.

    Args:
        similarity (`torch.Tensor`): (merged units, expert's units); the two may differ.
        regularization (`float`): Relative to the spread of the similarities; 0 in the limit is an assignment.
        iterations (`int`): Of Sinkhorn.
    """
    rows, columns = similarity.shape
    logits = similarity.double() / (regularization * similarity.double().std().clamp_min(1e-12) * columns**0.5)
    for _ in range(iterations):
        logits = logits - logits.logsumexp(1, keepdim=True)
        logits = logits - logits.logsumexp(0, keepdim=True) + torch.log(torch.tensor(rows / columns))
    plan = logits.exp().float()
    to = plan / plan.sum(1, keepdim=True)
    back = (plan / plan.sum(1, keepdim=True)).mT
    return Transform(to, back / back.sum(0, keepdim=True).clamp_min(1e-12))


class WeightMatching:
    """Coordinate descent on the inner product of the reference's weights with the transformed expert's, one space after another,
    until nothing changes (Git Re-Basin, algorithm 1).

    Args:
        spaces ([`Spaces`]): Of the backbone.
        reference, expert (`Mapping`): Parameters, float32.
        widths (`tuple[int, int]`): Of the two residual streams.
        soft (`float`, *optional*): Transport with this regularisation instead of assignments, for all but heads.
        residual (`bool`): Also match the residual stream.
    """

    def __init__(
        self,
        spaces: Spaces,
        reference: Mapping[str, Tensor],
        expert: Mapping[str, Tensor],
        widths: tuple[int, int],
        soft: float | None = None,
        residual: bool = True,
    ):
        self.spaces, self.reference, self.expert, self.widths = spaces, reference, expert, widths
        self.soft, self.residual = soft, residual
        self.transforms = ExpertTransforms(spaces)
        device = next(iter(reference.values())).device
        self.transforms.units[RESIDUAL] = Transform.identity(*widths, device)

    def run(self, sweeps: int = 20) -> ExpertTransforms:
        """Matches all spaces.

        Args:
            sweeps (`int`): At most so many rounds.
        """
        if self.residual:
            # The tables do not depend on any other space: a first guess that the other spaces build on.
            tables = _table_similarity(self.spaces.topology, self.reference, self.expert, self.widths)
            self.transforms.units[RESIDUAL] = self._match(tables)
        for _ in range(sweeps):
            before = self.transforms.units[RESIDUAL].to
            for space in self.spaces.hidden.values():
                self.transforms.units[space.name] = self._match(self._hidden_similarity(space))
            for name, site in self.spaces.attention.items():
                self.transforms.heads[name] = self._match_heads(site)
            if not self.residual:
                break
            self.transforms.units[RESIDUAL] = self._match(self._residual_similarity())
            if torch.allclose(before, self.transforms.units[RESIDUAL].to, atol=1e-4):
                break
        return self.transforms

    def _match(self, similarity: Tensor) -> Transform:
        if self.soft is not None:
            return transport(similarity, self.soft)
        return Transform.permutation(assign(similarity))

    def _pair(self, name: str) -> tuple[Tensor, Tensor]:
        """A layer's weight in the reference and in the expert, (out, in)."""
        site = self.spaces.topology.linears[name]
        return tuple(linear_matrix(site, model[f"{name}.weight"]) for model in (self.reference, self.expert))

    def _hidden_similarity(self, space: Space) -> Tensor:
        similarity = 0
        for name in space.writers:
            ours, theirs = self._pair(name)
            back = self.transforms.columns(name)
            similarity = similarity + ours @ (theirs if back is None else theirs @ back).mT
            if self.spaces.topology.linears[name].has_bias:
                similarity = similarity + torch.outer(self.reference[f"{name}.bias"], self.expert[f"{name}.bias"])
        for name in space.readers:
            ours, theirs = self._pair(name)
            to = self.transforms.rows(name, len(theirs))
            similarity = similarity + ours.mT @ (theirs if to is None else to @ theirs)
        return similarity

    def _residual_similarity(self) -> Tensor:
        topology, residual = self.spaces.topology, self.spaces.residual
        similarity = _table_similarity(topology, self.reference, self.expert, self.widths)
        for name in residual.writers:
            ours, theirs = self._pair(name)
            back = self.transforms.columns(name)
            similarity = similarity + ours @ (theirs if back is None else theirs @ back).mT
        for name in residual.readers:
            ours, theirs = self._pair(name)
            to = self.transforms.rows(name, len(theirs))
            similarity = similarity + ours.mT @ (theirs if to is None else to @ theirs)
        return similarity

    def _match_heads(self, site: AttentionSite) -> HeadOrder:
        """Groups of heads by what they compute (invariant to the order of channels within), then channels within heads."""
        ours, theirs = self._head_blocks(site)
        similarity = torch.tensor([[_circuit_similarity(a, b) for b in theirs] for a in ours])
        order = assign(similarity)
        pairs = [(a, theirs[int(k)]) for a, k in zip(ours, order, strict=True)]
        values = [assign(a.value @ b.value.mT + a.output.mT @ b.output) for a, b in pairs]
        return HeadOrder(order, torch.stack(values), self.matched_channels(site, order))

    def matched_channels(self, site: AttentionSite, order: Tensor) -> Tensor:
        """The order of the channels of queries and keys within each head, (groups, head size). Rotary positions fix it.

        Args:
            site ([`AttentionSite`]): The attention layer.
            order (`torch.Tensor`): The expert's group of heads for each of the reference's.
        """
        if site.is_rotary:
            return torch.arange(site.head_size, device=order.device).expand(len(order), -1)
        ours, theirs = self._head_blocks(site)
        pairs = [(a, theirs[int(k)]) for a, k in zip(ours, order, strict=True)]
        return torch.stack(
            [assign(sum(x @ y.mT for x, y in zip(a.matched, b.matched, strict=True))) for a, b in pairs]
        )

    def _head_blocks(self, site: AttentionSite) -> tuple[list[_HeadBlock], list[_HeadBlock]]:
        """The weights of every group of heads, in the reference and in the expert (there in the reference's residual units)."""
        blocks = []
        back, to = self.transforms.units[RESIDUAL].back, self.transforms.units[RESIDUAL].to
        for index, model in enumerate((self.reference, self.expert)):
            matrices = {}
            for name in {site.output, site.values.layer, *(part.layer for part in site.matched)}:
                matrix = linear_matrix(self.spaces.topology.linears[name], model[f"{name}.weight"])
                if index:
                    matrix = to @ matrix if name == site.output else matrix @ back
                matrices[name] = matrix
            blocks.append([_head_block(site, heads, matrices) for heads in head_groups(site)])
        return blocks[0], blocks[1]


class _HeadBlock:
    """The weights of one group of heads: values (size, d), output (d, size) summed over the group's heads, and queries and keys
    (size, d)."""

    def __init__(self, value: Tensor, output: Tensor, matched: list[Tensor]):
        self.value, self.output, self.matched = value, output, matched


def _head_block(site: AttentionSite, heads: list[int], matrices: Mapping[str, Tensor]) -> _HeadBlock:
    size, first = site.head_size, heads[0]
    start = site.values.starts[first]
    value = matrices[site.values.layer][start : start + size]
    output = sum(matrices[site.output][:, head * size : (head + 1) * size] for head in heads)
    matched = []
    for part in site.matched:
        starts = dict.fromkeys(part.starts[head] for head in heads)
        matched.append(sum(matrices[part.layer][start : start + size] for start in starts))
    return _HeadBlock(value, output, matched)


def _circuit_similarity(a: _HeadBlock, b: _HeadBlock) -> float:
    """⟨O_a V_a, O_b V_b⟩ / norms + ⟨Q_aᵀ K_a, Q_bᵀ K_b⟩ / norms."""
    return _product_cosine(a.output, a.value, b.output, b.value) + _product_cosine(
        a.matched[0].mT, a.matched[1], b.matched[0].mT, b.matched[1]
    )


def _product_cosine(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> float:
    """The cosine of the matrices A B and C D, with small products only."""

    def inner(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return ((a.mT @ c) * (b @ d.mT)).sum()

    norms = (inner(a, b, a, b) * inner(c, d, c, d)).clamp_min(1e-24).sqrt()
    return float(inner(a, b, c, d) / norms)


def _table_similarity(
    topology: Topology, reference: Mapping[str, Tensor], expert: Mapping[str, Tensor], widths: tuple[int, int]
) -> Tensor:
    """The part of the residual stream's similarity that tables and convolutions give."""
    device = next(iter(reference.values())).device
    similarity = torch.zeros(widths, device=device)
    for name in topology.tables:
        if (reference[name].shape[-1], expert[name].shape[-1]) == widths:
            similarity += reference[name].flatten(0, -2).mT @ expert[name].flatten(0, -2)
    for name in topology.convolutions:
        ours, theirs = reference[f"{name}.weight"], expert[f"{name}.weight"]
        if (len(ours), len(theirs)) == widths:
            similarity += ours.flatten(1) @ theirs.flatten(1).mT
    return similarity
