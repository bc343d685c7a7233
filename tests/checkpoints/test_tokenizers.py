"""Token ids against transformers' own tokenizers, on FLUX-nano's files and on folders laid out as FLUX.1's."""

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_jax.checkpoints.tokenizers import Tokenizers, ensure_tokenizer_json
from flux_jax.config import nano
from flux_jax.errors import UserError
from flux_jax.nano import vocabulary
from flux_jax.nano.captions import VOCABULARY

with warnings.catch_warnings():  # warnings are errors in our tests; those of other people's imports are not ours
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers", reason="the reference tokenizers are transformers'")
    from transformers import CLIPTokenizerFast, T5TokenizerFast

transformers.logging.set_verbosity_error()

T5_LENGTH, CLIP_LENGTH = nano().sampling.max_sequence_length, nano().clip.max_positions
PROMPTS = [
    "a red circle to the left of a blue square",
    "",
    "   ",
    " A  RED\tcircle, and two Green squares. ",
    "e\u0301 E\u0301 ﬁ 123!?",
    "Élan naïve 你好 🎈",
    "don't it's we'll they'd I'm you've they're",
    "new\nline, no-break\u00a0space, zero\u200bwidth, bell\x07",
    "</s> <pad> <unk> <|endoftext|> x <|startoftext|> <|ENDOFTEXT|> <|STARTOFTEXT|> <extra_id_0>",
    "a " * 80,
    "star" * 40,
]


def transformers_ids(tokenizer, prompts, length):
    """As FLUX's pipeline calls it."""
    return np.array(tokenizer(prompts, padding="max_length", max_length=length, truncation=True).input_ids)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tokenizers")
    vocabulary.build(out, VOCABULARY)
    return out


@pytest.fixture(scope="module")
def ours(folder) -> Tokenizers:
    return Tokenizers.load(folder, nano())


@pytest.fixture(scope="module")
def reference(folder):
    return T5TokenizerFast.from_pretrained(folder / "t5"), CLIPTokenizerFast.from_pretrained(folder / "clip")


@pytest.mark.parametrize("length", [1, 2, 24, 512])
def test_t5_ids_equal_transformers(ours, reference, length):
    ids = ours.t5(PROMPTS, length)
    assert ids.dtype == np.int32
    assert ids.shape == (len(PROMPTS), length)
    np.testing.assert_array_equal(ids, transformers_ids(reference[0], PROMPTS, length))


def test_clip_ids_equal_transformers(ours, reference):
    ids = ours.clip(PROMPTS)
    assert ids.dtype == np.int32
    assert reference[1].model_max_length == CLIP_LENGTH  # what diffusers' pipeline takes as the length
    np.testing.assert_array_equal(ids, transformers_ids(reference[1], PROMPTS, CLIP_LENGTH))


@settings(max_examples=200)
@given(st.text(max_size=60))
def test_any_text_equals_transformers(ours, reference, prompt):
    np.testing.assert_array_equal(ours.t5([prompt]), transformers_ids(reference[0], [prompt], T5_LENGTH))
    np.testing.assert_array_equal(ours.clip([prompt]), transformers_ids(reference[1], [prompt], CLIP_LENGTH))


def test_ids_end_and_are_padded(ours):
    t5, clip = ours.t5(["a red circle", "a " * 80]), ours.clip(["a red circle", "a " * 80])
    assert t5[0, 3:].tolist() == [1] + [0] * (T5_LENGTH - 4)
    assert (t5[1, -2] != 1, t5[1, -1]) == (True, 1)
    start, end = clip[0, 0], clip[0, -1]
    assert end == max(clip.ravel()) == start + 1
    assert clip[0, 4:].tolist() == [end] * (CLIP_LENGTH - 4)
    assert (clip[1, -2] != end, clip[1, -1]) == (True, end)


def test_prompts_do_not_depend_on_their_company(ours):
    for method in (ours.t5, ours.clip):
        np.testing.assert_array_equal(method(PROMPTS), np.concatenate([method([prompt]) for prompt in PROMPTS]))


def test_grammar_words_are_single_tokens(ours):
    assert ours.t5_lengths(VOCABULARY) == [2] * len(VOCABULARY)
    assert (ours.clip(VOCABULARY)[:, 2] != ours.clip([""])[0, 1]).sum() == 0
    assert len(np.unique(ours.t5(VOCABULARY)[:, 0])) == len(np.unique(ours.clip(VOCABULARY)[:, 1])) == len(VOCABULARY)


def test_any_printable_ascii_is_spelt_without_unknown_tokens(ours):
    text = "".join(map(chr, range(32, 127)))
    for prompt in (text, text[::-1], " ".join(text), "Zürich 你好 🎈"):
        assert prompt.startswith("Z") or 2 not in ours.t5([prompt], 256)
        content = ours._clip.encode(prompt).ids[1:-1]
        assert ours.clip([""])[0, 1] not in content
        assert ours._clip.decode(content).replace("</w>", "").replace(" ", "") == prompt.lower().replace(" ", "")


def test_what_does_not_fit_is_named(ours):
    prompt = "a red circle to the left  of a blue square"
    assert ours.t5_lengths([prompt]) == [11]
    assert ours.left_out(prompt, 11) == ""
    assert ours.truncation_warning(prompt) is None
    assert ours.left_out(prompt, 10) == "square"
    assert ours.truncation_warning(prompt, 7) == (
        "The prompt has 10 tokens, only the first 6 are used: 'of a blue square' is left out."
    )


