"""`python -m flux_jax.distill.compare`: see `flux_jax.cli.velocity_error`."""

import sys

from flux_jax.cli.velocity_error import main

if __name__ == "__main__":
    sys.exit(main())
