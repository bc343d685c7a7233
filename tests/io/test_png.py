"""The record in a PNG: the same JSON as ever, checked where it is read."""

import dataclasses
import json

import pytest
from PIL import Image

from flux_jax.errors import UserError
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
    assert png.Record.from_json(short | {"unknown": 1}, "This") == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 99999, "is not valid JSON: "),
        ("{", "is not valid JSON: "),
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
    assert str(caught.value).startswith(f"The record in {tmp_path / 'a.json'} ") and words in str(caught.value)
