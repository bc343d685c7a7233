"""`python -m flux_jax.doctor`: see `flux_jax.cli.doctor`."""

from flux_jax.cli.launch import launch

if __name__ == "__main__":
    launch("flux_jax.cli.doctor")
