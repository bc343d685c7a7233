"""Tokenizers of published folders: after the conversion their ids are transformers', whatever the format."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from published import PROMPTS, transformers_ids

from convert.tokenizers import ensure_tokenizer_json
from flux_jax.checkpoints.tokenizers import Tokenizers
from flux_jax.config import nano
from flux_jax.errors import UserError
from flux_jax.io import reading
from flux_jax.nano import vocabulary
from flux_jax.nano.captions import VOCABULARY

with warnings.catch_warnings():  # warnings are errors in our tests; those of other people's imports are not ours
    warnings.simplefilter("ignore")
    import transformers
    from transformers import CLIPTokenizerFast, T5TokenizerFast

transformers.logging.set_verbosity_error()
CLIP_LENGTH = nano().clip.max_positions


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tokenizers")
    vocabulary.build(out, VOCABULARY)
    return out


START, END = "<|startoftext|>", "<|endoftext|>"


def token(content: str, normalized: bool, **more) -> dict:
    flags = {"lstrip": False, "normalized": normalized, "rstrip": False, "single_word": False}
    return {"content": content, **flags, **more}


# In tokenizer_config.json of openai/clip-vit-large-patch14, of FLUX.1's `tokenizer`, and where there is no such file.
WRITTEN_OUT = {f"{role}_token": token(content, True, __type="AddedToken")
               for role, content in (("bos", START), ("eos", END), ("unk", END))} | {"pad_token": END}  # fmt: skip
BY_ID = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
BY_ID["added_tokens_decoder"] = {START: token(START, True, special=True), END: token(END, False, special=True)}


def hub_clip_folder(folder: Path, out: Path, roles: dict | None) -> Path:
    """A CLIP tokenizer as the hub has it, without tokenizer.json."""
    shutil.copytree(folder / "clip", out)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (out / name).unlink()
    if roles is None:
        return out
    config = {**roles, "add_prefix_space": False, "do_lower_case": True, "errors": "replace"}
    config |= {"model_max_length": CLIP_LENGTH, "tokenizer_class": "CLIPTokenizer"}
    if "added_tokens_decoder" in roles:
        ids = json.loads((out / "vocab.json").read_text())
        config["added_tokens_decoder"] = {
            str(ids[name]): flags for name, flags in roles["added_tokens_decoder"].items()
        }
    else:
        (out / "special_tokens_map.json").write_text(json.dumps(roles))
    (out / "tokenizer_config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize("roles", [WRITTEN_OUT, BY_ID, None], ids=["openai", "FLUX.1", "none"])
def test_tokenizer_json_is_made_from_a_published_clip_folder(folder, tmp_path, roles):
    source = hub_clip_folder(folder, tmp_path / "tokenizer", roles)
    shutil.copytree(folder / "t5", tmp_path / "out" / "t5")
    ensure_tokenizer_json(source, tmp_path / "out" / "clip")
    copied = {path.name for path in (tmp_path / "out" / "clip").iterdir()}
    assert copied == {"tokenizer.json"} | {path.name for path in source.iterdir()}
    expected = transformers_ids(CLIPTokenizerFast.from_pretrained(source), PROMPTS, CLIP_LENGTH)
    np.testing.assert_array_equal(Tokenizers.load(tmp_path / "out", nano()).clip(PROMPTS), expected)


@pytest.fixture
def spiece(tmp_path) -> Path:
    """A folder with a spiece.model and nothing else."""
    import sentencepiece

    source = tmp_path / "tokenizer_2"
    source.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*VOCABULARY, *PROMPTS[:8]] * 20), model_prefix=str(source / "spiece"), vocab_size=100,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2, num_threads=1,
    )  # fmt: skip
    return source


def test_tokenizer_json_is_made_from_sentencepiece(folder, spiece, tmp_path):
    shutil.copytree(folder / "clip", tmp_path / "out" / "clip")
    ensure_tokenizer_json(spiece, tmp_path / "out" / "t5")
    config = dataclasses.replace(nano(), t5=dataclasses.replace(nano().t5, vocab_size=300))
    ids = Tokenizers.load(tmp_path / "out", config).t5(PROMPTS, 64)
    np.testing.assert_array_equal(ids, transformers_ids(T5TokenizerFast.from_pretrained(spiece), PROMPTS, 64))


def test_an_existing_tokenizer_json_is_copied_as_it_is(folder, tmp_path):
    ensure_tokenizer_json(folder / "t5", tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "t5" / "tokenizer.json").read_bytes()


def test_neither_torch_nor_the_network_is_needed(folder, spiece, tmp_path):
    """In a process where torch cannot be imported and the network may be asked; and nothing is said."""
    clip = hub_clip_folder(folder, tmp_path / "tokenizer", BY_ID)
    code = f"""
