"""`python -m flux_jax NAME ...`: the script `flux-jax`, see `flux_jax.cli.main`."""

from flux_jax.cli.launch import launch

if __name__ == "__main__":
    launch("flux_jax.cli.main")
