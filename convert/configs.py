"""Config files of the published formats, to and from `FluxConfig`.

In: the JSON that lies beside a component's weights (diffusers' transformer, vae and scheduler; transformers' text
encoders) and that of the whole, model_index.json. Out: the section of `FluxConfig`, or, the other way, the JSON. By
the tables of `convert.config_keys` each key is used, compared with what our modules implement, or known to change
nothing; any other is named in a warning. A value that our modules do not implement is a fault, never ignored.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from convert.config_keys import (
    ALIASES,
    BLOCKS,
    FIELDS,
    FROM_TEXT,
    HARMLESS,
    HEAD_DIM,
    INDEX,
    MUST,
    NESTED,
    WHOLE_CLIP,
    WIDER,
    WRITTEN,
)
from flux_jax.config import (
    CLIPConfig,
    FluxConfig,
    SamplingConfig,
    T5Config,
    TransformerConfig,
    VAEConfig,
    dev,
    nano,
    schnell,
)
from flux_jax.errors import UserError, shortened
from flux_jax.io import reading

EXTRA = "_flux_jax"  # key of model_index.json with what diffusers has no place for; readers skip keys with a dash
FOLDERS = {"transformer": "transformer", "t5": "text_encoder_2", "clip": "text_encoder", "vae": "vae"}
CONFIG_OF = {"transformer": TransformerConfig, "t5": T5Config, "clip": CLIPConfig, "vae": VAEConfig}
NAMED = 5  # unknown keys that a warning names


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. UserError where there is none."""
    return reading.read_object(path, remedy="copy or download it again")


def section(component: str, data: Mapping[str, Any], where: str, warnings: list[str] | None = None) -> Any:
    """A component's section of FluxConfig from its published config. UserError with all the values that do not fit.
    warnings: gets a line for the keys that nobody knows."""
    _refuse_quantized(data, where)
    own, beside = _tower(component, data, where)
    _refuse_quantized(own, where)
    own, faults = _one_name_each(component, own)
    if component == "t5":
        own = _activation(own)
    faults += _unimplemented(component, own)
    values: dict[str, Any] = {ours: own.get(theirs, default) for ours, (theirs, default) in FIELDS[component].items()}
    known = {*HARMLESS[component], *MUST[component], *(theirs for theirs, _ in FIELDS[component].values())}
    if component == "transformer":
        known |= {HEAD_DIM[0], "out_channels"}
        faults += _wider(own)
        width, heads = own.get(*HEAD_DIM), values["num_heads"]
        if type(width) is not int or width < 1:
            faults.append(f"{HEAD_DIM[0]} must be a positive int, got {shortened(width)}")
        elif type(heads) is int and heads > 0:
            values["hidden_size"] = heads * width
    if component == "vae":
        known |= BLOCKS.keys()
        faults += [
            f"{key} is {shortened(own[key])}, must be {kind} at each level"
            for key, kind in BLOCKS.items()
            if key in own and own[key] != [kind] * len(_as_list(values["channels"]))
        ]
        if values["shift_factor"] is None:
            values["shift_factor"] = 0.0
    if not faults:
        try:
            whole = {**FluxConfig().to_json(), component: {**dataclasses.asdict(CONFIG_OF[component]()), **values}}
            found = getattr(FluxConfig.from_json(whole), component)
        except ValueError as error:
            faults.append(_their_names(component, str(error)))
        else:
            _warn(warnings, where, [*(key for key in own if key not in known), *beside])
            return found
    raise UserError(f"{where}: not a {component} that flux_jax knows: {'; '.join(faults)}")


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _refuse_quantized(data: Mapping[str, Any], where: str) -> None:
    how = data.get("quantization_config") or data.get("compression_config")
    if how:
        fields = how if isinstance(how, dict) else {"quant_method": how}
        kinds = [fields.get(key) for key in ("quant_method", "bnb_4bit_quant_type", "quant_type", "weight_format")]
        kinds += ["8 bits" if fields.get("load_in_8bit") is True else None]
        said = shortened(", ".join(kind for kind in kinds if isinstance(kind, str)) or "unknown")
        raise UserError(f"{where}: its weights are quantized ({said}): download the model in bfloat16 or float16")


