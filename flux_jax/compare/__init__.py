"""Two models side by side: `python -m flux_jax.compare A B` (see `flux_jax.cli.compare`)."""
