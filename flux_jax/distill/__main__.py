"""`python -m flux_jax.distill`: see `flux_jax.cli.distill`."""

import sys

from flux_jax.cli.distill import main

if __name__ == "__main__":
    sys.exit(main())
