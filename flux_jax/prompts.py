"""`python -m flux_jax.prompts`: see `flux_jax.cli.prompts`."""

import sys

from flux_jax.cli.prompts import main

if __name__ == "__main__":
    sys.exit(main())
