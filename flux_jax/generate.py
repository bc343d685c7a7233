"""`python -m flux_jax.generate`: see `flux_jax.cli.generate`."""

import sys

from flux_jax.cli.generate import main

if __name__ == "__main__":
    sys.exit(main())
