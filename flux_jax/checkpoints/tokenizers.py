"""Prompts become token ids: the two tokenizers of a checkpoint, read from their `tokenizer.json` files.

In: prompts (strings) and a folder with `t5/tokenizer.json` and `clip/tokenizer.json`. Out: ids int32 [b, max_length],
padded and cut to a fixed length exactly as transformers does with padding="max_length", truncation=True in FLUX's
pipeline. Only the `tokenizers` library is needed; `ensure_tokenizer_json` makes the one file from the older formats.
"""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from flux_jax.config import FluxConfig
from flux_jax.errors import UserError

START, END = "<|startoftext|>", "<|endoftext|>"
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
)


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
        return cls(_read(Path(directory) / "t5"), _read(clip_folder), config, pad)

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


def clip_tokenizer(
    vocab: Mapping[str, int], merges: Iterable[tuple[str, str]], normalized: Mapping[str, bool] | None = None
) -> Tokenizer:
    """CLIP's byte-level BPE (Radford et al. 2021) from its table of tokens and its ordered list of merges.

    Text is brought to NFC, white space collapsed, lower-cased, and split into runs of letters, single digits and runs
    of other marks; the last piece of each run carries "</w>". `normalized` says which of the two special tokens are
    looked for in the lower-cased text rather than in the raw one.
    """
    words = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    special = "|".join(token.replace("|", r"\|") for token in (START, END))
    tokenizer = Tokenizer(
        models.BPE(
            dict(vocab),
            list(merges),
            unk_token=END,
            fuse_unk=False,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(f"{special}|{words}"), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=bool(normalized and normalized.get(token))) for token in (START, END)]
    )
    end, start = (END, vocab[END]), (START, vocab[START])
    tokenizer.post_processor = processors.RobertaProcessing(end, start, trim_offsets=False, add_prefix_space=False)
    return tokenizer


def t5_tokenizer(vocab: Sequence[tuple[str, float]]) -> Tokenizer:
    """T5's Unigram tokenizer (Kudo 2018) from (piece, log probability), in the order of ids; ids 0 to 2 are special.

    Words are split at white space and marked with a leading U+2581; </s> closes the sequence.
    """
    tokenizer = Tokenizer(models.Unigram(list(vocab), unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always", split=True)]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always", split=True)
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False) for piece, _ in vocab[:3]])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], pair=["$A", "</s>", "$B", "</s>"], special_tokens=[("</s>", 1)]
    )
    return tokenizer


def clip_ids(folder: Path, prompts: Sequence[str], length: int) -> np.ndarray:
    """Ids int32 [b, length] of the tokenizer in a published CLIP folder (tokenizer.json, or vocab.json and merges.txt).
    What is longer is cut, what is shorter ends in end tokens. UserError where the files lack or are broken."""
    published = (folder / "tokenizer.json").is_file() or not (folder / "merges.txt").is_file()
    tokenizer = _read(folder) if published else _clip_from_files(folder)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return _pad(tokenizer, prompts, length, _token_id(tokenizer, END, "clip"))


def ensure_tokenizer_json(source: str | Path, out: str | Path) -> None:
    """Copies a tokenizer's files from a folder of a published model to `out` and makes `tokenizer.json` if it lacks.

    CLIP folders hold vocab.json and merges.txt; T5 folders may hold only spiece.model, which transformers reads.
    Raises UserError when the folder holds no tokenizer that can be read.
    """
    source, out = Path(source), Path(out)
    if not source.is_dir():
        raise UserError(f"There is no tokenizer folder {source}: download the model's tokenizer files too.")
    out.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    target = out / "tokenizer.json"
    if target.exists():
        _read(out)
    elif (out / "vocab.json").exists() and (out / "merges.txt").exists():
        _clip_from_files(out).save(str(target))
    elif (out / "spiece.model").exists():
        _t5_from_sentencepiece(out).save(str(target))
    else:
        raise UserError(
            f"{source} holds no tokenizer: it needs tokenizer.json, vocab.json and merges.txt, or spiece.model."
        )


def _clip_from_files(folder: Path) -> Tokenizer:
    normalized: dict[str, bool] = {}
    config = _json(folder / "tokenizer_config.json")
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):  # of one token's roles the last rules
        token = config.get(key)
        if isinstance(token, dict):
            normalized[str(token.get("content"))] = bool(token.get("normalized"))
        elif token is not None:
            normalized[token] = False
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    try:
        pairs = (line.split() for line in lines if line and not line.startswith("#version"))
        merges = [(left, right) for left, right in pairs]
        return clip_tokenizer(_json(folder / "vocab.json"), merges, normalized)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{folder} holds a broken CLIP tokenizer ({error}): download it again.") from error


def _t5_from_sentencepiece(folder: Path) -> Tokenizer:
    try:
        import sentencepiece  # noqa: F401 (transformers reads the file with it)
        from transformers import T5TokenizerFast
    except ImportError as error:
        raise UserError(
            f"{folder} has spiece.model but no tokenizer.json: add it, or `pip install transformers sentencepiece`."
        ) from error
    try:
        return T5TokenizerFast.from_pretrained(str(folder)).backend_tokenizer
    except Exception as error:  # transformers tries other formats too and fails in many ways
        raise UserError(f"{folder / 'spiece.model'} cannot be read ({error}): download it again.") from error


def _read(folder: Path) -> Tokenizer:
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
