"""What a FLUX model is, as numbers: frozen dataclasses that describe every part, to and from JSON.

In: a preset name, or the `configs` object of a checkpoint's manifest. Out: `FluxConfig`, from which each module in
`flux_jax.models` is built. No other file holds a dimension. Sources: the config files published with FLUX.1-dev and
FLUX.1-schnell, and black-forest-labs/flux `src/flux/util.py`.
"""

import dataclasses
import typing
from typing import Any


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """The velocity model: double-stream blocks (image and text apart), then single-stream blocks (together)."""

    in_channels: int = 64  # of a token: latent channels x 2 x 2 patch
    hidden_size: int = 3072
    num_heads: int = 24
    num_double_blocks: int = 19
    num_single_blocks: int = 38
    text_dim: int = 4096
    pooled_dim: int = 768
    mlp_ratio: int = 4
    axes_dim: tuple[int, ...] = (16, 56, 56)  # rotary widths of (index, row, column); their sum is the head width
    theta: float = 10_000.0
    timestep_dim: int = 256  # width of the sinusoidal embedding of t and guidance
    guidance_embeds: bool = True

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def mlp_dim(self) -> int:
        return self.hidden_size * self.mlp_ratio

    def __post_init__(self):
        if self.hidden_size % self.num_heads or sum(self.axes_dim) != self.head_dim:
            raise ValueError(
                f"hidden_size / num_heads = {self.hidden_size} / {self.num_heads} must equal sum(axes_dim), "
                f"axes_dim = {self.axes_dim}"
            )


@dataclasses.dataclass(frozen=True)
class T5Config:
    """T5 v1.1 encoder (gated GELU, relative positions, no biases)."""

    vocab_size: int = 32128
    d_model: int = 4096
    d_ff: int = 10240
    num_heads: int = 64
    head_dim: int = 64
    num_layers: int = 24
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """CLIP text tower; `eos_token_id` 2 is the historical value that means "pool at the largest token id"."""

    vocab_size: int = 49408
    hidden_size: int = 768
    mlp_dim: int = 3072
    num_heads: int = 12
    num_layers: int = 12
    max_positions: int = 77
    eos_token_id: int = 2
    eps: float = 1e-5
    activation: typing.Literal["quick_gelu", "gelu"] = "quick_gelu"


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Convolutional autoencoder; pixels shrink by `factor`, latents are normalised by shift and scale."""

    image_channels: int = 3
    latent_channels: int = 16
    channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_groups: int = 32
    scaling_factor: float = 0.3611
    shift_factor: float = 0.1159

    @property
    def factor(self) -> int:
        """Pixels per latent, along each axis."""
        return 2 ** (len(self.channels) - 1)


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """The schedule (resolution-dependent shift of the noise levels) and the defaults of a generation."""

    base_seq_len: int = 256
    max_seq_len: int = 4096
    base_shift: float = 0.5
    max_shift: float = 1.15
    use_dynamic_shifting: bool = True
    num_inference_steps: int = 28
    guidance_scale: float = 3.5
    max_sequence_length: int = 512  # T5 tokens
    height: int = 1024
    width: int = 1024


@dataclasses.dataclass(frozen=True)
class FluxConfig:
    """All parts of one model. `to_json` and `from_json` are inverse; unknown or missing keys raise ValueError."""

    name: str = "FLUX.1-dev"
    transformer: TransformerConfig = TransformerConfig()
    t5: T5Config = T5Config()
    clip: CLIPConfig = CLIPConfig()
    vae: VAEConfig = VAEConfig()
    sampling: SamplingConfig = SamplingConfig()

    @property
    def default_grid(self) -> tuple[int, int]:
        """Rows and columns of image tokens at the default size."""
        return self.sampling.height // self.pixels_per_token, self.sampling.width // self.pixels_per_token

    @property
    def pixels_per_token(self) -> int:
        """Edge of the square of pixels behind one image token; heights and widths are multiples of it."""
        return 2 * self.vae.factor

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "FluxConfig":
        return _from_json(cls, data, "configs")


def _from_json(cls, data, where: str):
    if not isinstance(data, dict):
        raise ValueError(f"{where} must be an object, got {type(data).__name__}")
    types = typing.get_type_hints(cls)
    if faults := sorted(set(data) ^ set(types)):
        raise ValueError(f"{where} must have exactly the keys {sorted(types)}; missing or unknown: {faults}")
    values = {}
    for key, value in data.items():
        expected = types[key]
        if dataclasses.is_dataclass(expected):
            values[key] = _from_json(expected, value, f"{where}.{key}")
            continue
        origin = typing.get_origin(expected)
        if origin is tuple:
            if not isinstance(value, list | tuple) or not all(type(v) is int for v in value):
                raise ValueError(f"{where}.{key} must be a list of integers, got {value!r}")
            value = tuple(value)
        elif origin is typing.Literal:
            if value not in typing.get_args(expected):
                raise ValueError(f"{where}.{key} must be one of {typing.get_args(expected)}, got {value!r}")
        elif expected is float and type(value) is int:
            value = float(value)
        elif type(value) is not expected:
            raise ValueError(f"{where}.{key} must be {expected.__name__}, got {value!r}")
        values[key] = value
    return cls(**values)


def dev() -> FluxConfig:
    """FLUX.1-dev: 11,901,408,320 transformer parameters, guidance embedded."""
    return FluxConfig()


def schnell() -> FluxConfig:
    """FLUX.1-schnell: four steps, no guidance, no shift of the schedule, 256 T5 tokens."""
    return FluxConfig(
        name="FLUX.1-schnell",
        transformer=TransformerConfig(guidance_embeds=False),
        sampling=SamplingConfig(
            use_dynamic_shifting=False, num_inference_steps=4, guidance_scale=0.0, max_sequence_length=256
        ),
    )


def nano() -> FluxConfig:
    """FLUX-nano: every part of FLUX.1-dev, small enough for two CPU cores; 64 tokens of 16 x 16 pixels."""
    return FluxConfig(
        name="FLUX-nano",
        transformer=TransformerConfig(
            hidden_size=128,
            num_heads=4,
            num_double_blocks=2,
            num_single_blocks=4,
            text_dim=128,
            pooled_dim=64,
            in_channels=16,
            axes_dim=(8, 12, 12),
            timestep_dim=256,
        ),
        t5=T5Config(vocab_size=256, d_model=128, d_ff=256, num_heads=4, head_dim=32, num_layers=2, max_distance=32),
        clip=CLIPConfig(
            vocab_size=512, hidden_size=64, mlp_dim=256, num_heads=2, num_layers=2, max_positions=16, eos_token_id=2
        ),
        vae=VAEConfig(
            latent_channels=4,
            channels=(16, 16, 32, 64),
            layers_per_block=1,
            norm_groups=8,
            scaling_factor=1.0,
            shift_factor=0.0,
        ),
        sampling=SamplingConfig(
            base_seq_len=64,
            max_seq_len=256,
            base_shift=0.5,
            max_shift=1.15,
            max_sequence_length=16,
            height=128,
            width=128,
        ),
    )
