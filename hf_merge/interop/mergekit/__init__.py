"""mergekit recipes: read, checked key by key, and translated into one [`MergeConfig`].

A recipe of several documents becomes a recipe with recipes inside; slices of layers become experts that are made of slices.
What mergekit knows and has no effect is accepted with a warning; what mergekit does not know is an error.
"""

from .recipe import is_mergekit, translate


__all__ = ["is_mergekit", "translate"]
