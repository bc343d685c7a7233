"""A finished training as the checkpoint that ships: all that goes with the weights is in it when it is hashed."""

import json
import pickle
import shutil
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from flux_jax.checkpoints import checksums
from flux_jax.checkpoints.checkpoint import Checkpoint, resolve
from flux_jax.checkpoints.tokenizers import Tokenizers
from flux_jax.cli.nano import main
from flux_jax.config import nano
from flux_jax.errors import UserError
from flux_jax.io import locks
from flux_jax.models.layers import Linear
from flux_jax.models.params import abstract_component, assemble, leaf_table
from flux_jax.nano import card, dataset, export, training

TOKENIZERS = Tokenizers.load(resolve("nano-bf16") / "tokenizers", nano())


def zeros(component):
    module = abstract_component(component, nano())
    shapes = leaf_table(module)
    return assemble(module, lambda names: {name: jnp.zeros(shapes[name]) for name in names})


def test_card_score_and_training_are_hashed_with_the_weights(tmp_path, monkeypatch):
    shipped, run, evaluation, out = resolve("nano-bf16"), tmp_path / "run", tmp_path / "evaluation", tmp_path / "out"
    phases = {"text": SimpleNamespace(encoders=SimpleNamespace(t5=zeros("t5"), clip=zeros("clip")))}
    phases["guidance"] = SimpleNamespace(transformer=zeros("transformer"))
    monkeypatch.setattr(export, "load_vae", lambda folder: (nano(), zeros("vae")))
    monkeypatch.setattr(export, "trained", lambda run, phase, config: phases[phase])
    for phase in ("vae", "text", "flow", "guidance"):
        shutil.copytree(shipped / "training" / phase, run / phase)
    evaluation.mkdir()
    shutil.copy(shipped / "training" / "summary.json", evaluation)
    shutil.copy(shipped / "sheet.png", evaluation)
    export.export(run, out, evaluation)
    listed = {line.split("  ", 1)[1] for line in (out / checksums.SUMS).read_text().splitlines()}
    assert checksums.check(out) == len(listed)
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} == listed | {checksums.SUMS}
    as_shipped = {path.relative_to(shipped) for path in (shipped / "training").rglob("*") if path.is_file()}
    assert {path.as_posix() for path in as_shipped} <= listed
    for path in as_shipped:
        assert (out / path).read_bytes() == (shipped / path).read_bytes()
    assert "Score" in (out / "README.md").read_text() and "sheet.png" in listed
    assert Checkpoint.open(out).manifest["source"]["from"] == "flux_jax.nano.train, phase guidance"


def test_a_phase_that_has_not_begun_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("flux_jax.nano.flow.Networks", lambda config, rngs: Linear(2, 2, rngs=rngs))
    with pytest.raises(UserError, match="holds no training: phase flow of"):
        export.trained(tmp_path, "flow", nano())
    assert not any(tmp_path.iterdir())
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "vae.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match="has no finished VAE"):
        export.load_vae(tmp_path / "vae")


@pytest.fixture
def run(tmp_path):
    """The records of the training that ships."""
    training = resolve("nano-bf16") / "training"
    for phase in ("vae", "text", "flow", "guidance"):
        shutil.copytree(training / phase, tmp_path / "run" / phase)
    return tmp_path / "run"


def test_damaged_records_of_a_training_are_sentences(run, tmp_path):
    for name, text in {
        "vae/vae.json": "{}", "text/recipe.json": "[]", "text/understood.json": '{"t5": "much"}',
        "flow/metrics.jsonl": "{", "guidance/recipe.json": '{"steps": 1}',
    }.items():  # fmt: skip
        kept = (run / name).read_bytes()
        (run / name).write_text(text)
        with pytest.raises(UserError, match="run its phase of flux_jax.nano.train again"):
            card.card(run)
        (run / name).write_bytes(kept)
    (tmp_path / "summary.json").write_text('{"sampling": {}}')
    with pytest.raises(UserError, match=f"{tmp_path / 'summary.json'} is not what an evaluation writes"):
        card.card(run, tmp_path)
    with pytest.raises(UserError, match="does not say how it was distilled"):
        card.student_card({"distilled": True})


def test_a_damaged_vae_is_a_sentence(run):
    np.savez(run / "vae" / "vae.npz", other=np.zeros(3))
    for spoil in (lambda: None, lambda: (run / "vae" / "vae.npz").write_bytes(b"PK\x03\x04")):
        spoil()
        with pytest.raises(UserError, match=f"{run / 'vae'} does not hold what phase vae writes"):
            export.load_vae(run / "vae")


def test_examples_are_built_once_and_only_taken_where_they_are_those_asked_for(tmp_path, monkeypatch):
    """A file of another number of scenes, of another kind, or with objects in it, is none."""
    arrays = {name: np.zeros((3, 1), np.int8) for name in ("tokens", "layout", "meaning", "t5", "clip")}
    arrays |= {"empty_t5": np.zeros((1, 1)), "empty_clip": np.zeros((1, 1))}
    monkeypatch.setattr(dataset, "_build", lambda *_: arrays)
    config, path = nano(), tmp_path / "latents.npz"
    vae = abstract_component("vae", config)

    def build(count):
        return dataset.load_or_build(path, vae, TOKENIZERS, config, seed=0, count=count)

    assert len(build(3).tokens) == 3
    with pytest.raises(UserError, match="does not hold the 4 examples that are asked for: delete it"):
        build(4)
    monkeypatch.undo()
    assert len(build(3).tokens) == 3
    for damage in (path.read_bytes()[:200], dataset.packed({"tokens": np.zeros(3)}), pickle.dumps(arrays)):
        path.write_bytes(damage)
        with pytest.raises(UserError, match="not what was written .*: delete it"):
            build(3)
    np.savez(path, **arrays | {"t5": np.array([None] * 3)})
    with pytest.raises(UserError, match="not what was written .*: delete it"):
        build(3)


def test_a_training_by_another_recipe_is_refused_and_one_that_has_not_saved_is_not(tmp_path):
    path = tmp_path / "flow" / "recipe.json"
    training.keep(path, {"steps": 3, "seed": 0})
    training.keep(path, {"steps": 4, "seed": 0})  # nothing has been learned yet
    (tmp_path / "flow" / "checkpoints").mkdir()
    training.keep(path, {"steps": 4, "seed": 0})
    with pytest.raises(UserError, match='begun with steps="4": give the same again, or delete it'):
        training.keep(path, {"steps": 5, "seed": 0})
    path.write_text("[]")
    with pytest.raises(UserError, match=f"delete {path.parent} to train anew"):
        training.keep(path, {"steps": 4, "seed": 0})
    with locks.alone(tmp_path):
        assert main(["flow", "--run", str(tmp_path)]) == 2
