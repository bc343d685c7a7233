"""FLUX-nano's autoencoder, trained on rendered scenes.

In: nothing but a seed; step s of a run draws its scenes from (seed, s). Out, besides the files of every run:
    vae.npz   float32 weights, {dotted parameter path: array}
    vae.json  config, seed, steps, held-out PSNR, mean and standard deviation of the unnormalised latents
Loss: |e| + 4 e^2 per pixel value (e on the [-1, 1] scale) plus KL_WEIGHT times the KL divergence to N(0, 1) per latent
value. The weight is large for an autoencoder: it spends a decibel or two on latents that a small model can denoise.
"""

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from flux_jax.config import VAEConfig, nano
from flux_jax.io.atomic import write_whole
from flux_jax.models.params import leaves
from flux_jax.models.vae import VAE
from flux_jax.nano import training
from flux_jax.nano.captions import sample
from flux_jax.nano.dataset import packed
from flux_jax.nano.scenes import render
from flux_jax.training import mesh as meshes
from flux_jax.training import optim
from flux_jax.training.loop import Trainer
from flux_jax.training.metrics import Metrics

KL_WEIGHT = 6e-4
LEARNING_RATE = 5e-3
WARM_UP = 100  # steps
CROP, CROPS = 64, 4  # edge and number of the pictures of a step, while training on crops ...
WHOLE = 2  # ... and number of whole pictures of a step, afterwards
CROP_SHARE = 0.8  # of the steps are on crops: four times cheaper, and convolutions do not care
LOG_EVERY, SAVE_EVERY = 50, 500
HELD_OUT, MEASURED = 64, 256  # pictures for PSNR, and for the statistics of the latents


def pictures(rng: np.random.Generator, count: int, size: int, split: str = "train") -> np.ndarray:
    """Scenes drawn and rendered: float32 [count, size, size, 3] in [-1, 1]."""
    images = np.stack([render(sample(rng, split=split)[1], size) for _ in range(count)])
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1)


def batch(seed: int, step: int, steps: int, size: int) -> np.ndarray:
    """The pictures of one step: random crops at first, whole pictures later."""
    rng = np.random.default_rng((seed, step))
    if step >= CROP_SHARE * steps:
        return pictures(rng, WHOLE, size)
    corners = rng.integers(0, size - CROP + 1, (CROPS, 2))
    images = pictures(rng, CROPS, size)
    return np.stack([x[i : i + CROP, j : j + CROP] for x, (i, j) in zip(images, corners, strict=True)])


def optimizer(steps: int) -> optax.GradientTransformation:
    """Muon for convolutions and linears, each a matrix [out, everything else], Adam for vectors; linear warm-up, then
    half a cosine down to zero at `steps`. In trials of 300 steps it was where Adam is after 1,200."""
    matrices = {4: optax.contrib.MuonDimensionNumbers((1, 2, 3), 0), 2: optax.contrib.MuonDimensionNumbers(1, 0)}
    schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, WARM_UP, max(steps, WARM_UP + 1))
    return optim.clipped_muon(schedule, lambda leaf: matrices.get(leaf.ndim), adam_b2=0.99)


def psnr(mse: Any) -> Any:
    """Decibels of a mean squared error on the [-1, 1] scale, for a peak-to-peak signal of 2."""
    return 10 * jnp.log10(4 / mse)


def loss_terms(vae: VAE, images: Float[Array, "b h w c"], key: jax.Array) -> tuple[Array, dict[str, Array]]:
    """The loss and its parts (means over pixel values and latent values) at a sample of the posterior."""
    mean, log_variance = vae.moments(images)
    z = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
    error = vae.decoder(z) - images
    mse = jnp.square(error).mean()
    kl = 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance).mean()
    loss = jnp.abs(error).mean() + 4 * mse + KL_WEIGHT * kl
    return loss, {"loss": loss, "mse": mse, "kl": kl}


