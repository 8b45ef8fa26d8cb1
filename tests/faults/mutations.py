"""Damaged and hostile variants of valid files: bytes are changed, and values, keys and branches of what JSON and YAML files say."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from random import Random
from typing import Any

import yaml


INTERESTING_BYTES = [
    b"\0",
    b"\xff",
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"-",
    b"9",
    b"e",
    b"\\",
    b"\\ud800",
    b"../",
]
INTERESTING_KEYS = ["", "../x", "merge_type", "model", "gradient", "filter", 1, None, True]
INTERESTING_VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    -(2**63),
    10**400,
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    " ",
    "x",
    "base",
    "linear",
    "..",
    "../../outside",
    "/etc/hostname",
    "C:\\outside",
    "a/b/../../c",
    "\0",
    "\ud800",
    "(",
    "(a+)+$",
    "%s%n",
    "{{ self.__init__.__globals__ }}",
    "os.system",
    [],
    {},
    [[]],
    [None],
    [{}],
    {"": 0},
    {"gradient": []},
    {"gradient": [0, 1]},
    {"model": "../outside"},
    {"model": None},
    {"merge": {}},
    {"slices": []},
    ["x"] * 3,
]


def mutated_bytes(draw: Random, data: bytes) -> bytes:
    """`data` after one to four changes: bits, bytes, pieces inserted, removed, repeated, or the end cut off."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        if not changed:
            break
        position, length = draw.randrange(len(changed)), draw.randint(1, 16)
        match draw.randrange(6):
            case 0:
                changed[position] ^= 1 << draw.randrange(8)
            case 1:
                changed[position : position + 1] = draw.choice(INTERESTING_BYTES)
            case 2:
                changed[position:position] = draw.choice(INTERESTING_BYTES)
            case 3:
                del changed[position : position + length]
            case 4:
                changed[position:position] = changed[position : position + length]
            case 5:
                del changed[position:]
    return bytes(changed)


def mutated_tree(draw: Random, tree: Any) -> Any:
    """What a JSON or YAML file says after one to three changes of a value, a key or a branch."""
    tree = copy.deepcopy(tree)
    for _ in range(draw.randint(1, 3)):
        places = list(_places(tree))
        if not places:
            return draw.choice(INTERESTING_VALUES)
        owner, key = draw.choice(places)
        match draw.randrange(6):
            case 0 | 1:
                owner[key] = copy.deepcopy(draw.choice(INTERESTING_VALUES))
            case 2:
                del owner[key]
            case 3:
                other, other_key = draw.choice(places)
                owner[key] = copy.deepcopy(other[other_key])
            case 4 if isinstance(owner, dict):
                owner[draw.choice([f"{key}s", str(key).upper(), *INTERESTING_KEYS])] = owner.pop(key)
            case 4:
                owner.insert(key, copy.deepcopy(draw.choice(INTERESTING_VALUES)))
            case 5:
                owner[key] = [owner[key]] if draw.random() < 0.5 else {"x": owner[key]}
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every container with every key or index in it."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield tree, key
        yield from _places(value)


def mutated_json(draw: Random, data: bytes) -> bytes:
    """A JSON file after changes of its bytes or of what it says."""
    if draw.random() < 0.4:
        return mutated_bytes(draw, data)
    return json.dumps(mutated_tree(draw, json.loads(data))).encode()


def mutated_yaml(draw: Random, data: bytes) -> bytes:
    """The same for YAML, with documents between `---`."""
    if draw.random() < 0.4:
        return mutated_bytes(draw, data)
    documents = list(yaml.safe_load_all(data))
    index = draw.randrange(len(documents))
    documents[index] = mutated_tree(draw, documents[index])
    return yaml.safe_dump_all(documents).encode("utf-8", "surrogatepass")
