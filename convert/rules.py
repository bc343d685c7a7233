"""The names of every weight in the published files: tables only.

Each row pairs one of our layers with the layer, or layers, that hold it in the source; `*` stands for a number, the
same on both sides, and `~` for a level counted from the other end. Several sources are laid one after the other along
axis 0 (`shares`: their relative heights). Suffixes `.weight` and `.bias` carry over. Each table is read both ways:
source to checkpoint, and checkpoint to source. Sources of the names: black-forest-labs/flux (`src/flux/modules`),
huggingface/diffusers (FluxTransformer2DModel, AutoencoderKL), huggingface/transformers (T5EncoderModel,
CLIPTextModel).
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Rule:
    """target: our layer; sources: theirs. swap: the two halves of axis 0 change places; squeeze: source is [o, i, 1,
    1].
    """

    target: str
    sources: tuple[str, ...]
    shares: tuple[int, ...] = (1,)
    change: Literal["swap", "squeeze"] | None = None
    suffix: str | None = None  # a source suffix that stands for our ".weight"


@dataclass(frozen=True)
class Format:
    """One published layout of one component. It is this one when the regular expression `mark` is found in a name."""

    name: str
    mark: str
    rules: tuple[Rule, ...]
    prefixes: tuple[str, ...] = ("",)  # a file may put one of these before every name
    aliases: tuple[
        tuple[str, str], ...
    ] = ()  # (name in the file, name in the rules): the same tensor, either may be there
    ignored: tuple[str, ...] = ()  # regular expressions of names that hold nothing we need


def same(prefix_ours: str, prefix_theirs: str, names: dict[str, str], change=None) -> tuple[Rule, ...]:
    return tuple(Rule(prefix_ours + ours, (prefix_theirs + theirs,), change=change) for ours, theirs in names.items())


def _embedder(ours: str, theirs: str) -> tuple[Rule, ...]:
    return same(ours, theirs, {".in_layer": ".linear_1", ".out_layer": ".linear_2"})


THIRDS = (1, 1, 1)

TRANSFORMER_DIFFUSERS = Format(
    "diffusers transformer",
    r"^(single_)?transformer_blocks\.\d",
    (
        *_embedder("time_in", "time_text_embed.timestep_embedder"),
        *_embedder("vector_in", "time_text_embed.text_embedder"),
        *_embedder("guidance_in", "time_text_embed.guidance_embedder"),
        *same("", "", {"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"}),
        Rule("final_layer.mod", ("norm_out.linear",), change="swap"),  # (scale, shift) there, (shift, scale) here
        *same(
            "double_blocks.*.img.",
            "transformer_blocks.*.",
            {
                "mod": "norm1.linear",
                "query_norm": "attn.norm_q",
                "key_norm": "attn.norm_k",
                "proj": "attn.to_out.0",
                "mlp_in": "ff.net.0.proj",
                "mlp_out": "ff.net.2",
            },
        ),
        *same(
            "double_blocks.*.txt.",
            "transformer_blocks.*.",
            {
                "mod": "norm1_context.linear",
                "query_norm": "attn.norm_added_q",
                "key_norm": "attn.norm_added_k",
                "proj": "attn.to_add_out",
                "mlp_in": "ff_context.net.0.proj",
                "mlp_out": "ff_context.net.2",
            },
        ),
        Rule("double_blocks.*.img.qkv", tuple(f"transformer_blocks.*.attn.to_{p}" for p in "qkv"), THIRDS),
        Rule("double_blocks.*.txt.qkv", tuple(f"transformer_blocks.*.attn.add_{p}_proj" for p in "qkv"), THIRDS),
        *same(
            "single_blocks.*.",
            "single_transformer_blocks.*.",
            {"mod": "norm.linear", "query_norm": "attn.norm_q", "key_norm": "attn.norm_k", "linear2": "proj_out"},
        ),
        Rule(
            "single_blocks.*.linear1",
            (*(f"single_transformer_blocks.*.attn.to_{p}" for p in "qkv"), "single_transformer_blocks.*.proj_mlp"),
            (1, 1, 1, 4),
        ),
    ),
)


def _bfl_stream(stream: str) -> tuple[Rule, ...]:
    ours, theirs = f"double_blocks.*.{stream}.", f"double_blocks.*.{stream}_"
    names = {"mod": "mod.lin", "qkv": "attn.qkv", "proj": "attn.proj", "mlp_in": "mlp.0", "mlp_out": "mlp.2"}
    return same(ours, theirs, names) + _bfl_norms(ours, theirs + "attn.norm.")


def _bfl_norms(ours: str, theirs: str) -> tuple[Rule, ...]:
    return tuple(Rule(ours + n, (theirs + n,), suffix=".scale") for n in ("query_norm", "key_norm"))


TRANSFORMER_BFL = Format(
    "BFL transformer",
    r"^(double|single)_blocks\.\d",
    (
        *same(
            "",
            "",
            {
                f"{e}.{n}": f"{e}.{n}"
                for e in ("time_in", "vector_in", "guidance_in")
                for n in ("in_layer", "out_layer")
            },
        ),
        *same("", "", {n: n for n in ("img_in", "txt_in", "final_layer.linear")}),
        Rule("final_layer.mod", ("final_layer.adaLN_modulation.1",)),
        *_bfl_stream("img"),
        *_bfl_stream("txt"),
        *same(
            "single_blocks.*.",
            "single_blocks.*.",
            {"mod": "modulation.lin", "linear1": "linear1", "linear2": "linear2"},
        ),
        *_bfl_norms("single_blocks.*.", "single_blocks.*.norm."),
    ),
)

T5_HF = Format(
    "transformers T5",
    r"^encoder\.block\.\d+\.layer\.0\.SelfAttention\.",
    (
        Rule("token_embedding", ("shared",)),
        Rule("relative_attention_bias", ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias",)),
        Rule("final_norm", ("encoder.final_layer_norm",)),
        *same("layers.*.", "encoder.block.*.layer.0.", {"attention_norm": "layer_norm"}),
        *same("layers.*.", "encoder.block.*.layer.0.SelfAttention.", {n: n for n in "qkvo"}),
        *same("layers.*.", "encoder.block.*.layer.1.", {"mlp_norm": "layer_norm"}),
        *same("layers.*.", "encoder.block.*.layer.1.DenseReluDense.", {n: n for n in ("wi_0", "wi_1", "wo")}),
    ),
    aliases=(("encoder.embed_tokens.weight", "shared.weight"),),
    ignored=(r"decoder\..*", r"lm_head\.weight"),
)

CLIP_HF = Format(
    "transformers CLIP text",
    r"^(text_model\.)?encoder\.layers\.\d+\.self_attn\.",
    (
        *same("", "embeddings.", {"token_embedding": "token_embedding", "position_embedding": "position_embedding"}),
        Rule("final_norm", ("final_layer_norm",)),
        *same(
            "layers.*.", "encoder.layers.*.self_attn.", {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}
        ),
        *same(
            "layers.*.",
            "encoder.layers.*.",
            {"norm1": "layer_norm1", "norm2": "layer_norm2", "fc1": "mlp.fc1", "fc2": "mlp.fc2"},
        ),
    ),
    prefixes=("text_model.", ""),
    ignored=(
        r"(text_model\.)?embeddings\.position_ids",
        r"text_projection\.weight",
        r"(vision_model|visual_projection)\..*",
        r"logit_scale",
    ),
)

RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2"}
HEADS = {"q": "q", "k": "k", "v": "v"}
ENDS = {"conv_in": "conv_in", "conv_out": "conv_out"}


def _vae_half(half: str, level: str, resample: str) -> tuple[Rule, ...]:
    ours, theirs = f"{half}.", f"{half}."
    return (
        *same(ours, theirs, {**ENDS, "norm_out": "conv_norm_out"}),
        *same(f"{ours}blocks.*.resnets.*.", f"{theirs}{level}.*.resnets.*.", {**RESNET, "shortcut": "conv_shortcut"}),
        *same(ours, theirs, {"blocks.*.resample": f"{level}.*.{resample}.0.conv"}),
        *same(f"{ours}mid.resnet1.", f"{theirs}mid_block.resnets.0.", RESNET),
        *same(f"{ours}mid.resnet2.", f"{theirs}mid_block.resnets.1.", RESNET),
        *same(
            f"{ours}mid.attention.",
            f"{theirs}mid_block.attentions.0.",
            {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"},
        ),
    )


VAE_DIFFUSERS = Format(
    "diffusers autoencoder",
    r"^(en|de)coder\.mid_block\.",
    (*_vae_half("encoder", "down_blocks", "downsamplers"), *_vae_half("decoder", "up_blocks", "upsamplers")),
)


def _vae_half_bfl(half: str, level: str, resample: str) -> tuple[Rule, ...]:
    return (
        *same(f"{half}.", f"{half}.", {**ENDS, "norm_out": "norm_out"}),
        *same(f"{half}.blocks.*.resnets.*.", f"{half}.{level}.block.*.", {**RESNET, "shortcut": "nin_shortcut"}),
        *same(f"{half}.", f"{half}.", {"blocks.*.resample": f"{level}.{resample}.conv"}),
        *same(f"{half}.mid.resnet1.", f"{half}.mid.block_1.", RESNET),
        *same(f"{half}.mid.resnet2.", f"{half}.mid.block_2.", RESNET),
        *same(f"{half}.mid.attention.", f"{half}.mid.attn_1.", {"norm": "norm"}),
        *same(f"{half}.mid.attention.", f"{half}.mid.attn_1.", {**HEADS, "out": "proj_out"}, change="squeeze"),
    )


VAE_BFL = Format(
    "BFL autoencoder",
    r"^(en|de)coder\.mid\.attn_1\.",
    (*_vae_half_bfl("encoder", "down.*", "downsample"), *_vae_half_bfl("decoder", "up.~", "upsample")),
)

FORMATS: dict[str, tuple[Format, ...]] = {
    "transformer": (TRANSFORMER_DIFFUSERS, TRANSFORMER_BFL),
    "t5": (T5_HF,),
    "clip": (CLIP_HF,),
    "vae": (VAE_DIFFUSERS, VAE_BFL),
}
