"""What all benchmarks share: a table for people, one JSON object for programs."""

import json
import subprocess

import jax

from bench import report


def test_report_says_device_versions_and_commit(capsys, tmp_path):
    report.finish("name", {"value": 1.5}, save=tmp_path / "results" / "name.json")
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == json.loads((tmp_path / "results" / "name.json").read_text())
    assert printed["figures"] == {"value": 1.5}
    assert printed["versions"]["jax"] == jax.__version__
    head = subprocess.run(["git", "-C", str(report.ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    assert (printed["commit"] or "").removesuffix("-dirty") == head.stdout.strip()


def test_table_aligns_words_left_and_numbers_right():
    lines = report.table(["gpu", "GB"], [["a10", 3.41234], ["h100", 12345.6], ["l20", None]]).splitlines()
    assert lines == ["gpu       GB", "----  ------", "a10     3.41", "h100  12,346", "l20        -"]