def test_same_words_same_bytes(folder, tmp_path):
    """Whatever the order of the texts and Python's hash seed."""
    words = list(VOCABULARY) * 2
    random.shuffle(words)
    script = f"from flux_jax.nano.vocabulary import build; build({str(tmp_path)!r}, {words!r})"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", script], check=True, cwd=root, env={**os.environ, "PYTHONHASHSEED": "123"})
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.*"))
    assert len(files) == 8
    for path in files:
        assert (tmp_path / path).read_bytes() == (folder / path).read_bytes(), path


def test_too_many_words_are_refused(tmp_path):
    with pytest.raises(ValueError, match="T5 tokens do not fit into a vocabulary of 256"):
        vocabulary.build(tmp_path, ["".join(chr(97 + i // 20) + chr(97 + i % 20)) for i in range(300)])


def hub_clip_folder(folder: Path, out: Path) -> Path:
    """As in FLUX.1's `tokenizer`: no tokenizer.json, special tokens written in full, padding named by its text."""
    shutil.copytree(folder / "clip", out)
    (out / "tokenizer.json").unlink()

    def token(content):
        flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        return {"__type": "AddedToken", "content": content, **flags}

    roles = {"bos_token": token("<|startoftext|>"), "eos_token": token("<|endoftext|>")}
    roles |= {"unk_token": token("<|endoftext|>"), "pad_token": "<|endoftext|>"}
    config = {
        **roles,
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": CLIP_LENGTH,
    }
    (out / "special_tokens_map.json").write_text(json.dumps(roles))
    (out / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "CLIPTokenizer"}))
    return out


def test_tokenizer_json_is_made_from_a_published_clip_folder(folder, tmp_path):
    source = hub_clip_folder(folder, tmp_path / "tokenizer")
    shutil.copytree(folder / "t5", tmp_path / "out" / "t5")
    ensure_tokenizer_json(source, tmp_path / "out" / "clip")
    copied = {path.name for path in (tmp_path / "out" / "clip").iterdir()}
    assert copied == {"merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"}
    expected = transformers_ids(CLIPTokenizerFast.from_pretrained(source), PROMPTS, CLIP_LENGTH)
    np.testing.assert_array_equal(Tokenizers.load(tmp_path / "out", nano()).clip(PROMPTS), expected)


def test_tokenizer_json_is_made_from_sentencepiece(folder, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece", reason="writes the spiece.model that this test reads")
    source = tmp_path / "tokenizer_2"
    source.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*VOCABULARY, *PROMPTS[:8]] * 20), model_prefix=str(source / "spiece"), vocab_size=100,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2, num_threads=1,
    )  # fmt: skip
    shutil.copytree(folder / "clip", tmp_path / "out" / "clip")
    ensure_tokenizer_json(source, tmp_path / "out" / "t5")
    config = dataclasses.replace(nano(), t5=dataclasses.replace(nano().t5, vocab_size=300))
    ids = Tokenizers.load(tmp_path / "out", config).t5(PROMPTS, 64)
    np.testing.assert_array_equal(ids, transformers_ids(T5TokenizerFast.from_pretrained(source), PROMPTS, 64))


def test_an_existing_tokenizer_json_is_copied_as_it_is(folder, tmp_path):
    ensure_tokenizer_json(folder / "t5", tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "t5" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("clip/tokenizer.json", None, "no tokenizer at .*clip"),
        ("t5/tokenizer.json", None, "no tokenizer at .*t5"),
        ("t5/tokenizer.json", "{}", "is not a tokenizer"),
        ("clip/tokenizer_config.json", "{", "is not JSON"),
        ("clip/tokenizer_config.json", '{"pad_token": "<nothing>"}', "no token '<nothing>' to pad with"),
    ],
)
def test_broken_tokenizers_are_one_clear_error(folder, tmp_path, name, content, message):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        Tokenizers.load(tmp_path, nano())
    assert caught.value.exit_code == 2


def test_a_tokenizer_of_another_model_is_refused(folder):
    small = dataclasses.replace(nano(), clip=dataclasses.replace(nano().clip, vocab_size=100))
    with pytest.raises(UserError, match="the clip model only knows 100 tokens"):
        Tokenizers.load(folder, small)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "There is no tokenizer folder"),
        ({}, "holds no tokenizer"),
        ({"tokenizer.json": "nonsense"}, "is not a tokenizer"),
        ({"vocab.json": "[1]", "merges.txt": ""}, "must hold a JSON object"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "a b c\n"}, "holds a broken CLIP tokenizer"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "x y\n"}, "holds a broken CLIP tokenizer"),
        ({"spiece.model": "nonsense"}, r"spiece\.model"),
    ],
)
def test_broken_source_folders_are_one_clear_error(tmp_path, files, message):
    source = tmp_path / "source"
    if files is not None:
        source.mkdir()
    for name, content in (files or {}).items():
        (source / name).write_text(content)
    with pytest.raises(UserError, match=message):
        ensure_tokenizer_json(source, tmp_path / "out")


def test_the_tokenizers_need_no_transformers(folder):
    """Start-up stays fast: transformers takes seconds to import."""
    script = (
        "import sys; from flux_jax.config import nano; from flux_jax.checkpoints.tokenizers import Tokenizers; "
        f"print(Tokenizers.load({str(folder)!r}, nano()).t5(['a red circle']).shape, 'transformers' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", script], check=True, cwd=root, capture_output=True, text=True)
    assert run.stdout == f"(1, {T5_LENGTH}) False\n"
