"""Reads and writes safetensors files, one tensor at a time.

In: files or folders of published weights. Out: `Source`: for each tensor its dtype and shape (from the headers,
nothing else is read), and the tensor itself on request as an owned numpy array. Files are read, not mapped as the
library `safetensors` does: mapped pages would count as memory of this process, and the converter promises a bound on
that. What is wrong with the files (missing shard, truncated file, damaged header) is collected in `faults`, so that one
report can name everything. The other way, `file_header` is what stands before the tensors of a file that is written.
Format: https://huggingface.co/docs/safetensors (8 bytes of little-endian header length, JSON header, data).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from flux_jax.errors import UserError

FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "I32": 4,
    "U32": 4,
    "I64": 8,
    "U64": 8,
}
MAX_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class Entry:
    """One tensor: dtype as safetensors names it, shape, where its bytes lie."""

    dtype: str
    shape: tuple[int, ...]
    file: Path | None = None
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(FLOATS[self.dtype]).itemsize


@dataclass
class Source:
    """The tensors of one part by name, the files they come from, and what is wrong with those files."""

    where: str
    entries: dict[str, Entry] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def read(self, name: str, out: np.ndarray | None = None) -> np.ndarray:
        """The tensor in its stored floating dtype. out: a contiguous array of that dtype and size to read it into, if
        it lies in a file; then that is returned. Raises UserError where the file ends early."""
        entry = self.entries[name]
        assert entry.file is not None
        out = np.empty(entry.shape, FLOATS[entry.dtype]) if out is None else out
        with open(entry.file, "rb", buffering=0) as f:
            f.seek(entry.offset)
            view, done = memoryview(out.reshape(-1).view(np.uint8)), 0
            while done < len(view):
                got = f.readinto(view[done:])
                if not got:
                    raise UserError(f"{entry.file} ends inside tensor {name}: copy or download the file again")
                done += got
        return out

    @classmethod
    def from_path(cls, path: Path) -> "Source":
        """A .safetensors file, or a folder with one such file or an index and its shards."""
        source = cls(str(path))
        if path.is_file():
            source._add_file(path)
            return source
        indices = sorted(path.glob("*.safetensors.index.json"), key=lambda p: len(p.name))
        singles = sorted(path.glob("*.safetensors"), key=lambda p: len(p.name))
        if indices:
            source._add_index(indices[0])
        elif singles:
            source._add_file(singles[0])
        else:
            pickled = " (files of pickled tensors, .bin or .pt, are not read)" if list(path.glob("*.bin")) else ""
            source.faults.append(f"{path}: no .safetensors file here{pickled}")
        return source

    def _add_index(self, index: Path) -> None:
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
            shards = {str(shard) for shard in weight_map.values()}
        except (ValueError, KeyError, AttributeError, TypeError):
            self.faults.append(f"{index}: not an index of safetensors shards")
            return
        for shard in sorted(shards):
            if Path(shard).name != shard:
                self.faults.append(f"{index}: shard name {shard!r} leaves the folder")
            elif not (index.parent / shard).is_file():
                self.faults.append(f"{index.parent / shard}: missing shard, named in {index.name}")
            else:
                self._add_file(index.parent / shard)
        present = {entry.file.name for entry in self.entries.values() if entry.file}
        lost = [n for n, shard in weight_map.items() if n not in self.entries and shard in present]
        self.faults += [f"{index}: {name} is not in {weight_map[name]}" for name in sorted(lost)]

    def _add_file(self, path: Path) -> None:
        self.files.append(path)
        try:
            entries = read_header(path)
        except ValueError as error:
            self.faults.append(f"{path}: {error}")
            return
        self.faults += [
            f"{path}: {name} is also in another shard" for name in sorted(entries.keys() & self.entries.keys())
        ]
        self.entries |= entries


def read_header(path: Path) -> dict[str, Entry]:
    """Name -> entry of one file. Raises ValueError with what is wrong, truncation included."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or not 2 <= length <= MAX_HEADER:
            raise ValueError("not a safetensors file")
        if 8 + length > size:
            raise ValueError(f"truncated inside its header ({size} bytes): copy or download the file again")
        try:
            header = json.loads(f.read(length))
            header.pop("__metadata__", None)
            entries, end = {}, 0
            for name, item in header.items():
                start, stop = item["data_offsets"]
                entries[name] = Entry(item["dtype"], tuple(item["shape"]), path, 8 + length + start)
                itemsize = (
                    np.dtype(FLOATS[item["dtype"]]).itemsize
                    if item["dtype"] in FLOATS
                    else ITEM_BYTES.get(item["dtype"])
                )
                if start < 0 or (itemsize is not None and stop - start != math.prod(item["shape"]) * itemsize):
                    raise ValueError(f"damaged header: the byte range of {name} does not fit its shape")
                end = max(end, stop)
        except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError("damaged header: not the JSON of a safetensors file") from error
    if 8 + length + end > size:
        raise ValueError(f"truncated: {size} bytes of {8 + length + end}: copy or download the file again")
    return entries


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
