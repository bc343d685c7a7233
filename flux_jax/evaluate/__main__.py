"""`python -m flux_jax.evaluate`: see `flux_jax.cli.evaluate`."""

from flux_jax.cli.launch import launch

if __name__ == "__main__":
    launch("flux_jax.cli.evaluate")
