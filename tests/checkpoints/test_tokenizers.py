"""Token ids against transformers' own tokenizers, on FLUX-nano's files."""

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
from published import PROMPTS, transformers_ids

from flux_jax.checkpoints.tokenizers import Tokenizers
from flux_jax.config import nano
from flux_jax.errors import LONGEST, UserError
from flux_jax.nano import vocabulary
from flux_jax.nano.captions import VOCABULARY

with warnings.catch_warnings():  # warnings are errors in our tests; those of other people's imports are not ours
    warnings.simplefilter("ignore")
    import transformers
    from transformers import CLIPTokenizerFast, T5TokenizerFast

transformers.logging.set_verbosity_error()

T5_LENGTH, CLIP_LENGTH = nano().sampling.max_sequence_length, nano().clip.max_positions


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


@pytest.mark.reference
@pytest.mark.parametrize("length", [1, 2, 24, 512])
def test_t5_ids_equal_transformers(ours, reference, length):
    ids = ours.t5(PROMPTS, length)
    assert ids.dtype == np.int32
    assert ids.shape == (len(PROMPTS), length)
    np.testing.assert_array_equal(ids, transformers_ids(reference[0], PROMPTS, length))


@pytest.mark.reference
def test_clip_ids_equal_transformers(ours, reference):
    ids = ours.clip(PROMPTS)
    assert ids.dtype == np.int32
    assert reference[1].model_max_length == CLIP_LENGTH  # what diffusers' pipeline takes as the length
    np.testing.assert_array_equal(ids, transformers_ids(reference[1], PROMPTS, CLIP_LENGTH))


@pytest.mark.reference
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
        content = ours._clip.encode([prompt])[0].ids[1:-1]
        assert ours.clip([""])[0, 1] not in content
        spelt = ours._clip.tokenizer.decode(content)
        assert spelt.replace("</w>", "").replace(" ", "") == prompt.lower().replace(" ", "")


def test_what_does_not_fit_is_named(ours, snapshot_message):
    prompt = "a red circle to the left  of a blue square"
    assert ours.t5_lengths([prompt]) == [11]
    assert ours.left_out(prompt, 11) == ""
    assert ours.truncation_warning(prompt) is None
    assert ours.left_out(prompt, 10) == "square"
    snapshot_message(ours.truncation_warning(prompt, 7), 10, 6, "'of a blue square'")


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


def test_too_many_words_are_refused(tmp_path, snapshot_message):
    with snapshot_message.raises(ValueError, 256):
        vocabulary.build(tmp_path, ["".join(chr(97 + i // 20) + chr(97 + i % 20)) for i in range(300)])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("clip/tokenizer.json", None),
        ("t5/tokenizer.json", None),
        ("t5/tokenizer.json", "{}"),
        ("clip/tokenizer_config.json", "{"),
        ("clip/tokenizer_config.json", '{"pad_token": "<nothing>"}'),
    ],
)
def test_broken_tokenizers_are_one_clear_error(folder, tmp_path, name, content, snapshot_message):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content)
    with snapshot_message.raises(
        UserError, name.partition("/")[0], volatile=r"(?<=\()[^)]* at line \d.*?(?=\))"
    ) as caught:
        Tokenizers.load(tmp_path, nano())
    assert caught.value.exit_code == 2


def steps(kind, each, count=34):
    """A tokenizer.json's step that is many."""
    key = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors"}[kind]
    return {kind: {"type": "Sequence", key: [each] * count}}


TWICE = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 2,
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {},
}
REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("clip", {"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []}),
        ("t5", {"model": {"type": "Unigram", "unk_id": None, "vocab": []}, "added_tokens": []}),
        ("clip", steps("normalizer", REPLACE)),
        ("t5", steps("normalizer", steps("normalizer", REPLACE, 6)["normalizer"], 6)),
        ("clip", steps("normalizer", {"type": "Prepend", "prepend": "a" * 1000}, 2)),
        ("clip", steps("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True})),
        ("t5", steps("post_processor", TWICE)),
        ("t5", {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}),  # a panic
        ("clip", {"pre_tokenizer": {"type": "FixedLength", "length": 0}}),  # a panic in use
        ("clip", {"post_processor": {"type": "BertProcessing", "sep": ["x", 10**6], "cls": ["x", 1]}}),
        ("clip", {"model": "x" * 5000}),
        ("clip", {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "dropout": 0.5}}),
    ],
)
def test_a_strangers_tokenizer_is_one_sentence(folder, tmp_path, name, change, capfd):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / name / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=name) as caught:
        Tokenizers.load(tmp_path, nano())
    assert len(str(caught.value)) <= LONGEST and "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""  # a panic writes there, past Python


def test_a_text_that_a_tokenizer_cannot_read_is_one_sentence(folder, tmp_path, snapshot_message):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "clip" / "tokenizer.json"
    hard = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Removed", "invert": True}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pre_tokenizer": hard}))
    tokenizers = Tokenizers.load(tmp_path, nano())
    with snapshot_message.raises(UserError, "clip", volatile=r"(?<=\()[^)]*(?=\))"):
        tokenizers.clip(["a" * 60 + "!"])


def test_an_interruption_is_none_of_the_librarys_failures(ours, monkeypatch):
    class Interrupted:
        def encode_batch(self, prompts):
            raise KeyboardInterrupt

    monkeypatch.setattr(ours._t5, "tokenizer", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        ours.t5(["a red circle"])


def test_an_end_that_the_model_does_not_know(folder, snapshot_message):
    """CLIP would take its vector at the first token, without a word."""
    other = dataclasses.replace(nano(), clip=dataclasses.replace(nano().clip, eos_token_id=17))
    with snapshot_message.raises(UserError, 17):
        Tokenizers.load(folder, other)


def test_what_clip_leaves_out_is_said(ours, snapshot_message):
    prompt = "a red circle to the left of a blue square and a green cross and two yellow stars"
    assert ours.clip_truncation_warning("a red circle") is None
    snapshot_message(ours.clip_truncation_warning(prompt), "CLIP", CLIP_LENGTH - 2, "'and two yellow stars'")


def test_a_tokenizer_of_another_model_is_refused(folder, snapshot_message):
    small = dataclasses.replace(nano(), clip=dataclasses.replace(nano().clip, vocab_size=100))
    with snapshot_message.raises(UserError, "clip", 100):
        Tokenizers.load(folder, small)


def test_the_tokenizers_need_no_transformers(folder):
    """Start-up stays fast: transformers takes seconds to import."""
    script = (
        "import sys; from flux_jax.config import nano; from flux_jax.checkpoints.tokenizers import Tokenizers; "
        f"print(Tokenizers.load({str(folder)!r}, nano()).t5(['a red circle']).shape, 'transformers' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", script], check=True, cwd=root, capture_output=True, text=True)
    assert run.stdout == f"(1, {T5_LENGTH}) False\n"
