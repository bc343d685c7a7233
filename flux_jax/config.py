"""What a FLUX model is, as numbers: frozen dataclasses that describe every part, to and from JSON.

In: a preset name, or the `configs` object of a checkpoint's manifest. Out: `FluxConfig`, from which each module in
`flux_jax.models` is built; ValueError for numbers that no model has, before anything is sized by them. No other file
holds a dimension. Sources: the config files published with FLUX.1-dev and FLUX.1-schnell, and black-forest-labs/flux
`src/flux/util.py`.
"""

import dataclasses
import math
import typing
from typing import Any

from flux_jax.errors import shortened

WIDTH = (1, 2**20)  # bounds of a dimension, of a count of heads, of layers: far beyond any model's
HEADS = (1, 2**12)
LAYERS = (0, 2**10)


def within(default: Any, bounds: tuple[int | float, int | float]) -> Any:
    """A field whose value, or each of whose values, lies within bounds, both included."""
    return dataclasses.field(default=default, metadata={"bounds": bounds})


@dataclasses.dataclass(frozen=True)
class Bounded:
    """What all sections share: every number is finite and within its field's bounds, and `faults` finds nothing."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, bounds = getattr(self, field.name), field.metadata.get("bounds")
            for number in value if isinstance(value, tuple) else (value,):
                if bounds and not bounds[0] <= number <= bounds[1]:  # so it is for NaN
                    raise ValueError(
                        f"{field.name} must be from {bounds[0]:g} to {bounds[1]:g}, not {shortened(number)}"
                    )
        if faults := self.faults():
            raise ValueError("; ".join(faults))

    def faults(self) -> list[str]:
        """What is wrong with the numbers together."""
        return []


@dataclasses.dataclass(frozen=True)
class TransformerConfig(Bounded):
    """The velocity model: double-stream blocks (image and text apart), then single-stream blocks (together)."""

    in_channels: int = within(64, WIDTH)  # of a token: latent channels x 2 x 2 patch
    hidden_size: int = within(3072, WIDTH)
    num_heads: int = within(24, HEADS)
    num_double_blocks: int = within(19, LAYERS)
    num_single_blocks: int = within(38, LAYERS)
    text_dim: int = within(4096, WIDTH)
    pooled_dim: int = within(768, WIDTH)
    mlp_ratio: int = within(4, (1, 64))
    # rotary widths of (index, row, column); their sum is the head width
    axes_dim: tuple[int, ...] = within((16, 56, 56), (2, 4096))
    theta: float = within(10_000.0, (1.0, 1e12))
    timestep_dim: int = within(256, (2, 2**16))  # width of the sinusoidal embedding of t and guidance
    guidance_embeds: bool = True

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def mlp_dim(self) -> int:
        return self.hidden_size * self.mlp_ratio

    def faults(self) -> list[str]:
        found = []
        if self.hidden_size % self.num_heads or sum(self.axes_dim) != self.head_dim:
            found.append(
                f"hidden_size / num_heads = {self.hidden_size} / {self.num_heads} must equal sum(axes_dim), "
                f"axes_dim = {self.axes_dim}"
            )
        if len(self.axes_dim) != 3 or any(width % 2 for width in self.axes_dim):
            found.append(f"axes_dim must be three even widths, not {self.axes_dim}")
        if self.in_channels % 4:
            found.append(f"in_channels must be a multiple of 4, for patches of 2 x 2, not {self.in_channels}")
        if self.timestep_dim % 2:
            found.append(f"timestep_dim must be even, not {self.timestep_dim}")
        return found


@dataclasses.dataclass(frozen=True)
class T5Config(Bounded):
    """T5 v1.1 encoder (gated GELU, relative positions, no biases)."""

    vocab_size: int = within(32128, WIDTH)
    d_model: int = within(4096, WIDTH)
    d_ff: int = within(10240, WIDTH)
    num_heads: int = within(64, HEADS)
    head_dim: int = within(64, HEADS)
    num_layers: int = within(24, (1, LAYERS[1]))
    num_buckets: int = within(32, (4, 4096))
    max_distance: int = within(128, (2, WIDTH[1]))
    eps: float = within(1e-6, (1e-12, 0.1))

    def faults(self) -> list[str]:
        found = []
        if self.num_buckets % 4:
            found.append(f"num_buckets must be a multiple of 4, not {self.num_buckets}")
        if self.max_distance <= self.num_buckets // 4:
            found.append(f"max_distance must be above num_buckets / 4 = {self.num_buckets // 4}")
        return found


@dataclasses.dataclass(frozen=True)
class CLIPConfig(Bounded):
    """CLIP text tower; `eos_token_id` 2 is the historical value that means "pool at the largest token id"."""

    vocab_size: int = within(49408, WIDTH)
    hidden_size: int = within(768, WIDTH)
    mlp_dim: int = within(3072, WIDTH)
    num_heads: int = within(12, HEADS)
    num_layers: int = within(12, (1, LAYERS[1]))
    max_positions: int = within(77, (2, 2**16))
    eos_token_id: int = within(2, (0, WIDTH[1]))
    eps: float = within(1e-5, (1e-12, 0.1))
    activation: typing.Literal["quick_gelu", "gelu"] = "quick_gelu"

    def faults(self) -> list[str]:
        found = []
        if self.hidden_size % self.num_heads:
            found.append(f"num_heads = {self.num_heads} must divide hidden_size = {self.hidden_size}")
        if self.eos_token_id >= self.vocab_size:
            found.append(f"eos_token_id = {self.eos_token_id} must be below vocab_size = {self.vocab_size}")
        return found


@dataclasses.dataclass(frozen=True)
class VAEConfig(Bounded):
    """Convolutional autoencoder; pixels shrink by `factor`, latents are normalised by shift and scale."""

    image_channels: int = within(3, (3, 3))
    latent_channels: int = within(16, WIDTH)
    channels: tuple[int, ...] = within((128, 256, 512, 512), WIDTH)
    layers_per_block: int = within(2, (0, 64))
    norm_groups: int = within(32, HEADS)
    scaling_factor: float = within(0.3611, (1e-4, 1e4))
    shift_factor: float = within(0.1159, (-1e4, 1e4))

    def faults(self) -> list[str]:
        found = []
        if not 1 <= len(self.channels) <= 8:
            found.append(f"channels must have from 1 to 8 levels, not {len(self.channels)}")
        if any(width % self.norm_groups for width in self.channels):
            found.append(f"norm_groups = {self.norm_groups} must divide channels = {self.channels}")
        return found

    @property
    def factor(self) -> int:
        """Pixels per latent, along each axis."""
        return 2 ** (len(self.channels) - 1)


@dataclasses.dataclass(frozen=True)
class SamplingConfig(Bounded):
    """The schedule (resolution-dependent shift of the noise levels) and the defaults of a generation."""

    base_seq_len: int = within(256, WIDTH)
    max_seq_len: int = within(4096, WIDTH)
    base_shift: float = within(0.5, (-10.0, 10.0))
    max_shift: float = within(1.15, (-10.0, 10.0))
    use_dynamic_shifting: bool = True
    num_inference_steps: int = within(28, (1, 1000))
    guidance_scale: float = within(3.5, (0.0, 100.0))
    max_sequence_length: int = within(512, (1, 2**16))  # T5 tokens
    height: int = within(1024, (1, 2**14))
    width: int = within(1024, (1, 2**14))

    def faults(self) -> list[str]:
        found = []
        if self.max_seq_len <= self.base_seq_len:
            found.append(f"max_seq_len = {self.max_seq_len} must be above base_seq_len = {self.base_seq_len}")
        return found


@dataclasses.dataclass(frozen=True)
class FluxConfig(Bounded):
    """All parts of one model. `to_json` and `from_json` are inverse; unknown or missing keys, and values of a wrong
    type or out of bounds, raise ValueError."""

    name: str = "FLUX.1-dev"
    transformer: TransformerConfig = TransformerConfig()
    t5: T5Config = T5Config()
    clip: CLIPConfig = CLIPConfig()
    vae: VAEConfig = VAEConfig()
    sampling: SamplingConfig = SamplingConfig()

    def faults(self) -> list[str]:
        fits = 0 < len(self.name) <= 200 and self.name.isprintable()
        return [] if fits else ["name must be one line of at most 200 characters"]

    def mismatches(self) -> list[str]:
        """Where the components do not fit each other: they were not made for one model."""
        pairs = {
            "T5's width and the transformer's text_dim": (self.t5.d_model, self.transformer.text_dim),
            "CLIP's width and the transformer's pooled_dim": (self.clip.hidden_size, self.transformer.pooled_dim),
            "4 latent channels and the transformer's in_channels": (
                4 * self.vae.latent_channels,
                self.transformer.in_channels,
            ),
        }
        return [f"{what} are {ours} and {theirs}" for what, (ours, theirs) in pairs.items() if ours != theirs]

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
    if unknown := sorted(set(data) - set(types)):
        raise ValueError(f"{where} has the unknown {_keys(unknown)}")
    if missing := sorted(set(types) - set(data)):
        raise ValueError(f"{where} lacks the {_keys(missing)}")
    values = {}
    for key, value in data.items():
        expected = types[key]
        if dataclasses.is_dataclass(expected):
            values[key] = _from_json(expected, value, f"{where}.{key}")
            continue
        origin = typing.get_origin(expected)
        if origin is tuple:
            if not isinstance(value, list | tuple) or not all(type(v) is int for v in value):
                raise ValueError(f"{where}.{key} must be a list of integers, got {shortened(value)}")
            value = tuple(value)
        elif origin is typing.Literal:
            if value not in typing.get_args(expected):
                raise ValueError(f"{where}.{key} must be one of {typing.get_args(expected)}, got {shortened(value)}")
        elif expected is float and type(value) is int:
            value = float(value) if abs(value) < 2**63 else math.inf
        elif type(value) is not expected:
            raise ValueError(f"{where}.{key} must be {expected.__name__}, got {shortened(value)}")
        values[key] = value
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _keys(names: list[str]) -> str:
    shown = ", ".join(shortened(name) for name in names[:3])
    return f"key{'s' if len(names) > 1 else ''} {shown}{' ...' if len(names) > 3 else ''}"


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
