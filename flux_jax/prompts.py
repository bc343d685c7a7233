"""`python -m flux_jax.prompts`: see `flux_jax.cli.prompts`."""

from flux_jax.cli.launch import launch

if __name__ == "__main__":
    launch("flux_jax.cli.prompts")
