"""Steps of the blockwise phase: each kind of block has its row, and one that fails leaves the other's."""

import json

import pytest

from bench import distill_steps, journal
from bench.process import Ended
from flux_jax.errors import UserError


def figures(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]


@pytest.mark.parametrize("losses", [[1.0, 0.9, 1.1], [1.0, 1.0], [1.0, float("nan"), 0.5]])
def test_steps_that_do_not_learn_are_wrong(losses):
    assert distill_steps.verdict(losses) == {"wrong": f"the loss goes from 1 to {losses[-1]:.4g}"}
    assert distill_steps.verdict([*losses[:1], 0.9]) == {}


def test_a_kind_that_does_not_learn_is_said(monkeypatch):
    found = {"block": "other", "points": 1, "parameters": 1, "seconds": 2.0, "compile_seconds": 3.0}
    found |= {"peak_bytes": None, "planned_bytes": 1, "losses": [1.0, 1.5], "wrong": "the loss goes from 1 to 1.5"}
    monkeypatch.setattr(distill_steps.process, "run", lambda *_, **__: Ended(0, 5.0, [json.dumps(found)], []))
    with pytest.raises(UserError, match="^double_blocks: the loss goes from 1 to 1.5; single_blocks: the loss"):
        distill_steps.main(["--tiny"])


@pytest.mark.parametrize("failing", distill_steps.KINDS)
def test_a_kind_that_fails_leaves_the_other(failing, capsys, monkeypatch, tmp_path):
    block = {"block": "other", "points": 1, "parameters": 10**6, "seconds": 2.0, "compile_seconds": 3.0}
    block |= {"peak_bytes": None, "planned_bytes": 10**9, "losses": [1.0, 0.5]}
    boxes = []

    def run(words, *, seconds):
        boxes.append(seconds)
        return Ended(None, 5.0, [], []) if words[-1] == failing else Ended(0, 5.0, [json.dumps(block)], [])

    monkeypatch.setattr(distill_steps.process, "run", run)
    path = tmp_path / "rows.jsonl"
    with pytest.raises(UserError, match=f"^{failing}: killed at its time box, after 5 s$") as error:
        distill_steps.main(["--tiny", "--rows", str(path), "--seconds", "100", "--kind-seconds", "40"])
    assert error.value.exit_code == 1 and boxes == [40, 40]
    rows = journal.read(path)
    assert [row["kind"] for row in rows] == list(distill_steps.KINDS)
    assert ["failure" in row for row in rows] == [kind == failing for kind in distill_steps.KINDS]
    assert len([row for row in figures(capsys)["blocks"] if row.get("seconds") == 2.0]) == 1
