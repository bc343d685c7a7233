"""`python -m flux_jax.generate`: see `flux_jax.cli.generate`."""

from flux_jax.cli.launch import launch

if __name__ == "__main__":
    launch("flux_jax.cli.generate")
