"""Training of the networks: a resumed run is the same run, the loss is what it says, guidance is learned."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flux_jax.config import CLIPConfig, T5Config, nano
from flux_jax.nano import flow, training
from flux_jax.nano.dataset import Dataset, example
from flux_jax.nano.scenes import COLORS, SHAPES
from flux_jax.nano.text import TextEncoders
from flux_jax.nano.training import Recipe

pytestmark = pytest.mark.usefixtures("hasty_compiler")
SMALL = dataclasses.replace(
    nano(),
    transformer=dataclasses.replace(
        nano().transformer, hidden_size=16, num_heads=1, axes_dim=(4, 6, 6), num_double_blocks=1, num_single_blocks=1,
        text_dim=8, pooled_dim=8, in_channels=8, timestep_dim=16,
    ),
    t5=T5Config(vocab_size=16, d_model=8, d_ff=16, num_heads=1, head_dim=8, num_layers=1),
    clip=CLIPConfig(vocab_size=16, hidden_size=8, mlp_dim=16, num_heads=1, num_layers=1, max_positions=16),
    sampling=dataclasses.replace(nano().sampling, height=32, width=32),
)  # fmt: skip
RECIPE = Recipe(steps=4, batch=4, warmup=1, seed=3)


@pytest.fixture(scope="module")
def dataset():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 16, (2, 20, 16)).astype(np.int32)
    empty = np.zeros((1, 16), np.int32)
    layout = rng.integers(0, 255 // 8, (20, 4, len(SHAPES) + len(COLORS))).astype(np.uint8)
    meaning = np.zeros((20, 2, 4), np.int8)
    return Dataset(rng.standard_normal((20, 4, 8)).astype(np.float16), layout, meaning, *ids, empty, empty)


@pytest.fixture(scope="module")
def networks():
    return nnx.jit(lambda: flow.Networks(SMALL, nnx.Rngs(0)))()


@pytest.fixture(scope="module")
def constants(dataset):
    return flow.constants(SMALL, nnx.jit(lambda: TextEncoders(SMALL, nnx.Rngs(1)))(), dataset)


def train(folder, dataset, networks, constants, loss=None):
    loss = loss or flow.FlowLoss(SMALL, RECIPE)
    return training.train(folder, RECIPE, networks, dataset, loss, constants, save_every=2, log_every=2)


def test_a_resumed_run_is_the_same_run(tmp_path, dataset, networks, constants):
    whole = train(tmp_path / "whole", dataset, networks, constants)

    class Killed(BaseException):
        pass

    class Interrupted(Dataset):
        def batch(self, seed, step, size):
            if step == 3:
                raise Killed  # between two saves
            return super().batch(seed, step, size)

    with pytest.raises(Killed):
        train(tmp_path / "killed", Interrupted(**vars(dataset)), networks, constants)
    resumed = train(tmp_path / "killed", dataset, networks, constants)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(whole), nnx.state(resumed))
    for name in ("whole", "killed"):
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [2, 4]
    assert json.loads((tmp_path / "whole" / "recipe.json").read_text()) == dataclasses.asdict(RECIPE)
    saved = training.averaged(tmp_path / "whole", networks)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(whole), nnx.state(saved))
    assert training.averaged(tmp_path / "none", networks) is None
    assert not (tmp_path / "none").exists()


def test_loss_is_the_squared_error_of_the_velocity(dataset, networks, constants):
    """Networks that always answer the same velocity c leave the mean square of c - (noise - x)."""
    networks, velocity = nnx.clone(networks), jnp.linspace(-1, 2, 8)
    networks.transformer.final_layer.linear.bias[...] = velocity
    batch, key = jax.tree.map(jnp.asarray, dataset.batch(0, 0, 20)), jax.random.key(1)
    minimised, loss = flow.FlowLoss(SMALL, RECIPE)(networks, batch, key, constants)
    noise = jax.random.normal(jax.random.split(key, 3)[1], (20, 4, 8))
    expected = jnp.square(velocity[None, None] - (noise - batch["tokens"])).mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert float(minimised) > float(loss)


def test_layout_loss_is_least_where_the_head_knows_the_shares():
    """By hand: the cross-entropy of the true shares is their entropy, and any other answer costs more."""
    layout = np.zeros((1, 1, len(SHAPES) + len(COLORS)), np.uint8)
    layout[0, 0, 2], layout[0, 0, len(SHAPES) + 3] = 51, 255  # a fifth of one shape, all of one colour
    logits = np.full((1, 1, len(SHAPES) + len(COLORS) + 2), -30.0, np.float32)
    logits[0, 0, [0, 3, len(SHAPES) + 1 + 4]] = np.log([0.8, 0.2, 1.0])
    entropy = -0.8 * np.log(0.8) - 0.2 * np.log(0.2)
    assert float(flow.layout_loss(jnp.asarray(logits), jnp.asarray(layout))) == pytest.approx(entropy, abs=1e-5)
    for wrong in (logits * 0.5, np.roll(logits, 1, -1)):
        assert float(flow.layout_loss(jnp.asarray(wrong), jnp.asarray(layout))) > entropy + 0.02


@pytest.mark.slow
def test_guidance_phase_starts_from_its_teacher_and_moves(tmp_path, dataset, networks, constants):
    teacher = jax.tree.map(lambda x: x + 0.05 * jnp.ones_like(x), networks)
    loss = flow.GuidanceLoss(SMALL, RECIPE)
    student = train(tmp_path / "guidance", dataset, teacher, constants | {"teacher": teacher}, loss)
    moved = [float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (student, teacher)), strict=True)]
    assert max(moved) > 0
    assert np.isfinite(moved).all()


def test_examples_depend_on_seed_and_index_alone():
    assert example(1, 5) == example(1, 5)
    assert len({example(1, i)[0] for i in range(50)}) > 30
    texts = [example(2, i)[0] for i in range(300)]
    capital, stop = (sum(f(t) for t in texts) / 300 for f in (lambda t: t[0].isupper(), lambda t: t.endswith(".")))
    assert 0.1 < capital < 0.25
    assert 0.1 < stop < 0.25