@functools.partial(jax.jit, static_argnames=("graph", "steps", "seed"), donate_argnames="state")
def update(graph, steps: int, seed: int, state: dict, images: Float[Array, "b h w c"], step: Int[Array, ""]):
    """(state {"params", "optimizer"}, {"loss", "psnr", "kl"}) after one step of `steps`."""
    key = jax.random.fold_in(jax.random.key(seed), step)

    def loss(params):
        return loss_terms(nnx.merge(graph, params), images, key)

    gradient, terms = jax.grad(loss, has_aux=True)(state["params"])
    changes, optimizer_state = optim.descend(optimizer(steps), gradient, state["optimizer"], state["params"])
    state = {"params": optax.apply_updates(state["params"], changes), "optimizer": optimizer_state}
    return state, {"loss": terms["loss"], "psnr": psnr(terms["mse"]), "kl": terms["kl"]}


def evaluate(vae: VAE, seed: int, size: int) -> dict[str, Any]:
    """Held-out PSNR (mean over pictures, from the posterior's mode, clipped to [-1, 1]), and mean and standard
    deviation of the modes of training pictures, over all values and per channel, before shift and scale."""
    moments = jax.jit(lambda vae, x: vae.moments(x)[0])
    decode = jax.jit(lambda vae, z: vae.decoder(z))
    decibels, latents = [], []
    rng = np.random.default_rng((seed, 1 << 32))  # no step is that large
    for _ in range(0, HELD_OUT, 8):
        images = pictures(rng, 8, size, "held_out")
        error = np.clip(decode(vae, moments(vae, images)), -1, 1) - images
        decibels += psnr(np.square(error).mean((1, 2, 3))).tolist()
    for _ in range(0, MEASURED, 8):
        latents.append(np.asarray(moments(vae, pictures(rng, 8, size)), np.float64))
    latents = np.concatenate(latents)
    return {
        "psnr": float(np.mean(decibels)),
        "psnr_worst": float(np.min(decibels)),
        "latent_mean": float(latents.mean()),
        "latent_std": float(latents.std()),
        "channel_mean": latents.mean((0, 1, 2)).tolist(),
        "channel_std": latents.std((0, 1, 2)).tolist(),
    }


def train(out: Path, *, steps: int, seed: int, config: VAEConfig | None = None, size: int | None = None) -> None:
    """Runs a training in the folder `out`, or goes on with it; config and size of the pictures are nano's by default.
    UserError when a loss is not finite, or the folder holds a training with other numbers."""
    config, size = config or nano().vae, size or nano().sampling.height
    training.keep(out / "recipe.json", {"steps": steps, "seed": seed})
    graph, params = nnx.split(VAE(config, rngs=nnx.Rngs(seed)))
    params = nnx.to_pure_dict(params)
    mesh = meshes.grid(math.gcd(WHOLE, jax.device_count()))
    state = jax.device_put({"params": params, "optimizer": jax.jit(optimizer(steps).init)(params)}, meshes.whole(mesh))
    rows = meshes.by_row(mesh)
    state = Trainer(out, out.name, Metrics(out), SAVE_EVERY, LOG_EVERY).run(
        state,
        lambda state, images, step: update(graph, steps, seed, state, images, step),
        lambda step, _: jax.device_put(batch(seed, step, steps, size), rows),
        steps,
    )
    vae = nnx.merge(graph, state["params"])
    result = {"config": dataclasses.asdict(config), "size": size, "seed": seed, "steps": steps}
    result |= {"kl_weight": KL_WEIGHT, "learning_rate": LEARNING_RATE} | evaluate(vae, seed, size)
    write_whole(out / "vae.json", json.dumps(result, indent=1).encode(), overwrite=True)
    write_whole(out / "vae.npz", packed(dict(leaves(vae))), overwrite=True)  # last: where it is, the phase is done
    print(f"held-out PSNR {result['psnr']:.2f} dB, latents {result['latent_mean']:.4f} +- {result['latent_std']:.4f}")
