"""A checkpoint back to a diffusers folder: what is looked at before the first byte is written."""

import shutil
from types import SimpleNamespace

import pytest

from convert import export
from flux_jax.checkpoints.checkpoint import Checkpoint
from flux_jax.errors import UserError

NANO = "nano-1.58bit"


@pytest.mark.parametrize("lost", ["double_blocks.0.img.qkv.bias", "double_blocks.0.img.qkv.scale", "img_in.weight"])
def test_a_table_that_lacks_a_weight(tmp_path, monkeypatch, lost, snapshot_message):
    stored = Checkpoint.open(NANO)
    table = dict(stored.manifest["parts"]["transformer"]["weights"])
    del table[lost]
    parts = {**stored.manifest["parts"], "transformer": {"path": "transformer", "weights": table}}
    changed = Checkpoint(stored.directory, {**stored.manifest, "parts": parts}, stored.config)
    monkeypatch.setattr(export.Checkpoint, "open", lambda name: changed)
    with snapshot_message.raises(UserError, "double_blocks.0.img.qkv" if "qkv" in lost else lost):
        export.export(NANO, tmp_path / "out", quiet=True)
    assert not list(tmp_path.iterdir())


def test_no_room_on_the_disk(tmp_path, monkeypatch, snapshot_message):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    monkeypatch.setattr(export, "dense_stream", None)  # nothing is read
    with snapshot_message.raises(UserError, tmp_path / "out"):
        export.export(NANO, tmp_path / "out", quiet=True)
    assert not list(tmp_path.iterdir())
