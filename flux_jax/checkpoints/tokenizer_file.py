"""The files of one tokenizer, read so that a stranger's, or a damaged one, is a sentence.

In: a folder with `tokenizer.json`, and `tokenizer_config.json` where there is one. Out: the tokenizer of the library
`tokenizers`, which is written in Rust: what goes wrong there may be a panic, which Python sees as no `Exception`, or
the end of the process, where memory runs out. So each use of it stands in `library`, and in `unheard`, for a panic
writes a page to stderr that would only hide the sentence; and what would grow a text without bounds is refused before
it is used.
"""

import base64
import json
import math
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from flux_jax.errors import UserError
from flux_jax.io.library import library
from flux_jax.io.reading import LARGE, read_object, unreadable
from flux_jax.runtime.console import unheard

AGAIN = "convert or download the checkpoint again"
MOST_GROWTH = 10**5  # of a text on its way to tokens; that of published tokenizers is some thousand
USUAL_GROWTH = 4  # the most that a step which inserts nothing of its own makes of a character, nearly


def read(folder: Path) -> Tokenizer:
    """The tokenizer in a folder's tokenizer.json; UserError where there is none that can be used."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"There is no tokenizer at {path}: the checkpoint is incomplete, convert or download it again.")
    described = read_object(path, most=LARGE, remedy=AGAIN)
    with library(f"{path} is not a tokenizer", AGAIN), unheard():
        steps = [described.get(key) for key in ("normalizer", "pre_tokenizer", "post_processor")]
        if growth(steps) > MOST_GROWTH:
            raise unreadable(path, "its steps would make too much of a text", AGAIN)
        if (described.get("model") or {}).get("dropout"):
            raise unreadable(path, "it would make other tokens of a text each time (dropout)", AGAIN)
        tokenizer = Tokenizer.from_str(json.dumps(described))  # what was looked at, and nothing else
        tokenizer.no_padding()
        tokenizer.no_truncation()
    return tokenizer


def growth(step: Any) -> int:
    """How many times longer a step, with all that lie in it, may make a text; a bound, not a measure."""
    if isinstance(step, list):
        return math.prod(map(growth, step))
    if not isinstance(step, dict):
        return 1
    match step.get("type"):
        case "Sequence":
            return math.prod(growth(each) for each in step.values() if isinstance(each, list))
        case "Replace":
            return 1 + len(step["content"])
        case "Prepend":
            return 1 + len(step["prepend"])
        case "TemplateProcessing":
            return 1 + len(step["single"])
        case "Precompiled":  # the size of a table, the table, and what may be inserted, each with a zero behind
            data = base64.b64decode(step["precompiled_charsmap"] or "")
            inserted = data[4 + int.from_bytes(data[:4], "little") :]
            return 1 + max(map(len, inserted.split(b"\0")))
    return USUAL_GROWTH


def special_tokens(folder: Path) -> dict[str, str]:
    """Role -> token, from tokenizer_config.json where there is one."""
    path = folder / "tokenizer_config.json"
    config = read_object(path, remedy=AGAIN) if path.is_file() else {}
    roles = {key: value for key, value in config.items() if key.endswith("_token")}
    roles = {key: value.get("content") if isinstance(value, dict) else value for key, value in roles.items()}
    return {key: value for key, value in roles.items() if isinstance(value, str)}
