"""Calibration samples and the activations that they make."""
