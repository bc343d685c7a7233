"""Converts a model weight by weight into a checkpoint that appears whole or not at all.

In: a `Model` (paths, configs) or a checkpoint, a name for the new checkpoint, the `WeightFormat` of its weights. Out:
the checkpoint. Everything that headers can show is checked before the first weight is read, and reported at once.
Memory: the largest source tensor, in the source's dtype and in the target's, what `flux_jax.checkpoints.orbax_writer`
holds, for a checkpoint what is read of it at a time, and fixed overhead.
"""

import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import numpy as np

from convert.engine import WeightMap, conversion_error, exact, kept_as, map_weights, own_dtypes, read_weight, stored_as
from convert.sources import Model, licence_files
from convert.tokenizers import ensure_tokenizer_json
from convert.weight_format import WeightFormat
from flux_jax.checkpoints.checkpoint import Checkpoint
from flux_jax.checkpoints.checksums import digest
from flux_jax.checkpoints.manifest import MANIFEST, TOKENIZERS
from flux_jax.checkpoints.tokenizers import Tokenizers
from flux_jax.checkpoints.writer import CheckpointWriter
from flux_jax.errors import UserError, printable
from flux_jax.io.places import check_space
from flux_jax.io.safetensors import Source

MARGIN = 1.01  # of disk space beyond the weights, for the files around them
AS_STORED = WeightFormat()
T = TypeVar("T")
Table = Mapping[str, tuple[np.dtype, tuple[int, ...]]]  # name of a weight -> its own dtype, its shape


def convert(
    model: Model, out: Path, *, form: WeightFormat = AS_STORED, overwrite: bool = False, quiet: bool = False
) -> list[str]:
    """Writes the checkpoint `out`; returns warnings (what was rounded, weights with NaN or infinity, the model's
    notes). UserError with all faults."""
    plans = {component: map_weights(component, model.config, source) for component, source in model.sources.items()}
    if faults := [f"{component}: {fault}" for component, plan in plans.items() for fault in plan.faults]:
        raise conversion_error(faults, f"{model.origin} cannot be converted")
    stored = {
        component: {path: stored_as(model.sources[component], weight) for path, weight in plan.weights.items()}
        for component, plan in plans.items()
    }
    tables = {}
    for component, plan in plans.items():
        own = own_dtypes(model.sources[component], plan.weights)
        tables[component] = {path: (own[path], weight.shape) for path, weight in plan.weights.items()}
    total = _size(tables, form)
    with CheckpointWriter(out, overwrite=overwrite) as writer:
        check_space(out, int(MARGIN * total))
        tokenizers = _tokenizers(model, writer.working / TOKENIZERS)
        hashes = in_background(lambda: {name: digest(file) for name, file in _recorded(model).items()})
        warnings = [*model.notes, *_narrowed(stored, tables, form)]
        with _progress(total, quiet) as bar:
            for component, plan in plans.items():
                warnings += _write(
                    writer, component, _weights(plan, model.sources[component], tables[component], form), form, bar
                )
            bar.set_description("hashing")
            sha256 = hashes.result()
        writer.finish(
            model.config,
            tokenizers=tokenizers,
            quantization=form.quantization,
            source={"from": model.origin, "sha256": sha256},
            licence=model.licence,
            files=model.licence_files,
        )
    return warnings


