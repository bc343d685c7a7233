"""The record in a PNG: the same JSON as ever, checked where it is read."""

import dataclasses
import io
import json
import os
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from flux_jax.errors import LONGEST, UserError
from flux_jax.io import png

RECORD = png.Record(
    dtype="float32",
    model={"id": "nano", "name": "FLUX-nano", "sha256": "0123456789abcdef"},
    device="cpu cpu",
    versions={"flux_jax": "1"},
    prompt="a “red” circle",
    seed=7,
    height=16,
    width=32,
    steps=4,
    guidance=3.5,
    true_cfg=1.0,
    max_sequence_length=16,
)
JSON = (
    '{"format": 1, "dtype": "float32", "model": {"id": "nano", "name": "FLUX-nano", "sha256": "0123456789abcdef"}, '
    '"device": "cpu cpu", "versions": {"flux_jax": "1"}, "prompt": "a “red” circle", "negative_prompt": null, '
    '"seed": 7, "height": 16, "width": 32, "steps": 4, "guidance": 3.5, "true_cfg": 1.0, "max_sequence_length": 16}'
)


def test_a_record_is_written_as_json_and_read_back(tmp_path):
    image = Image.new("RGB", (32, 16))
    png.write_png(tmp_path / "a.png", image, RECORD)
    png.write_png(tmp_path / "b.png", image, RECORD.to_json())
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as file:
        assert file.text["flux_jax"] == JSON
        assert file.text["parameters"] == (
            "a “red” circle\nSteps: 4, Sampler: Euler, CFG scale: 1.0, Distilled CFG Scale: 3.5, Seed: 7, "
            "Size: 32x16, Model hash: 0123456789, Model: FLUX-nano, Version: flux_jax 1"
        )
    assert png.read_record(tmp_path / "a.png") == RECORD.to_json()
    (tmp_path / "a.json").write_text("\ufeff" + JSON, "utf-8")
    assert png.read_record(tmp_path / "a.json") == RECORD.to_json()


def test_a_record_is_its_json():
    assert png.Record.from_json(json.loads(JSON), "This") == RECORD
    short = {key: value for key, value in json.loads(JSON).items() if key in ("format", *png.NEEDED)}
    del short["negative_prompt"]
    expected = dataclasses.replace(RECORD, device="", versions={})
    assert png.Record.from_json(short, "This") == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 99999, "not valid JSON (more than 64 levels deep)."),
        ("{", "not valid JSON ("),
        (JSON.replace('"seed": 7', '"seed": 7, "seed": 8'), "not valid JSON ('seed' stands there twice)."),
        (JSON.replace("3.5", "NaN"), "not valid JSON (NaN is no JSON number)."),
        (JSON.replace("3.5", "1e400"), "guidance must be from 0 to 100, not inf."),
        (JSON.replace("3.5", "1" + "0" * 400), "guidance must be from 0 to 100, not 1000"),
        (JSON.replace("3.5", "1" + "0" * 5000), "not valid JSON (a number has thousands of digits)."),
        (JSON.replace('"seed": 7', '"seed": -1'), "seed must be from 0 to 4294967295, not -1."),
        (JSON.replace('"width": 32', '"width": 0'), "width must be from 1 to 16384, not 0."),
        (JSON.replace('"steps": 4', '"steps": 1001'), "steps must be from 1 to 1000, not 1001."),
        (JSON.replace("a “red” circle", " "), "The prompt is empty; say what to draw."),
        (JSON.replace("circle", r"\u0000"), "The prompt holds a zero byte"),
        (JSON.replace("circle", "o" * 100_000), "The prompt has 100008 characters"),
        (JSON.replace("circle", r"\ud800"), "not valid JSON ("),
        (JSON.replace('"id": "nano"', '"id": ["nano"]'), "its model lacks, or has the wrong type in: id."),
        (JSON.replace('"id": "nano"', f'"id": "{"n" * 5000}"'), "names a model in more than 4096 characters."),
        (JSON.replace('"format": 1', '"format": true'), "has format True; "),
        (JSON.replace('"format": 1', r'"format": "\u001b[2J"'), r"has format '\x1b[2J'; "),
        ("[1]", "has format None; this version reads format 1."),
        (JSON.replace('"format": 1', '"format": 2'), "has format 2; this version reads format 1."),
        (JSON.replace('"seed": 7, ', ""), "lacks, or has the wrong type in: seed."),
        (JSON.replace('"seed": 7', '"seed": true'), "lacks, or has the wrong type in: seed."),
        (JSON.replace("3.5", '"3.5"').replace('"dtype": "float32"', '"dtype": 4'), "wrong type in: guidance, dtype."),
    ],
)
def test_a_faulty_record_is_one_sentence(tmp_path, text, words):
    (tmp_path / "a.json").write_text(text, "utf-8")
    with pytest.raises(UserError) as caught:
        png.read_record(tmp_path / "a.json")
    said = str(caught.value)
    assert said.startswith(f"The record in {tmp_path / 'a.json'}") and words in said
    assert len(said) <= LONGEST and said.isprintable()


