"""How good the pictures are: `python -m flux_jax.evaluate nano` (see `flux_jax.evaluate.nano`)."""
