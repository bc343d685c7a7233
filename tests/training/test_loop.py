"""The one training loop: killed, it ends with the bits and the lines of a whole run; and it says what went wrong."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flux_jax.errors import UserError
from flux_jax.training import mesh as meshes
from flux_jax.training.loop import Trainer, last_checkpoint
from flux_jax.training.metrics import Metrics
from flux_jax.training.optim import running_mean


class Killed(BaseException):
    pass


def run(folder, *, steps=7, kill=None, bad=None, stops=(), seen=None):
    """A state that depends on every batch before: {"sum", "count"}."""

    def batches(step, state):
        if step == kill:
            raise Killed
        if seen is not None:
            seen.append((step, int(state["count"])))
        return jnp.float32(np.nan if step == bad else np.random.default_rng(step).standard_normal())

    @jax.jit
    def update(state, batch, step):
        state = {"sum": 0.9 * state["sum"] + batch, "count": state["count"] + 1}
        return state, {"loss": batch, "other": state["sum"]}

    state = jax.device_put({"sum": jnp.float32(0), "count": jnp.int32(0)}, meshes.whole(meshes.grid(1)))
    trainer = Trainer(folder, "some phase", Metrics(folder), save_every=3, log_every=2)
    return trainer.run(state, update, batches, steps, stops)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kill", [2, 3, 5])
def test_a_killed_training_ends_with_the_bits_and_the_lines_of_a_whole_one(tmp_path, kill):
    whole = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "killed", kill=kill)
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as stream:
        stream.write('{"phase": "some ph')  # the line that a kill cut off
    seen = []
    assert run(tmp_path / "killed", seen=seen) == whole
    assert seen[0] == (kill // 3 * 3,) * 2  # from the last checkpoint on, with its state
    for folder in (tmp_path / "whole", tmp_path / "killed"):
        lines = rows(folder)
        assert [(row["phase"], row["step"]) for row in lines] == [("some phase", step) for step in (2, 4, 6, 7)]
        assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
        assert len(list((folder / "checkpoints").iterdir())) == 2
    assert rows(tmp_path / "whole")[0]["loss"] == pytest.approx(
        np.mean([np.random.default_rng(step).standard_normal() for step in (0, 1)]), rel=1e-6
    )


def test_a_checkpoint_stands_before_each_stop(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, kill=5, stops=(5,))
    state = {"sum": jnp.float32(0), "count": jnp.int32(0)}
    assert last_checkpoint(tmp_path, state)[1] == 5
    assert last_checkpoint(tmp_path / "nothing", state) == (state, 0)
    assert not (tmp_path / "nothing").exists()


def test_a_loss_that_is_not_finite_ends_it_after_its_line(tmp_path):
    with pytest.raises(UserError, match="1 of 4 steps"):
        run(tmp_path, bad=2)
    assert [row["loss"] is None for row in rows(tmp_path)] == [False, False]  # of the finite ones


def test_lines_of_other_phases_stay(tmp_path):
    metrics = Metrics(tmp_path)
    for phase in ("a one", "a two", "b"):
        metrics.forget_after(phase, 0)
        metrics.log(phase=phase, step=1, loss=float("nan"))
    metrics.forget_after("a two", 0)
    assert [(row["phase"], row["loss"]) for row in metrics.rows()] == [("a one", None), ("b", None)]


def test_a_weight_that_never_moves_is_its_own_mean_to_the_bit():
    still = {"weight": jnp.asarray(np.random.default_rng(0).standard_normal(1000), jnp.float32)}
    mean = still
    for step in range(20):
        mean = jax.jit(running_mean, static_argnums=2)(mean, still, 0.99, np.int32(step))
    np.testing.assert_array_equal(mean["weight"], still["weight"])


def test_a_damaged_checkpoint_is_a_sentence_and_without_it_the_training_goes_on_from_the_one_before(tmp_path, capfd):
    whole = run(tmp_path)
    damaged = tmp_path / "checkpoints" / "7"
    for file in (damaged / "state" / "manifest.ocdbt", damaged / "_CHECKPOINT_METADATA"):
        file.write_bytes(file.read_bytes()[:20])
    capfd.readouterr()
    with pytest.raises(UserError, match=f"{damaged} is damaged, .*: delete it and run the training again"):
        run(tmp_path)
    assert "Traceback" not in (said := capfd.readouterr().err) and "ERROR" not in said
    shutil.rmtree(damaged)
    seen = []
    assert run(tmp_path, seen=seen) == whole
    assert seen[0] == (6, 6)


def test_lines_that_are_no_metrics_end_no_training(tmp_path):
    metrics = Metrics(tmp_path)
    metrics.log(phase="a", step=1, loss=1.0)
    with metrics.path.open("ab") as stream:
        stream.write(b'[]\n3\n{"step": 2}\n{"phase": 1, "step": 2}\n\xff\xfe\n{"phase": "a", "step": 2, "loss": "x"}\n')
        stream.write(b'{"phase": "a", "step": 3, "loss": 1.0, "after": "b"}\n{"pha')
    metrics.forget_after("a", 3)
    metrics.log(phase="a", step=4, loss=2.0)
    assert [row["step"] for row in metrics.rows()] == [1, 2, 3, 4]
    metrics.plot()
    assert metrics.curve.read_bytes().startswith(b"\x89PNG")
    metrics.path.unlink()
    metrics.path.mkdir()
    with pytest.raises(UserError, match="Cannot write"):
        metrics.log(phase="a", step=5)
