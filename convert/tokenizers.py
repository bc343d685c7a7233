"""Tokenizers of a published model: their files are copied, and the one that is read at run time is made where it lacks.

In: a folder with tokenizer.json, with vocab.json and merges.txt (CLIP's, FLUX.1's own among them), or with spiece.model
(T5's). Out: a folder with all of them and tokenizer.json, which `flux_jax.checkpoints.tokenizers` reads. transformers
reads the older formats, so that the ids are its own; where nothing is to be made it is not imported.
"""

import os
from pathlib import Path

from flux_jax.checkpoints import tokenizer_file
from flux_jax.errors import UserError
from flux_jax.io import published


def ensure_tokenizer_json(source: Path, out: Path) -> None:
    """Copies a tokenizer's files from a folder of a published model to `out` and makes `tokenizer.json` if it lacks.
    UserError where the folder holds no tokenizer that can be read."""
    if not os.path.isdir(source):
        raise UserError(f"There is no tokenizer folder {source}: download the model's tokenizer files too.")
    out.mkdir(parents=True, exist_ok=True)
    published.copy_tokenizer(source, out)
    target = out / published.TOKENIZER
    if os.path.lexists(target):
        tokenizer_file.read(source)
        return
    if (out / "vocab.json").exists() and (out / "merges.txt").exists():
        tokenizer = published.clip_tokenizer(source)
    elif (out / "spiece.model").exists():
        tokenizer = published.t5_tokenizer(source)
    else:
        raise UserError(
            f"{source} holds no tokenizer: it needs tokenizer.json, vocab.json and merges.txt, or spiece.model."
        )
    tokenizer.backend_tokenizer.save(str(target))
