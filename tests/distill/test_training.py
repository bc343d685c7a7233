"""One fit: what is not finite is left out and counted, parts of a batch make the whole, rates are what they say."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flux_jax.distill.options import Options
from flux_jax.distill.training import Fit, FitConfig, init_state, schedule, update
from flux_jax.errors import UserError
from flux_jax.training import mesh as meshes
from flux_jax.training.metrics import Metrics

OPTIONS = Options(learning_steps=8, save_every=4, log_every=1, max_skipped=2, batch=4, learning_rate=0.1)


@dataclasses.dataclass(frozen=True)
class Line:
    """A linear fit, with leaves of all three kinds."""

    def __call__(self, params, batch, frozen):
        latent = params["layer"]["shadow"].astype(jnp.float32)
        y = batch["x"] @ (latent * jnp.exp(params["layer"]["log_scale"])[:, None]).T + params["bias"][None]
        return jnp.square(y - batch["y"]).mean()


def params(dtype=jnp.float32):
    latent = np.linspace(-0.5, 0.5, 6).reshape(2, 3)
    layer = {"shadow": jnp.asarray(latent, dtype), "log_scale": jnp.zeros(2)}
    return {"layer": layer, "bias": jnp.zeros(2)}


def batch(step, bad=()):
    rng = np.random.default_rng(step)
    x = rng.standard_normal((4, 3)).astype(np.float32)
    y = (x[:, :2] * 2 + 1).astype(np.float32)
    return {"x": x, "y": np.full_like(y, np.nan) if step in bad else y}


def one_device():
    return jax.make_mesh((1, 1), meshes.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:1])


def fit(folder, options=OPTIONS, bad=(), **own):
    folder.mkdir(exist_ok=True)
    plan = FitConfig.of(options, steps=options.learning_steps, **own)
    mesh = one_device()
    placed = meshes.put(params(), meshes.whole(mesh))
    found = Fit(folder, "end_to_end", plan, options, mesh, Metrics(folder)).run(
        Line(), placed, lambda step, mean: batch(step, bad), {}
    )
    return jax.device_get(found)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tmp_path):
    fit(tmp_path / "a", bad=(2, 5))
    lines = rows(tmp_path / "a")
    assert [row["skipped"] for row in lines] == [0, 0, 1, 1, 1, 2, 2, 2]
    assert lines[2]["loss"] is None and all(row["loss"] is not None for row in lines if row["step"] not in (3, 6))
    mesh = one_device()
    plan = FitConfig.of(OPTIONS, steps=8)
    state = init_state(plan, mesh, params())
    before = jax.tree.map(np.asarray, state)
    after, loss, _ = update(Line(), plan, mesh, state, batch(0, bad=(0,)), {}, np.int32(0))
    assert not np.isfinite(loss)
    assert int(after.pop("skipped")) == 1 + before.pop("skipped")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(after), before)


def test_too_many_of_them_stop_the_run_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="3 of 4 steps") as caught:
        fit(tmp_path / "b", bad=(1, 2, 3, 4))
    assert "\n" not in str(caught.value)


def test_parts_of_a_batch_make_the_whole(tmp_path):
    whole, parts = (fit(tmp_path / str(n), accumulate=n) for n in (1, 2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), whole, parts)


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_each_kind_moves_at_its_own_rate(optimizer):
    """The first update of Adam is the learning rate, whatever the gradient; Muon's has that root mean square."""
    mesh = one_device()
    plan = FitConfig.of(OPTIONS, steps=8, warmup=0.0, optimizer=optimizer)
    after, _, _ = update(Line(), plan, mesh, init_state(plan, mesh, params()), batch(0), {}, np.int32(0))
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a - b)), after["params"], params())
    root = float(np.sqrt(np.mean(moved["layer"]["shadow"] ** 2)))
    assert root == pytest.approx(0.1, rel=0.01 if optimizer == "adam" else 0.3)
    np.testing.assert_allclose(moved["layer"]["log_scale"], 0.1 * OPTIONS.scale_rate, rtol=1e-3)
    np.testing.assert_allclose(moved["bias"], 0.1 * OPTIONS.rest_rate, rtol=1e-3)
    frozen = FitConfig.of(dataclasses.replace(OPTIONS, train_rest=False), steps=8)
    after, _, _ = update(Line(), frozen, mesh, init_state(frozen, mesh, params()), batch(0), {}, np.int32(0))
    np.testing.assert_array_equal(after["params"]["bias"], 0)


def test_bf16_latents_move_by_less_than_they_resolve():
    """2e-4 is a twentieth of the distance between bfloat16 numbers around a half: to the nearest, none would move."""
    mesh, moved = one_device(), {}
    plan = FitConfig.of(OPTIONS, steps=200, learning_rate=2e-4, decay=0.0, scale_rate=0.0)
    for dtype in (jnp.float32, jnp.bfloat16):
        start = params(dtype) | {"layer": {"shadow": jnp.full((2, 3), 0.5, dtype), "log_scale": jnp.zeros(2)}}
        state = init_state(plan, mesh, start)
        for step in range(100):
            state, _, _ = update(Line(), plan, mesh, state, batch(7), {}, np.int32(step))
        latent = state["params"]["layer"]["shadow"]
        assert latent.dtype == state["ema"]["layer"]["shadow"].dtype == dtype
        moved[dtype] = float(jnp.abs(latent.astype(jnp.float32) - 0.5).mean())
    assert moved[jnp.float32] == pytest.approx(0.02, rel=0.1)
    assert moved[jnp.bfloat16] == pytest.approx(0.02, rel=0.5)


def test_schedule_rises_stays_and_falls():
    for power, after_half in ((1.0, 0.5), (2.0, 0.25)):
        plan = FitConfig.of(OPTIONS, steps=100, warmup=0.1, decay=0.5, decay_power=power)
        share = [float(schedule(plan)(step)) for step in range(101)]
        assert share[0] == pytest.approx(0.1) and share[9] == share[50] == 1 and share[100] == 0
        assert share[75] == pytest.approx(after_half)
