"""FLUX-nano's tokenizers: a real T5 (Unigram) and a real CLIP (byte-level BPE) tokenizer over a few hundred tokens.

In: the texts whose words must each be one token (the caption grammar's). Out: two folders, `t5` and `clip`, with the
files that both `flux_jax.checkpoints.tokenizers` and transformers read. Any other text is spelt in characters (T5:
<unk> beyond ASCII) or UTF-8 bytes (CLIP). The same texts give the same files, byte for byte.
"""

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from flux_jax.checkpoints.tokenizers import END
from flux_jax.config import FluxConfig, nano

START = "<|startoftext|>"
SPACE = "\u2581"
PRINTABLE = [chr(code) for code in range(33, 127)]
WORD_SCORE, CHARACTER_SCORE = -4.0, -12.0  # log probabilities: a word as a whole always beats its spelling


def build(out_dir: str | Path, texts: Iterable[str], config: FluxConfig | None = None) -> None:
    """Writes `out_dir/t5` and `out_dir/clip`. ValueError when the words do not fit into the config's vocabularies."""
    config = config or nano()
    words = sorted({word for text in texts for word in re.findall(r"[a-z]+", text.lower())})
    _write_t5(Path(out_dir) / "t5", words, config)
    _write_clip(Path(out_dir) / "clip", words, config)


def _write_t5(folder: Path, words: list[str], config: FluxConfig) -> None:
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (SPACE, CHARACTER_SCORE)]
    vocab += [(character, CHARACTER_SCORE) for character in PRINTABLE]
    vocab += [(SPACE + word, WORD_SCORE) for word in words]
    _check_size("T5", len(vocab), config.t5.vocab_size)
    roles = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    max_length = config.sampling.max_sequence_length
    settings = {"extra_ids": 0, "model_max_length": max_length, "tokenizer_class": "T5Tokenizer"}
    _write(folder, t5_tokenizer(vocab), roles, settings)


def _write_clip(folder: Path, words: list[str], config: FluxConfig) -> None:
    """Ids: single bytes, merged pieces in the order they are learned, start of text, end of text (the largest, because
    the text tower looks for the end of a prompt by the largest id)."""
    merges = learn_merges(words)
    pieces = [*byte_pieces(), *(left + right for left, right in merges), START, END]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    _check_size("CLIP", len(pieces), config.clip.vocab_size)
    roles = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    settings = {"model_max_length": config.clip.max_positions, "tokenizer_class": "CLIPTokenizer"}
    _write(folder, clip_tokenizer(vocab, merges), roles, settings)
    _write_json(folder / "vocab.json", vocab)
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def clip_tokenizer(vocab: Mapping[str, int], merges: Iterable[tuple[str, str]]) -> Tokenizer:
    """CLIP's byte-level BPE (Radford et al. 2021) from its table of tokens and its ordered list of merges.

    Text is brought to NFC, white space collapsed, lower-cased, and split into runs of letters, single digits and runs
    of other marks; the last piece of each run carries "</w>". The two special tokens are looked for in the raw text.
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
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (START, END)])
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


def byte_pieces() -> list[str]:
    """The single-byte tokens, within and at the end ("</w>") of a word, that CLIP can split UTF-8 text into.

    Left out to keep the table small: upper case (text is lower-cased), a digit that is not the end of its word (each
    digit is a word), a lead byte at the end of a word, and bytes that UTF-8 never uses.
    """
    letters = [c for c in PRINTABLE if not c.isupper()]
    lead = [byte_character(code) for code in range(0xC2, 0xF5)]
    following = [byte_character(code) for code in range(0x80, 0xC0)]
    inner = [c for c in letters if not c.isdigit()] + lead + following
    return inner + [c + "</w>" for c in letters + following]


def byte_character(code: int) -> str:
    """The printable character that stands for a byte in byte-level BPE: itself, or the next free one from U+0100 on."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(code) if code in shown else chr(256 + sum(other not in shown for other in range(code)))


def learn_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first (ties: alphabetical), until each word is one piece with "</w>"."""
    spellings = [[*word[:-1], word[-1] + "</w>"] for word in sorted(set(words))]
    merges = []
    while pairs := Counter(pair for spelling in spellings for pair in itertools.pairwise(spelling)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spellings = [_merge(spelling, best) for spelling in spellings]
    return merges


def _merge(spelling: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in spelling:
        # A piece that was just made from `pair` is longer than its left half, so it is not merged twice.
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def _check_size(name: str, size: int, limit: int) -> None:
    if size > limit:
        raise ValueError(f"{size} {name} tokens do not fit into a vocabulary of {limit}: use fewer words")


def _write(folder: Path, tokenizer: Tokenizer, roles: dict[str, str], settings: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    _write_json(folder / "special_tokens_map.json", roles)
    _write_json(folder / "tokenizer_config.json", {**roles, **settings})


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
