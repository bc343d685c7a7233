"""`python -m flux_jax.compare`: see `flux_jax.cli.compare`."""

import sys

from flux_jax.cli.compare import main

if __name__ == "__main__":
    sys.exit(main())
