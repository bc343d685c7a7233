"""Checkpoints on disk, read and written."""
