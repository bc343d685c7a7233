"""Published configs, key by key: used as diffusers and transformers use them, refused, or named."""

import dataclasses
import inspect
import json
import random
import warnings

import pytest
import tiny_model

from convert import configs
from convert.config_keys import FIELDS, HARMLESS, HEAD_DIM, MUST
from flux_jax.config import FluxConfig, dev, schnell
from flux_jax.errors import UserError

with warnings.catch_warnings():  # warnings are errors in our tests; those of other people's imports are not ours
    warnings.simplefilter("ignore")
    import transformers

CONFIG = tiny_model.published_config()
PUBLISHED = {component: configs.published(component, CONFIG) for component in configs.FOLDERS}
INDEX = {"_class_name": "FluxPipeline", "vae": ["diffusers", "AutoencoderKL"], "image_encoder": [None, None]}
DEV, SCHNELL = dev(), schnell()
DEV_SCHEDULE = configs.scheduler_json(DEV.sampling)
TEXT = {key: value for key, value in PUBLISHED["clip"].items() if key != "architectures"}
WHOLE_CLIP = {"model_type": "clip", "projection_dim": 64, "logit_scale_init_value": 2.6592, "vision_config": {}}


def section(component, **changes):
    """Our section for the published config with changes, and the warnings; a key that becomes `...` is left out."""
    data, said = {**PUBLISHED[component], **changes}, []
    data = {key: value for key, value in data.items() if value is not ...}
    return configs.section(component, data, "config.json", said), said


@pytest.mark.parametrize("component", configs.FOLDERS)
def test_what_is_written_is_read_without_a_word(component):
    assert section(component) == (getattr(CONFIG, component), [])


def test_defaults_are_those_of_transformers():
    for component, theirs in (("t5", transformers.T5Config()), ("clip", transformers.CLIPTextConfig())):
        for key, default in FIELDS[component].values():
            assert getattr(theirs, key) == default, key
        written = theirs.to_dict()
        for key, (default, _) in MUST[component].items():
            if default is not None:
                assert written[key] == default, key
        known = {*HARMLESS[component], *MUST[component], *(key for key, _ in FIELDS[component].values())}
        assert not written.keys() - known


@pytest.mark.reference
def test_defaults_are_those_of_diffusers():
    reference = pytest.importorskip("torch_reference")
    classes = {
        "transformer": reference.FluxTransformer2DModel,
        "vae": reference.AutoencoderKL,
        "scheduler": reference.FlowMatchEulerDiscreteScheduler,
    }
    for component, theirs in classes.items():
        found = {name: p.default for name, p in inspect.signature(theirs.__init__).parameters.items() if name != "self"}
        ours = {key: default for key, (default, _) in MUST[component].items() if not key.startswith("_")}
        ours |= dict(FIELDS[component].values()) | ({HEAD_DIM[0]: HEAD_DIM[1]} if component == "transformer" else {})
        for key, default in ours.items():
            value = found.pop(key)
            assert (list(value) if isinstance(value, tuple) else value) == default, key
        assert found.keys() <= HARMLESS[component] | {"out_channels", "down_block_types", "up_block_types"}


@pytest.mark.parametrize(
    "words",
    [
        {},
        {"feed_forward_proj": "gated-gelu"},
        {"feed_forward_proj": "gated-relu"},
        {"feed_forward_proj": "gated-silu"},
        {"feed_forward_proj": "gelu"},
        {"feed_forward_proj": "gated-gelu", "is_gated_act": False},
        {"is_gated_act": True, "dense_act_fn": "gelu_pytorch_tanh"},
        {"is_gated_act": True},
        {"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu"},
    ],
)
def test_the_activation_of_t5_is_what_transformers_makes_of_the_words(words):
    theirs = transformers.T5Config(**words)
    ours = theirs.is_gated_act and theirs.dense_act_fn in ("gelu_new", "gelu_pytorch_tanh")
    leave_out = dict.fromkeys(("feed_forward_proj", "is_gated_act", "dense_act_fn"), ...)
    if ours:
        assert section("t5", **{**leave_out, **words}) == (CONFIG.t5, [])
    else:
        with pytest.raises(UserError, match="is_gated_act|dense_act_fn"):
            section("t5", **{**leave_out, **words})


@pytest.mark.parametrize(
    "text",
    [
        {"text_config": TEXT},
        {"text_config": TEXT | {"model_type": ...}},
        {"text_config": TEXT, "text_config_dict": None},
        {"text_config": TEXT | {"hidden_act": "gelu"}, "text_config_dict": TEXT | {"hidden_act": ...}},
        {"text_config": {"hidden_size": 9}, "text_config_dict": {"hidden_size": 64, "num_hidden_layers": 3}},
        {"text_config": {}},
    ],
)
def test_a_whole_clip_has_the_towers_numbers_that_transformers_reads(text):
    text = {key: value and {k: v for k, v in value.items() if v is not ...} for key, value in text.items()}
    theirs = transformers.CLIPConfig(**json.loads(json.dumps(WHOLE_CLIP | text))).text_config
    warned = []
    ours = configs.section("clip", WHOLE_CLIP | text, "config.json", warned)
    assert {ours_: getattr(ours, ours_) for ours_ in FIELDS["clip"]} == {
        ours_: getattr(theirs, key) for ours_, (key, _) in FIELDS["clip"].items()
    }
    assert warned == []


