"""Where the components of a model lie: a diffusers folder, an all-in-one file, or parts from different places.

In: paths from the command line. Out: `Model`: the `FluxConfig`, the tensors of each component, the tokenizers' folders,
the licence, and what the user should know. Only small JSON files and headers are read here.
"""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convert import configs, files
from convert.engine import conversion_error
from convert.identify import holds, take, transformer_of, what
from flux_jax.checkpoints.checkpoint import MANIFEST
from flux_jax.config import FluxConfig, TransformerConfig, dev, schnell
from flux_jax.errors import UserError, printable
from flux_jax.io import reading
from flux_jax.io.safetensors import Source
from flux_jax.models.params import COMPONENTS

TOKENIZER_FOLDERS = {"t5": ("tokenizer_2", "t5"), "clip": ("tokenizer", "clip")}
LICENCES = {True: "LicenseRef-FLUX-1-dev-Non-Commercial", False: "Apache-2.0"}  # by guidance, for FLUX.1's own sizes
LICENCE_FILES = ("LICENSE.md", "LICENSE", "LICENSE.txt", "NOTICE")
CLASSES = {  # in a config.json -> whose it is
    "FluxTransformer2DModel": "transformer",
    "AutoencoderKL": "vae",
    "clip": "clip",
    "clip_text_model": "clip",
    "t5": "t5",
}


@dataclass(frozen=True)
class Model:
    """What is to be converted. sources: component -> its tensors; tokenizers: "t5", "clip" -> folder; notes: what the
    user should know."""

    config: FluxConfig
    sources: dict[str, Source]
    tokenizers: dict[str, Path]
    origin: str
    licence: str | None = None
    licence_files: dict[str, bytes] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class _Found:
    """What SOURCE holds: the tensors of its components, its model_index.json, its own folder."""

    sources: dict[str, Source]
    root: Path
    index: dict[str, Any] = field(default_factory=dict)


def find(
    source: Path,
    *,
    options: Mapping[str, Path] | None = None,
    tokenizers: Path | None = None,
    components: Iterable[str] | None = None,
    config: Path | None = None,
    origin: str | None = None,
) -> Model:
    """The model behind SOURCE. options: component -> path, instead of what SOURCE holds; components: only these;
    config: a JSON file that overrules every config found. UserError (exit code 3 where SOURCE does not exist).
    """
    wanted = tuple(COMPONENTS) if components is None else tuple(components)
    options = {component: path for component, path in (options or {}).items() if component in wanted}
    notes: list[str] = []
    inside = [component for component in wanted if component not in options]
    found = _in_folder(source, inside, notes) if files.is_folder(source) else _in_file(source, inside)
    sources = found.sources | {component: files.weights(path, component) for component, path in options.items()}
    if lacking := [component for component in wanted if component not in sources]:
        flags = " ".join(f"--{component} PATH" for component in lacking)
        held = ", ".join(found.sources) or "no part that is asked for"
        others = files.useless(source) if not found.index and os.path.isdir(source) else []
        hint = f" ({others[0]})" if others else ""
        raise UserError(f"{source} holds only {held}{hint}: give {flags}, or --parts with what you want")
    sources = {component: sources[component] for component in wanted}
    if tokenizers is None and found.index:
        tokenizers = source
    folders = {} if tokenizers is None else _tokenizer_folders(tokenizers)
    elsewhere = options.get("transformer")
    stated = configs.stated(found.index, str(source / "model_index.json"))
    if config is None:
        settled = _config(found, sources, elsewhere or source, stated, notes, replaced=elsewhere is not None)
    else:
        settled = _given(config)
    if len(sources) == len(COMPONENTS) and (wrong := settled.mismatches()):
        raise UserError(f"these parts were not made for one model: {'; '.join(wrong)}")
    standard = settled.transformer in (TransformerConfig(), TransformerConfig(guidance_embeds=False))
    licence = None if elsewhere else stated.licence
    if licence is None and standard and "transformer" in sources:
        licence = LICENCES[settled.transformer.guidance_embeds]
    name = origin or Path(os.path.realpath(source)).name
    for each in sources.values():
        notes += each.notes
    return Model(settled, sources, folders, printable(name), licence, licence_files(found.root, notes), notes)


def _in_file(source: Path, wanted: Iterable[str]) -> _Found:
    """The components in one file, all of them or one. UserError where it holds none, which says what it is."""
    whole = files.in_file(source)
    if whole.faults:
        raise conversion_error(whole.faults, f"{source} cannot be converted")
    if not any(holds(whole, component) for component in COMPONENTS):
        raise UserError(f"{source} {what(whole, 'transformer')}")
    return _Found({each: take(whole, each) for each in wanted if holds(whole, each)}, source.parent)


