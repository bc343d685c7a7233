"""A run of tests as rows: failures the moment they are known, numbers at the end, also where the time is over."""

import importlib.util
import os
import subprocess
import sys

import pytest

from bench import journal, process, pytest_rows

TESTS = """
import pytest

def test_good(): pass

@pytest.mark.parametrize("i", range(3))
def test_bad(i):
    assert i == 2, "far off"

def test_later(): pytest.skip("no GPU")
"""
WORKERS = [
    [],
    pytest.param(
        ["-p", "xdist.plugin", "-n", "2"],
        marks=pytest.mark.skipif(not importlib.util.find_spec("xdist"), reason="needs pytest-xdist"),
    ),
]


def rows_of(folder, *words):
    """The exit status and the rows of a run of its own, of tests that know nothing of this project's."""
    (folder / "test_some.py").write_text(TESTS)
    (folder / "pytest.ini").write_text("[pytest]\n")
    path = folder / "rows.jsonl"
    words = ["-m", "pytest", "-p", "bench.pytest_rows", *words, str(folder), "-q", "-p", "no:cacheprovider"]
    words += ["--rows", str(path), "--label", "tests", "--tiny"]
    alone = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    ended = subprocess.run([sys.executable, *words], cwd=process.ROOT, capture_output=True, env=alone)
    return ended.returncode, journal.read(path)


@pytest.mark.parametrize("workers", WORKERS)
def test_failures_and_numbers(tmp_path, workers):
    status, rows = rows_of(tmp_path, *workers)
    assert status == 1 and {row["step"] for row in rows} == {"tests"}
    failures = {row["test"].rpartition("::")[2]: row["failure"] for row in rows[:-1]}
    assert failures == {"test_bad[0]": "AssertionError: far off", "test_bad[1]": "AssertionError: far off"}
    expected = {"status": "TESTS_FAILED", "tests_passed": 2, "tests_failed": 2, "tests_skipped": 1}
    assert {key: rows[-1].get(key) for key in expected} == expected and "skipped" not in rows[-1]


@pytest.mark.parametrize("workers", WORKERS)
def test_a_file_that_cannot_be_read_is_a_failure(tmp_path, workers):
    (tmp_path / "test_other.py").write_text("import nonesuch")
    status, rows = rows_of(tmp_path, *workers)
    failures = [row["failure"] for row in rows[:-1] if row["test"].endswith("test_other.py")]
    assert status != 0 and failures == ["ModuleNotFoundError: No module named 'nonesuch'"]


def test_no_test_is_begun_when_the_time_is_over(tmp_path):
    status, rows = rows_of(tmp_path, "--seconds", "0")
    assert status == 0 and rows[-1]["status"] == "INTERRUPTED"
    assert rows[-1]["tests_passed"] == 1 and rows[-1]["skipped"] == pytest_rows.NO_TIME
