"""`python -m flux_jax.nano.train`: see `flux_jax.cli.nano`."""

from flux_jax.cli.launch import launch

if __name__ == "__main__":
    launch("flux_jax.cli.nano")
