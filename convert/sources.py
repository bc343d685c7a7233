"""Where the components of a model lie: a diffusers folder, or a single file with the other components named by options.

In: paths from the command line. Out: `Model`: the `FluxConfig`, a path per component, the tokenizers' folders, the
licence. Only small JSON files and headers are read here.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convert import configs
from flux_jax.checkpoints.checkpoint import MANIFEST
from flux_jax.config import FluxConfig, TransformerConfig
from flux_jax.errors import UserError
from flux_jax.io.safetensors import Source
from flux_jax.models.params import COMPONENTS

TOKENIZER_FOLDERS = {"t5": ("tokenizer_2", "t5"), "clip": ("tokenizer", "clip")}
LICENCES = {True: "LicenseRef-FLUX-1-dev-Non-Commercial", False: "Apache-2.0"}  # by guidance, for FLUX.1's own sizes
LICENCE_FILES = ("LICENSE.md", "LICENSE", "LICENSE.txt", "NOTICE")


@dataclass(frozen=True)
class Model:
    """What is to be converted. paths: component -> file or folder of weights; tokenizers: "t5", "clip" -> folder."""

    config: FluxConfig
    paths: dict[str, Path]
    tokenizers: dict[str, Path]
    origin: str
    licence: str | None = None
    licence_files: dict[str, bytes] = field(default_factory=dict)


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
    if not source.exists():
        raise UserError(f"no such file or folder: {source}", 3)
    wanted = tuple(COMPONENTS) if components is None else tuple(components)
    index: dict[str, Any] = {}
    paths = dict(options or {})
    if source.is_file():
        if source.suffix != ".safetensors":
            raise UserError(f"{source} is no .safetensors file: files of other kinds (.gguf, .bin, .pt) are not read")
        paths.setdefault("transformer", source)
    elif (source / "model_index.json").is_file():
        index = configs.read_json(source / "model_index.json")
        paths = {component: source / folder for component, folder in configs.FOLDERS.items()} | paths
        tokenizers = tokenizers or source
    elif (source / MANIFEST).is_file():
        raise UserError(
            f"{source} is a checkpoint of flux_jax already: '--to diffusers' turns it back, '--ternary' rounds it"
        )
    else:
        raise UserError(f"{source} is no diffusers folder (no model_index.json) and no .safetensors file")
    if lacking := [component for component in wanted if component not in paths]:
        flags = " ".join(f"--{component} PATH" for component in lacking)
        raise UserError(f"{source} holds only {', '.join(paths)}: give {flags}, or --parts with what you want")
    paths = {component: paths[component] for component in wanted}
    if absent := [str(path) for path in paths.values() if not path.exists()]:
        raise UserError(f"missing: {', '.join(absent)}: copy or download the whole model again")
    folders = {} if tokenizers is None else _tokenizer_folders(tokenizers)
    settled = _config(source, index, paths) if config is None else _given(config)
    standard = settled.transformer in (TransformerConfig(), TransformerConfig(guidance_embeds=False))
    root = source if source.is_dir() else source.parent
    stated = index.get(configs.EXTRA, {}).get("licence")
    licence = stated or (LICENCES[settled.transformer.guidance_embeds] if standard and "transformer" in paths else None)
    return Model(settled, paths, folders, origin or source.name, licence, licence_files(root))


def licence_files(folder: Path) -> dict[str, bytes]:
    """The licence's own texts in a model's folder, by name: they go where the weights go."""
    return {name: (folder / name).read_bytes() for name in LICENCE_FILES if (folder / name).is_file()}


def _tokenizer_folders(root: Path) -> dict[str, Path]:
    found = {}
    for component, names in TOKENIZER_FOLDERS.items():
        folder = next((root / name for name in names if (root / name).is_dir()), None)
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


def _config(source: Path, index: Mapping[str, Any], paths: Mapping[str, Path]) -> FluxConfig:
    """Every component's section from the config beside its weights; components without one, or left out, as in
    FLUX.1."""
    sections: dict[str, Any] = {}
    for component, path in paths.items():
        file = (path if path.is_dir() else path.parent) / "config.json"
        if component == "transformer" and path.is_file():
            sections[component] = configs.transformer_of(Source.from_path(path))
        elif file.is_file() or path.is_dir():
            sections[component] = configs.section(component, configs.read_json(file), str(file))
    config = dataclasses.replace(FluxConfig(), **sections)
    scheduler = source / "scheduler" / "scheduler_config.json"
    schedule = configs.read_json(scheduler) if scheduler.is_file() else None
    stated = index.get(configs.EXTRA, {})
    return dataclasses.replace(
        config,
        name=stated.get("name") or configs.name_of(config.transformer, source.stem),
        sampling=configs.sampling(index, schedule, config.transformer.guidance_embeds),
    )
