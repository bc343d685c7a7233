"""A finished training as the checkpoint that ships: all that goes with the weights is in it when it is hashed."""

import json
import shutil
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from flux_jax.checkpoints import checksums
from flux_jax.checkpoints.checkpoint import Checkpoint, resolve
from flux_jax.config import nano
from flux_jax.errors import UserError
from flux_jax.models.layers import Linear
from flux_jax.models.params import abstract_component, assemble, leaf_table
from flux_jax.nano import export


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