import os, socket, sys
del os.environ["HF_HUB_OFFLINE"]
sys.modules["torch"] = None
asked = []
socket.getaddrinfo = lambda *words, **named: asked.append(words) or []
from pathlib import Path
from convert.tokenizers import ensure_tokenizer_json
ensure_tokenizer_json(Path({str(clip)!r}), Path({str(tmp_path / "clip")!r}))
ensure_tokenizer_json(Path({str(spiece)!r}), Path({str(tmp_path / "t5")!r}))
print(asked)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")
    assert (tmp_path / "clip" / "tokenizer.json").is_file()
    assert (tmp_path / "t5" / "tokenizer.json").is_file()


THEIRS = r"(?<=\()(?!no <).*(?=\))"  # in brackets: what other libraries say
SPECIAL = '{"a": 0, "<|startoftext|>": 1, "<|endoftext|>": 2}'


@pytest.mark.parametrize(
    "files",
    [
        None,
        {},
        {"vocab.json": SPECIAL},
        {"tokenizer.json": "nonsense"},
        {"vocab.json": "[1]", "merges.txt": ""},
        {"vocab.json": '{"a": 0}', "merges.txt": "a b c\n"},
        {"vocab.json": '{"a": 0}', "merges.txt": "x y\n"},
        {"vocab.json": '{"a": 0}', "merges.txt": ""},
        {"vocab.json": SPECIAL, "merges.txt": "", "tokenizer_config.json": "{"},
        {"spiece.model": "nonsense"},
        {"spiece.model": ""},
    ],
)
def test_broken_source_folders_are_one_clear_error(tmp_path, files, snapshot_message):
    source = tmp_path / "source"
    if files is not None:
        source.mkdir()
    for name, content in (files or {}).items():
        (source / name).write_text(content)
    with snapshot_message.raises(UserError, source, volatile=THEIRS) as caught:
        ensure_tokenizer_json(source, tmp_path / "out")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "spiece.model", "added_tokens.json"])
@pytest.mark.parametrize("kind", ["pipe", "link", "large", "dangling"])
def test_files_that_are_not_copied(tmp_path, monkeypatch, name, kind, snapshot_message):
    """Pipes, which would never end, links to files of the user, and files that fill the memory."""
    source = tmp_path / "source"
    source.mkdir()
    if kind == "pipe":
        os.mkfifo(source / name)
    elif kind == "large":
        (source / name).write_text("{}" + " " * 2**21)
        monkeypatch.setattr(reading, "LARGE", 2**20)
    else:
        (tmp_path / "secret").write_text("{}")
        (source / name).symlink_to(tmp_path / ("secret" if kind == "link" else "gone"))
    with snapshot_message.raises(UserError, source / name):
        ensure_tokenizer_json(source, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_links_into_the_blobs_of_the_hubs_cache_are_copied(folder, tmp_path):
    blobs, source = tmp_path / "blobs", tmp_path / "snapshots" / "abc" / "tokenizer"
    shutil.copytree(folder / "clip", blobs)
    source.mkdir(parents=True)
    for file in blobs.iterdir():
        (source / file.name).symlink_to(file)
    ensure_tokenizer_json(source, tmp_path / "out")
    assert (tmp_path / "out" / "vocab.json").read_bytes() == (folder / "clip" / "vocab.json").read_bytes()


def test_transformers_opens_no_file_but_the_tokenizers(folder, tmp_path):
    """Neither what tokenizer_config.json names, nor what else lies there."""
    source = hub_clip_folder(folder, tmp_path / "source", BY_ID)
    expected = ensure(source, tmp_path / "expected")
    config = json.loads((source / "tokenizer_config.json").read_text())
    config |= {f"{name}_file": "/dev/tty" for name in ("vocab", "merges", "tokenizer", "special_tokens_map")}
    config |= {"fast_tokenizer_files": ["tokenizer.9.json"], "vocab": {"a": 0}, "merges": []}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    os.mkfifo(source / "chat_template.jinja")
    assert ensure(source, tmp_path / "out") == expected
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["vocab_file"] == "/dev/tty"


@pytest.mark.parametrize("count", [10**30, -1, "100", None])
def test_more_extra_tokens_than_there_is_memory(spiece, tmp_path, count, snapshot_message):
    (spiece / "tokenizer_config.json").write_text(json.dumps({"extra_ids": count}))
    with snapshot_message.raises(UserError, spiece, "extra_ids"):
        ensure_tokenizer_json(spiece, tmp_path / "out")


def ensure(source: Path, out: Path) -> bytes:
    ensure_tokenizer_json(source, out)
    return (out / "tokenizer.json").read_bytes()


class PanicException(BaseException):
    """As Rust's are."""


def test_a_panic_is_one_sentence(folder, spiece, tmp_path, monkeypatch, snapshot_message):
    def panic(*_, **__):
        raise PanicException("index out of bounds")

    clip = hub_clip_folder(folder, tmp_path / "clip", None)
    for source, kind in ((clip, CLIPTokenizerFast), (spiece, T5TokenizerFast)):
        monkeypatch.setattr(kind, "from_pretrained", panic)
        with snapshot_message.raises(UserError, source, "index out of bounds"):
            ensure_tokenizer_json(source, tmp_path / "out" / source.name)
