"""Fetches a published model from the Hugging Face hub: only the files that are converted, and says how many GB first.

In: a repository name such as black-forest-labs/FLUX.1-dev. Out: the local folder (in the hub's own cache, where an
interrupted download goes on). Missing or gated weights: one message, exit code 3.
"""

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from convert.configs import FOLDERS
from convert.sources import LICENCE_FILES, TOKENIZER_FOLDERS
from flux_jax.errors import UserError

NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
SMALL = ("model_index.json", "scheduler/scheduler_config.json", *LICENCE_FILES)


TRANSPORT = ("httpx", "httpx2")  # what the hub library speaks HTTP with; its errors, unlike its own, are no OSErrors


def is_hub_name(source: str) -> bool:
    """owner/name that is no path here."""
    return bool(NAME.fullmatch(source)) and not Path(source).exists() and not source.endswith(".safetensors")


def wanted_files(names: Iterable[str], components: Iterable[str]) -> list[str]:
    """The files of a diffusers repository that the converter reads: never the single-file layout beside it, never a
    second precision ("fp16" variants) of the same weights.
    """
    folders = {FOLDERS[component] for component in components}
    folders |= {TOKENIZER_FOLDERS[component][0] for component in components if component in TOKENIZER_FOLDERS}
    chosen = []
    for name in sorted(names):
        folder, _, file = name.rpartition("/")
        weights = file.endswith((".safetensors", ".safetensors.index.json")) and not re.search(
            r"\.(fp16|bf16|fp32)\b", file
        )
        if name in SMALL or (
            folder in folders and (weights or (folder.startswith("tokenizer") or file == "config.json"))
        ):
            chosen.append(name)
    return chosen


def fetch(repo: str, components: Iterable[str]) -> Path:
    """The folder of the model, downloaded where it is not in the hub's cache yet."""
    import huggingface_hub
    from huggingface_hub import errors

    url = f"https://huggingface.co/{repo}"
    try:
        info = huggingface_hub.HfApi().model_info(repo, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        files = wanted_files(sizes, components)
        if "model_index.json" not in files:
            raise UserError(
                f"{url} is no diffusers repository (no model_index.json): download its file and give its path", 3
            )
        gigabytes = sum(sizes[name] for name in files) / 1e9
        print(f"{repo}: {len(files)} files, {gigabytes:.1f} GB to have in the hub's cache", file=sys.stderr)
        return Path(huggingface_hub.snapshot_download(repo, revision=info.sha, allow_patterns=files))
    except errors.GatedRepoError as error:
        raise UserError(
            f"{repo} is gated ({_status(error)}): accept its licence at {url}, then log in with 'hf auth login' or set "
            "HF_TOKEN, and run this again",
            3,
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"no model {repo!r} on the hub ({_status(error)}), and no folder or file of that name here", 3
        ) from error
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__module__.split(".")[0] not in TRANSPORT:
            raise
        if _status(error) in ("HTTP 401", "HTTP 403"):
            raise UserError(
                f"{repo}: the hub refuses ({_status(error)}): accept the licence at {url} and log in again", 3
            ) from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = "check the network, or download the model elsewhere and give its folder"
        raise UserError(f"{repo} cannot be fetched ({reason}): {hint}", 3) from error


def _status(error: BaseException) -> str:
    code = getattr(getattr(error, "response", None), "status_code", None)
    return f"HTTP {code}" if code else "no HTTP status"
