"""The engine of mixtures of experts: streams the experts' MLPs and the merged rest from disk to disk.

Where routers are made from hidden states, the dense merge runs on the samples first, one block in memory at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from ..data.batching import Batch
from ..data.calibration import CalibrationData
from ..methods.mixture_base import MixtureMethod, RouterGroup
from ..methods.moe.config import OTHERS
from ..modeling.mixtures import routed_module
from ..registry import get_merge_method
from .adapters import tensor_engine
from .block_runner import BlockRunner, Key, hooked, open_runner, run_to_the_end
from .calibrated import task_model
from .mixture_plan import MixturePlan
from .options import EngineOptions
from .pipeline import Loaded
from .placement import Placement
from .plan import PlannedParameter
from .streaming import StreamingEngine, checked


class MixtureEngine(StreamingEngine):
    """Runs a plan of a [`MixtureMethod`].

    Args:
        plan ([`MixturePlan`]): A checked plan.
        placement ([`Placement`]): Where parameters are merged; the dense model runs on the device of `""`.
        data ([`CalibrationData`], *optional*): The samples of every expert, where the method needs some.
        options ([`EngineOptions`], *optional*): How to run the dense model.
    """

    def __init__(
        self,
        plan: MixturePlan,
        placement: Placement,
        data: CalibrationData | None = None,
        options: EngineOptions | None = None,
    ):
        super().__init__(plan, placement)
        self.options = options or EngineOptions()
        self.method: MixtureMethod = get_merge_method(plan.config.merge_type).method_cls()
        self.dense = tensor_engine(plan.shared, placement)
        self.dense.report = self.report
        self._dense_names = {parameter.name for parameter in plan.shared.parameters}
        self._data = data
        self._means: Mapping[str, Tensor] = {}

    @cached_property
    def identity(self) -> str:
        """The samples, where there are some, and the precision that they are run in."""
        if self._data is None:
            return ""
        content = [*(samples.fingerprint() for samples in self._samples), self.options.bf16, self.options.cache_dtype]
        return hashlib.sha256(repr(content).encode()).hexdigest()

    def place(self, placement: Placement) -> None:
        super().place(placement)
        self.dense.place(placement)

    # -- parameters -----------------------------------------------------------------------------------------------

    def read(self, parameter: PlannedParameter) -> Loaded:
        if parameter.action == "route":
            return Loaded([], None)
        if parameter.action != "stack":
            return self.dense.read(parameter)
        return Loaded([self._stacked(parameter)], None)

    @torch.no_grad()
    def finish(self, parameter: PlannedParameter, loaded: Loaded, rounded: bool = True) -> Tensor:
        if parameter.name in self._dense_names:
            return self.dense.finish(parameter, loaded, rounded)
        row = self._row(parameter)
        if parameter.action == "route":
            return self._router(parameter, row).to(parameter.info.dtype)
        row["norm"] = float(torch.linalg.vector_norm(loaded.experts[0].float()))
        return loaded.experts[0]

    def _stacked(self, parameter: PlannedParameter) -> Tensor:
        """The experts' weights in their places, read one at a time."""
        count = len(parameter.experts) // len(self.plan.experts)
        result = torch.empty(parameter.info.shape, dtype=parameter.info.dtype)
        for index, source in enumerate(self.plan.experts):
            names = parameter.experts[index * count : (index + 1) * count]
            for part, name in zip(result[index].chunk(count), names, strict=True):
                part.copy_(checked(name, source.read(name).to(result.dtype), source.name))
        return result

    def _router(self, parameter: PlannedParameter, row: dict) -> Tensor:
        count = len(self.plan.experts)
        means = self._means.get(routed_module(parameter.name))
        group = RouterGroup(
            name=parameter.name,
            shape=parameter.info.shape,
            expert_names=tuple(source.name for source in self.plan.experts),
            settings=self.plan.config,
            states=means[:count] if means is not None else None,
            negatives=self._negatives(means) if means is not None else None,
            seed=self.plan.config.seed,
        )
        router = self.method.router(group)
        row.update(group.report)
        return router

    def remarks(self) -> list[str]:
        return self.dense.remarks() + self.method.remarks()

    # -- hidden states --------------------------------------------------------------------------------------------

    def survey(self) -> None:
        """Shows the dense models to the recipe that merges them, and the samples to the merged dense model."""
        self.dense.survey()
        if self._data is not None:
            self._means = self._mean_inputs()

    @cached_property
    def _samples(self) -> list:
        """The samples of every expert, then those that a recipe names as negative."""
        models = [task_model(source) for source in self.plan.experts]
        prompts = self.plan.config.negative_prompts
        found = [self._data.load(models)]
        if isinstance(prompts, Mapping):
            chosen = [model for model in models if model.task in prompts]
            found.append(CalibrationData({model.task: prompts[model.task] for model in chosen}).load(chosen))
        return found

    def _mean_inputs(self) -> dict[str, Tensor]:
        """For each routed module the mean of what it reads on the samples of each expert, then on their negative prompts, (rows,
        hidden size): of real tokens for a sample, then of samples."""
        batch_size = self.plan.config.batch_size
        batches: dict[Key, Batch] = {}
        rows = [row for samples in self._samples for row in samples.batches(batch_size)]
        batches = {(row, index): batch for row, one in enumerate(rows) for index, batch in enumerate(one)}
        target, cache = self.plan.shared.target, self.options.open_cache()
        device = self.placement.device_of("")
        runner = open_runner(
            "the dense merge",
            target.model_class,
            target.config,
            self._dense_value,
            batches,
            cache,
            device,
            self.options.bf16,
        )
        try:
            sums = self._sums(runner, batches, len(rows))
        finally:
            cache.close()
        counts = torch.tensor([sum(batch.count for batch in one) for one in rows], dtype=torch.float64)
        return {path: (total / counts[:, None]).float() for path, total in sums.items()}

    def _sums(self, runner: BlockRunner, batches: Mapping[Key, Batch], rows: int) -> dict[str, Tensor]:
        paths = [path for p in self.plan.parameters if (path := routed_module(p.name)) is not None]
        width = self.plan.target.config.hidden_size
        sums = {path: torch.zeros(rows, width, dtype=torch.float64) for path in paths}

        def see(path: str, inputs: Tensor, output: Tensor) -> None:
            batch = batches[runner.running]
            mask = batch.token_mask(inputs.shape, decoder=False)
            weights = torch.ones(inputs.shape[:2]) if mask is None else mask.float()
            weights = (weights / weights.sum(-1, keepdim=True)).to(inputs)
            sums[path][runner.running[0]] += torch.einsum("sth,st->h", inputs, weights).double().cpu()

        with hooked(runner, paths, see):
            run_to_the_end(runner)
        return sums

    def _dense_value(self, name: str) -> Tensor | None:
        """An entry of the dense merge, as its own result would hold it."""
        target = self.plan.shared.target
        known = name if name in self._dense_names else target.tied_stand_in(name)
        return self.dense.merge_parameter(known, rounded=True) if known in self._dense_names else None

    def _negatives(self, means: Tensor) -> Tensor | None:
        count, prompts = len(self.plan.experts), self.plan.config.negative_prompts
        states = means[:count]
        if prompts == OTHERS:
            return (states.sum(0) - states) / (count - 1)
        if prompts is None:
            return None
        negatives = torch.zeros_like(states)
        chosen = [index for index, source in enumerate(self.plan.experts) if source.name in prompts]
        negatives[chosen] = means[count:]
        return negatives
