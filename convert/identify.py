"""What a file of weights is: by its first bytes, or by the names and shapes of its tensors.

In: a file, or the `Source` of its header. Out: the part of it that is a component, its names without the prefix that an
all-in-one file puts before them; the transformer's config, from shapes; or, of what the converter does not read, words
that say what it is and what to do instead. Only headers are read.
"""

import re
from dataclasses import replace
from pathlib import Path

from convert.config_keys import WIDER
from convert.engine import detect
from convert.rules import FORMATS, Format
from flux_jax.config import TransformerConfig, dev, nano
from flux_jax.errors import UserError, shortened
from flux_jax.io.safetensors import Source, opened
from flux_jax.models.params import COMPONENTS

NAMES = {
    "transformer": "FLUX.1's transformer",
    "t5": "a T5 text encoder",
    "clip": "a CLIP text encoder",
    "vae": "an autoencoder (VAE)",
}
# what an all-in-one file, as ComfyUI writes it, puts before the names of a component
PREFIXES = {
    "transformer": ("model.diffusion_model.",),
    "t5": ("text_encoders.t5xxl.transformer.",),
    "clip": ("text_encoders.clip_l.transformer.",),
    "vae": ("vae.", "first_stage_model."),
}
ROOTS = ("model.diffusion_model.", "text_encoders.", "vae.", "first_stage_model.", "cond_stage_model.", "conditioner.")
WRAPPERS = ("module.", "_orig_mod.", "diffusion_model.", "transformer.", "model.")  # before every name, or before none

BFLOAT16 = "download the model in bfloat16 or float16"
# first bytes -> words
FIRST_BYTES = (
    (rb"\s*version https://git-lfs", "a git-lfs pointer and not the weights: run 'git lfs pull' in its folder"),
    (rb"GGUF", f"a GGUF file, which is not read: {BFLOAT16}, as .safetensors"),
    (rb"\s*<", "a web page and not weights: the download failed or needs a login; download the file again"),
    (
        rb"PK\x03\x04|\x80[\x00-\x05]|\x1f\x8b|7z\xbc\xaf|Rar!",
        "a file of pickled tensors (.pt, .bin, .ckpt) or an archive, which is not read, for it may hold programs: "
        "download the model as .safetensors",
    ),
    (rb"\x89HDF|\x89PNG|\xff\xd8\xff|RIFF", "no file of weights: give a .safetensors file"),
    (rb"\0{64}", "a file that begins with zeros, as an interrupted download leaves it: download it again"),
    (rb"[\s\x21-\x7e]{16}", "a text and not weights: open it to see why, and download the file again"),
)

