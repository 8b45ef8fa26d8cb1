"""Recipes of other tools, translated into hf_merge's."""
