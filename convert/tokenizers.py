"""Tokenizers of a published model: their files are copied, and the one that is read at run time is made where it lacks.

In: a folder with tokenizer.json, with vocab.json and merges.txt (CLIP's, FLUX.1's own among them), or with spiece.model
(T5's). Out: a folder with all of them and tokenizer.json, which `flux_jax.checkpoints.tokenizers` reads. transformers
reads the older formats, so that the ids are its own; where nothing is to be made it is not imported.
"""

import shutil
from pathlib import Path
from typing import Any

from flux_jax.checkpoints import tokenizers
from flux_jax.errors import UserError
from flux_jax.io import published

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
)


def ensure_tokenizer_json(source: Path, out: Path) -> None:
    """Copies a tokenizer's files from a folder of a published model to `out` and makes `tokenizer.json` if it lacks.
    UserError where the folder holds no tokenizer that can be read."""
    if not source.is_dir():
        raise UserError(f"There is no tokenizer folder {source}: download the model's tokenizer files too.")
    out.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    target = out / "tokenizer.json"
    if target.exists():
        tokenizers.read(source)
    elif (out / "vocab.json").exists() and (out / "merges.txt").exists():
        published.clip_tokenizer(source).backend_tokenizer.save(str(target))
    elif (out / "spiece.model").exists():
        _t5_tokenizer(source).backend_tokenizer.save(str(target))
    else:
        raise UserError(
            f"{source} holds no tokenizer: it needs tokenizer.json, vocab.json and merges.txt, or spiece.model."
        )


def _t5_tokenizer(folder: Path) -> Any:
    import sentencepiece

    file = folder / "spiece.model"
    try:
        sentencepiece.SentencePieceProcessor(model_file=str(file))  # transformers takes a broken one for tiktoken's
        return published.transformers().T5TokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # of many kinds
        raise UserError(f"{file} cannot be read ({published.one_line(error)}): download it again.") from error
