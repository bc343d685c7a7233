"""LPIPS: how far two pictures lie apart to people's eyes (Zhang et al. 2018, arXiv 1801.03924), version 0.1, AlexNet.

In: the weights of `lpips.LPIPS(net="alex")` as safetensors, two pictures uint8 [h, w, 3]. Out: their distance, 0 where
they are equal. The file takes the packages `lpips` and `torchvision`, once, anywhere, and two lines:

    import lpips, safetensors.torch
    safetensors.torch.save_model(lpips.LPIPS(net="alex"), "lpips-alex.safetensors")

The distance: AlexNet's channels behind each of its five ReLUs, scaled to length one at every point; their squared
differences, weighted by channel; the mean over the picture, and the sum over the five.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from flux_jax.compare.networks import Judge, checked, open_tensors
from flux_jax.errors import UserError
from flux_jax.models.layers import Conv, Linear

LAYERS = (
    (64, 11, 4, 2),
    (192, 5, 1, 2),
    (384, 3, 1, 1),
    (256, 3, 1, 1),
    (256, 3, 1, 1),
)  # out, kernel, stride, padding
POOLED = (1, 2)  # layers whose input is pooled, 3 x 3 by steps of 2
PLACES = (0, 3, 6, 8, 10)  # of the layers in torchvision's `features`
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of values in [-1, 1]: the version's own constants
LEAST = 31  # pixels of an edge: smaller pictures end inside the network


class LPIPS(nnx.Module):
    """Two pictures float32 [b, h, w, 3] in [-1, 1], h and w at least 31 -> distances [b]."""

    def __init__(self, *, rngs: nnx.Rngs):
        inputs = (3, *(layer[0] for layer in LAYERS))
        self.convs = nnx.List(
            [
                Conv(i, o, kernel, stride=stride, padding=((pad, pad),) * 2, rngs=rngs)
                for i, (o, kernel, stride, pad) in zip(inputs, LAYERS, strict=False)
            ]
        )
        self.weights = nnx.List([Linear(layer[0], 1, bias=False, rngs=rngs) for layer in LAYERS])

    def __call__(self, a: Float[Array, "b h w 3"], b: Float[Array, "b h w 3"]) -> Float[Array, " b"]:
        x = jnp.concatenate([a, b])
        shift, scale = (jnp.asarray(v, x.dtype).reshape(1, 1, 1, 3) for v in (SHIFT, SCALE))
        x, distance = (x - shift) / scale, jnp.zeros(len(a), x.dtype)
        for i, (conv, weights) in enumerate(zip(self.convs, self.weights, strict=True)):
            if i in POOLED:
                x = nnx.max_pool(x, (3, 3), strides=(2, 2))
            x = jax.nn.relu(conv(x))
            of_a, of_b = jnp.split(unit(x), 2)
            distance += weights(jnp.square(of_a - of_b)).mean((1, 2, 3))
        return distance


def unit(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Scaled to length one over the channels; zero stays zero."""
    return x / (jnp.sqrt(jnp.square(x).sum(-1, keepdims=True)) + 1e-10)


def judge(path: Path, height: int, width: int) -> Judge:
    """Measures `lpips` of pictures of that size. UserError for files that are not LPIPS, and for pictures too small."""
    if min(height, width) < LEAST:
        raise UserError(f"LPIPS needs pictures of at least {LEAST} x {LEAST} pixels, not {width} x {height}.")
    source = open_tensors(path)
    load = checked(nnx.eval_shape(lambda: LPIPS(rngs=nnx.Rngs(0))), source, hub_name, "LPIPS with AlexNet")

    def start():
        network, run = load(), jax.jit(lambda network, a, b: network(a, b))

        def measure(index: int, a: UInt8[np.ndarray, "h w 3"], b: UInt8[np.ndarray, "h w 3"]) -> dict[str, float]:
            signed = (x[None].astype(np.float32) / np.float32(127.5) - np.float32(1) for x in (a, b))
            return {"lpips": float(run(network, *signed)[0])}

        return measure

    return start


def hub_name(ours: str) -> str:
    """`convs.1.bias` -> `net.slice2.3.bias`; `weights.1.weight` -> `lin1.model.1.weight`."""
    group, place, kind = ours.split(".")
    if group == "weights":
        return f"lin{place}.model.1.{kind}"
    return f"net.slice{int(place) + 1}.{PLACES[int(place)]}.{kind}"
