"""Fits what comes behind the blocks to the features of the merged model: poolers for all tasks together, heads for each.

What the merged backbone hands to a head differs a little from what the expert handed to it. A linear map of these features
towards the expert's, fitted to the calibration samples and folded into the head, undoes a good part of the difference (a linear
form of the surgery modules of arXiv 2402.02705). The blocks stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.source import ModelSource
from ..data.batching import Batch
from ..data.cache import CachedTensor
from ..data.calibration import TaskSamples
from ..methods.base import ParameterKind
from ..methods.linalg import solve_symmetric, sum_dtype
from ..modeling.shell import output_embeddings
from .block_runner import BlockRunner, Key, hooked, open_runner, run_to_the_end
from .calibrated import is_left_to_method
from .data_parallel import own_batches
from .heads import HeadPlan
from .options import EngineOptions
from .plan import MergePlan
from .task_models import MergedValues


@dataclass
class LayerMoments:
    """Sums over the rows x that a linear layer reads, and over the errors e of its outputs.

    Args:
        gram (`torch.Tensor`): Σ x xᵀ, (in, in).
        residual (`torch.Tensor`): Σ e xᵀ, (out, in).
        inputs (`torch.Tensor`): Σ x, (in,).
        errors (`torch.Tensor`): Σ e, (out,).
        count (`int`): How many rows.
    """

    gram: Tensor
    residual: Tensor
    inputs: Tensor
    errors: Tensor
    count: int = 0

    @classmethod
    def zeros(cls, layer: nn.Linear, dtype: torch.dtype) -> LayerMoments:
        """Of no rows."""
        out, width, device = layer.out_features, layer.in_features, layer.weight.device
        shapes = ((width, width), (out, width), (width,), (out,))
        return cls(*(torch.zeros(shape, dtype=dtype, device=device) for shape in shapes))

    def add(self, rows: Tensor, errors: Tensor) -> None:
        """Counts rows x (count, in) and errors e (count, out)."""
        rows, errors = rows.to(self.gram.dtype), errors.to(self.gram.dtype)
        self.gram += rows.mT @ rows
        self.residual += errors.mT @ rows
        self.inputs += rows.sum(0)
        self.errors += errors.sum(0)
        self.count += rows.shape[0]

    def include(self, other: LayerMoments) -> None:
        """Counts the rows of other moments of the same layer."""
        for ours, theirs in zip(self._sums, other._sums, strict=True):
            ours += theirs
        self.count += other.count

    @property
    def _sums(self) -> tuple[Tensor, ...]:
        return self.gram, self.residual, self.inputs, self.errors

    def solve(self, prior: float, has_bias: bool) -> tuple[Tensor, Tensor]:
        """argmin Σ ‖Δ x + δ − e‖² + prior · v ‖Δ‖², with v the mean variance of the inputs.

        Args:
            prior (`float`): How many rows the layer as it is weighs as much as.
            has_bias (`bool`): Whether δ is there; the rows are centred then.

        Returns:
            Δ (out, in) and δ (out,).
        """
        inputs, errors = self.inputs / self.count, self.errors / self.count
        gram, residual = self.gram, self.residual
        if has_bias:
            gram = gram - self.count * torch.outer(inputs, inputs)
            residual = residual - self.count * torch.outer(errors, inputs)
        scale = float(gram.diagonal().mean()) / self.count
        if scale <= 0:
            change = torch.zeros_like(residual)
        else:
            gram = gram.clone()
            gram.diagonal().add_(max(prior, 1e-9 * self.count) * scale)
            change = solve_symmetric(gram, residual.mT).mT
        return change, errors - change @ inputs if has_bias else torch.zeros_like(errors)


class HeadFitter:
    """Fits poolers and heads, with one block of a model in memory at a time, on all ranks of the options together.

    Args:
        plan ([`MergePlan`]): Its heads receive their values.
        samples ([`TaskSamples`]): Of every expert, on all ranks.
        merged ([`Mapping`]): The merged parameters by module name, as they are when they are asked for.
        options ([`EngineOptions`]): How to run.
        device (`torch.device`): Where models run.
    """

    def __init__(
        self,
        plan: MergePlan,
        samples: TaskSamples,
        merged: Mapping[str, Tensor],
        options: EngineOptions,
        device: torch.device,
    ):
        self.plan = plan
        self.values = MergedValues(plan, merged)
        self.merged = merged
        self.counts = [len(one) for one in samples.samples]
        self.batches = own_batches(options.ranks, samples.batches(plan.config.batch_size))
        self.options = options
        self.cache = options.open_cache()
        self.device = device
        self.prior = plan.config.head_prior

    def fit_poolers(self) -> dict[str, Tensor]:
        """The weights and biases of the poolers, one for all tasks, by module name."""
        poolers = pooler_layers(self.plan)
        moments: dict[str, LayerMoments] = {}
        for task in range(len(self.plan.experts)) if poolers else ():
            theirs = {names[task]: name for name, names in poolers.items()}
            for name, one in self._moments_of(task, list(theirs)).items():
                if theirs[name] in moments:
                    moments[theirs[name]].include(one)
                else:
                    moments[theirs[name]] = one
        values = {}
        for name, one in moments.items():
            entries = [entry for entry in (f"{name}.weight", f"{name}.bias") if entry in self.merged]
            values |= changed(
                {entry: self.merged[entry] for entry in entries}, name, one, self.prior * len(self.counts)
            )
        return values

    def fit_heads(self) -> dict[str, dict[str, Any]]:
        """Fits the head of every task that has one. Returns what is to be reported, by task."""
        return {
            source.name: self._fit_head(task, source, self.plan.heads[source.name])
            for task, source in enumerate(self.plan.experts)
            if source.name in self.plan.heads
        }

    def _fit_head(self, task: int, source: ModelSource, head: HeadPlan) -> dict[str, Any]:
        owners = {name.removesuffix(".weight") for name in head.names if name.endswith(".weight")}
        layers = [path for path in owners if isinstance(source.shell.get_submodule(path), nn.Linear)]
        moments = self._moments_of(task, layers)
        head.values = {name: source.read(name).to("cpu", copy=True) for name in head.names}
        for name, one in moments.items():
            head.values |= changed(head.values, name, one, self.prior)
        return {"fitted": list(moments), "samples": self.counts[task]}

    @torch.no_grad()
    def _moments_of(self, task: int, layers: Sequence[str]) -> dict[str, LayerMoments]:
        """The moments of linear layers behind the blocks on the samples of a task, by the names that they have in its expert."""
        source = self.plan.experts[task]
        keyed = {key: batch for key, batch in self.batches.items() if key[0] == task}
        try:
            targets = self._outputs_of(self._runner(str(source), source, source.read, keyed), layers)
            under_head = self.values.under_head_of(source, self.device)
            student = self._runner(f"the merged model for '{source.name}'", source, under_head, keyed)
            return self._all_reduce(self._moments(student, layers, targets, keyed))
        finally:
            self.cache.close()

    def _all_reduce(self, moments: Mapping[str, LayerMoments]) -> dict[str, LayerMoments]:
        """The moments over the samples of all ranks."""
        parts = {
            (name, key): torch.as_tensor(value) for name, one in moments.items() for key, value in vars(one).items()
        }
        sums: dict[str, dict[str, Any]] = {}
        for (name, key), value in self.options.ranks.all_reduce(parts, self.device).items():
            sums.setdefault(name, {})[key] = int(value) if key == "count" else value
        return {name: LayerMoments(**one) for name, one in sums.items()}

    def _runner(self, label: str, source: ModelSource, read: Any, batches: Mapping[Key, Batch]) -> BlockRunner:
        bf16 = self.options.bf16
        return open_runner(label, source.model_class, source.config, read, batches, self.cache, self.device, bf16)

    def _outputs_of(self, runner: BlockRunner, layers: Sequence[str]) -> dict[tuple[str, Key], CachedTensor]:
        """What the expert's layers give, by layer and batch."""
        outputs: dict[tuple[str, Key], CachedTensor] = {}

        def see(name: str, inputs: Tensor, output: Tensor) -> None:
            outputs[name, runner.running] = self.cache.put(output.float())

        with hooked(runner, layers, see):
            run_to_the_end(runner)
        return outputs

    def _moments(
        self,
        runner: BlockRunner,
        layers: Sequence[str],
        targets: Mapping[tuple[str, Key], CachedTensor],
        batches: Mapping[Key, Batch],
    ) -> dict[str, LayerMoments]:
        """The moments of the layers that read the merged model's features.

        A layer gives what the expert's gives, so that the layers behind it read what the expert's read: their errors vanish,
        and they stay as they are.
        """
        moments: dict[str, LayerMoments] = {}
        is_decoder = bool(runner.model.config.is_encoder_decoder)

        def see(name: str, inputs: Tensor, output: Tensor) -> Tensor | None:
            if (name, runner.running) not in targets:
                return None
            target = targets[name, runner.running].load(self.device)
            if name not in moments:
                moments[name] = LayerMoments.zeros(runner.model.get_submodule(name), sum_dtype(inputs))
            mask = batches[runner.running].token_mask(inputs.shape, is_decoder) if inputs.dim() == 3 else None
            rows, errors = inputs.flatten(0, -2), (target - output.float()).flatten(0, -2)
            chosen = slice(None) if mask is None else mask.to(inputs.device).flatten()
            moments[name].add(rows[chosen], errors[chosen])
            return target.to(output.dtype)

        with hooked(runner, layers, see):
            run_to_the_end(runner)
        return moments


