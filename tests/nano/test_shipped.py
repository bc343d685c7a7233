"""The FLUX-nanos that ship, in bf16 and in 1.58 bits: whole, small, documented, and drawing what they are asked for."""

import hashlib

import numpy as np
import pytest

from flux_jax.checkpoints import checksums
from flux_jax.checkpoints.checkpoint import Checkpoint, resolve
from flux_jax.cli.nano import main
from flux_jax.distill.run_context import teacher_digest
from flux_jax.nano.captions import Spec, phrase
from flux_jax.nano.scenes import COLORS, SHAPES
from flux_jax.sampling.pipeline import FluxPipeline

MODELS = ("nano-bf16", "nano-1.58bit")
MAX_BYTES = 30e6  # of all models together


@pytest.mark.parametrize("model", MODELS)
def test_every_file_is_the_one_that_was_exported(model):
    folder = resolve(model)
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    listed = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {"SHA256SUMS"}
    assert present == set(listed)
    for name, digest in listed.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name


def test_they_are_small():
    assert sum(p.stat().st_size for p in resolve("nano").parent.rglob("*") if p.is_file()) < MAX_BYTES


def test_the_teacher_says_what_it_is():
    manifest = Checkpoint.open("nano-bf16").manifest
    assert manifest["licence"] == "Apache-2.0"
    assert manifest["source"]["sha256"].keys() == {"transformer", "t5", "clip", "vae"}
    folder = resolve("nano-bf16")
    card = (folder / "README.md").read_text()
    for word in ("Apache-2.0", "Data", "seed", "Score", "SHA256SUMS"):
        assert word in card
    for phase in ("vae", "text", "flow"):
        assert (folder / "training" / phase / "metrics.jsonl").is_file()
        assert (folder / "training" / phase / "curve.png").is_file()


def test_the_student_is_the_default_and_says_how_it_was_made():
    stored = Checkpoint.open("nano")
    made = stored.manifest["quantization"]
    teacher = Checkpoint.open("nano-bf16")
    assert made["distilled"] and made["phases"].keys() == {"blockwise", "end_to_end"}
    assert made["teacher"] == teacher_digest(teacher)  # not of an earlier one
    assert made["held_out_relative"]["end_to_end"] < 0.2 * made["held_out_relative"]["rounding"]
    assert stored.config == teacher.config
    card = (resolve("nano") / "README.md").read_text()
    for word in ("1.58 bits", "Apache-2.0", "seed", "Score", "SHA256SUMS"):
        assert word in card
    assert (resolve("nano") / "training" / "curve.png").is_file()


def test_a_student_is_exported_whole_also_in_its_own_place(tmp_path):
    out = tmp_path / "out"
    assert main(["student", str(resolve("nano")), str(out)]) == 0
    assert main(["student", str(out), str(out)]) == 2  # in the way
    assert main(["student", str(out), str(out), "--overwrite"]) == 0
    assert checksums.check(out) > 10
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_only_a_student_ships_as_one(tmp_path, capsys):
    assert main(["student", "nano-bf16", str(tmp_path / "out")]) == 2
    assert "no student of flux_jax.distill" in capsys.readouterr().err
    assert main(["student", "nano-1.58bit", str(tmp_path / "out"), "--evaluation", str(tmp_path)]) == 2
    assert "no finished evaluation" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("model", [pytest.param("nano-bf16", marks=pytest.mark.slow), "nano-1.58bit"])
def test_it_draws_the_colour_asked_for(model):
    """Not a score, which `flux_jax.evaluate` gives: that weights, tokenizers, schedule and decoder fit together."""
    pipe = FluxPipeline.from_pretrained(model)
    captions = [phrase((Spec(shape, color),)) for shape in SHAPES for color in ("red", "blue")]
    pictures = [np.asarray(pipe(caption.text, seed=1).images[0]) for caption in captions]
    drawn = [main_color(picture) for picture in pictures]
    assert sum(color == caption.objects[0].color for color, caption in zip(drawn, captions, strict=True)) >= 10


def main_color(picture: np.ndarray) -> str:
    """The name of the palette's colour nearest to the pixels that are least like the picture's corner."""
    pixels = picture.reshape(-1, 3).astype(np.float32)
    distance = np.linalg.norm(pixels - pixels[:1], axis=1)
    ink = pixels[distance >= np.quantile(distance, 0.98)].mean(0)
    return min(COLORS, key=lambda name: float(np.linalg.norm(ink - np.asarray(COLORS[name]))))
