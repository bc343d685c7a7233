"""What a picture takes on a device, known before anything is loaded."""

import dataclasses
import importlib.util
import json

import jax.numpy as jnp
import pytest
import tiny_model

from flux_jax.cli import plan
from flux_jax.config import dev
from flux_jax.models.params import nbytes
from flux_jax.runtime import aot
from flux_jax.sampling.planner import AbstractModel, Planner, StageMemory, describe

SIZE = {"height": 32, "width": 64, "steps": 3, "length": 12}


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner(AbstractModel(tiny_model.config(), None, jnp.dtype("float32")), None, **SIZE)


def test_weights_are_those_of_the_modules(planner):
    size = {part: nbytes(module) for part, module in tiny_model.modules(tiny_model.config()).items()}
    text, denoise, decode = planner.stages()
    assert text.weights == size["t5"] + size["clip"]
    assert denoise.weights == size["transformer"]
    assert decode.weights == size["vae"]
    assert {stage.weights + stage.waiting for stage in (text, denoise, decode)} == {sum(size.values())}
    assert all(stage.temporaries > 0 for stage in (text, denoise, decode))


def test_offloading_leaves_only_what_works(planner):
    stages = planner.stages("model")
    assert [stage.waiting for stage in stages] == [0, 0, 0]
    layer = nbytes(planner.model.component("t5").layers)  # of which the tiny T5 has one
    assert planner.stages("layers")[0].weights == max(layer, nbytes(planner.model.component("clip")))


def test_the_first_argument_that_helps_is_named(planner, monkeypatch):
    """Sizes of a model far larger than its device, in gigabytes, in place of the tiny one's."""
    stages = {
        ("none", "on"): (20, 20, 18), ("model", "off"): (9, 4, 6), ("model", "on"): (9, 4, 2),
        ("layers", "off"): (1, 4, 6), ("layers", "on"): (1, 4, 2),
    }  # fmt: skip
    stages[("none", "off")] = (20, 20, 22)
    monkeypatch.setattr(planner, "stages", lambda *flags: [StageMemory("s", 0, 0, total) for total in stages[flags]])
    both = 'offload="layers" vae_tiling="on"'
    expected = {30: "", 20: 'vae_tiling="on"', 12: 'offload="model"', 7: 'offload="layers"', 5: both}
    for capacity, remedy in expected.items():
        monkeypatch.setattr(planner, "capacity", capacity)
        words, figures = describe(planner, "none", "off")
        assert figures["fits"] is (not remedy)
        assert figures["remedy"] == (remedy or None)
        assert (f"does with {remedy}." if remedy else "It fits: ") in words
    monkeypatch.setattr(planner, "capacity", 3)
    words, figures = describe(planner, "none", "off")
    assert "nothing makes it on one device; choose a ternary checkpoint, or split" in words
    assert figures["remedy"] is None
    monkeypatch.setattr(planner, "model", dataclasses.replace(planner.model, activations="int8"))
    assert "; choose a smaller size, or split" in describe(planner, "none", "off")[0]


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--gpu", "voodoo"], "voodoo"),
        (["--size", "1000x1000"], "1000"),
        (["--batch", "0"], "--batch"),
        (["-m", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_sentence(argv, named, capsys, snapshot_message):
    assert plan.main(argv) in (2, 3)
    out, err = capsys.readouterr()
    assert out == ""
    snapshot_message(err, named)
    assert err.count("\n") == 1


@pytest.mark.gpu
@pytest.mark.slow
def test_flux_at_its_real_size_within_five_gigabytes(capsys):
    """The whole pipeline at 1024 x 1024 on an A10, compiled for it: ternary weights, T5 by layers, strips."""
    if not any(map(importlib.util.find_spec, aot.PLUGINS)):
        pytest.skip("needs the extra `aot`")
    assert plan.main(["--gpu", "a10", "--offload", "layers", "--vae-tiling", "on", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["model"] == dev().name
    assert max(stage["total"] for stage in figures["stages"]) < 5e9
    assert figures["stages"][0]["total"] < 1e9
