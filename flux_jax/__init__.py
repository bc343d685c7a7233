"""1.58-bit FLUX in JAX."""
