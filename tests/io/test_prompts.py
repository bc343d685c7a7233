"""Prompts: what counts as one, for every program that reads them; how they are held out; that fetched files are the
published ones."""

import functools
import hashlib
import http.server
import json
import os
import threading
from pathlib import Path

import pytest
import tiny_model
from reference_files import reference_file

from flux_jax.cli import compare, distill, generate
from flux_jax.cli import prompts as program
from flux_jax.errors import UserError
from flux_jax.evaluate import benchmarks
from flux_jax.io import prompts
from flux_jax.nano.captions import in_training, parse


def test_the_papers_calibration_set_is_7232_prompts_and_7190_different_ones():
    folder = reference_file("prompts")
    files = [folder / "parti" / "PartiPrompts.tsv", *sorted((folder / "t2i_compbench").glob("*_train.txt"))]
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
    lines = [line for file in folder.glob("*/*.*") for line in file.read_text("utf-8").splitlines()]
    assert len(lines) > 9000 and not any(line.lstrip().startswith("#") for line in lines)  # none is lost as a comment


def test_published_files_have_the_digests_that_fetch_expects():
    local = {file.name: file for file in reference_file("prompts").glob("*/*") if file.name in program.FILES}
    assert local.keys() == program.FILES.keys()
    for name, file in local.items():
        assert hashlib.sha256(file.read_bytes()).hexdigest() == program.FILES[name][1], name


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


