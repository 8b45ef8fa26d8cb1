"""Adapters: reading PEFT's adapters as task vectors of their base model, and writing merged ones."""
