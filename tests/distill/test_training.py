"""How a student learns: bad steps are left out and counted, microbatches make the whole, rates are what they say."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flux_jax.distill.options import Options
from flux_jax.distill.training import FitConfig, fit, init_state, update
from flux_jax.errors import UserError
from flux_jax.training import mesh as meshes
from flux_jax.training.loop import Trainer
from flux_jax.training.metrics import Metrics
from flux_jax.training.optim import share_of_rate

OPTIONS = Options(learning_steps=8, save_every=4, log_every=1, max_skipped=2, batch=4, learning_rate=0.1)


@dataclasses.dataclass(frozen=True)
class Line:
    """A linear fit, with leaves of all three kinds."""

    def __call__(self, params, batch, constants):
        shadow = params["layer"]["shadow"].astype(jnp.float32)
        y = batch["x"] @ (shadow * jnp.exp(params["layer"]["log_scale"])[:, None]).T + params["bias"][None]
        return jnp.square(y - batch["y"]).mean()


def params(dtype=jnp.float32):
    shadow = np.linspace(-0.5, 0.5, 6).reshape(2, 3)
    layer = {"shadow": jnp.asarray(shadow, dtype), "log_scale": jnp.zeros(2)}
    return {"layer": layer, "bias": jnp.zeros(2)}


def batch(step, bad=()):
    rng = np.random.default_rng(step)
    x = rng.standard_normal((4, 3)).astype(np.float32)
    y = (x[:, :2] * 2 + 1).astype(np.float32)
    return {"x": x, "y": np.full_like(y, np.nan) if step in bad else y}


def trained(folder, options=OPTIONS, bad=(), **own):
    plan, mesh = FitConfig.of(options, steps=options.learning_steps, **own), meshes.grid(1)
    often = options.save_every, options.log_every, options.max_skipped
    trainer = Trainer(folder, "end_to_end", Metrics(folder), *often)
    placed = meshes.put(params(), meshes.whole(mesh))
    return jax.device_get(fit(trainer, plan, mesh, Line(), placed, lambda step, mean: batch(step, bad), {}))


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tmp_path):
    trained(tmp_path / "a", bad=(2, 5))
    lines = rows(tmp_path / "a")
    assert [row["skipped"] for row in lines] == [0, 0, 1, 1, 1, 2, 2, 2]
    assert lines[2]["loss"] is None and all(row["loss"] is not None for row in lines if row["step"] not in (3, 6))
    mesh = meshes.grid(1)
    plan = FitConfig.of(OPTIONS, steps=8)
    state = init_state(plan, mesh, params())
    before = jax.tree.map(np.asarray, state)
    after, numbers = update(Line(), plan, mesh, state, batch(0, bad=(0,)), {}, np.int32(0))
    assert not np.isfinite(numbers["loss"])
    assert int(after.pop("skipped")) == 1 + before.pop("skipped")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(after), before)


def test_too_many_of_them_stop_the_run_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="3 of 4 steps") as caught:
        trained(tmp_path / "b", bad=(1, 2, 3, 4))
    assert "\n" not in str(caught.value)


def test_microbatches_make_the_whole(tmp_path):
    whole, summed = (trained(tmp_path / str(n), accumulate=n) for n in (1, 2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), whole, summed)


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_each_kind_moves_at_its_own_rate(optimizer):
    """The first update of Adam is the learning rate, whatever the gradient; Muon's has that root mean square."""
    mesh = meshes.grid(1)
    plan = FitConfig.of(OPTIONS, steps=8, warmup=0.0, optimizer=optimizer)
    after, _ = update(Line(), plan, mesh, init_state(plan, mesh, params()), batch(0), {}, np.int32(0))
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a - b)), after["params"], params())
    root = float(np.sqrt(np.mean(moved["layer"]["shadow"] ** 2)))
    assert root == pytest.approx(0.1, rel=0.01 if optimizer == "adam" else 0.3)
    np.testing.assert_allclose(moved["layer"]["log_scale"], 0.1 * OPTIONS.scale_rate, rtol=1e-3)
    np.testing.assert_allclose(moved["bias"], 0.1 * OPTIONS.rest_rate, rtol=1e-3)
    frozen = FitConfig.of(dataclasses.replace(OPTIONS, train_rest=False), steps=8)
    after, _ = update(Line(), frozen, mesh, init_state(frozen, mesh, params()), batch(0), {}, np.int32(0))
    np.testing.assert_array_equal(after["params"]["bias"], 0)


def test_bf16_shadows_move_by_less_than_they_resolve():
    """2e-4 is a twentieth of the distance between bfloat16 numbers around a half: to the nearest, none would move."""
    mesh, moved = meshes.grid(1), {}
    plan = FitConfig.of(OPTIONS, steps=200, learning_rate=2e-4, decay=0.0, scale_rate=0.0)
    for dtype in (jnp.float32, jnp.bfloat16):
        start = params(dtype) | {"layer": {"shadow": jnp.full((2, 3), 0.5, dtype), "log_scale": jnp.zeros(2)}}
        state = init_state(plan, mesh, start)
        for step in range(100):
            state, _ = update(Line(), plan, mesh, state, batch(7), {}, np.int32(step))
        shadow = state["params"]["layer"]["shadow"]
        assert shadow.dtype == state["ema"]["layer"]["shadow"].dtype == dtype
        moved[dtype] = float(jnp.abs(shadow.astype(jnp.float32) - 0.5).mean())
    assert moved[jnp.float32] == pytest.approx(0.02, rel=0.1)
    assert moved[jnp.bfloat16] == pytest.approx(0.02, rel=0.5)


def test_rate_rises_stays_and_falls():
    for power, after_half in ((1.0, 0.5), (2.0, 0.25)):
        share = [float(share_of_rate(100, warmup=0.1, decay=0.5, power=power)(step)) for step in range(101)]
        assert share[0] == pytest.approx(0.1) and share[9] == share[50] == 1 and share[100] == 0
        assert share[75] == pytest.approx(after_half)
