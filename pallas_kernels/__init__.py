"""GPU kernels for FLUX, written in Pallas; jax and numpy only, and nothing from `flux_jax` or `convert`.

The package holds no kernel yet: the 2-bit weight layout and `ternary_matmul` are the next step, and belong here.
"""
