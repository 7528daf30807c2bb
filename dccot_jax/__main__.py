"""`python -m dccot_jax` is the console script `dccot`."""

from dccot_jax.cli import console

if __name__ == "__main__":
    console()
