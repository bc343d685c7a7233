"""Inputs that once went wrong, here or in tools like this one: every run of a target begins with them.

In: the file that a sound input was written to, or its folder. Out: the same with one thing changed. JSON texts stand
for themselves, so that they may be none.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.fuzz.mutations import DEEP, KINDS

Case = Callable[[Path], None]
GROW = '{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}'


def written(path: Path, where: Sequence[Any], text: str) -> None:
    """A place in a JSON file holds a text instead."""
    value = json.loads(path.read_bytes())
    holder = value
    for key in where[:-1]:
        holder = holder[key]
    holder[where[-1]] = "@raw@"
    path.write_text(json.dumps(value).replace('"@raw@"', text), "utf-8", errors="surrogatepass")


def at(name: str, where: str, text: str) -> Case:
    return lambda folder: written(folder / name, where.split("/"), text)


def config(where: str, text: str) -> Case:
    return at("flux_jax.json", f"configs/{where}", text)


def cut(name: str, size: int) -> Case:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def becomes(name: str, kind: str) -> Case:
    def case(folder: Path) -> None:
        (folder / name).unlink()
        KINDS[kind](folder / name)

    return case


def unlisted(folder: Path) -> None:
    """A weight is damaged, and the list of hashes leaves its file out."""
    file = next(path for path in (folder / "t5" / "state").rglob("*") if path.parent.name == "d")
    sums = folder / "SHA256SUMS"
    kept = [line for line in sums.read_text().splitlines() if not line.endswith(file.name)]
    sums.write_text("\n".join(kept) + "\n")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def tokens(component: str, where: str, text: str) -> Case:
    return at(f"tokenizers/{component}/tokenizer.json", where, text)


CHECKPOINT: list[Case] = [
    cut("t5/state/manifest.ocdbt", 40),
    cut("transformer/state/_METADATA", 1000),
    cut("SHA256SUMS", 0),
    cut("SHA256SUMS", 500),
    unlisted,
    *(config("t5/num_layers", text) for text in ("1000000000", "1025", "0")),
    *(config("clip/num_layers", text) for text in ("1000000", "0")),
    *(config("clip/num_heads", text) for text in ("0", "1000000")),
    *(config("vae/layers_per_block", text) for text in (str(10**30), "-1")),
    *(config("vae/scaling_factor", text) for text in ("0", "1e-38", "1e999", "NaN")),
    *(config("vae/shift_factor", text) for text in ("NaN", "Infinity", str(10**400))),
    *(config("vae/channels", text) for text in ("[-1]", "[]", "[8, 0]")),
    *(config(f"transformer/{key}", "0") for key in ("num_heads", "hidden_size", "pooled_dim", "mlp_ratio")),
    *(config("transformer/num_double_blocks", text) for text in ("-1", "1e9")),
    config("vae/norm_groups", "0"),
    config("t5/d_model", "0"),
    config("name", '"\\u001b]0;x\\u0007"'),
    config("sampling/base_seq_len", "64"),
    *(at("flux_jax.json", "parts/t5/path", text) for text in ('"\\u0000"', '"\\ud800"', '"/etc"', '"../.."', '"."')),
    at("flux_jax.json", "version", DEEP),
    at("flux_jax.json", "quantization/activations", f'"{"x" * 70_000}"'),
    at("flux_jax.json", "parts/t5/weights/final_norm.weight", '["float16", [24]]'),
    at("flux_jax.json", "parts/t5/weights/final_norm.weight", '["float32", [1000000000, 1000000000]]'),
    tokens("t5", "model/vocab", "[]"),
    tokens("t5", "model/unk_id", "null"),
    tokens("clip", "model/vocab", "{}"),
    tokens("clip", "normalizer", f'{{"type": "Sequence", "normalizers": [{", ".join([GROW] * 34)}]}}'),
    tokens("clip", "normalizer", DEEP),
    tokens(
        "clip", "post_processor/special_tokens", '{"<|endoftext|>": {"id": "a", "ids": [1000000], "tokens": ["a"]}}'
    ),
    *(becomes(name, "a pipe") for name in ("SHA256SUMS", "flux_jax.json", "t5/state/_METADATA", "crc32.json")),
    *(becomes(name, "a device") for name in ("flux_jax.json", "tokenizers/t5/tokenizer.json", "clip/orbax.checkpoint")),
    becomes("t5/state/_METADATA", "a file of the system"),
    becomes("crc32.json", "gone"),
]


def header(change: Callable[[dict], None], body: Callable[[bytes], bytes] = lambda body: body) -> Case:
    """A safetensors file whose header and data were changed, and fit each other no more."""

    def case(folder: Path) -> None:
        path = folder / "model.safetensors"
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        found = json.loads(data[8 : 8 + length])
        change(found)
        text = json.dumps(found).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + body(data[8 + length :]))

    return case


def shifted(found: dict) -> None:
    for entry in found.values():
        entry["data_offsets"] = [offset + 2 for offset in entry["data_offsets"]]


def raw_header(text: bytes) -> Case:
    return lambda folder: (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)


SAFETENSORS: list[Case] = [
    header(lambda found: None, lambda body: body[:40] + b"xxxx" + body[40:]),
    header(lambda found: None, lambda body: body + b"x"),
    header(shifted),
    header(shifted, lambda body: b"xx" + body),
    header(lambda found: found.update(twin=found["a.weight"])),
    header(lambda found: found["a.weight"].update(shape=[4.0, 6.0])),
    header(lambda found: found["a.weight"].update(shape=[True, 24])),
    header(lambda found: found["a.weight"].update(shape=[2**40, 2**40])),
    header(lambda found: found["scalar"].update(dtype="F7")),
    raw_header(b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, "a": 1}'),
    raw_header(DEEP.encode()),
    raw_header(b'{"a":' * 100_000),
    lambda folder: (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
    lambda folder: (folder / "model.safetensors").write_bytes((2**63).to_bytes(8, "little") + b"{}"),
    becomes("model.safetensors", "a link to itself"),
    becomes("model.safetensors", "a pipe"),
]

RECORDS = {  # place in a picture's record -> texts
    "model/id": ("1", "[]", f'"{"x" * 5000}"', '"/etc"', '"../nano-bf16"', '"nano-bf16\\u0000"', '"\\ud800"'),
    "guidance": (str(10**400), "1e999", "-1", '"3"'),
    "seed": ("-1", "4294967296", "7.5", "9" * 5000),
    "width": ("0", "-64", "1000000000", "64.0"),
    "steps": ("0", "1e9"),
    "prompt": ('""', f'"{"x" * 10_000_000}"', '"\\u001b[2J"', '"\\ud800"', "[]"),
    "format": ("2", "null", DEEP),
    "dtype": ('"int4"', '"\\u0007"'),
}
