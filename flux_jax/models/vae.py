"""FLUX's convolutional autoencoder (the paper's KL autoencoder without its two 1 x 1 convolutions).

Pictures float [b, h, w, image_channels] in [-1, 1] <-> latents [b, h / factor, w / factor, latent_channels], with
factor 2 ** (levels - 1) and h, w multiples of it. Each level is a few residual blocks; between levels the encoder
halves by a strided convolution and the decoder doubles by repeating pixels; attention over all positions is in the
middle. Architecture: Rombach et al. 2022 (arXiv 2112.10752), appendix; as published, diffusers' `AutoencoderKL`.

`strip_bytes`, where a function takes it: the size in float32 of what is computed at a time (see
`flux_jax.models.vae_tiling`); None computes whole pictures. It changes memory, not the result, but for the rounding of
sums.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from flux_jax.config import VAEConfig
from flux_jax.models.attention import softmax_attention
from flux_jax.models.layers import Conv, Linear
from flux_jax.models.vae_tiling import by_strips, rows_within

EPS = 1e-6  # of every group norm; FLUX's files do not store it


class GroupNorm(nnx.Module):
    """Norm over (positions, channels of one group) and an affine map per channel, in float32; returns x's dtype."""

    def __init__(self, channels: int, groups: int, *, dtype=jnp.float32):
        self.weight = nnx.Param(jnp.ones((channels,), dtype))
        self.bias = nnx.Param(jnp.zeros((channels,), dtype))
        self.groups = groups

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return self.apply(x, *self.statistics(x))

    def statistics(self, x: Float[Array, "b h w c"]) -> tuple[Float[Array, "b 1 1 c"], Float[Array, "b 1 1 c"]]:
        """Mean, and weight over standard deviation, of each channel's group in whole pictures; float32."""
        # Positions are summed before channels: the long reduction then runs along contiguous channels.
        y = x.astype(jnp.float32)
        mean = self._group_mean(y)
        return mean, jax.lax.rsqrt(self._group_mean(jnp.square(y - mean)) + EPS) * self._expand(self.weight)

    def apply(
        self, x: Float[Array, "b r w c"], mean: Float[Array, "b 1 1 c"], scale: Float[Array, "b 1 1 c"]
    ) -> Float[Array, "b r w c"]:
        """Any rows of the pictures whose statistics these are, normalised."""
        return ((x.astype(jnp.float32) - mean) * scale + self._expand(self.bias)).astype(x.dtype)

    def _group_mean(self, x: Float[Array, "b h w c"]) -> Float[Array, "b 1 1 c"]:
        b, _, _, c = x.shape
        mean = x.mean((1, 2)).reshape(b, self.groups, c // self.groups).mean(-1)
        return jnp.repeat(mean, c // self.groups, axis=-1)[:, None, None]

    def _expand(self, param: nnx.Param) -> Float[Array, "1 1 1 c"]:
        return param[...].astype(jnp.float32)[None, None, None]


def filtered(norm: GroupNorm, conv: Conv, x: Float[Array, "b h w i"], strip_bytes: int | None) -> Array:
    """conv(silu(norm(x))), float [b, h, w, o]: what every block of the autoencoder is made of."""
    if strip_bytes is None:
        return conv(nnx.silu(norm(x)))
    statistics = norm.statistics(x)
    rows = rows_within(x.shape[1], 4 * x.shape[0] * x.shape[2] * x.shape[3], strip_bytes)
    # Beyond the picture lie the zeros of the convolution's own padding, not the norm of anything.
    return by_strips(lambda y, inside: conv(jnp.where(inside, nnx.silu(norm.apply(y, *statistics)), 0.0)), x, rows)


class ResnetBlock(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))); a 1 x 1 convolution carries x where the channels change."""

    def __init__(self, d_in: int, d_out: int, groups: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(d_in, groups, dtype=dtype)
        self.conv1 = Conv(d_in, d_out, 3, dtype=dtype, rngs=rngs)
        self.norm2 = GroupNorm(d_out, groups, dtype=dtype)
        self.conv2 = Conv(d_out, d_out, 3, dtype=dtype, rngs=rngs)
        self.shortcut = None if d_in == d_out else Conv(d_in, d_out, 1, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w i"], strip_bytes: int | None = None) -> Float[Array, "b h w o"]:
        y = filtered(self.norm1, self.conv1, x, strip_bytes)
        y = filtered(self.norm2, self.conv2, y, strip_bytes)
        return y + (x if self.shortcut is None else self.shortcut(x))


class Attention(nnx.Module):
    """x + attention over all h * w positions with a single head as wide as the channels."""

    def __init__(self, channels: int, groups: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.norm = GroupNorm(channels, groups, dtype=dtype)
        self.q = Linear(channels, channels, dtype=dtype, rngs=rngs)
        self.k = Linear(channels, channels, dtype=dtype, rngs=rngs)
        self.v = Linear(channels, channels, dtype=dtype, rngs=rngs)
        self.out = Linear(channels, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"], strip_bytes: int | None = None) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        y = self.norm(x).reshape(b, h * w, c)
        keys, values = self.k(y)[:, :, None], self.v(y)[:, :, None]

        def attend(queries: Float[Array, "b q c"]) -> Float[Array, "b q c"]:
            return self.out(softmax_attention(self.q(queries)[:, :, None], keys, values))

        if strip_bytes is None:
            return x + attend(y).reshape(b, h, w, c)
        rows = rows_within(h, 4 * b * w * h * w, strip_bytes)
        return x + by_strips(
            lambda q, _: attend(q.reshape(b, -1, c)).reshape(q.shape), y.reshape(x.shape), rows, halo=0
        )


class Middle(nnx.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, groups: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.resnet1 = ResnetBlock(channels, channels, groups, dtype=dtype, rngs=rngs)
        self.attention = Attention(channels, groups, dtype=dtype, rngs=rngs)
        self.resnet2 = ResnetBlock(channels, channels, groups, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"], strip_bytes: int | None = None) -> Float[Array, "b h w c"]:
        for layer in (self.resnet1, self.attention, self.resnet2):
            x = layer(x, strip_bytes)
        return x


def double(x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w c"]:
    """Each pixel repeated 2 x 2."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