def _tower(component: str, data: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """The part of a config that is the component's own, and the keys beside it that nobody knows: a whole CLIP has its
    text tower's numbers under `text_config`."""
    nested = [key for key in NESTED.get(component, ()) if isinstance(data.get(key), dict)]
    if component == "clip" and data.get("model_type") == "clip" and not nested:
        raise UserError(f"{where}: not a clip that flux_jax knows: text_config must be an object")
    if not nested or data.get("model_type") in ("t5", "clip_text_model"):
        return dict(data), []
    own = {"model_type": data.get("model_type"), **data[nested[0]]}
    again = data.get("text_config_dict") if component == "clip" else None
    if isinstance(again, dict):  # the older name; as in transformers, what it says and what it leaves out overrule
        own |= dict(FIELDS["clip"].values()) | again
    elif again is not None:
        raise UserError(f"{where}: not a clip that flux_jax knows: text_config_dict must be an object")
    known = {*nested, *WHOLE_CLIP, *HARMLESS[component]}
    return own, [key for key in data if key not in known]


def _one_name_each(component: str, data: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The config without second names of keys, and where the two names of one key say different things."""
    faults = []
    for second, first in ALIASES.get(component, {}).items():
        if second in data and data.setdefault(first, data[second]) != data.pop(second):
            faults.append(f"{first} and {second} are one number, but they differ")
    return data, faults


def _activation(data: dict[str, Any]) -> dict[str, Any]:
    """T5's feed-forward layer, which older files describe in one word, as "gated-gelu" for GELU by tanh."""
    word = data.get("feed_forward_proj")
    if isinstance(word, str):
        gate, _, act = word.rpartition("-")
        said = {"is_gated_act": gate == "gated", "dense_act_fn": "gelu_new" if word == "gated-gelu" else act}
        data = said | data
    return data


def _unimplemented(component: str, data: Mapping[str, Any]) -> list[str]:
    faults = []
    for key, (default, allowed) in MUST[component].items():
        if (value := data.get(key, default)) not in allowed:
            names = [repr(each) for each in allowed if each is not None] or ["null"]
            faults.append(f"{key} is {shortened(value)}, must be {' or '.join(names)}")
    return faults


def _wider(data: Mapping[str, Any]) -> list[str]:
    """Transformers that take pictures beside the noise have more channels going in than coming out."""
    channels, out = data.get("in_channels", 64), data.get("out_channels")
    if out is None or out == channels:
        return []
    what = next((f": this is {what}" for width, what in WIDER.items() if channels == width), "")
    return [f"in_channels is {shortened(channels)} and out_channels {shortened(out)}, must be the same{what}"]


def _their_names(component: str, message: str) -> str:
    """A message about our fields as one about theirs."""
    message = re.sub(rf"^configs\.{component}[.:] ?", "", message)
    theirs = {ours: name for ours, (name, _) in FIELDS.get(component, {}).items()}
    return re.sub(r"\w+", lambda word: theirs.get(word[0], word[0]), message)


def _warn(warnings: list[str] | None, where: str, unknown: list[str]) -> None:
    if unknown and warnings is not None:
        named = ", ".join(shortened(key) for key in unknown[:NAMED])
        more = f" and {len(unknown) - NAMED} more" if len(unknown) > NAMED else ""
        warnings.append(f"{where}: not used, since flux_jax does not know it: {named}{more}")


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
        data[HEAD_DIM[0]] = ours.head_dim
    if component == "clip":
        data["projection_dim"] = ours.hidden_size
    if component == "vae":
        data["out_channels"] = ours.image_channels
        data |= {key: [kind] * len(ours.channels) for key, kind in BLOCKS.items()}
    return data


class Stated(NamedTuple):
    """What model_index.json says under our own key."""

    name: str | None = None
    licence: str | None = None
    sampling: SamplingConfig | None = None


def stated(index: Mapping[str, Any], where: str) -> Stated:
    """Our own key of model_index.json. UserError where its values are of a wrong type or out of bounds."""
    data = index.get(EXTRA, {})
    if not isinstance(data, dict) or (unknown := data.keys() - set(Stated._fields)):
        wrong = f"has the unknown key {shortened(min(unknown))}" if isinstance(data, dict) else "must be an object"
        raise UserError(f"{where}: {EXTRA} {wrong}")
    licence = data.get("licence")
    if licence is not None and not (isinstance(licence, str) and licence.isprintable() and len(licence) <= 200):
        raise UserError(f"{where}: the licence in {EXTRA} must be one line of at most 200 characters")
    given = {key: data[key] for key in ("name", "sampling") if data.get(key) is not None}
    try:
        config = FluxConfig.from_json({**FluxConfig().to_json(), **given})
    except ValueError as error:
        raise UserError(f"{where}: {EXTRA}: {str(error).removeprefix('configs.').removeprefix('configs: ')}") from None
    return Stated(given.get("name"), licence, config.sampling if "sampling" in given else None)


def check_index(index: Mapping[str, Any], where: str, warnings: list[str] | None = None) -> None:
    """UserError for a model_index.json of a model that is not FLUX.1, or that needs more than a text. warnings: gets a
    line for what its pipeline takes and ours does not, and for parts that are not used."""
    kind = index.get("_class_name", "FluxPipeline")
    if not isinstance(kind, str) or kind not in FROM_TEXT:
        raise UserError(f"{where} is of a {shortened(kind)}: convert a FLUX.1 that draws from text alone")
    if FROM_TEXT[kind] and warnings is not None:
        warnings.append(f"{where}: a {kind} takes {FROM_TEXT[kind]}, too: here it draws from text alone")
    absent = (None, [None, None])
    known = {*INDEX, EXTRA, *FOLDERS.values()}
    _warn(warnings, where, [key for key, value in index.items() if key not in known and value not in absent])


def sampling(
    index: Mapping[str, Any],
    scheduler: Mapping[str, Any] | None,
    base: SamplingConfig,
    where: str = "scheduler_config.json",
    warnings: list[str] | None = None,
) -> SamplingConfig:
    """The schedule from scheduler_config.json; defaults of a generation from our own key, else `base`'s. UserError for
    a schedule that our sampler does not have. where: the name of that file. warnings: as in `section`."""
    base = stated(index, "model_index.json").sampling or base
    if scheduler is None:
        return base
    fields = FIELDS["scheduler"]
    faults = _unimplemented("scheduler", scheduler)
    values = {ours: scheduler.get(theirs, default) for ours, (theirs, default) in fields.items()}
    shift = scheduler.get("shift", 1.0)
    if values["use_dynamic_shifting"] is False and shift != 1.0:
        faults.append(f"shift is {shortened(shift)}, must be 1.0 where use_dynamic_shifting is False")
    if not faults:
        try:
            whole = {**FluxConfig().to_json(), "sampling": {**dataclasses.asdict(base), **values}}
            found = FluxConfig.from_json(whole).sampling
        except ValueError as error:
            faults.append(_their_names("scheduler", re.sub(r"^configs\.sampling[.:] ?", "", str(error))))
        else:
            known = {*HARMLESS["scheduler"], *MUST["scheduler"], *(theirs for theirs, _ in fields.values())}
            _warn(warnings, where, [key for key in scheduler if key not in known])
            return found
    raise UserError(f"{where}: not FLUX.1's schedule: {'; '.join(faults)}")


def scheduler_json(config: SamplingConfig) -> dict[str, Any]:
    """diffusers' scheduler_config.json."""
    fields = {theirs: getattr(config, ours) for ours, (theirs, _) in FIELDS["scheduler"].items()}
    return {**WRITTEN["scheduler"], **fields, "shift": 3.0 if config.use_dynamic_shifting else 1.0}


def known_model(transformer: TransformerConfig) -> FluxConfig | None:
    """The published model that has such a transformer."""
    return next((model for model in (dev(), schnell(), nano()) if model.transformer == transformer), None)


def name_of(transformer: TransformerConfig, fallback: str) -> str:
    """Of a known model by the numbers, else the fallback, as much of it as a name may be."""
    model = known_model(transformer)
    return model.name if model else "".join(filter(str.isprintable, fallback))[:200] or "FLUX"
