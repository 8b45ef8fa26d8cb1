"""`python -m hf_merge` is `hf-merge`."""

from .cli import console


console()
