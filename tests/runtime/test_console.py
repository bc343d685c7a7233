"""Standard streams that can never end a run, in this process and, closed, full or without a reader, in another one."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from flux_jax.runtime import console

ROOT = Path(__file__).parents[2]
TEXT = "猫 é ц \udcff a"


def stream(encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding)


@pytest.mark.parametrize("encoding", ["cp1252", "gbk", "ascii", "latin-1", "utf-8"])
def test_any_encoding_shows_any_text(encoding, monkeypatch):
    monkeypatch.setattr(sys, "stdout", out := stream(encoding))
    monkeypatch.setattr(sys, "stderr", err := stream(encoding))
    console.output(TEXT)
    console.output_json({"text": TEXT, "loss": [float("nan"), 1.5]})
    console.say(TEXT)
    for each in (out, err):
        each.seek(0)
    first, second = out.read().splitlines()
    assert first.encode("ascii", "backslashreplace") == TEXT.encode("ascii", "backslashreplace") or "\\u" in first
    assert json.loads(second) == {"text": TEXT, "loss": [None, 1.5]}
    assert err.read().endswith(" a\n")


def test_what_a_terminal_would_act_on_is_spelled_out(capsys, monkeypatch):
    text = "a\x1b[2Jb\x9b\tc\nd"
    console.say(text)
    assert capsys.readouterr().err == "a\\x1b[2Jb\\x9b\tc\nd\n"
    console.output(text)
    assert capsys.readouterr().out == f"{text}\n"  # a file of it has the very name
    console.output_json(text)
    assert capsys.readouterr().out.isascii()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    console.output(text)
    assert "\x1b" not in capsys.readouterr().out


def test_streams_that_are_not_there_or_closed(monkeypatch):
    closed = stream("utf-8")
    closed.close()
    for each in (None, closed):
        monkeypatch.setattr(sys, "stdout", each)
        monkeypatch.setattr(sys, "stderr", each)
        console.say("a")
        console.output("a")
        console.output_json("a")
        console.flush()
        assert console.settled(0) == 0


PROGRAM = """if True:
    import os, sys
    sys.path.insert(0, os.getcwd())
    from flux_jax.runtime import console
    console.make_unfailing()
    print("猫" * 50_000)
    opened = open(os.devnull).fileno()
    sys.stdout.flush()
    sys.stderr.write("bars, too\\n")
    console.output("b")
    assert opened > 2
    sys.exit(console.settled(0))
"""


@pytest.mark.parametrize(
    ("shell", "status", "said"),
    [
        ("{} | head -c 1 >/dev/null; exit ${{PIPESTATUS[0]}}", 0, "bars, too\n"),
        ("{} >&-", 0, "bars, too\n"),
        ("{} >&- 2>&- <&-", 0, ""),
        ("{} 2>/dev/full >/dev/null", 0, ""),
        ("{} >/dev/full", 2, "bars, too\nNot all of standard output was written: No space left on device.\n"),
    ],
)
def test_a_process_of_our_own_goes_on_whatever_its_streams_take(shell, status, said):
    command = shell.format('"$0" -c "$1"')
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (status, said)
