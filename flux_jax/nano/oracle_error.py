"""`python -m flux_jax.nano.oracle_error`: see `flux_jax.cli.oracle_error`."""

from flux_jax.cli.launch import launch

if __name__ == "__main__":
    launch("flux_jax.cli.oracle_error")
