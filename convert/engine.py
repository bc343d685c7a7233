"""From published names to our weights: a plan with every fault in it, then one weight at a time.

In: a `Source` of tensors in any known format, a component's name, a `FluxConfig`. Out: `WeightMap`, which says for each
of our weights the tensors that make it, and `read_weight`, which builds one. Coverage is an error both ways: every
tensor of the source is used or on a list of ignored names, every weight of the component is filled once, shapes and
dtypes fit; one report has all faults.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from convert.rules import FORMATS, Format, Rule
from flux_jax.config import FluxConfig
from flux_jax.errors import UserError, shortened
from flux_jax.io.safetensors import FLOATS, Source
from flux_jax.models.params import abstract_component, leaf_of, leaf_table

SHOWN = 40  # faults printed before "and N more"
KEPT = tuple(map(np.dtype, (ml_dtypes.bfloat16, np.float16, np.float32)))  # what floating weights are stored as


@dataclass(frozen=True)
class Piece:
    """One source tensor and the rows of our weight that it fills."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Weight:
    """One of our weights (outside name, one layer): its shape and its pieces in order of rows."""

    path: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    change: str | None


@dataclass(frozen=True)
class WeightMap:
    """How a source becomes a component. `faults` is empty when it can be carried out."""

    component: str
    format: Format
    weights: dict[str, Weight]
    faults: list[str]


def conversion_error(faults: Iterable[str], what: str) -> UserError:
    """One error with all faults, exit code 2."""
    faults = list(faults)
    lines = [f"  - {fault}" for fault in faults[:SHOWN]]
    if len(faults) > SHOWN:
        lines.append(f"  - and {len(faults) - SHOWN} more")
    return UserError(f"{what}: {len(faults)} fault{'s' if len(faults) != 1 else ''}\n" + "\n".join(lines))


def detect(component: str, names: Iterable[str]) -> Format | None:
    """The format whose mark is found in one of the names."""
    names = list(names)
    return next((f for f in FORMATS[component] if any(re.search(f.mark, name) for name in names)), None)


def expected(component: str, fmt: Format, config: FluxConfig, table: dict[str, tuple[int, ...]]) -> dict[str, Weight]:
    """Each weight of the component with the tensors that hold it in `fmt`. Raises KeyError if the rules miss one of our
    weights.
    """
    rules = [(re.compile(re.escape(r.target).replace(r"\*", r"(\d+)") + r"\.(weight|bias)"), r) for r in fmt.rules]
    weights = {}
    for path, shape in table.items():
        match, rule = next(((m, r) for pattern, r in rules if (m := pattern.fullmatch(path))), (None, None))
        if match is None or rule is None:
            raise KeyError(f"no rule of {fmt.name} for {path}")
        *numbers, kind = match.groups()
        names = [_source_name(s, numbers, rule, kind, len(config.vae.channels)) for s in rule.sources]
        weights[path] = Weight(path, shape, _pieces(names, shape, rule, kind), rule.change)
    return weights


def _source_name(template: str, numbers: list[str], rule: Rule, kind: str, levels: int) -> str:
    left = list(numbers)
    filled = re.sub(r"[*~]", lambda m: left.pop(0) if m[0] == "*" else str(levels - 1 - int(left.pop(0))), template)
    return filled + (rule.suffix or f".{kind}")


def _pieces(names: list[str], shape: tuple[int, ...], rule: Rule, kind: str) -> tuple[Piece, ...]:
    pieces, total, start = [], sum(rule.shares), 0
    for name, share in zip(names, rule.shares, strict=True):
        stop = start + shape[0] * share // total
        source_shape = (stop - start, *shape[1:])
        if rule.change == "squeeze" and kind == "weight":
            source_shape = (*source_shape, 1, 1)
        pieces.append(Piece(name, source_shape, start, stop))
        start = stop
    return tuple(pieces)


