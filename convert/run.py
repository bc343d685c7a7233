"""Converts a model weight by weight into a checkpoint that appears whole or not at all.

In: a `Model` (paths, configs), a name for the checkpoint, a dtype. Out: the checkpoint. Everything that headers can
show is checked before the first weight is read, and reported at once. Memory: the largest source tensor, in the
source's dtype and in the target's, plus `flux_jax.checkpoint.FLUSH_BYTES` and fixed overhead.
"""

import hashlib
import math
import shutil
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from convert.engine import Plan, make_plan, read_weight, report
from convert.reader import Source
from convert.sources import Model
from flux_jax.checkpoint import TOKENIZERS, Writer
from flux_jax.errors import UserError
from flux_jax.tokenizers import Tokenizers, ensure_tokenizer_json

MARGIN = 1.01  # of disk space beyond the weights, for the files around them
HASH_BLOCK = 2**22


def convert(
    model: Model, out: Path, *, dtype: Any = jnp.bfloat16, overwrite: bool = False, quiet: bool = False
) -> list[str]:
    """Writes the checkpoint `out`; returns warnings (weights with NaN or infinity). UserError with all faults."""
    sources = {part: Source.from_path(path) for part, path in model.paths.items()}
    plans = {part: make_plan(part, model.config, source) for part, source in sources.items()}
    if faults := [f"{part}: {fault}" for part, plan in plans.items() for fault in plan.faults]:
        raise report(faults, f"{model.origin} cannot be converted")
    total = (
        sum(math.prod(w.shape) for plan in plans.values() for w in plan.weights.values()) * jnp.dtype(dtype).itemsize
    )
    with Writer(out, overwrite=overwrite) as writer:
        _check_space(out, total)
        tokenizers = _tokenizers(model, writer.working / TOKENIZERS)
        hashes = Hashes(file for source in sources.values() for file in source.files)
        warnings = []
        with _progress(total, quiet) as bar:
            for part, plan in plans.items():
                bar.set_description(part)
                for value, warning in _weights(plan, sources[part], dtype):
                    writer.add(part, *value)
                    warnings += [f"{part}: {warning}"] if warning else []
                    bar.update(value[1].nbytes)
            bar.set_description("hashing")
            sha256 = hashes.result()
        names = {file: _relative(file, model) for file in sha256}
        writer.finish(
            model.config,
            tokenizers=tokenizers,
            source={"from": model.origin, "sha256": {names[file]: digest for file, digest in sha256.items()}},
            licence=model.licence,
            files=model.licence_files,
        )
    return warnings


def _weights(plan: Plan, source: Source, dtype: Any) -> Iterable[tuple[tuple[str, np.ndarray], str | None]]:
    for path, weight in plan.weights.items():
        value = read_weight(source, weight, dtype)
        yield (
            (path, value),
            None if finite(value) else f"NaN or infinity in {path} ({', '.join(p.name for p in weight.pieces)})",
        )


def finite(x: np.ndarray) -> bool:
    """Whether all values are finite; numpy alone would make a float32 copy of a bfloat16 array to say so."""
    if x.dtype.itemsize != 2:
        return bool(np.isfinite(x).all())
    exponent = 0x7C00 if x.dtype == np.float16 else 0x7F80
    bits = x.reshape(-1).view(np.uint16)
    return all(((block & exponent) != exponent).all() for block in np.array_split(bits, max(1, bits.size >> 22)))


def _check_space(out: Path, total: int) -> None:
    free = shutil.disk_usage(out.absolute().parent).free
    if total * MARGIN > free:
        raise UserError(
            f"the disk of {out} is too full: {total * MARGIN / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free"
        )


def _tokenizers(model: Model, folder: Path) -> Path | None:
    if not model.tokenizers:
        return None
    for part, source in model.tokenizers.items():
        ensure_tokenizer_json(source, folder / part)
    if {"t5", "clip"} <= model.paths.keys():
        Tokenizers.load(folder, model.config)  # do they belong to these text encoders?
    return folder


def _relative(file: Path, model: Model) -> str:
    """The file's name in the record: with its folder's, so that shards of two parts differ."""
    parent = next((p for p in model.paths.values() if p == file.parent), None)
    return file.name if parent is None else f"{parent.name}/{file.name}"


def _progress(total: int, quiet: bool):
    from tqdm import tqdm

    return tqdm(total=total, unit="B", unit_scale=True, file=sys.stderr, disable=quiet, dynamic_ncols=True)


class Hashes:
    """SHA-256 of files, taken by a thread while the converter works on the same files."""

    def __init__(self, files: Iterable[Path]):
        self._files = list(files)
        self._digests: dict[Path, str] = {}
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def result(self) -> dict[Path, str]:
        """File -> hexadecimal digest; waits for the thread. Raises what reading raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._digests

    def _run(self) -> None:
        try:
            for file in self._files:
                digest = hashlib.sha256()
                with open(file, "rb", buffering=0) as f:
                    while block := f.read(HASH_BLOCK):
                        digest.update(block)
                self._digests[file] = digest.hexdigest()
        except OSError as error:
            self._error = error