def test_what_a_record_says_that_is_not_known_is_told(tmp_path):
    data = json.loads(JSON) | {"lora": "x", "\x1b[2J": 1}
    data["model"]["kernel"] = "xla"
    (tmp_path / "a.json").write_text(json.dumps(data))
    said: list[str] = []
    assert png.read_record(tmp_path / "a.json", said.append)["seed"] == 7
    where = f"The record in {tmp_path / 'a.json'}"
    assert said == [f"{where} says what this version does not know, and leaves out: \\x1b[2J, lora, model.kernel."]


def test_a_value_with_commas_is_quoted_as_the_web_interfaces_do():
    record = dataclasses.replace(RECORD, model=RECORD.model | {"name": 'mine, Seed: "999"'}, prompt="a\nb, c: d")
    *prompt, pairs = png.parameters_text(record.to_json()).split("\n")
    assert prompt == ["a", "b, c: d"]
    assert pairs.endswith(r'Model: "mine, Seed: \"999\"", Version: flux_jax 1')
    assert "Size: 32x16" in pairs


def test_no_picture_is_lost_to_what_its_record_holds(tmp_path):
    """Bytes of a path that are no text, numpy's numbers, and what JSON does not know."""
    model = RECORD.model | {"id": "caf\udce9", "folder": Path("a")}
    entry = RECORD.to_json() | {"model": model, "seed": np.int64(7), "guidance": np.float32(3.5)}
    png.write_png(tmp_path / "a.png", Image.new("RGB", (32, 16)), entry)
    found = png.read_record(tmp_path / "a.png")
    assert (found["model"]["id"], found["seed"], found["guidance"]) == (r"caf\udce9", 7, 3.5)


def chunk(kind: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")


def header(width: int, height: int) -> bytes:
    return chunk(b"IHDR", width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0")


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("png") / "a.png"
    png.write_png(path, Image.new("RGB", (32, 16)), RECORD)
    return path.read_bytes()


def encoded(kind: str, **how) -> bytes:
    Image.new("RGB", (32, 16)).save(buffer := io.BytesIO(), format=kind, **how)
    return buffer.getvalue()


BOMB = zlib.compress(bytes(2**24))
FIRST = 33  # bytes of the signature and the header
HOSTILE = {  # what becomes of a sound file
    "empty": lambda sound: b"",
    "cut": lambda sound: sound[:60],
    "another format": lambda sound: encoded("jpeg"),
    "TIFF": lambda sound: encoded("tiff"),
    "a flipped bit": lambda sound: sound.replace(b"circle", b"circlf"),
    "too many pixels": lambda sound: sound[:8] + header(60_000, 60_000) + sound[FIRST:],
    "many pixels": lambda sound: sound[:8] + header(11_000, 11_000) + sound[FIRST:],
    "no pixels": lambda sound: sound[:8] + header(0, 0) + sound[FIRST:],
    "a bomb": lambda sound: sound[:FIRST] + chunk(b"zTXt", b"flux_jax\0\0" + BOMB) + sound[FIRST:],
    "a bomb of another key": lambda sound: sound[:FIRST] + chunk(b"iTXt", b"x\0\1\0\0\0" + BOMB) + sound[FIRST:],
    "a short header": lambda sound: sound[:8] + chunk(b"IHDR", b"\0") + sound[FIRST:],
    "a record of nothing": lambda sound: sound[:FIRST] + chunk(b"tEXt", b"flux_jax\0") + encoded("png")[FIRST:],
    "without one, cut": lambda sound: encoded("png")[:60],
    "animated, without one": lambda sound: encoded("png", save_all=True, append_images=[Image.new("RGB", (32, 16), 1)]),
}


@pytest.mark.parametrize("harm", HOSTILE)
def test_a_strangers_picture_is_refused_in_a_sentence(tmp_path, sound, harm):
    (tmp_path / "a.png").write_bytes(HOSTILE[harm](sound))
    with warnings.catch_warnings(record=True) as warned, pytest.raises(UserError) as caught:
        png.read_record(tmp_path / "a.png")
    assert str(tmp_path / "a.png") in str(caught.value) and len(str(caught.value)) <= LONGEST
    assert not warned


def test_only_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    for name in ("pipe", "device", "folder"):
        with pytest.raises(UserError, match=f"{name}.png: it is a {name}, not a file"):
            png.read_record(tmp_path / f"{name}.png")


def test_a_record_behind_the_pixels_is_found(tmp_path):
    """Programs that optimize a PNG may put it there, or compress it."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt("flux_jax", JSON, zip=True)
    compressed = encoded("png", pnginfo=info)
    text = chunk(b"iTXt", b"flux_jax\0\0\0\0\0" + JSON.encode())
    plain = encoded("png")
    for data in (compressed, plain[:-12] + text + plain[-12:]):
        (tmp_path / "a.png").write_bytes(data)
        assert png.read_record(tmp_path / "a.png") == RECORD.to_json()
