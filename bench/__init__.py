"""Measurements: `python -m bench.NAME`, from a clone. Each prints a table and, as its last line, one JSON object."""
