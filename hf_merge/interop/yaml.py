"""YAML as people write it: numbers such as `1e-5` are numbers, which YAML 1.1 reads as text."""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml import YAMLError


__all__ = ["YAMLError", "load_documents"]


class _Loader(yaml.SafeLoader):
    """`yaml.SafeLoader` with the numbers of YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_documents(text: str) -> list[Any]:
    """The documents of a YAML file that are not empty. Only plain data are made of them.

    Raises:
        YAMLError: The text is not YAML.
    """
    return [document for document in yaml.load_all(text, Loader=_Loader) if document is not None]
