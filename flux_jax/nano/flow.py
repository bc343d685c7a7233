"""FLUX-nano's text encoders and transformer, trained together on rendered scenes.

In: a `Dataset` of captions and latents. Out: in a folder, Orbax checkpoints (killed at any moment, the same call goes
on), `metrics.jsonl`, `curve.png` and `recipe.json`. The same recipe runs on a CPU (data-parallel over its cores) and
on GPUs.

Phase `flow` minimises |v(x_t, t, text) - (noise - x)|^2 with x_t = (1 - t) x + t noise (rectified flow, arXiv
2403.03206); one caption in ten is empty, so that the model also knows the unconditional velocity. Beside it, a head on
the image stream behind the double blocks, which is thrown away in the end, learns what the finished picture shows at
each token: so the first blocks learn early to plan a picture (the idea of REPA, arXiv 2410.06940, with the renderer's
own truth in place of a pretrained encoder).

Phase `guidance` then teaches the guidance input g what two evaluations give, v(empty) + g (v(text) - v(empty)) (arXiv
2210.03142).
"""

import dataclasses
import functools
import json
import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, UInt8

from flux_jax.config import FluxConfig
from flux_jax.images import write_whole
from flux_jax.models.attention import rotary
from flux_jax.models.clip import CLIPText
from flux_jax.models.linear import Linear
from flux_jax.models.mixed import use_mixed_products
from flux_jax.models.t5 import T5Encoder
from flux_jax.models.transformer import Embedder, Transformer
from flux_jax.nano.dataset import Dataset
from flux_jax.nano.runs import Folder
from flux_jax.nano.world import COLORS, SHAPES
from flux_jax.sampling import position_ids, shift_mu

NO_GUIDANCE = 1.0  # the guidance input that stands for the plain conditional velocity


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a phase does; every field is a flag of `python -m flux_jax.nano.train`."""

    steps: int = 8000
    batch: int = 64
    learning_rate: float = 2e-3
    warmup: int = 200
    decay: float = 0.3  # the last share of the steps, over which the learning rate falls to zero
    ema: float = 0.999
    dropout: float = 0.1  # share of empty captions
    layout_weight: float = 0.2  # of the head's loss beside the velocity's
    examples: int = 32_768
    guidance_max: float = 6.0  # phase `guidance` draws g from [1, guidance_max]
    seed: int = 0


class Networks(nnx.Module):
    """What is trained together: text encoders, transformer, and the layout head that only training has."""

    def __init__(self, config: FluxConfig, rngs: nnx.Rngs):
        self.t5 = T5Encoder(config.t5, rngs=rngs)
        self.clip = CLIPText(config.clip, rngs=rngs)
        self.transformer = Transformer(config.transformer, rngs=rngs)
        width = config.transformer.hidden_size
        self.layout_head = Embedder(width, 2 * width, rngs=rngs)
        self.layout_classes = Linear(2 * width, len(SHAPES) + 1 + len(COLORS) + 1, rngs=rngs)
        # Every block starts as the identity and the velocity as zero (adaLN-Zero, DiT section 3.2).
        blocks = self.transformer
        linears = (blocks.double_blocks.img.mod, blocks.double_blocks.txt.mod, blocks.single_blocks.mod)
        for linear in (*linears, blocks.final_layer.mod, blocks.final_layer.linear):
            linear.weight[...] = jnp.zeros_like(linear.weight[...])
        self.transformer.unroll = True
        use_mixed_products(self)

    def __call__(
        self,
        x: Float[Array, "b i c"],
        t: Float[Array, " b"],
        guidance: Float[Array, " b"],
        t5_ids: Int[Array, "b k"],
        clip_ids: Int[Array, "b p"],
        rope: Float[Array, "2 n r"],
    ) -> tuple[Float[Array, "b i c"], Float[Array, "b i k"]]:
        """(velocity, layout): of each token, the logits of no shape and each shape, of no colour and each colour."""
        modulation = self.transformer.modulation(t, guidance, self.clip(clip_ids))
        img, txt = self.transformer.streams(x, self.t5(t5_ids), modulation, rope)
        layout = self.layout_classes(jax.nn.silu(self.layout_head(jax.nn.standardize(img))))
        return self.transformer.velocity(img, txt, modulation, rope), layout


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Muon for the matrices inside the blocks (arXiv 2502.16982, update sizes matched to AdamW's), Adam for the rest,
    behind a clip of the gradient's norm; warm-up, constant, then linear decay to zero."""
    decay = int(recipe.steps * recipe.decay)
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, recipe.learning_rate, recipe.warmup),
            optax.constant_schedule(recipe.learning_rate),
            optax.linear_schedule(recipe.learning_rate, 0.0, decay),
        ],
        [recipe.warmup, recipe.steps - decay],
    )
    stacked_matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)

    def dimensions(params):
        return jax.tree.map(lambda leaf: stacked_matrix if leaf.ndim == 3 else None, params)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(schedule, consistent_rms=0.2, muon_weight_dimension_numbers=dimensions),
    )


