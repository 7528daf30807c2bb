"""dccot_jax: data-centric chain-of-thought distillation in JAX/Flax."""

__version__ = "0.1.0"