class Level(nnx.Module):
    """The residual blocks of one resolution, d_in to d_out channels, then a 3 x 3 convolution to the next, if any.

    resample: "halve" (stride 2, padded below and to the right only, as in the original), "double" (after repeating each
    pixel 2 x 2) or None.
    """

    def __init__(self, d_in: int, d_out: int, layers: int, groups: int, resample: str | None, *, dtype, rngs: nnx.Rngs):
        self.resnets = nnx.List(
            ResnetBlock(d_in if i == 0 else d_out, d_out, groups, dtype=dtype, rngs=rngs) for i in range(layers)
        )
        self.doubles = resample == "double"
        layout: dict[str, Any] = {"stride": 2, "padding": ((0, 1), (0, 1))} if resample == "halve" else {}
        self.resample = Conv(d_out, d_out, 3, **layout, dtype=dtype, rngs=rngs) if resample else None

    def __call__(self, x: Float[Array, "b h w i"], strip_bytes: int | None = None) -> Float[Array, "b h2 w2 o"]:
        for resnet in self.resnets:
            x = resnet(x, strip_bytes)
        if self.resample is None:
            return x
        if not self.doubles:
            return self.resample(x)
        resample = self.resample
        if strip_bytes is None:
            return resample(double(x))
        rows = rows_within(x.shape[1], 16 * x.shape[0] * x.shape[2] * x.shape[3], strip_bytes)
        return by_strips(lambda y, inside: resample(double(jnp.where(inside, y, 0.0))), x, rows, factor=2)