def _in_folder(source: Path, wanted: Iterable[str], notes: list[str]) -> _Found:
    """The components in a folder: diffusers', each in a folder of its own, or files side by side."""
    index_file = source / "model_index.json"
    if os.path.lexists(index_file):
        index = configs.read_json(index_file)
        configs.check_index(index, str(index_file), notes)
        folders = {component: source / configs.FOLDERS[component] for component in wanted}
        if absent := [str(path) for path in folders.values() if not os.path.lexists(path)]:
            raise UserError(f"missing: {', '.join(absent)}: copy or download the whole model again")
        return _Found({each: files.weights(path, each) for each, path in folders.items()}, source, index)
    if os.path.lexists(source / MANIFEST):
        raise UserError(
            f"{source} is a checkpoint of flux_jax already: '--to diffusers' turns it back, '--ternary' rounds it"
        )
    sources = {}
    for component in wanted:
        folder = source / configs.FOLDERS[component]
        found = files.in_folder(folder, component) if os.path.isdir(folder) else files.search(source, component)
        if found is not None:
            sources[component] = found
    if not files.candidates(source) and not sources:
        raise UserError(f"{source} is no diffusers folder (no model_index.json), and no .safetensors file is there")
    if not sources:
        for component in wanted:
            files.in_folder(source, component)  # says what is there
    return _Found(sources, source)


def licence_files(folder: Path, notes: list[str]) -> dict[str, bytes]:
    """The licence's own texts in a model's folder, by name: they go where the weights go. notes: gets a line for one
    that is a link to somewhere else, which is left out: what lies there need not be for others' eyes."""
    found = {}
    for name in LICENCE_FILES:
        path = folder / name
        if not os.path.isfile(path):
            continue
        if reading.leads_out(folder, path):
            notes.append(f"{path} leads out of its folder and was not copied: copy the licence by hand")
        else:
            found[name] = reading.read_bytes(path)
    return found


def _tokenizer_folders(root: Path) -> dict[str, Path]:
    found = {}
    for component, names in TOKENIZER_FOLDERS.items():
        folder = next((root / name for name in names if os.path.isdir(root / name)), None)
        if folder is None:
            raise UserError(f"{root} holds no tokenizer folder {' or '.join(names)}: download the tokenizers too")
        found[component] = folder
    return found


def _given(path: Path) -> FluxConfig:
    data = configs.read_json(path)
    try:
        return FluxConfig.from_json(data.get("configs", data))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _config(
    found: _Found, sources: Mapping[str, Source], place: Path, stated: configs.Stated, notes: list[str], replaced: bool
) -> FluxConfig:
    """Every component's section from the config beside its weights; components without one, or left out, as in the
    known model that has this transformer, else FLUX.1's. place: where the transformer was looked for; replaced: it is
    not SOURCE's."""
    sections = {
        component: section
        for component, source in sources.items()
        if (section := _section(component, source, notes)) is not None
    }
    transformer = sections.get("transformer", TransformerConfig())
    model = configs.known_model(transformer)
    base = model or (dev() if transformer.guidance_embeds else schnell())
    scheduler = found.root / "scheduler" / "scheduler_config.json"
    schedule = configs.read_json(scheduler) if os.path.lexists(scheduler) else None
    sampling = configs.sampling(found.index, schedule, base.sampling, str(scheduler), notes)
    if replaced and model is not None and sampling.use_dynamic_shifting != model.sampling.use_dynamic_shifting:
        sampling = model.sampling
        notes.append(f"{place} has the numbers of {model.name}, so its schedule was taken and not that of {found.root}")
    name = None if replaced else stated.name
    return dataclasses.replace(
        model or FluxConfig(),
        name=name or configs.name_of(transformer, Path(os.path.realpath(place)).stem),
        sampling=sampling,
        **sections,
    )


def _section(component: str, source: Source, notes: list[str]) -> Any:
    """A component's numbers from the config.json beside its weights, the transformer's else from its shapes; None where
    nothing says them. A file may lie beside the config of another component, but a folder of weights has its own."""
    path = Path(source.where)
    whole = os.path.isdir(path)
    file = (path if whole else path.parent) / "config.json"
    if os.path.lexists(file) or (whole and component != "transformer"):
        data = configs.read_json(file)
        if whole or _whose(data) == component or (_whose(data) is None and component != "transformer"):
            return configs.section(component, data, str(file), notes)
    if component == "transformer":
        if source.faults:
            raise conversion_error(source.faults, f"{source.where} cannot be converted")
        return transformer_of(source)
    return None


def _whose(config: Mapping[str, Any]) -> str | None:
    """The component that a config.json is of, "" for none of ours, None where it does not say."""
    kind = config.get("_class_name", config.get("model_type"))
    return None if kind is None else CLASSES.get(kind, "") if isinstance(kind, str) else ""