BOM = "\ufeff"
ODD = {  # a file's name, what is in it, its prompts
    "windows.txt": (
        f"{BOM}one\r\n\r\n two \r\nthree\u2028and\tthree\x0band three",
        ["one", "two", "three\u2028and\tthree\x0band three"],
    ),
    "comments.txt": (f"{BOM}# mine\none\n  # indented\n#\nno # comment\n", ["one", "no # comment"]),
    "UPPER.TXT": ("one\rtwo\r", ["one", "two"]),
    "no-suffix": ("# mine\none\n", ["one"]),
    "objects.JSONL": (
        BOM
        + '{"prompt": " one ", "id": 3, "seed": 7, "tag": "x"}\r\n \r\n'
        + '{"prompt": "# caf\u0085\\u00e9", "guidance": 2}',
        ["one", "# caf\u0085é"],
    ),
    "table.tsv": (
        BOM + 'Note\tPROMPT \r\nx\t"a" b "c\r\n\r\n# y\t d \tmore\r\nz\t# no comment\n',
        ['"a" b "c', "d", "# no comment"],
    ),
    "twice.tsv": ("prompt\na\na\n", ["a", "a"]),
    "braces.txt": ("{a red circle}\n{}\n", ["{a red circle}", "{}"]),
    "objects": ('{"prompt": "a"}\n{"prompt": "b"}\n', ["a", "b"]),
}
FAULTY = {  # a file's name, what is in it, what is said of it
    "empty.txt": (" \n\n", "empty.txt holds no prompt."),
    "comments.txt": ("# a\n", "comments.txt holds no prompt."),
    "table.csv": (
        "prompt\na\n",
        "table.csv: prompts come in .txt, .jsonl or .tsv files, not in '.csv'; save it as tab-",
    ),
    "list.json": ("[]", "list.json: prompts come in .txt, .jsonl or .tsv files, not in '.json'; write each prompt"),
    "mine.md": ("a\n", "mine.md: prompts come in .txt, .jsonl or .tsv files, not in '.md'."),
    "objects.txt": ('\n{"prompt": "a"}\n', "objects.txt, line 2: this is a JSON object; name the file .jsonl."),
    "long.txt": ("a\n" + "b" * 100_001, "long.txt, line 2: The prompt has 100001 characters"),
    "zero.jsonl": ('{"prompt": "a\\u0000"}', "zero.jsonl, line 1: The prompt holds a zero byte"),
    "negative.jsonl": (
        '{"prompt": "a", "negative_prompt": "\\u0000"}',
        "negative.jsonl, line 1: The negative prompt holds",
    ),
    "twice.jsonl": ('{"prompt": "a", "prompt": "b"}', "twice.jsonl, line 1: not valid JSON ("),
    "digits.jsonl": (f'{{"prompt": "a", "seed": {"9" * 5000}}}', "digits.jsonl, line 1: not valid JSON ("),
    "terminal.jsonl": ('{"prompt": "a", "seed": "\\u001b[2J"}', "terminal.jsonl, line 1: seed cannot be '\\x1b[2J'."),
    "headless.tsv": ("a\tb\nc\td\n", "headless.tsv, line 1: the heading must name the column Prompt"),
    "late.tsv": ("\nprompt\na\n", "late.tsv, line 1: the heading must name the column Prompt"),
    "short.tsv": ("x\tprompt\na\tb\nc\n", "short.tsv, line 3: the prompt is empty."),
    "blank.tsv": ("x\tprompt\na\t \n", "blank.tsv, line 2: the prompt is empty."),
    "broken.jsonl": ('{"prompt": "a"}\n{"prompt"\n', "broken.jsonl, line 2: not valid JSON ("),
    "deep.jsonl": ("[" * 99999, "deep.jsonl, line 1: not valid JSON ("),
    "half.jsonl": ('\n{"prompt": "\\ud83d"}', "half.jsonl, line 2: not valid JSON ("),
    "keyless.jsonl": ("{}\n", 'keyless.jsonl, line 1: each line must be an object with a "prompt".'),
    "array.jsonl": ("[1]\n", 'array.jsonl, line 1: each line must be an object with a "prompt".'),
    "number.jsonl": ('{"prompt": 3}\n', "number.jsonl, line 1: prompt cannot be 3."),
    "blank.jsonl": ('\n{"prompt": " "}\n', "blank.jsonl, line 2: the prompt is empty."),
    "seed.jsonl": ('{"prompt": "a", "seed": "7"}', "seed.jsonl, line 1: seed cannot be '7'."),
    "true.jsonl": ('{"prompt": "a", "steps": true}', "true.jsonl, line 1: steps cannot be True."),
    "null.jsonl": ('{"prompt": "a", "width": null}', "null.jsonl, line 1: width cannot be None."),
    "large.jsonl": (f'{{"prompt": "a", "guidance": 1{"0" * 400}}}', "large.jsonl, line 1: guidance is too large"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(tiny_model.save(tmp_path_factory.mktemp("models") / "tiny", tiny_model.config()))


USERS = ("generate", "compare", "distill", "count")


@pytest.fixture
def read_by(model, tmp_path, monkeypatch, capsys):
    """Lets a program read a file in its folder: (exit status, SHA-256 of the prompts in order, stderr). What follows on
    the reading is left out, but for generate's dry run."""
    pytest.importorskip("skimage", reason="compare needs the extra `evaluate`")
    pytest.importorskip("jinja2", reason="compare needs the extra `evaluate`")
    from flux_jax.compare import drawing
    from flux_jax.distill import run

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    seen = []

    def begin(*given, **named):
        (texts,) = (each for each in (*given, *named.values()) if isinstance(each, list))
        seen[:] = [getattr(each, "prompt", each) for each in texts]
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "distill", begin)
    monkeypatch.setattr(drawing, "run", begin)
    draws = ["--model", model, "--dry-run", "--json", "--quiet", "--seed", "1", "--device", "cpu"]
    mains = {"generate": generate.main, "compare": compare.main, "distill": distill.main, "count": program.main}
    words = {
        "generate": lambda file: ["--prompts-file", file, *draws],
        "compare": lambda file: [model, model, "--prompts", file, "--out", "out", "--steps", "1"],
        "distill": lambda file: [model, "student", "--prompts", file],
        "count": lambda file: ["count", file],
    }

    def read(user: str, file: str) -> tuple[int, str, str]:
        status = mains[user](words[user](file))
        out, err = capsys.readouterr()
        if status == 0:
            report = json.loads(out)
            return 0, report.get("sha256") or prompts.digest(each["prompt"] for each in report["images"]), err
        return status % 130, prompts.digest(seen), err

    return read


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("name", ODD)
def test_every_program_reads_the_same_prompts(read_by, tmp_path, user, name):
    text, expected = ODD[name]
    write(tmp_path / name, text)
    assert prompts.read(tmp_path / name) == expected
    assert read_by(user, name)[:2] == (0, prompts.digest(expected))


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("name", [*FAULTY, "binary.txt", "missing.txt", "folder.txt"])
def test_every_program_says_the_same_of_what_is_no_prompt_file(read_by, tmp_path, user, name):
    if name == "binary.txt":
        (tmp_path / name).write_bytes(b"a\nb\n\xff\xfe\n")
        said = "Cannot read binary.txt: it is not UTF-8 text (line 3); save it as UTF-8."
    elif name == "missing.txt":
        said = "Cannot read missing.txt: No such file or directory."
    elif name == "folder.txt":
        (tmp_path / name).mkdir()
        said = "Cannot read folder.txt: it is a folder, not a file."
    else:
        text, said = FAULTY[name]
        write(tmp_path / name, text)
    status, _, err = read_by(user, name)
    assert status == 2
    assert err.startswith(said) and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_encodings_with_a_mark(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("# mine\r\nein Kätzchen 猫\r\n".encode(encoding))
    assert prompts.read(tmp_path / "a.txt") == ["ein Kätzchen 猫"]


def test_a_shells_pipe_is_read_and_any_other_is_not(tmp_path):
    reader, writer = os.pipe()
    os.write(writer, b"a\nb\n")
    os.close(writer)
    assert prompts.read(Path(f"/dev/fd/{reader}")) == ["a", "b"]
    os.close(reader)
    os.mkfifo(tmp_path / "a.txt")
    (tmp_path / "b.txt").symlink_to("/dev/zero")
    for name, what in (("a.txt", "a pipe"), ("b.txt", "a device")):
        with pytest.raises(UserError, match=f"{name}: it is {what}, not a file"):
            prompts.read(tmp_path / name)


def test_too_many_prompts_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "MAX_LINES", 2)
    assert len(prompts.read(write(tmp_path / "a.txt", "a\n\nb\n\n"))) == 2
    with pytest.raises(UserError, match=r"a.txt, line 4: 2 prompts are the most of one file; split it"):
        prompts.read(write(tmp_path / "a.txt", "a\n\nb\nc\n"))


def test_what_a_line_says_of_its_picture(tmp_path):
    rows, unknown = prompts.read_rows(write(tmp_path / "objects.jsonl", ODD["objects.JSONL"][0]))
    assert [(row.line, row.fields) for row in rows] == [(1, {"id": 3, "seed": 7}), (3, {"guidance": 2.0})]
    assert isinstance(rows[1].fields["guidance"], float)
    assert unknown == ["tag"]
    rows, unknown = prompts.read_rows(write(tmp_path / "table.tsv", "seed\tprompt\n7\ta\n"))
    assert (rows, unknown) == ([prompts.PromptRow("a", 2)], [])


def test_benchmarks_are_stricter(tmp_path):
    """Their pictures are placed by counting lines, and their files have no comments."""
    path = write(tmp_path / "color_val.txt", f"{BOM}# a bench\r\na bowl\u2028of\r\n\r\n")
    assert [(each.place, each.text) for each in benchmarks.read_t2i_compbench(path)] == [
        (0, "# a bench"),
        (1, "a bowl\u2028of"),
    ]
    for name, read, text, line in (
        ("color_val.txt", benchmarks.read_t2i_compbench, "a\n\nb\n", 2),
        ("p.tsv", benchmarks.read_parti, "Prompt\tCategory\na\tb\n\nc\td\n", 3),
        ("p.jsonl", benchmarks.read_geneval, '\n{"prompt": "a"}\n', 1),
    ):
        with pytest.raises(UserError, match=f"{name}, line {line}: there is no prompt; delete the line."):
            read(write(tmp_path / name, text))


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
