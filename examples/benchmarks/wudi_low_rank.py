"""Compares WUDI on the factors of adapters, in the space that they span, with WUDI on the matrices that they multiply out to.

    python wudi_low_rank.py --experts 5 --rank 16 --size 4096

Time is the processor's, of the solver alone, with one thread; the products B A are made before. It takes about a minute and 1.5 GB.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable


os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

import torch
from torch import Tensor

from hf_merge import WudiConfig
from hf_merge.methods.base import ParameterKind, TensorGroup
from hf_merge.methods.wudi import Wudi, merge_low_rank


SOLVERS = ("adaptive", "spectral", "closed_form")


def random_factors(experts: int, rank: int, size: int) -> list[tuple[Tensor, Tensor]]:
    """B_i (size, rank) and A_i (rank, size) in float64, whose product has the size of a fine-tune's task vector."""
    generator = torch.Generator().manual_seed(0)
    left = 1e-2 * torch.randn(experts, size, rank, generator=generator, dtype=torch.float64)
    right = 1e-2 * torch.randn(experts, rank, size, generator=generator, dtype=torch.float64)
    return list(zip(left, right, strict=True))


def merge_dense(vectors: list[Tensor], settings: WudiConfig) -> Tensor:
    names = tuple(f"expert{index}" for index in range(len(vectors)))
    base = torch.zeros((), dtype=torch.float64).expand_as(vectors[0])
    settings = settings.resolve("weight", 0.5, names)
    return Wudi()(TensorGroup("weight", ParameterKind.LINEAR, base, vectors, names, settings))


def timed(function: Callable) -> tuple[float, tuple[Tensor, Tensor] | Tensor]:
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=5)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--size", type=int, default=4096, help="Rows and columns of the layer.")
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=["adaptive"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    factors = random_factors(arguments.experts, arguments.rank, arguments.size)
    vectors = [b @ a for b, a in factors]
    merge_low_rank(random_factors(2, 4, 64), WudiConfig())  # warms the libraries
    for solver in arguments.solvers:
        settings = WudiConfig(solver=solver, check_norms=False)
        low, (left, right) = timed(lambda settings=settings: merge_low_rank(factors, settings))
        high, dense = timed(lambda settings=settings: merge_dense(vectors, settings))
        difference = torch.linalg.vector_norm(left @ right - dense) / torch.linalg.vector_norm(dense)
        sys.stdout.write(
            f"{solver:12s} factors {low:.3f} s, matrices {high:.1f} s: {high / low:.0f} x faster, "
            f"relative difference {difference.item():.1e}\n"
        )


if __name__ == "__main__":
    main()
