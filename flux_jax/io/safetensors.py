"""Reads and writes safetensors files, one tensor at a time.

In: files of published weights. Out: `Source`: for each tensor its dtype and shape (from the headers, nothing else is
read), and the tensor itself on request as an owned numpy array. Files are read, not mapped as the library `safetensors`
does: mapped pages would count as memory of this process, and the converter promises a bound on that. What is wrong with
the files (missing shard, truncated file, damaged header) is collected in `faults`, so that one report can name
everything; a header that the library refuses is refused here, too. The other way, `file_header` is what stands before
the tensors of a file that is written.
Format: https://huggingface.co/docs/safetensors (8 bytes of little-endian header length, JSON header, data).
"""

import contextlib
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from flux_jax.errors import UserError, shortened
from flux_jax.io import reading

FLOATS = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
BITS = {  # of every dtype that the format knows
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16"), 16),
    **dict.fromkeys(("I32", "U32"), 32),
    **dict.fromkeys(("I64", "U64", "C64"), 64),
    **{name: 8 * np.dtype(kind).itemsize for name, kind in FLOATS.items()},
}
MAX_HEADER = 100_000_000  # the format's own limit
MOST_AXES, MOST_ELEMENTS = 64, 2**56  # of what numpy can hold
AGAIN = "copy or download it again"


@dataclass(frozen=True)
class Entry:
    """One tensor: dtype as safetensors names it, shape, where its bytes lie."""

    dtype: str
    shape: tuple[int, ...]
    file: Path | None = None
    offset: int = 0


@dataclass
class Source:
    """The tensors of one part by name, the files they come from, and what is wrong with those files. `notes`: what
    whoever converts them should know."""

    where: str
    entries: dict[str, Entry] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def read(self, name: str, out: np.ndarray | None = None) -> np.ndarray:
        """The tensor in its stored floating dtype. out: a contiguous array of that dtype and size to read it into, if
        it lies in a file; then that is returned. Raises UserError where the file ends early or cannot be read."""
        entry = self.entries[name]
        assert entry.file is not None
        out = np.empty(entry.shape, FLOATS[entry.dtype]) if out is None else out
        with opened(entry.file) as file:
            file.seek(entry.offset)
            view, done = memoryview(out.reshape(-1).view(np.uint8)), 0
            while done < len(view):
                got = file.readinto(view[done:])
                if not got:
                    raise UserError(f"{entry.file} ends inside tensor {name}: {AGAIN}")
                done += got
        return out

    @classmethod
    def of(cls, where: Path, files: Iterable[Path]) -> "Source":
        """The tensors of these files together."""
        source = cls(str(where))
        for file in files:
            source.files.append(file)
            try:
                entries = read_header(file)
            except UserError as error:
                source.faults.append(str(error))
                continue
            twice = sorted(entries.keys() & source.entries.keys())
            source.faults += [f"{file}: {shortened(name, 100, quote=False)} is also in another shard" for name in twice]
            source.entries |= entries
        return source

    @classmethod
    def of_index(cls, where: Path, index: Path) -> "Source":
        """The tensors of the shards that an index names."""
        try:
            weight_map = read_index(index)
        except UserError as error:
            return cls(str(where), faults=[str(error)])
        shards = sorted(set(weight_map.values()))
        there = [shard for shard in shards if os.path.isfile(index.parent / shard)]
        source = cls.of(where, [index.parent / shard for shard in there])
        source.faults += [
            f"{index.parent / shortened(shard, 100, quote=False)}: missing shard, named in {index.name}"
            for shard in shards
            if shard not in there
        ]
        readable = {entry.file.name for entry in source.entries.values() if entry.file}
        lost = [name for name, shard in weight_map.items() if name not in source.entries and shard in readable]
        source.faults += [
            f"{index}: {shortened(name, 100, quote=False)} is not in {shortened(weight_map[name], 100, quote=False)}"
            for name in sorted(lost)
        ]
        return source


@contextlib.contextmanager
def opened(path: Path) -> Iterator[io.FileIO]:
    """A regular file, unbuffered; whatever the system says while it is read is a UserError that names it."""
    reading.check_regular(path, remedy=AGAIN)
    try:
        with open(path, "rb", buffering=0) as file:
            yield file
    except OSError as error:
        raise reading.unreadable(path, reading.reason(error), AGAIN) from error