# names of tensors that show what a part is -> words; the first one that fits
FOREIGN = (
    (r"\.(wscales|wcscales|wtscale|smooth_factor\w*|smooth)$", f"quantized by SVDQuant (Nunchaku): {BFLOAT16}"),
    (
        r"\.quant_state\.bitsandbytes__|\.(absmax|nested_absmax|quant_map|SCB)$",
        f"quantized by bitsandbytes (NF4, FP4 or 8 bits): {BFLOAT16}",
    ),
    (r"(^|\.)comfy_quant$", f"quantized by ComfyUI: {BFLOAT16}"),
    (r"\.(qweight|qzeros|g_idx|qdata|W_q|weight_packed|_data)$", f"quantized (GPTQ, AWQ or the like): {BFLOAT16}"),
    (
        r"(^|\.)scaled_fp8$|\.(scale_weight|scale_input|weight_scale\w*|input_scale)$",
        f"in float8 with a scale for each weight (scaled fp8), which is not read: {BFLOAT16}, or in plain fp8",
    ),
    (
        r"(^|[._])(lora|lokr|loha|hada|dora|oft)\d?(_|\.|$)",
        "a LoRA, a change to a model and not a model: merge it into the model that it was made for, then convert that",
    ),
    (r"(^|\.)(controlnet_|control_model\.|input_hint_block)", "a ControlNet, which flux_jax does not have"),
    (r"(^|\.)(ip_adapter|image_proj|pulid)", "an IP-Adapter, which flux_jax does not have"),
    (r"(^|\.)redux_(up|down)\b", "FLUX.1 Redux, an adapter for pictures, which flux_jax does not have"),
    (r"(^|\.)distilled_guidance_layer\.", "a Chroma model: convert FLUX.1-dev or FLUX.1-schnell instead"),
    (r"(^|\.)(double|single)_stream_modulation", "a FLUX.2 model: convert FLUX.1-dev or FLUX.1-schnell instead"),
    (r"(^|\.)(joint_blocks|pos_embed\.proj)\.", "a Stable Diffusion 3 model: convert FLUX.1-dev or FLUX.1-schnell"),
    (
        r"(^|\.)(input_blocks\.\d|time_embedding\.linear_1|add_embedding\.linear_1)",
        "a Stable Diffusion model (a UNet): convert FLUX.1-dev or FLUX.1-schnell instead",
    ),
    (r"(^|\.)(post_)?quant_conv\.", "the autoencoder of a Stable Diffusion model: give FLUX.1's, ae.safetensors"),
    (
        r"individual_token_refiner|double_stream_blocks\.|transformer_blocks\.\d+\.img_mlp\.|(^|\.)text_fusion\.",
        "a transformer of another family: convert FLUX.1-dev or FLUX.1-schnell instead",
    ),
    (r"block\.[1-9]\d*\.layer\.0\.SelfAttention\.relative_attention_bias", "a UMT5 text encoder: give T5 v1.1 XXL"),
    (r"DenseReluDense\.wi\.weight$", "T5 of the first version, without gates: give T5 v1.1 XXL"),
)
# of what holds no component at all
OTHERS = (
    (r"(^|\.)decoder\.block\.\d", "the decoder of a T5 alone"),
    (r"transformer\.resblocks\.", "a CLIP under OpenCLIP's names: give transformers' own"),
    (r"(^|\.)vision_model\.", "the half of a CLIP that sees pictures"),
    (r"(^|\.)(en|de)coder\.layers\.\d+\.(conv\.)?\d*", "a tiny autoencoder (TAESD): give FLUX.1's, ae.safetensors"),
    (r"(^|\.)(layers|blocks)\.\d+\.(self_attn|attention)\.", "a language model or a transformer of another family"),
)


def refuse_other_kinds(path: Path) -> None:
    """UserError that says what a file is whose first bytes are those of no safetensors file; nothing where they could
    be, or where they say nothing."""
    with opened(path) as file:
        head = file.read(64)
    if not head:
        raise UserError(f"{path} is an empty file: copy or download it again")
    if head[4:8] == bytes(4) and head[8:9] == b"{":  # a length below 4 GiB, a header
        return
    if words := next((words for mark, words in FIRST_BYTES if re.match(mark, head)), None):
        raise UserError(f"{path} is {words}")


def part(source: Source, component: str) -> Source | None:
    """Of the tensors, those that a component would have, its prefix taken off; None where the file holds others, each
    under a prefix, and none for it. A name that has no known prefix among others that do stays as it is."""
    names = source.entries
    if not any(name.startswith(ROOTS) for name in names):
        prefix = next((p for p in WRAPPERS if names and all(name.startswith(p) for name in names)), "")
        own = list(names)
    else:
        found = [p for p in PREFIXES[component] if any(name.startswith(p) for name in names)]
        if not found:
            return None
        if len(found) > 1:
            raise UserError(f"{source.where} holds {NAMES[component]} twice, under {' and '.join(found)}")
        prefix, own = found[0], [name for name in names if name.startswith(found[0]) or not name.startswith(ROOTS)]
    entries = {name.removeprefix(prefix): names[name] for name in own}
    faults = list(source.faults)
    if len(entries) < len(own):
        faults.append(f"{source.where}: the same name stands there with {prefix!r} before it and without")
    return replace(source, entries=entries, faults=faults)


def holds(source: Source, component: str) -> bool:
    """Whether the component's names are among the tensors."""
    own = part(source, component)
    return own is not None and detect(component, own.entries) is not None