def rewrite(
    name: str,
    out: Path,
    *,
    form: WeightFormat,
    components: Iterable[str] | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> list[str]:
    """The checkpoint `name` (a path or an alias) once more, its weights in another form. As `convert`; UserError where
    it is ternary already."""
    stored = Checkpoint.open(name)
    if stored.quantization is not None:
        raise UserError(f"{stored.directory} has ternary weights already")
    tables = {component: stored.table(component) for component in components or stored.components}
    if "transformer" not in tables:
        raise UserError(f"{stored.directory} has no transformer to round")
    kinds = {component: {n: [dtype] for n, (dtype, _) in table.items()} for component, table in tables.items()}
    warnings = _narrowed(kinds, tables, form)
    files = licence_files(stored.directory, warnings)
    total = _size(tables, form)
    with CheckpointWriter(out, overwrite=overwrite) as writer:
        check_space(out, int(MARGIN * total))
        with _progress(total, quiet) as bar:
            for component, table in tables.items():
                weights = ((n, value, stored.directory.name) for n, value in stored.stream(component, table))
                warnings += _write(writer, component, weights, form, bar)
        writer.finish(
            stored.config,
            tokenizers=None if stored.manifest["tokenizers"] is None else stored.tokenizers,
            quantization=form.quantization,
            source={"from": stored.directory.name, "sha256": {MANIFEST: stored.digest}},
            licence=stored.manifest.get("licence"),
            files=files,
        )
    return warnings


def _size(tables: Mapping[str, Table], form: WeightFormat) -> int:
    return sum(form.nbytes(name, *row) for table in tables.values() for name, row in table.items())


def _narrowed(
    stored: Mapping[str, Mapping[str, list[np.dtype]]],
    tables: Mapping[str, Table],
    form: WeightFormat,
) -> list[str]:
    """A line for each pair of dtypes where weights lose digits or range; those that become ternary do so anyway."""
    lost: dict[tuple[np.dtype, np.dtype], dict[str, None]] = {}
    for component, weights in stored.items():
        for name, pieces in weights.items():
            dtype = form.stored(tables[component][name][0])
            for each in pieces:
                if not form.rounds(name) and not exact(each, dtype):
                    lost.setdefault((each, dtype), {})[component] = None
    lines = []
    for (was, now), components in lost.items():
        best = kept_as([was])
        keeps = f"; --dtype {best.name} keeps {'them' if exact(was, best) else 'more of them'}" if best != now else ""
        lines.append(f"{', '.join(components)}: weights stored as {was.name} were rounded to {now.name}{keeps}")
    return lines


def _weights(
    plan: WeightMap, source: Source, table: Table, form: WeightFormat
) -> Iterable[tuple[str, np.ndarray, str]]:
    """Name, value, names in the source; what is to be rounded keeps the source's precision until then."""
    for path, weight in plan.weights.items():
        own = table[path][0]
        value = read_weight(source, weight, own if form.rounds(path) else form.stored(own))
        yield path, value, ", ".join(piece.name for piece in weight.pieces)


def _write(
    writer: CheckpointWriter, component: str, weights: Iterable[tuple[str, np.ndarray, str]], form: WeightFormat, bar
) -> list[str]:
    """Adds a component to the checkpoint; returns its warnings."""
    warnings = []
    bar.set_description(component)
    for name, value, origin in weights:
        if not finite(value):
            if form.rounds(name):
                raise UserError(f"NaN or infinity in {name} ({origin}), which cannot be rounded to ternary")
            beyond = ", perhaps for a number beyond 65504, float16's largest" if value.dtype == np.float16 else ""
            warnings.append(f"{component}: NaN or infinity in {name} ({origin}){beyond}")
        for stored, array in form.arrays(name, value):
            writer.add(component, stored, array)
            bar.update(array.nbytes)
    return warnings


def finite(x: np.ndarray) -> bool:
    """Whether all values are finite; numpy alone would make a float32 copy of a bfloat16 array to say so."""
    if x.dtype.itemsize != 2:
        return bool(np.isfinite(x).all())
    exponent = 0x7C00 if x.dtype == np.float16 else 0x7F80
    bits = x.reshape(-1).view(np.uint16)
    return all(((block & exponent) != exponent).all() for block in np.array_split(bits, max(1, bits.size >> 22)))


def _tokenizers(model: Model, folder: Path) -> Path | None:
    if not model.tokenizers:
        return None
    for component, source in model.tokenizers.items():
        ensure_tokenizer_json(source, folder / component)
    if {"t5", "clip"} <= model.sources.keys():
        Tokenizers.load(folder, model.config)  # do they belong to these text encoders?
    return folder


def _recorded(model: Model) -> dict[str, Path]:
    """Each file of weights by its name in the record: with its folder's where that is the component's, and with the
    component's where two files would have one name."""
    found: dict[str, Path] = {}
    for component, source in model.sources.items():
        folder = Path(source.where)
        for file in source.files:
            name = printable(f"{folder.name}/{file.name}" if file.parent == folder else file.name)
            if found.setdefault(name, file) != file:
                found[f"{component}/{name}"] = file
    return found


def _progress(total: int, quiet: bool):
    from tqdm import tqdm

    return tqdm(total=total, unit="B", unit_scale=True, file=sys.stderr, disable=quiet, dynamic_ncols=True)


def in_background(function: Callable[[], T]) -> "Future[T]":
    """What the function returns or raises, computed by a thread while the converter works. Unlike an executor's thread
    it ends with the program: whoever interrupts does not wait until 24 GB are hashed."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
