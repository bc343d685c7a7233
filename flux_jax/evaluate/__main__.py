"""`python -m flux_jax.evaluate`: see `flux_jax.cli.evaluate`."""

import sys

from flux_jax.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
