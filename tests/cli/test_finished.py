"""A picture that was drawn is kept, wherever it can be."""

import argparse
from pathlib import Path

import pytest
from PIL import Image

from flux_jax.cli import finished, requests
from flux_jax.errors import UserError
from flux_jax.io import png

SETTINGS = {
    "prompt": "a",
    "negative_prompt": None,
    "seed": 7,
    "height": 16,
    "width": 32,
    "steps": 4,
    "guidance": 3.5,
    "true_cfg": 1.0,
    "max_sequence_length": 16,
}
RECORD = png.Record(
    dtype="float32", model={"id": "nano", "name": "n", "sha256": "0"}, versions={"flux_jax": "1"}, **SETTINGS
)


@pytest.fixture
def keep(tmp_path, monkeypatch):
    """Keeps a picture at a path of the test's folder; `tmp` is there for temporary files."""
    monkeypatch.chdir(tmp_path)
    Path("tmp").mkdir()
    monkeypatch.setattr(finished.tempfile, "tempdir", str(tmp_path / "tmp"))

    def keep(output: str, **options) -> Path | None:
        args = argparse.Namespace(**({"overwrite": False, "prompts_file": None} | options))
        request = requests.Request(0, None, output=Path(output), **SETTINGS)
        return finished.keep(request, Image.new("RGB", (32, 16)), RECORD, args=args, seeded=True)

    return keep


def test_where_it_was_asked_for(keep):
    assert keep("new/a.png") == Path("new/a.png")
    assert keep("new/a.png", overwrite=True) == Path("new/a.png")
    Path("link.png").symlink_to("new/b.png")
    assert keep("link.png") == Path("link.png") and Path("new/b.png").is_file()


def test_beside_it_where_the_name_was_taken(keep, capsys):
    assert [keep("a.png") for _ in range(3)] == [Path("a.png"), Path("a-2.png"), Path("a-3.png")]
    assert "a.png exists" in capsys.readouterr().err
    assert keep("a.png", prompts_file=Path("p.txt")) is None  # a twin made the same
    Path("a.png").write_bytes(b"another's")
    assert keep("a.png", prompts_file=Path("p.txt")) == Path("a-4.png")


def test_among_the_temporary_files_where_nothing_can_be_written(keep, capsys):
    Path("out").write_text("a file, where there was a folder")
    found = keep("out/a.png")
    assert found is not None and found.parent.parent == Path("tmp").absolute()
    assert png.read_record(found)["seed"] == 7
    assert f"the picture is {found} now." in capsys.readouterr().err


def test_nowhere(keep, monkeypatch):
    def full(*_, **__):
        raise UserError("Cannot write a.png: its disk is full.")

    monkeypatch.setattr(png, "write_png", full)
    with pytest.raises(UserError, match="disk is full"):
        keep("a.png")
    assert list(Path("tmp").iterdir()) == []
