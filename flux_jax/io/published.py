"""What only transformers reads: its class for each published format, and CLIP's tokenizer from a published folder.

In: a folder as the hub has it. Out: transformers' own objects. The library takes seconds to import (torch, which these
classes do not need, more where it is installed), so only the converter and `compare --clip` come this way, and a
generation never does. No network is touched.
"""

import os
from pathlib import Path
from typing import Any

from flux_jax.errors import UserError

CLIP_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))  # either will do


def transformers() -> Any:
    """The library, imported at this moment. Its advice ("PyTorch was not found") is none for our users."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import transformers

    return transformers


def clip_tokenizer(folder: Path) -> Any:
    """transformers' CLIP tokenizer from tokenizer.json, or from vocab.json and merges.txt. UserError where the files
    lack or are broken."""
    if not any(all((folder / name).is_file() for name in names) for names in CLIP_FILES):
        raise UserError(f"{folder} holds no tokenizer: it needs tokenizer.json, or vocab.json and merges.txt.")
    try:
        tokenizer = transformers().CLIPTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        vocabulary = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
        if lacking := {tokenizer.bos_token, tokenizer.eos_token} - vocabulary.keys():  # they would get ids of their own
            raise ValueError(f"no {' and no '.join(sorted(lacking))} among its tokens")
    except Exception as error:  # of many kinds, bare Exception among them
        raise UserError(f"{folder} holds a broken CLIP tokenizer ({one_line(error)}): download it again.") from error
    return tokenizer


def one_line(error: BaseException) -> str:
    """An error of the library as a part of one sentence."""
    return " ".join(str(error).split())
