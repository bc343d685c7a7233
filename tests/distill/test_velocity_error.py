"""A student against its teacher: the teacher itself is perfect, a known error is measured as what it is."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_distillation as tiny
from flax import nnx

from flux_jax.checkpoints import checkpoint, writer
from flux_jax.cli import velocity_error
from flux_jax.io.prompts import split

pytestmark = pytest.mark.usefixtures("hasty_compiler")


@pytest.mark.slow
def test_a_scaled_velocity_is_wrong_by_its_scale(folder, tmp_path, capsys):
    """A student whose velocity is 1.1 times the teacher's has a relative squared error of 0.01 at every level."""
    stored = checkpoint.Checkpoint.open(folder / "teacher")
    teacher = stored.load("transformer", jnp.float32)
    scaled = nnx.merge(*nnx.split(teacher))
    last = scaled.final_layer.linear
    last.weight, last.bias = (nnx.Param(1.1 * leaf[...]) for leaf in (last.weight, last.bias))
    parts = {part: stored.load(part, jnp.float32) for part in ("t5", "clip", "vae")}
    rest = {"tokenizers": stored.tokenizers}
    writer.save(tmp_path / "scaled", stored.config, parts | {"transformer": scaled}, **rest)
    words = [str(path) for path in (folder / "teacher", folder / "teacher", tmp_path / "scaled")]
    assert velocity_error.main([*words, "--rounded", "--prompts", str(folder / "prompts.txt"), "--count", "9"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)["students"]
    same, wrong, rounded = (found[name] for name in (words[0], words[2], "rounded"))
    assert same["velocity_mean"] < 1e-5 and same["psnr"] > 50  # points are stored as float16
    np.testing.assert_allclose(wrong["velocity"], 0.01, rtol=0.02)
    assert len(wrong["velocity"]) == stored.config.sampling.num_inference_steps
    assert rounded["velocity_mean"] > 2 * wrong["velocity_mean"]
    assert rounded["psnr"] < wrong["psnr"] < same["psnr"]
    assert "latent PSNR" in printed.err


def test_what_cannot_be_compared_is_one_sentence(folder, tmp_path, capsys):
    held_out = split(tiny.PROMPTS)[1]
    (tmp_path / "p.txt").write_text("\n".join(p for p in tiny.PROMPTS if p not in held_out))
    teacher = str(folder / "teacher")
    for words in ([teacher, teacher, "--prompts", str(tmp_path / "p.txt")],
                  [teacher, "--prompts", str(folder / "prompts.txt")],
                  [teacher, "nano-bf16", "--prompts", str(folder / "prompts.txt")]):  # fmt: skip
        assert velocity_error.main(words) == 2
        error = capsys.readouterr().err.strip()
        assert error and "\n" not in error