def test_other_places_and_names_of_the_numbers():
    t5 = PUBLISHED["t5"]
    nested = {"model_type": "encoder-decoder", "encoder": t5, "decoder": {}}
    said = []
    assert configs.section("t5", nested, "config.json", said) == CONFIG.t5
    assert len(said) == 1 and "'decoder'" in said[0]
    second = {"hidden_size": t5["d_model"], "head_dim": t5["d_kv"], "d_model": ..., "d_kv": ...}
    assert section("t5", **second) == (CONFIG.t5, [])
    with pytest.raises(UserError, match="d_model and hidden_size"):
        section("t5", hidden_size=7)


def test_keys_that_nobody_knows_are_named(snapshot_message):
    found, said = section("vae", zoom=2, _comment="x" * 1000, latents_mean=None, sample_size=3)
    assert found == CONFIG.vae
    snapshot_message("\n".join(said), "'zoom', '_comment'")
    _, said = section("clip", **{f"key{i}": i for i in range(8)})
    snapshot_message("\n".join(said), "'key0'", "3 more")
    said = []
    configs.sampling({}, DEV_SCHEDULE | {"sigma_min": 0.1}, DEV.sampling, "scheduler_config.json", said)
    snapshot_message("\n".join(said), "'sigma_min'")


REFUSED = [
    ("transformer", {"_class_name": "FluxControlNetModel"}, "FluxControlNetModel"),
    ("transformer", {"in_channels": 384, "out_channels": 64}, "Fill"),
    ("transformer", {"in_channels": 128, "out_channels": 64}, "Depth"),
    ("transformer", {"attention_head_dim": "16"}, "attention_head_dim"),
    ("transformer", {"num_attention_heads": 0}, "num_attention_heads"),
    ("transformer", {"num_layers": -1}, "num_layers"),
    ("transformer", {"num_layers": 10**400}, "num_layers"),
    ("transformer", {"joint_attention_dim": None}, "joint_attention_dim"),
    ("transformer", {"guidance_embeds": 1}, "guidance_embeds"),
    ("transformer", {"axes_dims_rope": 16}, "axes_dims_rope"),
    ("transformer", {"axes_dims_rope": [16.0, 8, 8]}, "axes_dims_rope"),
    ("transformer", {"quantization_config": {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"}}, "nf4"),
    ("t5", {"quantization_config": {"quant_method": "torchao", "quant_type": "int8wo"}}, "torchao"),
    ("t5", {"quantization_config": "gguf"}, "gguf"),
    ("t5", {"model_type": "umt5"}, "umt5"),
    ("t5", {"d_kv": 0}, "d_kv"),
    ("t5", {"pruned_heads": {"0": [1]}}, "pruned_heads"),
    ("clip", {"model_type": "bert"}, "bert"),
    ("clip", {"model_type": "clip"}, "text_config"),
    ("clip", {"eos_token_id": [2, 3]}, "eos_token_id"),
    ("clip", {"model_type": "siglip", "text_config": {"hidden_size": 64}}, "siglip"),
    ("clip", {"layer_norm_eps": 0}, "layer_norm_eps"),
    ("vae", {"_class_name": "AutoencoderTiny"}, "AutoencoderTiny"),
    ("vae", {"down_block_types": ["AttnDownEncoderBlock2D"] * 4}, "down_block_types"),
    ("vae", {"up_block_types": ["UpDecoderBlock2D"]}, "up_block_types"),
    ("vae", {"block_out_channels": [], "down_block_types": ..., "up_block_types": ...}, "block_out_channels"),
    ("vae", {"block_out_channels": 128, "down_block_types": ..., "up_block_types": ...}, "block_out_channels"),
    ("vae", {"scaling_factor": 0}, "scaling_factor"),
    ("vae", {"shift_factor": [0.1]}, "shift_factor"),
    ("vae", {"latents_mean": [0.0]}, "latents_mean"),
    ("vae", {"norm_num_groups": 0}, "norm_num_groups"),
    ("vae", {"layers_per_block": 10**30}, "layers_per_block"),
]  # fmt: skip


@pytest.mark.parametrize(("component", "changes", "named"), REFUSED)
def test_what_we_do_not_implement(component, changes, named, snapshot_message):
    with snapshot_message.raises(UserError, named) as caught:
        section(component, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, "Heun"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas"),
        ({"use_exponential_sigmas": True}, "use_exponential_sigmas"),
        ({"use_beta_sigmas": True}, "use_beta_sigmas"),
        ({"invert_sigmas": True}, "invert_sigmas"),
        ({"shift_terminal": 0.02}, "shift_terminal"),
        ({"stochastic_sampling": True}, "stochastic_sampling"),
        ({"time_shift_type": "linear"}, "linear"),
        ({"num_train_timesteps": 500}, "500"),
        ({"use_dynamic_shifting": False}, "shift"),
        ({"use_dynamic_shifting": None}, "use_dynamic_shifting"),
        ({"use_dynamic_shifting": False, "shift": None}, "shift"),
        ({"base_shift": None}, "base_shift"),
        ({"max_shift": 10**400}, "max_shift"),
        ({"max_image_seq_len": 256}, "max_image_seq_len"),
        ({"base_image_seq_len": -1}, "base_image_seq_len"),
        ({"base_image_seq_len": "256"}, "base_image_seq_len"),
    ],
)
def test_schedules_that_we_do_not_have(changes, named, snapshot_message):
    with snapshot_message.raises(UserError, named) as caught:
        configs.sampling({}, DEV_SCHEDULE | changes, DEV.sampling)
    assert "\n" not in str(caught.value)


def test_schedules_that_we_have():
    for config in (DEV, SCHNELL):
        assert configs.sampling({}, configs.scheduler_json(config.sampling), config.sampling) == config.sampling
        assert configs.sampling({}, None, config.sampling) == config.sampling
    own = {configs.EXTRA: {"sampling": CONFIG.to_json()["sampling"]}}
    assert configs.sampling(own, None, DEV.sampling) == CONFIG.sampling
    assert configs.sampling(own, configs.scheduler_json(CONFIG.sampling), DEV.sampling) == CONFIG.sampling
    edited = configs.sampling(own, configs.scheduler_json(CONFIG.sampling) | {"max_shift": 2}, DEV.sampling)
    assert edited == dataclasses.replace(CONFIG.sampling, max_shift=2.0)  # the file that diffusers reads decides


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (None, "object"),
        ([], "object"),
        ({"colour": 1}, "colour"),
        ({"name": 3}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"name": ""}, "name"),
        ({"licence": ["MIT"]}, "licence"),
        ({"sampling": {}}, "sampling"),
        ({"sampling": {**CONFIG.to_json()["sampling"], "height": "tall"}}, "height"),
        ({"sampling": {**CONFIG.to_json()["sampling"], "width": 10**9}}, "width"),
    ],
)
def test_our_own_key_is_checked_as_a_strangers(extra, named, snapshot_message):
    with snapshot_message.raises(UserError, named):
        configs.stated({configs.EXTRA: extra}, "model_index.json")


