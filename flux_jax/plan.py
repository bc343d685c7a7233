"""`python -m flux_jax.plan`: see `flux_jax.cli.plan`."""

from flux_jax.cli.launch import launch

if __name__ == "__main__":
    launch("flux_jax.cli.plan")
