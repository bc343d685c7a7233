"""The converter's benchmark: rows for both formats and forms, and a disk that is as it was, also when it is stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PEAK = 2e9  # bytes: the goal


def start(folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "bench.convert", "--dir", str(folder)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_a_row_for_each_format_and_form(tmp_path):
    out, err = start(tmp_path).communicate(timeout=600)
    rows = json.loads(out.splitlines()[-1])["figures"]["rows"]
    assert [row["to"] for row in rows] == ["bf16", "ternary"] * 2, err
    assert len({row["format"] for row in rows}) == 2
    for bf16, ternary in (rows[:2], rows[2:]):
        assert 0.5 < bf16["output_bytes"] / bf16["source_bytes"] < 1.1
        assert ternary["output_bytes"] < bf16["output_bytes"] / 2
        assert all(row["peak_rss_bytes"] < PEAK for row in (bf16, ternary))
    assert not list(tmp_path.iterdir())


def test_stopped_while_the_converter_runs_it_leaves_nothing(tmp_path):
    process = start(tmp_path)
    assert process.stderr is not None
    assert any("converting" in line for line in process.stderr)
    until = time.monotonic() + 120
    while not list(tmp_path.glob("*/.out.flux-partial")):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert out == ""
    assert err == "Interrupted; nothing was left behind.\n"
    assert not list(tmp_path.iterdir())
