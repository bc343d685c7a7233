"""`python -m flux_jax.nano.train`: see `flux_jax.cli.nano`."""

import sys

from flux_jax.cli.nano import main

if __name__ == "__main__":
    sys.exit(main())
