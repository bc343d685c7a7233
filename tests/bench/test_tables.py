"""The tables of the README and the docs are those of bench/results: made, never typed."""

import json
import re
import shutil

import pytest

from bench import tables


@pytest.fixture
def clone(tmp_path):
    """README, docs and results of this clone, to be changed."""
    shutil.copy(tables.ROOT / "README.md", tmp_path)
    shutil.copytree(tables.ROOT / "docs", tmp_path / "docs")
    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    for path in (tables.ROOT / "bench" / "results").glob("*.json"):
        shutil.copy(path, results)
    return tmp_path


def test_the_clone_is_up_to_date(capsys):
    assert tables.main(["--check"]) == 0, capsys.readouterr().err


def test_every_table_is_shown_somewhere():
    pages = [tables.ROOT / "README.md", *(tables.ROOT / "docs").glob("*.md")]
    shown = {name for page in pages for name in re.findall(r"<!-- table: (\S+) -->", page.read_text(encoding="utf-8"))}
    assert shown == set(tables.TABLES)


def test_a_changed_figure_makes_its_pages_stale_until_they_are_written_anew(clone, capsys):
    path = clone / "bench" / "results" / "nano.json"
    data = json.loads(path.read_text())
    student = next(row for row in data["figures"]["scores"] if row["model"] == "nano-1.58bit")
    student["overall"][0] = 0.8125
    path.write_text(json.dumps(data))
    before = (clone / "README.md").read_text(encoding="utf-8")
    assert tables.main(["--check", "--root", str(clone)]) == 1
    stale = capsys.readouterr().err
    assert "README.md is stale" in stale and "docs/results.md is stale" in stale and "docs/memory.md" not in stale
    assert (clone / "README.md").read_text(encoding="utf-8") == before
    assert tables.main(["--root", str(clone)]) == 0
    assert "README.md" in capsys.readouterr().out.splitlines()
    assert "0.812" in (clone / "README.md").read_text(encoding="utf-8")
    assert tables.main(["--check", "--root", str(clone)]) == 0


def test_a_typed_figure_is_stale(clone):
    page = clone / "docs" / "parity.md"
    page.write_text(page.read_text(encoding="utf-8").replace("3.4e-06", "3.4e-07"), encoding="utf-8")
    assert tables.main(["--check", "--root", str(clone)]) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<!-- table: nothing -->\n<!-- /table -->\n", "'nothing'"),
        ("<!-- table: memory -->\n\n| a |\n", "lacks the other"),
        ("<!-- table: memory -->\n<!-- table: plan -->\n<!-- /table -->\n", "lacks the other"),
    ],
)
def test_a_block_that_cannot_be_made_is_one_sentence(clone, capsys, text, words):
    (clone / "docs" / "bad.md").write_text(text, encoding="utf-8")
    assert tables.main(["--root", str(clone)]) == 2
    assert words in capsys.readouterr().err
    assert (clone / "docs" / "bad.md").read_text(encoding="utf-8") == text


def test_results_that_are_missing_are_one_sentence(clone, capsys):
    (clone / "bench" / "results" / "plan.json").unlink()
    assert tables.main(["--check", "--root", str(clone)]) == 2
    assert "plan.json" in capsys.readouterr().err
