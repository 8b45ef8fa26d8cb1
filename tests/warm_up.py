"""Imported by the server that starts processes for tests: what every merge in a fresh process would do first is done once, there."""

from __future__ import annotations

import pydantic.type_adapter  # noqa: F401  typer's, at its first command
import torch

from hf_merge import cli, merger  # noqa: F401
from hf_merge.checkpoints.conversion import Converter
from hf_merge.modeling.shell import build_shell

from .zoo import ZOO


torch.set_num_threads(1)
for family in ("llama", "bert"):
    model = ZOO[family].build()
    Converter(build_shell(type(model), model.config, torch.float32), None)
