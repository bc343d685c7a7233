"""Safetensors headers: what the library refuses is refused, what both read is the same; and every file that cannot be
read is one sentence."""

import json
import os
import random

import numpy as np
import pytest
import safetensors
from safetensors import safe_open

from flux_jax.errors import UserError
from flux_jax.io.safetensors import FLOATS, Source, file_header, read_header, read_index

HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "none": {"dtype": "F16", "shape": [0, 5], "data_offsets": [32, 32]},
    "one": {"dtype": "F64", "shape": [], "data_offsets": [32, 40]},
    "bytes": {"dtype": "U8", "shape": [3], "data_offsets": [40, 43]},
}
BODY = bytes(range(1, 44))
VALUES = [0, 1, -1, 2, 24, 32, 40, 43, 44, 24.0, 1e2, True, None, "x", [], [0], [0, 1], {}, 2**64, "F64", "F4"]
VALUES += ["F6_E2M3", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "C64", "BOOL", "I64", "U16", "f32"]


def blob(header, body=BODY):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def theirs(file):
    """Name -> dtype, shape, by the library; None where it refuses."""
    try:
        with safe_open(file, "np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - it is no dict
            return {name: (each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()}
    except (safetensors.SafetensorError, OSError):
        return None


def ours(file):
    try:
        return {name: (entry.dtype, entry.shape) for name, entry in read_header(file).items()}
    except UserError:
        return None


def mutated(draw: random.Random) -> bytes:
    """A file with a header that someone damaged or forged, or with damaged bytes."""
    whole = blob(HEADER)
    if draw.random() < 0.2:
        return whole[: draw.randrange(len(whole))] + draw.choice([b"", whole[:9]])
    if draw.random() < 0.3:
        data = bytearray(whole)
        data[draw.randrange(len(data))] = draw.choice(b' "0,9:[]{}\xff')
        return bytes(data)
    header = json.loads(json.dumps(HEADER))
    for name in draw.choices(list(header), k=draw.randint(1, 2)):
        item = header[name]
        key = draw.choice(list(item)) if isinstance(item, dict) and item else None
        if key is None or draw.random() < 0.1:
            header[name] = draw.choice(VALUES)
        elif isinstance(item[key], list) and item[key] and draw.random() < 0.6:
            item[key][draw.randrange(len(item[key]))] = draw.choice(VALUES)
        else:
            item[key] = draw.choice(VALUES)
    return blob(header)


def test_nothing_is_read_that_the_library_refuses(tmp_path):
    draw, file, counts = random.Random(0), tmp_path / "a.safetensors", {True: 0, False: 0}
    for _ in range(200):
        file.write_bytes(mutated(draw))
        known, found = theirs(file), ours(file)
        counts[known is not None] += 1
        assert known == found
    assert min(counts.values()) > 10


def test_what_both_read_is_the_same(tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_bytes(blob(HEADER))
    source = Source.of(file, [file])
    assert source.faults == [] and source.files == [file]
    with safe_open(file, "np") as opened:
        for name in ("a", "none", "one"):
            assert source.read(name).tobytes() == opened.get_tensor(name).tobytes()
            assert source.read(name).shape == opened.get_tensor(name).shape
    into = np.empty((2, 3), np.float32)
    assert source.read("a", into) is into and into.tobytes() == BODY[:24]


@pytest.mark.parametrize("kind", sorted(FLOATS))
def test_what_is_written_is_read(tmp_path, kind):
    values = {"x": np.arange(6).reshape(2, 3).astype(FLOATS[kind]), "y": np.array(3).astype(FLOATS[kind])}
    file = tmp_path / "a.safetensors"
    header = file_header({name: (value.dtype, value.shape) for name, value in values.items()}, {"format": "pt"})
    file.write_bytes(header + b"".join(value.tobytes() for value in values.values()))
    source = Source.of(file, [file])
    assert theirs(file) == {name: (entry.dtype, entry.shape) for name, entry in source.entries.items()}
    assert all(source.read(name).tobytes() == value.tobytes() for name, value in values.items())


DAMAGED = {
    "hole": HEADER | {"b": {"dtype": "BF16", "shape": [3], "data_offsets": [26, 32]}},
    "overlap": HEADER | {"b": {"dtype": "BF16", "shape": [4], "data_offsets": [22, 30]}},
    "shape": HEADER | {"b": {"dtype": "BF16", "shape": [5], "data_offsets": [24, 32]}},
    "fraction": HEADER | {"b": {"dtype": "BF16", "shape": [4.0], "data_offsets": [24, 32]}},
    "dtype": HEADER | {"b": {"dtype": "BF17", "shape": [4], "data_offsets": [24, 32]}},
    "huge": HEADER | {"none": {"dtype": "F16", "shape": [0, 2**60, 2**60], "data_offsets": [32, 32]}},
    "twice": json.dumps(HEADER).replace('"b"', '"a"').encode(),
    "deep": b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}",
    "list": b"[]",
    "UTF-16": json.dumps(HEADER).encode("utf-16"),
    "about": HEADER | {"__metadata__": {"format": 3}},
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_headers(tmp_path, damage, snapshot_message):
    file = tmp_path / "a.safetensors"
    file.write_bytes(blob(DAMAGED[damage]))
    with snapshot_message.raises(UserError, file, "again"):
        read_header(file)


def test_a_body_that_is_too_short_or_too_long(tmp_path, snapshot_message):
    """A download that went on in the wrong place has bytes twice: all that lie behind would be shifted."""
    file = tmp_path / "a.safetensors"
    for body in (BODY[:-1], BODY[:20] + BODY[10:]):
        file.write_bytes(blob(HEADER, body))
        with snapshot_message.raises(UserError, file, "again"):
            read_header(file)


def test_files_that_cannot_be_read(tmp_path, snapshot_message):
    (tmp_path / "nowhere").symlink_to("../../blobs/0123")
    (tmp_path / "itself").symlink_to("itself")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "device").symlink_to("/dev/zero")
    for name in ("nowhere", "itself", "pipe", "folder", "device"):
        source = Source.of(tmp_path, [tmp_path / name])
        assert len(source.faults) == 1 and not source.entries
        snapshot_message(source.faults[0], tmp_path / name)


def test_a_file_that_goes_while_it_is_read(tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_bytes(blob(HEADER))
    source = Source.of(file, [file])
    file.write_bytes(blob(HEADER)[:-20])
    with pytest.raises(UserError, match="ends inside tensor one"):
        source.read("one")
    file.unlink()
    with pytest.raises(UserError, match=r"Cannot read .*a\.safetensors"):
        source.read("a")


def test_shards_and_what_is_wrong_with_them(tmp_path, snapshot_message):
    index, shard = tmp_path / "m.safetensors.index.json", tmp_path / "m-1.safetensors"
    shard.write_bytes(blob(HEADER))
    names = [name for name in HEADER if name != "__metadata__"]
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, shard.name)}))
    source = Source.of_index(tmp_path, index)
    assert source.faults == [] and sorted(source.entries) == sorted(names)
    index.write_text(json.dumps({"weight_map": {"c": shard.name, "d": "m-2.safetensors"}}))
    snapshot_message("\n".join(Source.of_index(tmp_path, index).faults), "c is not in", "m-2.safetensors")
    for wrong in ("../m-1.safetensors", "a/b", "", "..", "x\0", 3, None):
        index.write_text(json.dumps({"weight_map": {"a": wrong}}))
        with pytest.raises(UserError):
            read_index(index)
    index.write_text(json.dumps({"weight_map": {"a": "x" * 300}}))
    assert "missing shard" in Source.of_index(tmp_path, index).faults[0]
    for wrong in ("[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "", "nonsense", "[" * 5000):
        index.write_text(wrong)
        with pytest.raises(UserError):
            read_index(index)
    assert Source.of(tmp_path, [shard, shard]).faults[0].endswith("is also in another shard")
