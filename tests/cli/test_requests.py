"""What a command line asks for, before any model is loaded: names that all file systems take, seeds, paths at home."""

import io
import json
import os
import shlex
import sys
from pathlib import Path

import pytest

from flux_jax.cli import arguments, finished, output_paths, requests
from flux_jax.config import nano
from flux_jax.errors import UserError
from flux_jax.validation import SEED_LIMIT


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """The requests of a command line in an empty folder, and whose seeds were asked for; FLUX-nano draws them."""
    monkeypatch.chdir(tmp_path)

    def plan(*words: str, record=None):
        return requests.plan_requests(arguments.parse(words), nano(), record, lambda _: None)

    return plan


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("A Red circle!", "a-red-circle"),
        ("../..", "picture"),
        ("é" * 99, "é" * 30),
        ("猫" * 99, "猫" * 20),
        ("🙂" * 99, "picture"),
        ("e\u0301", "é"),
        ("a\udc80b", "a-b"),
        ("", "picture"),
    ],
)
def test_slug(text, name):
    assert output_paths.slug(text) == name


def test_names_are_cut_between_characters_and_counted_in_bytes(plan, tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "x", "id": "a" + "猫" * 100}, ensure_ascii=False), "utf-8")
    (request, _), _ = plan("--prompts-file", "p.jsonl", "-b", "2", "-o", "{id}-{id}/")
    assert request.output.parent.name == "-".join(2 * ["a" + "猫" * 39])
    assert max(len(os.fsencode(part)) for part in request.output.parts) <= 255
    with pytest.raises(UserError, match="is a name of 360 bytes, and 255 are the most"):
        plan("--prompts-file", "p.jsonl", "-o", "{id}-{id}-{id}.png")
    assert len(os.fsencode(output_paths.beside(Path("猫" * 83 + "ab.png"), 2).name)) <= 255


def test_templates(plan, tmp_path):
    (tmp_path / "{odd}").mkdir()
    for template, expected in (
        ("{i:03d}", "000.png"),
        ("a{{b}}.PNG", "a{b}.PNG"),
        ("{odd}", "{odd}/00000.png"),
        ("{seed}/{prompt}/", "7/a-red-circle/00000.png"),
    ):
        (tmp_path / "p.txt").write_text("a red circle\n")
        ((request,), _) = plan("--prompts-file", "p.txt", "--seed", "7", "-o", template)
        assert str(request.output) == expected


@pytest.mark.parametrize(
    "form", ["{seed:{seed}}", "{seed!r}", "{seed:9999}", "{}", "{0}", "{i[0]}", "{seed:c}/{seed:c}}"]
)
def test_templates_that_are_refused(plan, form):
    with pytest.raises(UserError, match="can be filled in"):
        plan("x", "--seed", "4294967295", "-o", form)


def test_the_home_folder_also_behind_an_equals_sign(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ("--output=~/a/", "--model=~/ck", "--prompts-file=~/p.txt")
    args = arguments.parse(words)
    assert (args.output, args.model, args.prompts_file) == (f"{tmp_path}/a/", f"{tmp_path}/ck", tmp_path / "p.txt")
    assert arguments.parse(["--from-metadata=~/a.png"]).from_metadata == tmp_path / "a.png"
    args = arguments.parse(["x", "-o", "./a/", "-m", "./nano"])
    assert (args.output, args.model) == ("./a/", "./nano")  # a folder, not the package's model


def test_two_pictures_at_one_place(plan, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "p.jsonl").write_text('{"prompt": "x", "id": "real"}\n{"prompt": "y", "id": "link"}\n')
    with pytest.raises(UserError, match="Two pictures would be written to real/a.png"):
        plan("--prompts-file", "p.jsonl", "-o", "{id}/a.png")


def test_seeds(plan, tmp_path):
    def seeds(*words, record=None):
        made, asked = plan("x", *words, record=record)
        return [each.seed if each.index in asked else "any" for each in made]

    record = {"prompt": "y", "seed": 5}
    assert seeds() == seeds("--seed", "-1") == ["any"]
    assert seeds("--seed", "7", "-b", "2") == [7, 8]
    assert seeds("--seed", "7", "-1", "3") == [7, "any", 3]
    assert (seeds(record=record), seeds("--seed", "-1", record=record)) == ([5], ["any"])
    (tmp_path / "p.jsonl").write_text('{"prompt": "x", "seed": -1}\n{"prompt": "y", "seed": 4}\n{"prompt": "z"}\n')
    made, asked = plan("--prompts-file", "p.jsonl", "-b", "2", "-o", "out/")
    assert asked == {2, 3} and [made[i].seed for i in (2, 3)] == [4, 5]
    assert len({each.seed for each in made}) == 6 and all(0 <= each.seed < SEED_LIMIT for each in made)
    with pytest.raises(UserError, match=rf"its remainder modulo 2\*\*32 is {648312782957426 % 2**32}"):
        plan("x", "--seed", "648312782957426")
    with pytest.raises(UserError, match="Several processes need"):
        plan("x", "--seed", "-1", "--processes", "2", "--mesh", "data=2", "--coordinator", "a:1")


def test_standard_input(monkeypatch):
    def read(data: bytes | None):
        monkeypatch.setattr(sys, "stdin", None if data is None else io.TextIOWrapper(io.BytesIO(data), "ascii"))
        return arguments.parse(["-", "y"]).prompts

    assert read("\ufeff猫\r\n".encode()) == ["猫", "y"]
    for data, wrong in (
        (None, "it is closed"),
        (b"\xff", "not UTF-8"),
        (b"a\0", "zero byte"),
        (b"a" * 400_001, "100000"),
    ):
        with pytest.raises(UserError, match=f"Cannot read standard input: .*{wrong}"):
            read(data)


@pytest.mark.parametrize("path", ["a b.png", "it's.png", "-x.png", "~/x.png", "a;b$c.png", "plain.png"])
def test_words_for_a_shell(path):
    (text,) = shlex.split(finished.word(path))
    assert arguments.parse(["-C", text]).from_metadata == Path(path)
