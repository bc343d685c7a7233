"""Config files of the published formats, to and from `FluxConfig`.

In: the JSON that lies beside a component's weights (diffusers' transformer, vae and scheduler; transformers' text
encoders), or the shapes in a single file's header. Out: the section of `FluxConfig`, or, the other way, the JSON. A
value that our modules do not implement is a fault, never ignored.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flux_jax.config import CLIPConfig, FluxConfig, SamplingConfig, T5Config, TransformerConfig, VAEConfig, dev, schnell
from flux_jax.errors import UserError
from flux_jax.io.safetensors import Source

EXTRA = "_flux_jax"  # key of model_index.json with what diffusers has no place for; readers skip keys with a dash
FOLDERS = {"transformer": "transformer", "t5": "text_encoder_2", "clip": "text_encoder", "vae": "vae"}
CONFIG_OF = {"transformer": TransformerConfig, "t5": T5Config, "clip": CLIPConfig, "vae": VAEConfig}

# our field -> (their key, their default)
FIELDS: dict[str, dict[str, tuple[str, Any]]] = {
    "transformer": {
        "in_channels": ("in_channels", 64),
        "num_heads": ("num_attention_heads", 24),
        "num_double_blocks": ("num_layers", 19),
        "num_single_blocks": ("num_single_layers", 38),
        "text_dim": ("joint_attention_dim", 4096),
        "pooled_dim": ("pooled_projection_dim", 768),
        "axes_dim": ("axes_dims_rope", [16, 56, 56]),
        "guidance_embeds": ("guidance_embeds", False),
    },
    "t5": {
        "vocab_size": ("vocab_size", 32128),
        "d_model": ("d_model", 512),
        "d_ff": ("d_ff", 2048),
        "num_heads": ("num_heads", 8),
        "head_dim": ("d_kv", 64),
        "num_layers": ("num_layers", 6),
        "num_buckets": ("relative_attention_num_buckets", 32),
        "max_distance": ("relative_attention_max_distance", 128),
        "eps": ("layer_norm_epsilon", 1e-6),
    },
    "clip": {
        "vocab_size": ("vocab_size", 49408),
        "hidden_size": ("hidden_size", 512),
        "mlp_dim": ("intermediate_size", 2048),
        "num_heads": ("num_attention_heads", 8),
        "num_layers": ("num_hidden_layers", 12),
        "max_positions": ("max_position_embeddings", 77),
        "eos_token_id": ("eos_token_id", 49407),
        "eps": ("layer_norm_eps", 1e-5),
        "activation": ("hidden_act", "quick_gelu"),
    },
    "vae": {
        "image_channels": ("in_channels", 3),
        "latent_channels": ("latent_channels", 4),
        "channels": ("block_out_channels", [64]),
        "layers_per_block": ("layers_per_block", 1),
        "norm_groups": ("norm_num_groups", 32),
        "scaling_factor": ("scaling_factor", 0.18215),
        "shift_factor": ("shift_factor", None),
    },
}

# their key -> (their default, the values that our modules implement)
MUST: dict[str, dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "transformer": {"patch_size": (1, (1,)), "out_channels": (None, (None, 64))},
    "t5": {"is_gated_act": (False, (True,)), "dense_act_fn": ("relu", ("gelu_new", "gelu_pytorch_tanh"))},
    "clip": {"hidden_act": ("quick_gelu", ("quick_gelu", "gelu"))},
    "vae": {
        "act_fn": ("silu", ("silu",)),
        "mid_block_add_attention": (True, (True,)),
        "use_quant_conv": (True, (False,)),
        "use_post_quant_conv": (True, (False,)),
        "latents_mean": (None, (None,)),
        "latents_std": (None, (None,)),
    },
}

# what diffusers and transformers want to see beside the fields, when a folder is written for them
WRITTEN: dict[str, dict[str, Any]] = {
    "transformer": {"_class_name": "FluxTransformer2DModel", "_diffusers_version": "0.30.0", "patch_size": 1},
    "t5": {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "feed_forward_proj": "gated-gelu",
        "is_gated_act": True,
        "dense_act_fn": "gelu_new",
        "is_encoder_decoder": True,
        "tie_word_embeddings": False,
        "dropout_rate": 0.0,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    },
    "clip": {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "bos_token_id": 0,
        "pad_token_id": 1,
        "attention_dropout": 0.0,
        "dropout": 0.0,
    },
    "vae": {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.30.0",
        "act_fn": "silu",
        "mid_block_add_attention": True,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "force_upcast": True,
        "sample_size": 1024,
    },
}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. UserError where there is none."""
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: copy or download the whole model again") from None
    except (ValueError, OSError):
        data = None
    if not isinstance(data, dict):
        raise UserError(f"{path} is not a JSON object: copy or download it again")
    return data


