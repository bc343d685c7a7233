"""What breaks on real machines: memory that runs out, files that change on the way, processes that die."""

import shutil
import subprocess
from pathlib import Path

import pytest

from flux_jax.checkpoints import checksums, integrity
from flux_jax.checkpoints.checkpoint import resolve
from flux_jax.cli import generate
from flux_jax.errors import UserError
from flux_jax.runtime import memory


@pytest.fixture
def model(tiny_checkpoint, tmp_path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "model")


def largest(model: Path) -> Path:
    """A file of the transformer's weights."""
    return max((f for f in (model / "transformer").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def flip(file: Path) -> None:
    """One bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_whole_checkpoint_is_verified(model):
    assert checksums.check(model) == sum(file.is_file() for file in model.rglob("*")) - 1
    done = subprocess.run(["sha256sum", "--quiet", "-c", checksums.SUMS], cwd=model, check=False)
    assert done.returncode == 0
    assert checksums.check(resolve("nano")) > 10


def test_a_flipped_bit_a_lost_end_and_a_lost_file_are_found(model, tmp_path, capsys, snapshot_message):
    file = largest(model)
    content = file.read_bytes()
    for damage in (flip, lambda f: f.write_bytes(content[:-1]), Path.unlink):
        file.write_bytes(content)
        damage(file)
        with snapshot_message.raises(UserError, file.name, volatile=file.name):
            checksums.check(model)
    argv = [
        "a red circle",
        "-m",
        str(model),
        "--verify",
        "--device",
        "cpu",
        "-o",
        str(tmp_path / "a.png"),
        "--no-cache",
    ]
    assert generate.main(argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    snapshot_message(err, file.name, volatile=file.name)
    assert not (tmp_path / "a.png").exists()


def test_a_truncated_file_is_one_sentence_without_hashes_too(model, tmp_path, capsys, snapshot_message):
    file = largest(model)
    file.write_bytes(file.read_bytes()[:100])
    assert generate.main(["a red circle", "-m", str(model), "--no-cache", "-o", str(tmp_path / "a.png")]) == 2
    err = capsys.readouterr().err
    snapshot_message(err, model / "transformer", volatile=r"(?<=again: ).+")


@pytest.mark.parametrize("text", ["", "x  a\n", f"{'0' * 64}  ../a\n", f"{'0' * 64}  /a\n"])
def test_damaged_sums(model, text, snapshot_message):
    (model / checksums.SUMS).write_text(text)
    with snapshot_message.raises(UserError, checksums.SUMS):
        checksums.check(model)
    (model / checksums.SUMS).unlink()
    with snapshot_message.raises(UserError, checksums.SUMS):
        checksums.check(model)


@pytest.mark.slow
def test_too_large_a_picture_is_refused_before_it_takes_the_memory(
    model, tmp_path, capsys, monkeypatch, snapshot_message
):
    monkeypatch.setattr(integrity, "check_room", lambda *_: None)  # in so little the weights had no room either
    monkeypatch.setattr(memory, "free", lambda device: 10**5)
    argv = ["a red circle", "-m", str(model), "--device", "cpu", "--no-cache", "-q", "-o", str(tmp_path / "a.png")]
    assert generate.main(argv) == 4
    err = capsys.readouterr().err
    snapshot_message(err, "--vae-tiling on")
    assert err.count("\n") == 1
    assert not (tmp_path / "a.png").exists()
