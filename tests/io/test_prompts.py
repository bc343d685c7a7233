"""Prompts: what counts as one, how they are held out, and that fetched files are the published ones."""

import functools
import hashlib
import http.server
import json
import threading
from pathlib import Path

import pytest

from flux_jax.cli import prompts as program
from flux_jax.errors import UserError
from flux_jax.io import prompts
from flux_jax.nano.captions import in_training, parse

SHARED = Path(__file__).parents[2].parent / "shared" / "prompts"
here = pytest.mark.skipif(not SHARED.is_dir(), reason="the published prompt files are not on this machine")


@here
def test_the_papers_calibration_set_is_7232_prompts_and_7190_different_ones():
    files = [SHARED / "parti" / "PartiPrompts.tsv", *sorted((SHARED / "t2i_compbench").glob("*_train.txt"))]
    counts = [len(prompts.read(file)) for file in files]
    assert counts == [1632] + 8 * [700]
    found = prompts.read_all(files)
    assert len(found) == 7232
    training, held_out = prompts.split(found)
    assert len(training) + len(held_out) == 7190
    assert not set(training) & set(held_out)
    assert 0.05 < len(held_out) / 7190 < 0.075
    assert any(prompt.count('"') == 1 or prompt.startswith('"') for prompt in found)
    assert not any("\r" in prompt or "\t" in prompt for prompt in found)


@here
def test_published_files_have_the_digests_that_fetch_expects():
    local = {file.name: file for file in SHARED.glob("*/*") if file.name in program.FILES}
    assert local.keys() == program.FILES.keys()
    for name, file in local.items():
        assert hashlib.sha256(file.read_bytes()).hexdigest() == program.FILES[name][1], name


def test_formats(tmp_path):
    def read(name, data):
        (tmp_path / name).write_bytes(data.encode())
        return prompts.read(tmp_path / name)

    assert read("a.txt", "\ufeffone\r\n\r\n two \r\nthree\u2028still three") == ["one", "two", "three\u2028still three"]
    assert read("a.tsv", 'Category\tPrompt\nx\t"a" b "c\ny\td\n') == ['"a" b "c', "d"]
    assert read("a.jsonl", '{"prompt": "a", "id": 3}\n\n{"prompt": "a"}\n') == ["a", "a"]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.txt", " \n\n", "holds no prompt"),
        ("a.csv", "a", "prompts come in"),
        ("a.tsv", "a\nb\n", "name its columns"),
        ("a.tsv", "x\tprompt\nb\n", "line 2"),
        ("a.jsonl", "{}\n", "line 1"),
        ("a.jsonl", '{"prompt": 3}\n', "line 1"),
        ("missing.txt", None, "Cannot read"),
    ],
)
def test_what_is_no_prompt_file_is_one_sentence(tmp_path, name, text, says):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=says) as caught:
        prompts.read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_held_out_depends_on_the_text_alone():
    words = [f"a prompt number {i}" for i in range(2000)]
    training, held_out = prompts.split(words + words[::-1])
    assert prompts.split(words[500:] + words[:100])[1] == [w for w in words[500:] + words[:100] if w in set(held_out)]
    assert 90 < len(held_out) < 160
    assert training + held_out != words and set(training) | set(held_out) == set(words)


def test_fetch_takes_what_is_missing_and_refuses_what_differs(tmp_path, monkeypatch, capsys):
    served, got = tmp_path / "served", tmp_path / "got"
    served.mkdir()
    texts = {"one.txt": b"a\nb\n", "two.tsv": b"Prompt\nc\n"}
    files = {name: ("http://unused.invalid", hashlib.sha256(data).hexdigest()) for name, data in texts.items()}
    monkeypatch.setattr(program, "FILES", files)
    for name, data in texts.items():
        (served / name).write_bytes(data)
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=served)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"

        def fetch():
            return program.main(["fetch", str(got), "--server", address])

        assert fetch() == 0
        assert {path.name: path.read_bytes() for path in got.iterdir()} == texts
        assert capsys.readouterr().out.split() == [str(got / name) for name in texts]
        asked.clear()
        assert fetch() == 0
        assert asked == []  # nothing is fetched twice
        (got / "one.txt").write_bytes(b"damaged")
        assert fetch() == 2
        (got / "one.txt").unlink()
        (served / "one.txt").write_bytes(b"another file")
        assert fetch() == 3
        assert not (got / "one.txt").exists()
        (served / "one.txt").unlink()
        assert fetch() == 3
        assert "HTTP 404" in capsys.readouterr().err
        server.shutdown()


def test_nano_captions_are_different_and_hold_nothing_of_the_evaluation(tmp_path, capsys):
    assert program.main(["nano", str(tmp_path / "n.txt"), "--count", "300"]) == 0
    captions = prompts.read(tmp_path / "n.txt")
    assert len(set(captions)) == 300
    assert all(in_training(parse(caption)) for caption in captions)
    assert program.main(["nano", str(tmp_path / "n.txt"), "--count", "3"]) == 2  # it exists
    assert program.main(["nano", str(tmp_path / "m.txt"), "--count", "0"]) == 2
    capsys.readouterr()
    assert program.main(["count", str(tmp_path / "n.txt"), str(tmp_path / "n.txt")]) == 0
    assert json.loads(capsys.readouterr().out)["prompts"] == 600