def section(component: str, data: Mapping[str, Any], where: str) -> Any:
    """A component's section of FluxConfig from its published config. UserError with all the values that do not fit."""
    data = dict(data)
    if component == "t5" and "gated" in str(data.get("feed_forward_proj", "")):  # older files say it in one word
        data.setdefault("is_gated_act", True)
        data.setdefault("dense_act_fn", "gelu_new")
    faults = [
        f"{key} is {data.get(key, default)!r}, must be {' or '.join(map(repr, allowed))}"
        for key, (default, allowed) in MUST[component].items()
        if data.get(key, default) not in allowed
        and not (key == "out_channels" and data.get(key) == data.get("in_channels"))
    ]
    values: dict[str, Any] = {ours: data.get(theirs, default) for ours, (theirs, default) in FIELDS[component].items()}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    if component == "transformer":
        values["hidden_size"] = values["num_heads"] * data.get("attention_head_dim", 128)
    if component == "vae":
        values["shift_factor"] = float(values["shift_factor"] or 0.0)
    if not faults:
        try:
            full = dataclasses.asdict(CONFIG_OF[component](**values))
            return getattr(FluxConfig.from_json({**FluxConfig().to_json(), component: full}), component)
        except (ValueError, TypeError) as error:
            faults.append(str(error))
    raise UserError(f"{where}: not a {component} that flux_jax knows: {'; '.join(faults)}")


def published(component: str, config: FluxConfig) -> dict[str, Any]:
    """A component's config.json, as diffusers or transformers reads it. UserError where their classes cannot express
    it."""
    ours = getattr(config, component)
    fields = {theirs: getattr(ours, name) for name, (theirs, _) in FIELDS[component].items()}
    data = {**WRITTEN[component], **{k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}}
    if component == "transformer":
        fixed = {"mlp_ratio": 4, "theta": 10_000, "timestep_dim": 256}
        if odd := {k: getattr(ours, k) for k, v in fixed.items() if getattr(ours, k) != v}:
            raise UserError(f"diffusers has no place for {odd} of this transformer: it knows only {fixed}")
        data["attention_head_dim"] = ours.head_dim
    if component == "clip":
        data["projection_dim"] = ours.hidden_size
    if component == "vae":
        levels = len(ours.channels)
        data["out_channels"] = ours.image_channels
        data["down_block_types"] = ["DownEncoderBlock2D"] * levels
        data["up_block_types"] = ["UpDecoderBlock2D"] * levels
    return data


def sampling(index: Mapping[str, Any], scheduler: Mapping[str, Any] | None, guidance: bool) -> SamplingConfig:
    """The schedule from scheduler_config.json; defaults of a generation from our own key, else FLUX.1's. UserError for
    a schedule that our sampler does not have."""
    extra = index.get(EXTRA, {}).get("sampling")
    if extra is not None:
        return FluxConfig.from_json({**FluxConfig().to_json(), "sampling": extra}).sampling
    base = (dev() if guidance else schnell()).sampling
    if scheduler is None:
        return base
    if not scheduler.get("use_dynamic_shifting", False) and scheduler.get("shift", 1.0) != 1.0:
        raise UserError(f"scheduler: a fixed shift of {scheduler['shift']} is not FLUX.1's schedule, must be 1.0")
    return dataclasses.replace(
        base,
        base_seq_len=scheduler.get("base_image_seq_len", base.base_seq_len),
        max_seq_len=scheduler.get("max_image_seq_len", base.max_seq_len),
        base_shift=scheduler.get("base_shift", base.base_shift),
        max_shift=scheduler.get("max_shift", base.max_shift),
        use_dynamic_shifting=scheduler.get("use_dynamic_shifting", False),
    )


def scheduler_json(config: SamplingConfig) -> dict[str, Any]:
    """diffusers' scheduler_config.json."""
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "_diffusers_version": "0.30.0",
        "base_image_seq_len": config.base_seq_len,
        "max_image_seq_len": config.max_seq_len,
        "base_shift": config.base_shift,
        "max_shift": config.max_shift,
        "num_train_timesteps": 1000,
        "shift": 3.0 if config.use_dynamic_shifting else 1.0,
        "use_dynamic_shifting": config.use_dynamic_shifting,
    }


def name_of(transformer: TransformerConfig, fallback: str) -> str:
    """FLUX.1-dev or FLUX.1-schnell by the numbers, else the fallback."""
    return next((c.name for c in (dev(), schnell()) if c.transformer == transformer), fallback)


def transformer_of(source: Source) -> TransformerConfig:
    """The transformer behind a BFL single file, from its shapes. UserError where they do not say enough."""
    shapes = {name.removeprefix("model.diffusion_model."): entry.shape for name, entry in source.entries.items()}
    try:
        hidden, in_channels = shapes["img_in.weight"]
        head_dim = shapes["double_blocks.0.img_attn.norm.query_norm.scale"][0]
        counts = {
            kind: 1 + max(int(m[1]) for n in shapes if (m := re.match(rf"{kind}_blocks\.(\d+)\.", n)))
            for kind in ("double", "single")
        }
        axes = (
            TransformerConfig.axes_dim
        )  # no shape tells them apart; FLUX.1's fit heads of 128 only, others are refused
        return TransformerConfig(
            in_channels=in_channels,
            hidden_size=hidden,
            num_heads=hidden // head_dim,
            num_double_blocks=counts["double"],
            num_single_blocks=counts["single"],
            text_dim=shapes["txt_in.weight"][1],
            pooled_dim=shapes["vector_in.in_layer.weight"][1],
            axes_dim=axes,
            guidance_embeds="guidance_in.in_layer.weight" in shapes,
        )
    except (KeyError, ValueError, IndexError):
        raise UserError(
            f"{source.where}: not a FLUX transformer in BFL's format; give its numbers with --config"
        ) from None
