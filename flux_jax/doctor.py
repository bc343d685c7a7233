"""`python -m flux_jax.doctor`: see `flux_jax.cli.doctor`."""

import sys

from flux_jax.cli.doctor import main

if __name__ == "__main__":
    sys.exit(main())