def noise_levels(key, config: FluxConfig, count: int) -> Float[Array, " count"]:
    """t in (0, 1) for training: logit-normal (arXiv 2403.03206, section 3.1), shifted as the sampler's schedule is."""
    mu = shift_mu(config.sampling, math.prod(config.default_grid))
    return jax.nn.sigmoid(mu + jax.random.normal(key, (count,)))


def flow_loss(networks: Networks, batch, key, rope, config: FluxConfig, recipe: Recipe):
    """(what is minimised, mean squared error of the velocity) on a batch; see the module's docstring."""
    keys = jax.random.split(key, 3)
    size = len(batch["tokens"])
    t = noise_levels(keys[0], config, size)
    noise = jax.random.normal(keys[1], batch["tokens"].shape)
    dropped = jax.random.bernoulli(keys[2], recipe.dropout, (size, 1))
    t5_ids = jnp.where(dropped, batch["empty_t5"], batch["t5"])
    clip_ids = jnp.where(dropped, batch["empty_clip"], batch["clip"])
    x = mix(batch["tokens"], noise, t)
    velocity, layout = networks(x, t, jnp.full(size, NO_GUIDANCE), t5_ids, clip_ids, rope)
    loss = jnp.square(velocity - (noise - batch["tokens"])).mean()
    return loss + recipe.layout_weight * layout_loss(layout, batch["layout"]), loss


def layout_loss(logits: Float[Array, "b i k"], layout: UInt8[Array, "b i s"]) -> Float[Array, ""]:
    """Cross-entropy of shapes plus that of colours, in nats per token; each class's share of the token's square (and
    nothing's, the rest) is its probability."""

    def cross_entropy(logits, share):
        share = jnp.concatenate([1 - share.sum(-1, keepdims=True), share], -1)
        return -(share * jax.nn.log_softmax(logits)).sum(-1).mean()

    shapes, colors = jnp.split(layout.astype(jnp.float32) / 255, [len(SHAPES)], -1)
    return cross_entropy(logits[..., : len(SHAPES) + 1], shapes) + cross_entropy(logits[..., len(SHAPES) + 1 :], colors)


def guidance_loss(networks: Networks, teacher: Networks, batch, key, rope, config: FluxConfig, recipe: Recipe):
    """(loss, loss): mean squared error against the teacher's guided velocity, at a random guidance for each example."""
    keys = jax.random.split(key, 3)
    size = len(batch["tokens"])
    t = noise_levels(keys[0], config, size)
    x = mix(batch["tokens"], jax.random.normal(keys[1], batch["tokens"].shape), t)
    guidance = jax.random.uniform(keys[2], (size,), minval=NO_GUIDANCE, maxval=recipe.guidance_max)
    plain = jnp.full(size, NO_GUIDANCE)
    conditional, _ = teacher(x, t, plain, batch["t5"], batch["clip"], rope)
    empty_t5, empty_clip = (jnp.broadcast_to(batch[f"empty_{name}"], batch[name].shape) for name in ("t5", "clip"))
    unconditional, _ = teacher(x, t, plain, empty_t5, empty_clip, rope)
    target = unconditional + guidance[:, None, None] * (conditional - unconditional)
    velocity, _ = networks(x, t, guidance, batch["t5"], batch["clip"], rope)
    loss = jnp.square(velocity - jax.lax.stop_gradient(target)).mean()
    return loss, loss


