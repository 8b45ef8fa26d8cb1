"""WHAT a model is made of: its class, a shell without weights, the kinds of its parameters, backbone and heads, blocks."""
