"""Fetches a published model from the Hugging Face hub: only the files that are converted, and says how many GB first.

In: a repository name such as black-forest-labs/FLUX.1-dev. Out: the local folder (in the hub's own cache, where an
interrupted download goes on). Where the hub cannot be asked, a copy in that cache does, if it is whole. Missing or
gated weights, no network, a cache that cannot be used: one message, exit code 3.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from convert.configs import FOLDERS
from convert.files import VARIANTS
from convert.sources import LICENCE_FILES, TOKENIZER_FOLDERS
from flux_jax.errors import UserError
from flux_jax.io import reading
from flux_jax.io.library import PASSED_ON
from flux_jax.io.places import disk_is_full
from flux_jax.io.published import CLIP_FILES
from flux_jax.runtime.console import say

NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
INDEX = "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"
WEIGHTS = re.compile(r"\.safetensors(\.index(\.\w+)?\.json)?$")
VARIANT = re.compile(rf"\.({'|'.join(VARIANTS)})\b")
SMALL = (INDEX, SCHEDULER, *LICENCE_FILES)
TOKENIZERS = (*CLIP_FILES, ("spiece.model",))  # either will do
HINT = "check the network, or download the model elsewhere and give its folder"


class NotFetched(UserError):
    """The hub cannot be asked, or refuses. `reason`: why, as a part of a sentence."""

    def __init__(self, message: str, reason: str):
        super().__init__(message, 3)
        self.reason = reason


def is_hub_name(source: str) -> bool:
    """owner/name that is no path here."""
    return bool(NAME.fullmatch(source)) and not os.path.lexists(source) and not source.endswith(".safetensors")


def wanted_files(names: Iterable[str], components: Iterable[str]) -> list[str]:
    """The files of a diffusers repository that the converter reads: never the single-file layout beside it, never a
    second precision ("fp16" variants) of the same weights.
    """
    tokenizers = {TOKENIZER_FOLDERS[component][0] for component in components if component in TOKENIZER_FOLDERS}
    folders = {FOLDERS[component] for component in components} | tokenizers
    variants: dict[str, dict[str, list[str]]] = {}  # folder -> variant, "" for none -> its files
    chosen = []
    for name in names:
        folder, _, file = name.rpartition("/")
        if folder in folders and WEIGHTS.search(file):
            variant = VARIANT.search(file)
            variants.setdefault(folder, {}).setdefault(variant[1] if variant else "", []).append(name)
        elif name in SMALL or folder in tokenizers or (folder in folders and file == "config.json"):
            chosen.append(name)
    for found in variants.values():
        chosen += found[min(found, key=("", *VARIANTS).index)]
    return sorted(chosen)


def fetch(repo: str, components: Iterable[str]) -> Path:
    """The folder of the model, downloaded where it is not in the hub's cache yet. UserError, exit code 3, where it can
    neither be fetched nor found there whole."""
    components = tuple(components)
    _check_environment()
    try:
        return _downloaded(repo, components)
    except NotFetched as error:
        return _cached(repo, components, error)


def _check_environment() -> None:
    try:
        from huggingface_hub import constants
    except ValueError as error:  # it reads the environment's numbers as it is imported
        raise UserError(
            f"a variable HF_... of the environment is wrong ({reading.reason(error)}): unset it", 3
        ) from error
    if constants.HF_HUB_CACHE.startswith("~"):
        raise UserError("the hub's cache has no place, for there is no home folder: set HF_HOME to a folder", 3)


def _downloaded(repo: str, components: tuple[str, ...]) -> Path:
    import huggingface_hub
    from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT

    info = _asked(  # without a timeout the library waits for ever
        repo, lambda: huggingface_hub.HfApi().model_info(repo, files_metadata=True, timeout=HF_HUB_ETAG_TIMEOUT)
    )
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    files = wanted_files(sizes, components)
    if INDEX not in files:
        raise UserError(
            f"https://huggingface.co/{repo} is no diffusers repository (no {INDEX}): download its file and give "
            "its path",
            3,
        )
    gigabytes = sum(sizes[name] for name in files) / 1e9
    say(f"{repo}: {len(files)} files, {gigabytes:.1f} GB to have in the hub's cache")
    fetched = _asked(repo, lambda: huggingface_hub.snapshot_download(repo, revision=info.sha, allow_patterns=files))
    if missing := _missing(Path(fetched), components):  # without the network the library returns what it has
        raise NotFetched(f"{repo} cannot be fetched ({missing} did not come): {HINT}", f"{missing} did not come")
    return Path(fetched)


def _asked(repo: str, call: Callable[[], Any]) -> Any:
    """What the library returns. NotFetched for whatever it raises: its own exceptions, those of what it speaks HTTP
    with, of the system, of answers that it does not understand."""
    from huggingface_hub import errors

    try:
        return call()
    except PASSED_ON:
        raise
    except BaseException as error:
        url, reason = f"https://huggingface.co/{repo}", reading.reason(error)
        code = getattr(getattr(error, "response", None), "status_code", None)
        status = f"HTTP {code}" if code else "no HTTP status"
        if isinstance(error, errors.GatedRepoError):
            reason = f"it is gated, {status}"
            message = (
                f"{repo} is gated ({status}): accept its licence at {url}, then log in with 'hf auth login' or set "
                "HF_TOKEN, and run this again"
            )
        elif isinstance(error, errors.RepositoryNotFoundError):
            reason = f"the hub does not know it, {status}"
            message = f"no model {repo!r} on the hub ({status}), and no folder or file of that name here"
        elif code in (401, 403):
            reason = f"the hub refuses, {status}"
            message = f"{repo}: the hub refuses ({status}): accept the licence at {url} and log in again"
        elif isinstance(error, errors.OfflineModeIsEnabled):
            reason = "offline mode is on, HF_HUB_OFFLINE"
            message = (
                f"{repo} cannot be fetched ({reason}): unset it, or download the model elsewhere and give its folder"
            )
        elif disk_is_full(error):
            message = (
                f"{repo} cannot be fetched ({reason}): free some space, or set HF_HOME to a folder on another disk"
            )
        elif isinstance(error, OSError) and error.filename:
            message = (
                f"{repo} cannot be fetched ({reason}: {error.filename}): set HF_HOME to a folder that can be written"
            )
        else:
            message = f"{repo} cannot be fetched ({reason}): {HINT}"
        raise NotFetched(message, reason) from error


def _cached(repo: str, components: tuple[str, ...], error: NotFetched) -> Path:
    """The copy in the hub's cache, of the newest revision that is whole. The error where there is no copy."""
    from huggingface_hub.constants import HF_HUB_CACHE

    lacking: list[str] = []
    for folder in _snapshots(Path(HF_HUB_CACHE, "models--" + repo.replace("/", "--"))):
        missing = _missing(folder, components)
        if missing is None:
            say(f"{repo}: {error.reason}; the hub's cache has it, revision {folder.name}")
            return folder
        lacking.append(missing)
    if not lacking:
        raise error
    raise UserError(
        f"{repo} cannot be fetched ({error.reason}), and the copy in the hub's cache lacks {lacking[0]}: {HINT}", 3
    ) from error