def read_index(path: Path) -> dict[str, str]:
    """Name of a tensor -> name of the shard beside the index that holds it. UserError where it is no such table."""
    data = reading.read_object(path, most=reading.LARGE, remedy=AGAIN).get("weight_map")
    if not isinstance(data, dict) or not data or not all(isinstance(shard, str) for shard in data.values()):
        raise UserError(f"{path} is not an index of safetensors shards: {AGAIN}")
    out = [shard for shard in data.values() if shard in ("", "..") or "\0" in shard or Path(shard).name != shard]
    if out:
        raise UserError(f"{path}: shard name {shortened(out[0])} leaves the folder")
    return data


def read_header(path: Path) -> dict[str, Entry]:
    """Name -> entry of one file. UserError with what is wrong, truncation included."""
    with opened(path) as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or not 2 <= length <= MAX_HEADER:
            raise UserError(f"{path} is not a safetensors file: {AGAIN}")
        text = b"".join(iter(lambda: file.read(length - file.tell() + 8), b""))
        size = file.seek(0, 2)
    if len(text) < length:
        raise UserError(f"{path} is truncated inside its header ({size} bytes): {AGAIN}")
    try:
        header = reading.parse_json(text.decode(), f"{path}: damaged header", AGAIN)
    except UnicodeDecodeError:
        header = None
    if not isinstance(header, dict):
        raise UserError(f"{path}: damaged header: not the JSON of a safetensors file; {AGAIN}")
    about = header.pop("__metadata__", None)
    if about is not None and not (isinstance(about, dict) and all(isinstance(value, str) for value in about.values())):
        raise UserError(f"{path}: damaged header: __metadata__ holds more than text; {AGAIN}")
    return _tiles(path, header, 8 + length, size)


def _tiles(path: Path, header: Mapping[str, Any], begin: int, size: int) -> dict[str, Entry]:
    """The entries of a header, which must lie one behind the other from `begin` to the end of the file: with a hole, an
    overlap or bytes left over, those behind would be read in the wrong place."""
    ranges = sorted((*_range(path, name, item), name) for name, item in header.items())
    position = 0
    for start, stop, name in ranges:
        if start != position:
            raise UserError(f"{path}: damaged header: a hole or an overlap before tensor {shortened(name)}; {AGAIN}")
        position = stop
    if (end := begin + position) != size:
        state = "is truncated" if size < end else "has bytes that belong to no tensor"
        raise UserError(f"{path} {state}: {size} bytes, not {end}: {AGAIN}")
    return {
        name: Entry(header[name]["dtype"], tuple(header[name]["shape"]), path, begin + start)
        for start, _, name in ranges
    }


def _range(path: Path, name: str, item: Any) -> tuple[int, int]:
    """Where a tensor begins and ends in the data. UserError where its entry is none, or its bytes do not fit its
    shape."""
    wrong = "is not described by dtype, shape and data_offsets"
    if isinstance(item, dict) and _counts(item.get("shape"), MOST_AXES) and _counts(item.get("data_offsets"), 2):
        shape, dtype, offsets = item["shape"], item.get("dtype"), item["data_offsets"]
        if isinstance(dtype, str) and len(offsets) == 2:
            elements = math.prod(n for n in shape if n)
            if dtype not in BITS:
                wrong = f"has the unknown dtype {shortened(dtype)}"
            elif elements > MOST_ELEMENTS or (offsets[1] - offsets[0]) * 8 != BITS[dtype] * math.prod(shape):
                wrong = "has a byte range that does not fit its shape"
            else:
                return offsets[0], offsets[1]
    raise UserError(f"{path}: damaged header: tensor {shortened(name)} {wrong}; {AGAIN}")


def _counts(value: Any, most: int) -> bool:
    return isinstance(value, list) and len(value) <= most and all(type(n) is int and n >= 0 for n in value)


def file_header(
    tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The bytes before the first tensor of a file in which these follow one another, without gaps, in this order."""
    names = {np.dtype(dtype): name for name, dtype in FLOATS.items()}
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    start = 0
    for name, (dtype, shape) in tensors.items():
        stop = start + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
