"""Two models side by side: `python -m flux_jax.compare A B --prompts FILE` (see `flux_jax.compare.__main__`)."""