def map_weights(component: str, config: FluxConfig, source: Source) -> WeightMap:
    """Compares the source's names, shapes and dtypes with what the component needs; reads headers only."""
    fmt = detect(component, source.entries)
    if fmt is None:
        known = ", ".join(f.name for f in FORMATS[component])
        unknown = f"{source.where}: holds no weights of the {component} in a known format ({known})"
        return WeightMap(component, FORMATS[component][0], {}, source.faults or [unknown])
    weights = expected(component, fmt, config, leaf_table(abstract_component(component, config)))
    renamed, faults = _normal_names(source, fmt)
    needed = {piece.name: piece.shape for weight in weights.values() for piece in weight.pieces}
    odd: dict[str, list[str]] = {}  # dtype -> names
    for name, shape in needed.items():
        if name not in renamed:
            if not source.faults:  # a lost shard has its own line; its tensors need none
                faults.append(f"missing: {name} {list(shape)}")
            continue
        entry = source.entries[renamed[name]]
        if entry.shape != shape:
            faults.append(f"wrong shape: {renamed[name]} is {shortened(list(entry.shape))}, must be {list(shape)}")
        if entry.dtype not in FLOATS:
            odd.setdefault(entry.dtype, []).append(renamed[name])
    for dtype, names in odd.items():
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        faults.append(f"wrong dtype: {names[0]}{more} is {dtype}, must be one of {', '.join(FLOATS)}")
    faults += [
        f"unknown: {renamed[name]} {shortened(list(source.entries[renamed[name]].shape))}"
        for name in renamed
        if name not in needed
    ]
    located = {path: _located(weight, renamed) for path, weight in weights.items()}
    return WeightMap(component, fmt, located, source.faults + faults)


def _located(weight: Weight, renamed: dict[str, str]) -> Weight:
    pieces = tuple(Piece(renamed.get(p.name, p.name), p.shape, p.start, p.stop) for p in weight.pieces)
    return Weight(weight.path, weight.shape, pieces, weight.change)


def _normal_names(source: Source, fmt: Format) -> tuple[dict[str, str], list[str]]:
    """Name in the rules -> name in the file: prefix taken off, second names resolved, ignored names left out."""
    prefix = next((p for p in fmt.prefixes if p and any(n.startswith(p) for n in source.entries)), "")
    renamed: dict[str, str] = {}
    faults = []
    for name in source.entries:
        if not any(re.fullmatch(pattern, name) for pattern in fmt.ignored):
            first = renamed.setdefault(name.removeprefix(prefix), name)
            if first != name:
                faults.append(f"{first} and {name} are one weight, and both are there")
    for alias, name in fmt.aliases:
        if alias in renamed:
            second = renamed.pop(alias)
            first = renamed.setdefault(name, second)
            if source.entries[first].shape != source.entries[second].shape:
                faults.append(f"{first} and {second} must be the same tensor, but their shapes differ")
    return renamed, faults


def stored_as(source: Source, weight: Weight) -> list[np.dtype]:
    """The dtype of each of its pieces in the files."""
    return [np.dtype(FLOATS[source.entries[piece.name].dtype]) for piece in weight.pieces]


def kept_as(stored: Iterable[np.dtype]) -> np.dtype:
    """The dtype that keeps what pieces hold: the first of bfloat16, float16 and float32 that does, and float32 where
    none does, for float64."""
    return next((dtype for dtype in KEPT if all(exact(each, dtype) for each in stored)), KEPT[-1])


def exact(stored: np.dtype, dtype: np.dtype) -> bool:
    """Whether each finite number of the one floating dtype is one of the other."""
    a, b = ml_dtypes.finfo(stored), ml_dtypes.finfo(dtype)
    within = float(a.max) <= float(b.max) and float(a.smallest_subnormal) >= float(b.smallest_subnormal)
    return within and a.nmant <= b.nmant


def own_dtypes(source: Source, weights: Mapping[str, Weight]) -> dict[str, np.dtype]:
    """The dtype in which each weight keeps what its pieces hold, the same for all layers of a kind: the program stacks
    them."""
    pieces: dict[str, list[np.dtype]] = {}
    for path, weight in weights.items():
        pieces.setdefault(leaf_of(path), []).extend(stored_as(source, weight))
    own = {leaf: kept_as(set(stored)) for leaf, stored in pieces.items()}
    return {path: own[leaf_of(path)] for path in weights}


def read_weight(source: Source, weight: Weight, dtype: Any) -> np.ndarray:
    """One weight in `dtype`, its pieces read one after the other. The caller has checked the plan."""
    stored = stored_as(source, weight)
    out = np.empty(weight.shape, dtype)
    for piece, found in zip(weight.pieces, stored, strict=True):
        rows = out[piece.start : piece.stop]
        value = source.read(piece.name, rows if found == dtype else None)
        if value is not rows:
            with np.errstate(over="ignore"):  # infinity, which the caller looks for
                rows[...] = value.reshape(rows.shape)
    if weight.change == "swap":
        out = np.concatenate(np.split(out, 2)[::-1])
    return out