class Encoder(nnx.Module):
    """Pictures [b, h, w, image_channels] -> mean and log variance, [b, h / factor, w / factor, 2 * latent_channels]."""

    def __init__(self, config: VAEConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        channels, groups = config.channels, config.norm_groups
        self.conv_in = Conv(config.image_channels, channels[0], 3, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(
            Level(d_in, d_out, config.layers_per_block, groups, resample, dtype=dtype, rngs=rngs)
            for d_in, d_out, resample in _levels(channels, "halve")
        )
        self.mid = Middle(channels[-1], groups, dtype=dtype, rngs=rngs)
        self.norm_out = GroupNorm(channels[-1], groups, dtype=dtype)
        self.conv_out = Conv(channels[-1], 2 * config.latent_channels, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        x = self.conv_in(x)
        for block in self.blocks:
            x = block(x)
        return filtered(self.norm_out, self.conv_out, self.mid(x), None)


class Decoder(nnx.Module):
    """Latents [b, h, w, latent_channels] -> pictures [b, h * factor, w * factor, image_channels]; deepest first."""

    def __init__(self, config: VAEConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        channels, groups = config.channels[::-1], config.norm_groups
        self.conv_in = Conv(config.latent_channels, channels[0], 3, dtype=dtype, rngs=rngs)
        self.mid = Middle(channels[0], groups, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(
            Level(d_in, d_out, config.layers_per_block + 1, groups, resample, dtype=dtype, rngs=rngs)
            for d_in, d_out, resample in _levels(channels, "double")
        )
        self.norm_out = GroupNorm(channels[-1], groups, dtype=dtype)
        self.conv_out = Conv(channels[-1], config.image_channels, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w i"], strip_bytes: int | None = None) -> Float[Array, "b h2 w2 o"]:
        x = self.mid(self.conv_in(x), strip_bytes)
        for block in self.blocks:
            x = block(x, strip_bytes)
        return filtered(self.norm_out, self.conv_out, x, strip_bytes)


def _levels(channels: tuple[int, ...], resample: str) -> list[tuple[int, int, str | None]]:
    """(channels in, channels out, resample) of each level; the last one keeps its resolution."""
    inputs = (channels[0], *channels[:-1])
    return list(zip(inputs, channels, [resample] * (len(channels) - 1) + [None], strict=True))


class VAE(nnx.Module):
    """Encoder, decoder and the normalisation of latents. Inputs of any float dtype; outputs have the weights' dtype."""

    def __init__(self, config: VAEConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(config, dtype=dtype, rngs=rngs)

    def moments(self, images: Float[Array, "b h w i"]) -> tuple[Float[Array, "b h2 w2 c"], Float[Array, "b h2 w2 c"]]:
        """Mean and log variance (clipped to [-30, 20]) of the posterior, before shift and scale; images in [-1, 1].

        Raises ValueError where height or width is no multiple of `config.factor`.
        """
        factor = self.config.factor
        if images.shape[1] % factor or images.shape[2] % factor:
            raise ValueError(f"height and width must be multiples of {factor}, got {images.shape[1:3]}")
        x = images.astype(self.encoder.conv_in.weight[...].dtype)
        mean, log_variance = jnp.split(self.encoder(x), 2, axis=-1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def encode(self, images: Float[Array, "b h w i"], key: jax.Array | None = None) -> Float[Array, "b h2 w2 c"]:
        """Latents (z - shift) * scale of images in [-1, 1]; z: the posterior's mode, or a sample where key is given."""
        z, log_variance = self.moments(images)
        if key is not None:
            z = z + jnp.exp(0.5 * log_variance) * jax.random.normal(key, z.shape, z.dtype)
        return (z - self.config.shift_factor) * self.config.scaling_factor

    def decode(self, latents: Float[Array, "b h w c"], strip_bytes: int | None = None) -> Float[Array, "b h2 w2 o"]:
        """Images, nominally in [-1, 1] but not clipped, of normalised latents."""
        z = latents / self.config.scaling_factor + self.config.shift_factor
        return self.decoder(z.astype(self.decoder.conv_in.weight[...].dtype), strip_bytes)
