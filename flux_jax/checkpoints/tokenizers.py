"""Prompts become token ids: the two tokenizers of a checkpoint, read from their `tokenizer.json` files.

In: prompts (strings) and a folder with `t5/tokenizer.json` and `clip/tokenizer.json`. Out: ids int32 [b, max_length],
padded and cut to a fixed length exactly as transformers does with padding="max_length", truncation=True in FLUX's
pipeline. Only the `tokenizers` library is needed, which is imported in a tenth of a second: transformers takes seconds.
The converter makes the one file from the older formats (`convert.tokenizers`).
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Encoding, Tokenizer

from flux_jax.checkpoints.tokenizer_file import AGAIN, read, special_tokens
from flux_jax.config import FluxConfig
from flux_jax.errors import UserError, shortened
from flux_jax.io.library import library
from flux_jax.runtime.console import unheard

END = "<|endoftext|>"  # of a text, to CLIP; pads where the checkpoint names no other token
PROBE = "A photo, 3 é."  # drawn by nobody: what a tokenizer makes of it shows which ids it uses


class Tokenizers:
    """Both tokenizers of one checkpoint; prompts are lists of strings."""

    def __init__(self, t5: Tokenizer, clip: Tokenizer, config: FluxConfig, clip_pad: str = END):
        self.config = config
        self._t5 = Encoder("t5", t5, config.t5.vocab_size, "<pad>")
        self._clip = Encoder("clip", clip, config.clip.vocab_size, clip_pad)
        end = config.clip.eos_token_id
        if end != 2 and end not in self._clip.encode([PROBE])[0].ids:  # 2: see `CLIPText.end_of_text`
            raise UserError(
                f"The clip tokenizer does not end a text with token {end}, where the clip model looks for it."
            )

    @classmethod
    def load(cls, directory: str | Path, config: FluxConfig) -> "Tokenizers":
        """Reads `directory/t5` and `directory/clip`; UserError when a file is missing, broken or another model's."""
        clip_folder = Path(directory) / "clip"
        pad = special_tokens(clip_folder).get("pad_token", END)
        return cls(read(Path(directory) / "t5"), read(clip_folder), config, pad)

    def t5(self, prompts: Sequence[str], max_length: int | None = None) -> np.ndarray:
        """Ids int32 [b, max_length] (default: the model's max_sequence_length), </s> behind the prompt, then <pad>."""
        return self._t5.padded(prompts, max_length or self.config.sampling.max_sequence_length)

    def clip(self, prompts: Sequence[str]) -> np.ndarray:
        """Ids int32 [b, max_positions]: start of text, the prompt, end of text, then padding."""
        return self._clip.padded(prompts, self.config.clip.max_positions)

    def t5_lengths(self, prompts: Sequence[str]) -> list[int]:
        """Number of T5 tokens of each prompt, </s> included: what max_length must be for nothing to be left out."""
        return [len(encoding.ids) for encoding in self._t5.encode(prompts)]

    def left_out(self, prompt: str, max_length: int | None = None) -> str:
        """The end of the prompt that `t5` cuts off at `max_length`; "" when all of it is used."""
        return self._t5.left_out(prompt, max_length or self.config.sampling.max_sequence_length)

    def truncation_warning(self, prompt: str, max_length: int | None = None) -> str | None:
        """One sentence for the user when part of the prompt does not fit, otherwise None."""
        max_length = max_length or self.config.sampling.max_sequence_length
        if not (rest := self.left_out(prompt, max_length)):
            return None
        total = self.t5_lengths([prompt])[0] - 1
        return f"The prompt has {total} tokens, only the first {max_length - 1} are used: {rest!r} is left out."

    def clip_truncation_warning(self, prompt: str) -> str | None:
        """One sentence when CLIP, which steers less than T5, reads less of the prompt than `max_positions` hold."""
        length = self.config.clip.max_positions
        if not (rest := self._clip.left_out(prompt, length)):
            return None
        cut = shortened(rest, 120, quote=False)
        return f"CLIP reads only the first {length - 2} tokens: {cut!r} is left out for it; T5 reads the whole prompt."


class Encoder:
    """One tokenizer, whose ids a model's embedding has. UserError where it has others, or fails."""

    def __init__(self, name: str, tokenizer: Tokenizer, vocab_size: int, pad: str):
        self.name, self.tokenizer, self.vocab_size = name, tokenizer, vocab_size
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._check(tokenizer.get_vocab().values())
        if (found := tokenizer.token_to_id(pad)) is None:
            raise UserError(
                f"The {name} tokenizer has no token {shortened(pad)} to pad with: it is not one of a FLUX model."
            )
        self.pad = found
        self.encode([PROBE])

    def encode(self, prompts: Sequence[str]) -> list[Encoding]:
        """What the library says of texts, their ids looked at: a model would take one that it does not know for its
        last one, without a word."""
        with library(f"The {self.name} tokenizer cannot read {shortened(list(prompts))}", AGAIN), unheard():
            encodings = self.tokenizer.encode_batch(list(prompts))
        self._check(max(encoding.ids, default=0) for encoding in encodings)
        return encodings

    def _check(self, ids: Iterable[int]) -> None:
        if (largest := max(ids, default=0)) >= self.vocab_size:
            raise UserError(
                f"The {self.name} tokenizer has ids up to {largest} but the {self.name} model only knows "
                f"{self.vocab_size} tokens: use the tokenizer files that belong to this model."
            )

    def left_out(self, prompt: str, length: int) -> str:
        """The end of the prompt that does not fit into so many tokens; "" when all of it does."""
        [encoding] = self.encode([prompt])
        if len(encoding.ids) <= length:
            return ""
        start, _ = encoding.offsets[length - 1]  # one place is taken by the end token
        return prompt[start:].strip()

    def padded(self, prompts: Sequence[str], length: int) -> np.ndarray:
        """Ids int32 [b, length]; the last id of a prompt that is too long stays the end token."""
        ids = np.full((len(prompts), length), self.pad, np.int32)
        for row, encoding in zip(ids, self.encode(prompts), strict=True):
            tokens = encoding.ids
            if len(tokens) > length:
                tokens = [*tokens[: length - 1], tokens[-1]]
            row[: len(tokens)] = tokens
        return ids
