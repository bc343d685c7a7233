"""`python -m flux_jax NAME ...`: the script `flux-jax`, see `flux_jax.cli.main`."""

import sys

from flux_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
