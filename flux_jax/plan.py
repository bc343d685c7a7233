"""`python -m flux_jax.plan`: see `flux_jax.cli.plan`."""

import sys

from flux_jax.cli.plan import main

if __name__ == "__main__":
    sys.exit(main())
