"""The side of transformers' training loop: arguments, callbacks and their state."""
