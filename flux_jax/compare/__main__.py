"""`python -m flux_jax.compare`: see `flux_jax.cli.compare`."""

from flux_jax.cli.launch import launch

if __name__ == "__main__":
    launch("flux_jax.cli.compare")