def _snapshots(store: Path) -> list[Path]:
    """The revisions of a repository's cache: the one that was "main" last, then the newest."""
    main = ""
    with contextlib.suppress(UserError):
        main = reading.read_text(store / "refs" / "main").strip()
    try:
        folders = [each for each in (store / "snapshots").iterdir() if each.is_dir()]
        return sorted(folders, key=lambda each: (each.name != main, -each.stat().st_mtime))
    except OSError:
        return []


def _missing(folder: Path, components: tuple[str, ...]) -> str | None:
    """The first file that the converter will want and that is not there; None where all are."""
    names = [
        (Path(at) / name).relative_to(folder).as_posix() for at, _, files in os.walk(folder) for name in files
    ]  # also links whose target is gone
    files = set(wanted_files(names, components))
    needed = {INDEX, SCHEDULER, *files} - set(LICENCE_FILES)
    for component in components:
        place = FOLDERS[component]
        needed.add(f"{place}/config.json")
        weights = sorted(name for name in files if name.startswith(f"{place}/") and ".safetensors" in name)
        for index in (name for name in weights if name.endswith(".index.json")):
            with contextlib.suppress(UserError):  # which is said when it is converted
                shards = reading.read_object(folder / index, most=reading.LARGE).get("weight_map")
                needed |= {f"{place}/{shard}" for shard in shards.values()} if isinstance(shards, dict) else set()
        if not weights:
            return f"{place}/*.safetensors"
        if component in TOKENIZER_FOLDERS:
            place = TOKENIZER_FOLDERS[component][0]
            if not any(all(f"{place}/{name}" in files for name in either) for either in TOKENIZERS):
                return f"{place}/tokenizer.json"
    return next((name for name in sorted(needed) if not _readable(folder / name)), None)


def _readable(path: Path) -> bool:
    return os.path.isfile(path) and os.access(path, os.R_OK)