def test_our_own_key():
    assert configs.stated(INDEX, "model_index.json") == (None, None, None)
    extra = {"name": "FLUX-x", "licence": "MIT", "sampling": CONFIG.to_json()["sampling"]}
    assert configs.stated({configs.EXTRA: extra}, "model_index.json") == ("FLUX-x", "MIT", CONFIG.sampling)


@pytest.mark.parametrize("kind", ["FluxFillPipeline", "FluxControlPipeline", "StableDiffusion3Pipeline", 3, ["a"]])
def test_pipelines_of_other_models(kind, snapshot_message):
    with snapshot_message.raises(UserError, str(kind)):
        configs.check_index(INDEX | {"_class_name": kind}, "model_index.json")


def test_pipelines_that_take_more_than_a_text(snapshot_message):
    said = []
    configs.check_index(INDEX, "model_index.json", said)
    assert said == []
    index = {"_class_name": "FluxKontextPipeline", "controlnet": ["diffusers", "FluxControlNetModel"]}
    configs.check_index(INDEX | index, "model_index.json", said)
    snapshot_message("\n".join(said), "picture", "controlnet")


def test_a_name_is_one_line():
    assert configs.name_of(DEV.transformer, "x") == "FLUX.1-dev"
    for fallback in ("a\nb", "x" * 1000, "\udc80", ""):
        FluxConfig(name=configs.name_of(CONFIG.transformer, fallback))


VALUES = [0, -1, 3, 10**400, 1e308, True, None, "", "two\n", "x" * 999, [], [1], [None], {}, {"a": []}, "gated-gelu"]


def test_configs_of_any_kind_are_used_or_one_sentence():
    """A few hundred at random; the whole grammar of wrong values is here, for each key of each file."""
    rng = random.Random(0)
    files = {**PUBLISHED, "scheduler": DEV_SCHEDULE, "whole": {**WHOLE_CLIP, "text_config": TEXT}}
    cases = [(name, key, value) for name, data in files.items() for key in data for value in VALUES]
    for name, key, value in rng.sample(cases, 600):
        data, said = {**files[name], key: value}, []
        try:
            if name == "scheduler":
                configs.sampling({}, data, DEV.sampling, "file", said)
            else:
                configs.section("clip" if name == "whole" else name, data, "file", said)
        except UserError as error:
            said.append(str(error))
        assert all("\n" not in line and len(line) <= 300 for line in said)
