"""A result is on disk the moment it is known, or said where the disk has no room; what is half written is skipped."""

import os
import subprocess
import sys

import pytest

from bench import journal, summary
from bench.journal import Journal
from bench.process import ROOT


def test_rows_are_appended_with_their_step(tmp_path):
    path = tmp_path / "rows.jsonl"
    Journal(path, "first").row(value=1.5)
    Journal(path, "second").row(value=None)
    assert [(row["step"], row["value"]) for row in journal.read(path)] == [("first", 1.5), ("second", None)]


def test_a_half_written_line_is_skipped_and_the_next_row_is_whole(tmp_path):
    path = tmp_path / "rows.jsonl"
    Journal(path, "a").row(value=1)
    with open(path, "ab") as file:
        file.write(b'{"step": "a", "value": 2, "tex')
    Journal(path, "a").row(value=3)
    assert [row["value"] for row in journal.read(path)] == [1, 3]


def test_an_attempt_is_a_row_whatever_happens(capsys, tmp_path):
    def fails():
        raise RuntimeError("out of registers\nand much more")

    rows = Journal(tmp_path / "rows.jsonl", "a", seconds=100)
    rows.attempt({"n": 1}, lambda: {"value": 2})
    rows.attempt({"n": 2}, fails)
    rows.attempt({"n": 3}, lambda: {"value": 4}, least=200)
    assert rows.rows[:2] == [{"n": 1, "value": 2}, {"n": 2, "failure": "RuntimeError: out of registers"}]
    assert rows.rows[2]["n"] == 3 and rows.rows[2]["skipped"].endswith(" s left")
    assert len(journal.read(rows.path)) == 3
    printed = capsys.readouterr().err.splitlines()
    assert "  RuntimeError: out of registers" in printed and all(line[:2].isspace() for line in printed if line)


def test_without_a_file_rows_are_kept():
    rows = Journal(None, "a")
    rows.row(value=1)
    assert rows.rows == [{"value": 1}]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_costs_no_row(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.symlink_to("/dev/full")
    Journal(path, "a").row(value=1)
    Journal(path, "a").row(value=2)
    said = capsys.readouterr().err.splitlines()
    assert [row["value"] for row in summary.unwritten(["noise", *said, "not written to {"])] == [1, 2]


def test_a_row_that_does_not_fit_leaves_those_before_it(tmp_path):
    """The limit cuts the third row in its middle: it is taken back, and said; a short one still fits."""
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))\n"
        "import pathlib, sys; from bench.journal import Journal; rows = Journal(pathlib.Path(sys.argv[1]), 'a')\n"
        "for text in ('x' * 40, 'y' * 40, 'z' * 400, 'w'): rows.row(text=text)"
    )
    path = tmp_path / "rows.jsonl"
    words = [sys.executable, "-B", "-c", code, str(path)]  # Python would keep bytecode that the limit cuts
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert [row["text"][0] for row in journal.read(path)] == ["x", "y", "w"]
    assert [row["text"][0] for row in summary.unwritten(ended.stderr.splitlines())] == ["z"]