def mix(x: Float[Array, "b i c"], noise: Float[Array, "b i c"], t: Float[Array, " b"]) -> Float[Array, "b i c"]:
    """x_t = (1 - t) x + t noise."""
    t = t[:, None, None]
    return (1 - t) * x + t * noise


@functools.partial(jax.jit, static_argnames=("graph", "config", "recipe"), donate_argnames="state")
def update(graph, config: FluxConfig, recipe: Recipe, state: dict, batch: dict, step: Int[Array, ""], rope, teacher):
    """(state, velocity's loss, gradient norm) after one step; every random draw is a function of (seed, step)."""
    key = jax.random.fold_in(jax.random.key(recipe.seed), step)

    def loss(params):
        networks = nnx.merge(graph, params)
        if teacher is None:
            return flow_loss(networks, batch, key, rope, config, recipe)
        return guidance_loss(networks, nnx.merge(graph, teacher), batch, key, rope, config, recipe)

    (_, value), gradient = jax.value_and_grad(loss, has_aux=True)(state["params"])
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
        updates, optimizer_state = optimizer(recipe).update(gradient, state["optimizer"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    decay = jnp.minimum(recipe.ema, (1 + step) / (10 + step))
    ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state["ema"], params)
    return {"params": params, "ema": ema, "optimizer": optimizer_state}, value, optax.tree.norm(gradient)


class Trainer:
    """One phase of training: state on the devices, checkpoints and metrics in `folder`."""

    def __init__(self, folder: Path, config: FluxConfig, recipe: Recipe, initial: dict, teacher: dict | None = None):
        self.folder, self.config, self.recipe, self.teacher = Folder(folder), config, recipe, teacher
        self.mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
        self.replicated = NamedSharding(self.mesh, PartitionSpec())
        self.graph = nnx.graphdef(nnx.eval_shape(lambda: Networks(config, nnx.Rngs(0))))
        ids = position_ids(*config.default_grid, config.sampling.max_sequence_length)
        self.rope = jnp.asarray(rotary(ids, config.transformer.axes_dim, config.transformer.theta))
        params, ema = (jax.tree.map(jnp.copy, initial) for _ in range(2))  # updates donate their buffers
        state = {"params": params, "ema": ema, "optimizer": jax.jit(optimizer(recipe).init)(params)}
        self.state, self.step = self.folder.restore(jax.device_put(state, self.replicated))

    def run(self, dataset: Dataset, save_every: int = 500, log_every: int = 50) -> dict:
        """Train to the recipe's last step; returns the averaged parameters."""
        self.folder.forget_after(self.step)
        recipe = json.dumps(dataclasses.asdict(self.recipe), indent=1) + "\n"
        write_whole(self.folder.path / "recipe.json", recipe.encode(), overwrite=True)
        by_example = NamedSharding(self.mesh, PartitionSpec("data"))
        empty = {"empty_t5": dataset.empty_t5, "empty_clip": dataset.empty_clip}
        empty = jax.device_put(empty, self.replicated)
        teacher = None if self.teacher is None else jax.device_put(self.teacher, self.replicated)
        losses, start = [], time.perf_counter()
        while self.step < self.recipe.steps:
            batch = jax.device_put(dataset.batch(self.recipe.seed, self.step, self.recipe.batch), by_example)
            self.state, loss, norm = update(
                self.graph,
                self.config,
                self.recipe,
                self.state,
                batch | empty,
                jnp.int32(self.step),
                self.rope,
                teacher,
            )
            losses.append(loss)
            self.step += 1
            if self.step % log_every == 0:
                mean = float(np.mean(jax.device_get(losses)))
                seconds, losses, start = time.perf_counter() - start, [], time.perf_counter()
                self.folder.log(
                    step=self.step,
                    loss=round(mean, 5),
                    gradient_norm=round(float(norm), 4),
                    samples_per_second=round(log_every * self.recipe.batch / seconds, 1),
                )
                if not np.isfinite(mean):
                    raise FloatingPointError(f"the loss is {mean} at step {self.step}: lower --learning-rate")
            if self.step % save_every == 0 or self.step == self.recipe.steps:
                self.folder.save(self.step, self.state)
        return self.state["ema"]


def initial_params(config: FluxConfig, seed: int) -> dict:
    return nnx.to_pure_dict(nnx.state(Networks(config, nnx.Rngs(seed))))
