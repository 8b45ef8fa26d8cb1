"""What every test shares: no network, one thread, quiet libraries, and upstream deprecations as errors."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_MERGE_CACHE"] = tempfile.mkdtemp(prefix="hf_merge_cache_")  # of processes that tests start

import pytest
import torch
import transformers


class DeprecationsAreErrors(logging.Handler):
    """transformers logs most deprecations instead of warning: a message about one fails the test that caused it."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecated" in message.lower():
            pytest.fail(f"Deprecated use of transformers: {message}")


def pytest_configure(config: pytest.Config) -> None:
    transformers.logging.set_verbosity_warning()
    transformers.logging.disable_default_handler()
    transformers.logging.add_handler(DeprecationsAreErrors())
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HF_MERGE_CACHE"], ignore_errors=True)
