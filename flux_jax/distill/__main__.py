"""`python -m flux_jax.distill`: see `flux_jax.cli.distill`."""

from flux_jax.cli.launch import launch

if __name__ == "__main__":
    launch("flux_jax.cli.distill")
