"""Attention backends: one meaning, several kernels; see `registry`."""
