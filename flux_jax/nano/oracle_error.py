"""`python -m flux_jax.nano.oracle_error`: see `flux_jax.cli.oracle_error`."""

import sys

from flux_jax.cli.oracle_error import main

if __name__ == "__main__":
    sys.exit(main())
