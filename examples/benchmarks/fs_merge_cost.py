"""One training step of FS-Merge against one of plain distillation, and against the supernet of the paper that pushes
activations through all experts.

    python fs_merge_cost.py --experts 2 3 4
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from hf_merge.methods.backbone_base import BackboneGroup, Topology
from hf_merge.methods.fs_merge.supernet import Supernet
from hf_merge.methods.fs_merge.training import FoldedWeights
from hf_merge.modeling.topology import trace


class LiteralLinear(nn.Module):
    """Σ_i M_i (W_i U_i x + b_i) on activations, as the paper's code computes it.

    Args:
        supernet ([`Supernet`]): Gives the factors.
        name (`str`): The layer.
    """

    def __init__(self, supernet: Supernet, name: str):
        super().__init__()
        self.site = supernet.topology.linears[name]
        self.outputs, self.inputs = supernet.output(name), supernet.input(self.site.group)
        self.weights = [(expert[f"{name}.weight"], expert[f"{name}.bias"]) for expert in supernet.experts]

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        total = 0
        for (weight, bias), output, factor in zip(self.weights, self.outputs, self.inputs, strict=True):
            hidden = torch.addmm(bias, factor.left(rows.mT).mT, weight.mT)
            total = total + output.left(hidden.mT).mT
        return total.reshape(*x.shape[:-1], -1)


def median_seconds(step: Callable[[], None], repeats: int) -> float:
    step()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        step()
        times.append(time.process_time() - start)
    return sorted(times)[len(times) // 2]


class SavedBytes:
    """Bytes that autograd keeps for the backward pass, each storage once; parameters are left out."""

    def __init__(self, ignore: Sequence[Tensor]):
        self.ignore = {tensor.untyped_storage().data_ptr() for tensor in ignore}
        self.seen: dict[int, Tensor] = {}

    def measure(self, forward: Callable[[], Tensor]) -> int:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            loss = forward()
        total = sum(tensor.untyped_storage().nbytes() for tensor in self.seen.values())
        del loss
        return total

    def _pack(self, tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in self.ignore:
            self.seen[pointer] = tensor
        return tensor


def make_models(experts: int, layers: int, width: int) -> list[nn.Module]:
    config = ViTConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64, intermediate_size=4 * width,
        image_size=28, patch_size=7, num_channels=1,
    )  # fmt: skip
    return [ViTForImageClassification(config).eval().requires_grad_(False) for _ in range(experts)]


def literal_model(backbone: nn.Module, topology: Topology, supernet: Supernet) -> nn.Module:
    literal = copy.deepcopy(backbone).requires_grad_(False)
    for name in topology.linears:
        literal.set_submodule(name, LiteralLinear(supernet, name))
    return literal


def compare(experts: int, batch: int, layers: int, width: int, rank: int, repeats: int) -> Mapping[str, float]:
    models = make_models(experts, layers, width)
    topology = trace(models[0])
    weights = [{name: p.detach() for name, p in model.vit.named_parameters()} for model in models]
    shapes = {name: value.shape for name, value in weights[0].items()}
    student = copy.deepcopy(models[0].vit)
    supernet = Supernet(topology, weights, shapes, (1.0, *[0.0] * (experts - 1)), rank=rank)
    group = BackboneGroup(topology, student, weights, [], [], [], tuple(map(str, range(experts))), None)
    folded = FoldedWeights(group, supernet)
    literal = literal_model(student, topology, supernet)
    images = torch.randn(batch, 1, 28, 28)
    with torch.no_grad():
        targets = [model.vit(images).last_hidden_state for model in models]

    def loss_of(backbone: nn.Module, task: int) -> Tensor:
        return (backbone(images).last_hidden_state - targets[task]).square().mean()

    def distill(teach: bool = True) -> None:
        for task, model in enumerate(models):
            if teach:
                with torch.no_grad():
                    model.vit(images)
            loss_of(student, task).backward()

    def fold() -> None:
        folded.refresh()
        distill()
        folded.collect()

    def run_literal() -> None:
        for task, model in enumerate(models):
            with torch.no_grad():
                model.vit(images)
            loss_of(literal, task).backward()

    student.requires_grad_(True)
    seconds = {
        name: median_seconds(step, repeats)
        for name, step in (("kd", distill), ("fs_merge", fold), ("literal", run_literal))
    }
    folded.refresh()
    constant = [
        *student.parameters(),
        *supernet.parameters(),
        *(value for expert in weights for value in expert.values()),
    ]
    memory = {
        "fs_merge": SavedBytes(constant).measure(lambda: loss_of(student, 0)),
        "literal": SavedBytes(constant).measure(lambda: loss_of(literal, 0)),
    }
    return {
        "fs_merge / kd, time": seconds["fs_merge"] / seconds["kd"],
        "literal / fs_merge, time": seconds["literal"] / seconds["fs_merge"],
        "fs_merge / literal, activations": memory["fs_merge"] / memory["literal"],
        "kd, seconds": seconds["kd"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    for experts in args.experts:
        row = compare(experts, args.batch, args.layers, args.width, args.rank, args.repeats)
        print(f"{experts} experts: " + ", ".join(f"{name} {value:.2f}" for name, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
