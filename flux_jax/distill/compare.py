"""`python -m flux_jax.distill.compare`: see `flux_jax.cli.velocity_error`."""

from flux_jax.cli.launch import launch

if __name__ == "__main__":
    launch("flux_jax.cli.velocity_error")
