"""Published FLUX weights to checkpoints and back: `python -m convert SOURCE OUT`."""
