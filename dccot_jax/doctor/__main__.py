"""`python -m dccot_jax.doctor` is `dccot doctor`."""

import sys

from dccot_jax.cli import main

sys.exit(main(["doctor", *sys.argv[1:]]))