def take(source: Source, component: str) -> Source:
    """The part that is the component. UserError that says what the file is where it is something else, in words; a
    file with faults passes, for these say more."""
    own = part(source, component)
    if source.faults:
        return own or source
    if words := what(source, component):
        raise UserError(f"{source.where} {words}")
    assert own is not None
    return own


def what(source: Source, component: str) -> str | None:
    """Words for a file that was taken for the component and is not, such as "is a LoRA: ..."; None where it is."""
    own = part(source, component)
    for mark, words in FOREIGN:
        if own is not None and any(re.search(mark, name) for name in own.entries):
            return f"is {words}"
    if holds(source, component):
        return _wider(own) if component == "transformer" and own is not None else None
    if present := [each for each in COMPONENTS if holds(source, each)]:
        flags = " or ".join(f"--{each}" for each in present)
        kind = "is" if len(present) == 1 else "holds"
        return f"{kind} {' and '.join(NAMES[each] for each in present)}, not {NAMES[component]}: give it by {flags}"
    for mark, words in OTHERS:
        if any(re.search(mark, name) for name in source.entries):
            kind, colon, advice = words.partition(":")
            return f"is {kind}, not {NAMES[component]}{colon}{advice}"
    first = f" (it begins with {shortened(next(iter(source.entries)))})" if source.entries else " (it has no tensor)"
    return f"is not {NAMES[component]} under a name that is known{first}"


def _wider(own: Source) -> str | None:
    """Words for a transformer with more channels going in than coming out: it takes a picture beside the noise."""
    fmt = detect("transformer", own.entries)
    assert fmt is not None
    ours, theirs = _shape(own, fmt, "img_in"), _shape(own, fmt, "final_layer.linear")
    if len(ours) != 2 or not theirs or ours[1] == theirs[0]:
        return None
    kind = WIDER.get(ours[1], "a transformer that takes a picture beside the noise")
    return f"is {kind} ({ours[1]} channels go in, {theirs[0]} come out): convert one that draws from text alone"


def _shape(own: Source, fmt: Format, target: str) -> tuple[int, ...]:
    """The shape of the first tensor that makes our weight `target`, in the first layer; () where it is not there."""
    rule = next(rule for rule in fmt.rules if rule.target == target)
    entry = own.entries.get(rule.sources[0].replace("*", "0") + (rule.suffix or ".weight"))
    return () if entry is None else entry.shape


def transformer_of(own: Source) -> TransformerConfig:
    """The config of a transformer, from its shapes. What no shape tells, how a head's width is divided among the axes,
    is as in the published model that has such heads. UserError where they do not say enough."""
    fmt = detect("transformer", own.entries) or FORMATS["transformer"][0]
    heads = {model.transformer.head_dim: model.transformer.axes_dim for model in (dev(), nano())}

    def count(target: str) -> int:
        first = next(rule for rule in fmt.rules if rule.target == target).sources[0].partition("*")[0]
        pattern = re.compile(re.escape(first) + r"([0-9]{1,6})\.")
        return 1 + max((int(m[1]) for name in own.entries if (m := pattern.match(name))), default=-1)

    try:
        hidden, in_channels = _shape(own, fmt, "img_in")
        (width,) = _shape(own, fmt, "double_blocks.*.img.query_norm") or _shape(own, fmt, "single_blocks.*.query_norm")
        return TransformerConfig(
            in_channels=in_channels,
            hidden_size=hidden,
            num_heads=hidden // width,
            num_double_blocks=count("double_blocks.*.img.mod"),
            num_single_blocks=count("single_blocks.*.mod"),
            text_dim=_shape(own, fmt, "txt_in")[1],
            pooled_dim=_shape(own, fmt, "vector_in.in_layer")[1],
            axes_dim=heads[width],
            timestep_dim=_shape(own, fmt, "time_in.in_layer")[1],
            guidance_embeds=bool(_shape(own, fmt, "guidance_in.in_layer")),
        )
    except (KeyError, ValueError, IndexError, ZeroDivisionError):
        raise UserError(
            f"{own.where}: its shapes do not say all the numbers of a FLUX transformer: give them with --config"
        ) from None
