"""FLUX-nano's latents beside others: what rounding alone can do is told from another picture."""

import numpy as np
import pytest

from bench import journal, nano_latents
from flux_jax.errors import UserError

RIGHT = np.random.default_rng(0).normal(size=(2, 16, 4)).astype(np.float32)


def test_distance_in_decibels():
    assert nano_latents.compare(RIGHT, RIGHT)["error"] == 0
    largest = np.abs(RIGHT).max()
    found = nano_latents.compare(RIGHT + largest / 50, RIGHT)
    assert found == pytest.approx({"error": 0.02, "decibels": 40.0}, rel=1e-4)


def test_other_pictures_cannot_be_compared():
    with pytest.raises(ValueError, match=r"latents \[2, 16, 4\] cannot be compared with \[1, 16, 4\]"):
        nano_latents.compare(RIGHT, RIGHT[:1])


def test_another_picture_is_wrong():
    noise = np.abs(RIGHT).max() * np.random.default_rng(1).normal(size=RIGHT.shape).astype(np.float32)
    assert "wrong" not in nano_latents.row(RIGHT + 1e-3 * noise, RIGHT, "float32")
    assert "wrong" not in nano_latents.row(RIGHT + 5e-3 * noise, RIGHT, "bfloat16")
    assert nano_latents.row(RIGHT + 5e-3 * noise, RIGHT, "float32")["wrong"] == "another picture"
    assert nano_latents.row(RIGHT + 0.1 * noise, RIGHT, "bfloat16")["wrong"] == "another picture"
    assert nano_latents.row(np.where(RIGHT > 0, np.nan, RIGHT), RIGHT, "float32") == {"wrong": "not finite"}
    assert nano_latents.row(RIGHT, np.where(RIGHT > 0, np.nan, RIGHT), "float32")["wrong"] == "another picture"


def test_carried_latents_are_compared_with(tmp_path, monkeypatch, capsys):
    """One model paints another picture, one fails: both are rows, and so is the third."""
    monkeypatch.setattr(nano_latents, "latents", lambda name, *_: RIGHT)
    file, path = tmp_path / "new" / "cpu.npz", tmp_path / "rows.jsonl"
    nano_latents.main(["--reference", str(file)])
    assert set(nano_latents.read(file)) == set(nano_latents.MODELS)

    def latents(name, *_):
        if name == "nano-bf16":
            raise RuntimeError("out of registers")
        return RIGHT if name.endswith("A8") else -RIGHT

    monkeypatch.setattr(nano_latents, "latents", latents)
    with pytest.raises(UserError, match="4 of 6 are wrong or failed"):
        nano_latents.main(["--against", str(file), "--rows", str(path)])
    rows = journal.read(path)
    assert {row["beside"] for row in rows} == {"a CPU's"}
    assert [row.get("failure") or row.get("wrong") for row in rows][:3] == [
        "RuntimeError: out of registers",
        "another picture",
        None,
    ]


def test_without_carried_latents_bfloat16_is_compared_with_float32(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(nano_latents, "latents", lambda name, dtype, *_: RIGHT * (0.99 if dtype == "bfloat16" else 1))
    nano_latents.main(["--against", str(tmp_path / "none.npz"), "--rows", str(tmp_path / "rows.jsonl")])
    rows = journal.read(tmp_path / "rows.jsonl")
    assert [round(row["error"], 3) for row in rows] == [0, 0, 0, 0.01, 0.01, 0.01]
    assert {row["beside"] for row in rows} == {"this device's float32"}


def test_bfloat16_is_not_compared_with_itself(monkeypatch, tmp_path):
    def latents(name, dtype, *_):
        if dtype == "float32":
            raise RuntimeError("out of registers")
        return RIGHT

    monkeypatch.setattr(nano_latents, "latents", latents)
    path = tmp_path / "rows.jsonl"
    with pytest.raises(UserError, match="6 of 6 are wrong or failed"):
        nano_latents.main(["--against", str(tmp_path / "none.npz"), "--rows", str(path)])
    assert journal.read(path)[-1]["failure"] == "ValueError: there are no latents to compare with"


def test_a_damaged_file_is_one_sentence(tmp_path):
    (tmp_path / "cpu.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(UserError, match="holds no latents of FLUX-nano"):
        nano_latents.read(tmp_path / "cpu.npz")
