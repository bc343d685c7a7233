"""Inputs gone wrong: bytes that were damaged on the way, files that are something else, JSON that a stranger wrote.

In: a random generator (Python's, seeded by the input's number, or hypothesis' own) and bytes, a file or a JSON value.
Out: the same, changed; and what was done, in words that let a person do it again.
"""

import copy
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from flux_jax.io.places import remove

DEEP = "[" * 100_000 + "]" * 100_000
RAW = [  # JSON texts of values that no writer of ours would give, or that mean something else at that place
    "0", "-1", "1", "2", "7", "3.5", "-0.0", "1e-38", "1e38", "1e999", "-1e999", "NaN", "Infinity", "null", "true",
    "false", '""', '"x"', "[]", "{}", "[[]]", '[""]', "[null]", "[1, 2, 3]", "[0]", "[-1]", "[1e9]", "[1.5]",
    "[1000000000, 1000000000]", "1000000000", "4294967296", "9223372036854775808", str(10**30),
    str(10**400), "9" * 5000,
    f'"{"x" * 100_000}"', '"../../etc"', '"/etc/passwd"', '"/dev/zero"', '"."', '"a/../../b"', '"\\u0000"',
    '"\\ud800"', '"a\\nb"', '"\\u001b[31m"', '"NaN"', '"bfloat16"', '"float64"', '"int8"', '"object"', '"U3"', '"F64"',
    '"F8_E4M3"', '{"a": {"b": 1}}', '{"a": 1, "a": 2}', DEEP, '{"a":' * 70 + "1" + "}" * 70,
]  # fmt: skip


def damaged(random: Random, data: bytes) -> tuple[bytes, str]:
    """Bytes that a disk, a network or an interrupted copy changed."""
    size = len(data)
    kind = random.choice(
        ["bit", "bit", "bits", "byte", "cut", "zeros", "noise", "inserted", "removed", "twice", "empty"]
    )
    at, length = random.randrange(size + 1), random.randrange(1, 64)
    if kind in ("bit", "bits", "byte") and size:
        changed = bytearray(data)
        for _ in range({"bit": 1, "byte": 1, "bits": 5}[kind]):
            changed[random.randrange(size)] ^= 1 << random.randrange(8) if kind != "byte" else 255
        return bytes(changed), kind
    if kind == "cut":
        return data[:at], f"cut at {at}"
    if kind == "zeros":
        return data[:at] + bytes(min(length, size - at)) + data[at + length :], f"{length} zeros at {at}"
    if kind == "noise":
        return data[:at] + random.randbytes(min(length, size - at)) + data[at + length :], f"{length} of noise at {at}"
    if kind == "inserted":
        return data[:at] + random.randbytes(length) + data[at:], f"{length} inserted at {at}"
    if kind == "removed":
        return data[:at] + data[at + length :], f"{length} removed at {at}"
    if kind == "twice":
        return data + data, "twice"
    return b"", "empty"


def places(value: Any, here: tuple = ()) -> list[tuple]:
    """The path of every value within a JSON value."""
    found = [here] if here else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*here, key))
    return found


def edited(random: Random, value: Any) -> tuple[str, str]:
    """A JSON value as text, one place of it changed: replaced, left out, renamed, moved, given twice."""
    value, everywhere = copy.deepcopy(value), places(value)
    if not everywhere:
        return random.choice(RAW), "another value"
    where = random.choice(everywhere)
    if random.random() < 0.5:  # near the top more often than a table of weights would have it
        where = where[: random.randrange(1, len(where) + 1)]
    holder = value
    for key in where[:-1]:
        holder = holder[key]
    kind, key, name = (
        random.choice(["replaced"] * 5 + ["left out", "renamed", "added", "swapped"]),
        where[-1],
        "/".join(map(str, where)),
    )
    if kind == "left out":
        del holder[key]
        return json.dumps(value), f"{name} left out"
    if kind == "renamed" and isinstance(holder, dict):
        other = random.choice(["", "x", "../x", "a" * 5000, "\0", str(key).upper(), f"{key} ", "__class__"])
        holder[other] = holder.pop(key)
        return json.dumps(value), f"{name} renamed {other[:20]!r}"
    if kind == "added" and isinstance(holder, dict):
        holder["one more"] = 1
        return json.dumps(value), f"one more beside {name}"
    if kind == "swapped":
        other = random.choice([place for place in everywhere if len(place) == len(where)])
        inner = value
        for step in other:
            inner = inner[step]
        holder[key] = inner
        return json.dumps(value), f"{name} is {'/'.join(map(str, other))}"
    text = random.choice(RAW)
    holder[key] = "@raw@"
    return json.dumps(value).replace('"@raw@"', text, 1), f"{name} is {text[:40]}"


def become_pipe(path: Path) -> None:
    os.mkfifo(path)


def become_folder(path: Path) -> None:
    path.mkdir()


def become_link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def become_large(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(2**31)


KINDS: dict[str, Callable[[Path], None]] = {
    "gone": lambda path: None,
    "a pipe": become_pipe,
    "a folder": become_folder,
    "a link to nothing": become_link("nothing-here"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to its folder": become_link("."),
    "a device": become_link("/dev/zero"),
    "a file of the system": become_link("/etc/passwd"),
    "2 GiB of nothing": become_large,
}


def replaced(random: Random, path: Path) -> str:
    """Something else lies at the path."""
    kind = random.choice(list(KINDS))
    remove(path)
    KINDS[kind](path)
    return f"{path.name} is {kind}"


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file."""
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


BOMB = zlib.compress(bytes(2**27), 1)  # 128 MiB of zeros
CHUNKS: dict[str, Callable[[bytes], bytes]] = {  # that are true to the format and mean harm, of a record
    "a compressed bomb": lambda record: chunk(b"zTXt", b"flux_jax\0\0" + BOMB),
    "a compressed bomb of another key": lambda record: chunk(b"iTXt", b"x\0\1\0\0\0" + BOMB),
    "the record compressed": lambda record: chunk(b"zTXt", b"flux_jax\0\0" + zlib.compress(record)),
    "the record in Latin-1": lambda record: chunk(b"tEXt", b"flux_jax\0" + record),
    "another record": lambda record: chunk(b"iTXt", b"flux_jax\0\0\0\0\0" + record.replace(b"7", b"8")),
    "a key that never ends": lambda record: chunk(b"tEXt", b"x" * 70_000),
    "ten thousand texts": lambda record: chunk(b"tEXt", b"x\0y") * 10_000,
    "no text in a text": lambda record: chunk(b"iTXt", b"flux_jax\0"),
    "a profile bomb": lambda record: chunk(b"iCCP", b"x\0\0" + BOMB),
}
SIZES = {"60,000 x 60,000 pixels": (60_000, 60_000), "no pixels": (0, 0), "more pixels than numbers": (2**31, 1)}
HARM = (*CHUNKS, *SIZES)


def with_chunk(data: bytes, name: str) -> bytes:
    """A PNG file, whose second chunk is its record, with one of CHUNKS before that, or of one of SIZES."""
    if name in SIZES:
        header = b"".join(edge.to_bytes(4, "big") for edge in SIZES[name]) + data[24:29]
        return data[:8] + chunk(b"IHDR", header) + data[33:]
    length = int.from_bytes(data[33:37], "big")
    return data[:33] + CHUNKS[name](data[54 : 41 + length]) + data[33:]
