"""What only transformers reads: its class for each published format, and the tokenizers of a published folder.

In: a folder as the hub has it. Out: transformers' own objects; or the tokenizer's files, copied. The library takes
seconds to import (torch, which these classes do not need, more where it is installed), so only the converter and
`compare --clip` come this way, and a generation never does. No network is touched.

A folder is a stranger's: the library gets a copy of the few files that make a tokenizer, each a regular one of bounded
size that lies in the folder, and what it raises over them is one sentence.
"""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flux_jax.errors import UserError, shortened
from flux_jax.io import reading
from flux_jax.io.library import library

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    TOKENIZER,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
)
CLIP_FILES = ((TOKENIZER,), ("vocab.json", "merges.txt"))  # either will do
# what else than tokens of tokenizer_config.json decides on ids
CONFIG = ("added_tokens_decoder", "add_prefix_space", "do_lower_case", "errors", "extra_ids", "legacy")
MOST_EXTRA = 10_000  # tokens that T5 was trained to fill in; published ones have 100
AGAIN = "download it again"


def transformers() -> Any:
    """The library, imported at this moment. Its advice ("PyTorch was not found") is none for our users."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with library("The package transformers cannot be imported", "mend the environment, or install the package again"):
        import transformers

    return transformers


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copies those of the tokenizer's files that a folder has to `out`. UserError for pipes, for links that lead out of
    the folder, and for files larger than any tokenizer."""
    for name in TOKENIZER_FILES:
        path = source / name
        if not os.path.lexists(path):
            continue
        if reading.leads_out(source, path):
            raise reading.unreadable(path, "it is a link that leads out of its folder", "copy the file there")
        (out / name).write_bytes(reading.read_bytes(path, most=reading.LARGE, remedy=AGAIN))


def clip_tokenizer(folder: Path) -> Any:
    """transformers' CLIP tokenizer from tokenizer.json, or from vocab.json and merges.txt. UserError where the files
    lack or are broken."""
    if not any(all(os.path.isfile(folder / name) for name in names) for names in CLIP_FILES):
        raise UserError(f"{folder} holds no tokenizer: it needs tokenizer.json, or vocab.json and merges.txt.")
    with library(f"{folder} holds a broken CLIP tokenizer", AGAIN):
        tokenizer = _from_copy(folder, lambda copy: transformers().CLIPTokenizerFast)
        vocabulary = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
        if lacking := {tokenizer.bos_token, tokenizer.eos_token} - vocabulary.keys():  # they would get ids of their own
            raise ValueError(f"no {' and no '.join(sorted(map(str, lacking)))} among its tokens")
    return tokenizer


def t5_tokenizer(folder: Path) -> Any:
    """transformers' T5 tokenizer from spiece.model. UserError where it is broken."""

    def checked(copy: Path) -> Any:
        import sentencepiece

        sentencepiece.SentencePieceProcessor(model_file=str(copy / "spiece.model"))  # transformers takes a broken one
        return transformers().T5TokenizerFast  # for tiktoken's

    with library(f"{folder / 'spiece.model'} cannot be read", AGAIN):
        return _from_copy(folder, checked)


def _from_copy(folder: Path, kind: Callable[[Path], Any]) -> Any:
    """A tokenizer read by transformers' class, which would open further files that it finds in a folder, and take
    whatever tokenizer_config.json says for an argument, files and vocabularies among them."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        copy_tokenizer(folder, copy)
        if (copy / TOKENIZER_CONFIG).exists():
            config = reading.read_object(folder / TOKENIZER_CONFIG, remedy=AGAIN)
            config = {
                key: value for key, value in config.items() if key in CONFIG or key.endswith(("_token", "_tokens"))
            }
            extra = config.get("extra_ids", 0)
            if type(extra) is not int or not 0 <= extra <= MOST_EXTRA:
                raise ValueError(f"extra_ids is {shortened(extra)}, must be from 0 to {MOST_EXTRA}")
            (copy / TOKENIZER_CONFIG).write_text(json.dumps(config))
        return kind(copy).from_pretrained(name, local_files_only=True)