class LazyParameters(Mapping[str, Tensor]):
    """Parameters that are read when they are asked for.

    Args:
        names (`Sequence[str]`): All of them.
        read (`Callable`): Gives one.
    """

    def __init__(self, names: Sequence[str], read: Callable[[str], Tensor]):
        self._names = dict.fromkeys(names)
        self._read = read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def with_fitted_head(plan: MergePlan, merged: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of the merged model, with the first expert's head as it was fitted."""
    head = plan.heads.get(plan.target.name)
    if head is None or head.values is None:
        return merged
    fitted = {name: head.values[name].to(head.outputs[name].dtype) for name in head.names if name in merged}
    return merged | fitted


def pooler_layers(plan: MergePlan) -> dict[str, list[str]]:
    """The linear layers of the backbone that belong to the readout, and that the recipe's method merges: their names in the merged
    model, and in each expert."""
    shell, known = plan.target.shell, plan.target.anatomy.parameters
    output = output_embeddings(shell)
    found = {}
    for parameter in plan.parameters:
        path, _, leaf = parameter.name.rpartition(".")
        is_pooler = parameter.kind is ParameterKind.HEAD and not known[parameter.name].is_task_head
        if leaf == "weight" and is_pooler and is_left_to_method(plan, parameter):
            owner = shell.get_submodule(path)
            if isinstance(owner, nn.Linear) and owner is not output:
                found[path] = [name.removesuffix(".weight") for name in parameter.experts]
    return found


def changed(values: Mapping[str, Tensor], layer: str, moments: LayerMoments, prior: float) -> dict[str, Tensor]:
    """The weight and bias of a layer, float32, with the fitted change."""
    weight, bias = f"{layer}.weight", f"{layer}.bias"
    change, shift = moments.solve(prior, bias in values)
    result = {weight: (values[weight].to(change) + change).float().cpu()}
    if bias in values:
        result[bias] = (values[bias].to(shift) + shift).float().cpu()
    return result
