"""Prompts become token ids: the two tokenizers of a checkpoint, read from their `tokenizer.json` files.

In: prompts (strings) and a folder with `t5/tokenizer.json` and `clip/tokenizer.json`. Out: ids int32 [b, max_length],
padded and cut to a fixed length exactly as transformers does with padding="max_length", truncation=True in FLUX's
pipeline. Only the `tokenizers` library is needed, which is imported in a tenth of a second: transformers takes seconds.
The converter makes the one file from the older formats (`convert.tokenizers`).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from flux_jax.config import FluxConfig
from flux_jax.errors import UserError

END = "<|endoftext|>"  # of a text, to CLIP; pads where the checkpoint names no other token


class Tokenizers:
    """Both tokenizers of one checkpoint; prompts are lists of strings."""

    def __init__(self, t5: Tokenizer, clip: Tokenizer, config: FluxConfig, clip_pad: str = END):
        self.config = config
        self._t5, self._clip = t5, clip
        for name, tokenizer, size in (("t5", t5, config.t5.vocab_size), ("clip", clip, config.clip.vocab_size)):
            tokenizer.no_padding()
            tokenizer.no_truncation()
            if (largest := max(tokenizer.get_vocab().values())) >= size:
                raise UserError(
                    f"The {name} tokenizer has ids up to {largest} but the {name} model only knows {size} tokens: "
                    "use the tokenizer files that belong to this model."
                )
        self._t5_pad = _token_id(t5, "<pad>", "t5")
        self._clip_pad = _token_id(clip, clip_pad, "clip")

    @classmethod
    def load(cls, directory: str | Path, config: FluxConfig) -> "Tokenizers":
        """Reads `directory/t5` and `directory/clip`; UserError when a file is missing, broken or another model's."""
        clip_folder = Path(directory) / "clip"
        pad = _special_tokens(clip_folder).get("pad_token", END)
        return cls(read(Path(directory) / "t5"), read(clip_folder), config, pad)

    def t5(self, prompts: Sequence[str], max_length: int | None = None) -> np.ndarray:
        """Ids int32 [b, max_length] (default: the model's max_sequence_length), </s> behind the prompt, then <pad>."""
        return _pad(self._t5, prompts, max_length or self.config.sampling.max_sequence_length, self._t5_pad)

    def clip(self, prompts: Sequence[str]) -> np.ndarray:
        """Ids int32 [b, max_positions]: start of text, the prompt, end of text, then padding."""
        return _pad(self._clip, prompts, self.config.clip.max_positions, self._clip_pad)

    def t5_lengths(self, prompts: Sequence[str]) -> list[int]:
        """Number of T5 tokens of each prompt, </s> included: what max_length must be for nothing to be left out."""
        return [len(encoding.ids) for encoding in self._t5.encode_batch(list(prompts))]

    def left_out(self, prompt: str, max_length: int | None = None) -> str:
        """The end of the prompt that `t5` cuts off at `max_length`; "" when all of it is used."""
        encoding = self._t5.encode(prompt)
        max_length = max_length or self.config.sampling.max_sequence_length
        if len(encoding.ids) <= max_length:
            return ""
        start, _ = encoding.offsets[max_length - 1]  # one place is taken by </s>
        return prompt[start:].strip()

    def truncation_warning(self, prompt: str, max_length: int | None = None) -> str | None:
        """One sentence for the user when part of the prompt does not fit, otherwise None."""
        max_length = max_length or self.config.sampling.max_sequence_length
        if not (rest := self.left_out(prompt, max_length)):
            return None
        total = self.t5_lengths([prompt])[0] - 1
        return f"The prompt has {total} tokens, only the first {max_length - 1} are used: {rest!r} is left out."


def read(folder: Path) -> Tokenizer:
    """The tokenizer in a folder's tokenizer.json; UserError where there is none."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"There is no tokenizer at {path}: the checkpoint is incomplete, convert or download it again.")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path} is not a tokenizer ({error}): convert or download the checkpoint again.") from error


def _special_tokens(folder: Path) -> dict[str, str]:
    """Role -> token, from tokenizer_config.json where there is one."""
    config = _json(folder / "tokenizer_config.json")
    roles = {key: value for key, value in config.items() if key.endswith("_token")}
    roles = {key: value.get("content") if isinstance(value, dict) else value for key, value in roles.items()}
    return {key: value for key, value in roles.items() if isinstance(value, str)}


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): convert or download it again.") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold a JSON object: convert or download it again.")
    return data


def _token_id(tokenizer: Tokenizer, token: str, name: str) -> int:
    if (index := tokenizer.token_to_id(token)) is None:
        raise UserError(f"The {name} tokenizer has no token {token!r} to pad with: it is not one of a FLUX model.")
    return index


def _pad(tokenizer: Tokenizer, prompts: Sequence[str], length: int, pad: int) -> np.ndarray:
    """Ids int32 [b, length]; the last id of a prompt that is too long stays the end token."""
    ids = np.full((len(prompts), length), pad, np.int32)
    for row, encoding in zip(ids, tokenizer.encode_batch(list(prompts)), strict=True):
        tokens = encoding.ids
        if len(tokens) > length:
            tokens = [*tokens[: length - 1], tokens[-1]]
        row[: len(tokens)] = tokens
    return ids
