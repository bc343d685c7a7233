"""Two models on the same captions: differences by hand, flips named and shown."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from flux_jax.cli.evaluate import main
from flux_jax.errors import UserError
from flux_jax.evaluate import nano, paired
from flux_jax.evaluate.models import Variant
from flux_jax.evaluate.statistics import paired_difference
from flux_jax.nano.captions import parse, scene_for
from flux_jax.nano.scenes import render


def rows(verdicts):
    """verdicts: (tag, right) for each caption."""
    return [
        {"index": i, "tag": tag, "prompt": f"caption {i}", "seed": i, "correct": right, "reason": f"why {i}"}
        for i, (tag, right) in enumerate(verdicts)
    ]


STUDENT = rows([("counting", True)] * 6 + [("counting", False)] * 4 + [("colors", False), ("colors", True)])
TEACHER = rows([("counting", True)] * 5 + [("counting", False)] + [("counting", True)] * 4 + [("colors", False)] * 2)


def test_differences_by_hand():
    found = paired.compare(STUDENT, TEACHER)
    counting = found["tags"]["counting"]
    assert (counting["both"], counting["gained"], counting["lost"], counting["neither"]) == (5, 1, 4, 0)
    assert counting["difference"] == pytest.approx(-0.3)
    assert counting["interval"] == list(paired_difference(5, 1, 4, 0).interval)
    assert counting["chance"] == pytest.approx(2 * (1 + 5) / 32)
    assert found["tags"]["colors"]["difference"] == 0.5
    assert found["overall"]["difference"] == pytest.approx((-0.3 + 0.5) / 2)  # as in GenEval: the mean over tags
    assert (found["overall"]["gained"], found["overall"]["lost"]) == (2, 4)
    assert "counting           -0.300" in paired.table(found)


def test_the_captions_that_flipped():
    flips = paired.compare(STUDENT, TEACHER)["flipped"]
    assert [(flip["index"], flip["change"]) for flip in flips] == [
        (6, "lost"), (7, "lost"), (8, "lost"), (9, "lost"), (5, "gained"), (11, "gained"),
    ]  # fmt: skip
    assert flips[0]["reason"] == "why 6"


def test_other_captions_or_seeds_cannot_be_paired(snapshot_message):
    with snapshot_message.raises(UserError, "captions"):
        paired.compare(STUDENT, TEACHER[:-1])
    with snapshot_message.raises(UserError, "captions"):
        paired.compare(STUDENT, [*TEACHER[:-1], TEACHER[-1] | {"seed": 99}])


def test_command_pairs_models(tmp_path, monkeypatch, capsys, snapshot_message):
    """The teacher is perfect, one student (asked for in float32) draws nothing where a star is wanted, one is blind."""

    def load(variant):
        def draw(prompt, seed, **sampling):
            if variant.dtype == "float32" and (variant.offload or "star" in prompt):
                return SimpleNamespace(images=[Image.new("RGB", (128, 128))])
            scene = scene_for(np.random.default_rng(seed), parse(prompt), "held_out")
            return SimpleNamespace(images=[Image.fromarray(render(scene))])

        return draw

    monkeypatch.setattr(Variant, "load", load)
    students = ["nano@dtype=float32", "nano@dtype=float32,offload=model"]
    command = ["nano", "--model", *students, "--against", "nano@dtype=bfloat16", "--every", "23"]
    assert main([*command, "--out", str(tmp_path), "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    stars = [task for task in nano.tasks(0, 23) if "star" in task.caption.text]
    first, second = found["paired"]
    assert stars and first["overall"]["lost"] == len(stars)
    assert {flip["prompt"] for flip in first["flipped"]} == {task.caption.text for task in stars}
    assert second["overall"]["lost"] == len(nano.tasks(0, 23)) and (tmp_path / "flipped-2.png").exists()
    scores = [model["overall"]["score"] for model in (found["against"], *found["models"])]
    assert scores[0] == 1 > scores[1] > scores[2] == 0
    assert json.loads((tmp_path / "paired.json").read_text()) == found
    assert "nano@dtype=float32 minus nano@dtype=bfloat16" in err
    lines = (tmp_path / "table.md").read_text("utf-8").splitlines()
    table = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines if line.startswith("|")]
    assert table[0][:3] == ["FLUX-nano", "Overall", "Single"] and {len(row) for row in table} == {8}
    assert [row[0] for row in table[2:5]] == ["nano@dtype=bfloat16", *students]
    assert [row[1].split()[0] for row in table[2:]] == [
        "1.000", f"{scores[1]:.3f}", "0.000", f"{scores[1] - 1:+.3f}", "-1.000",
    ]  # fmt: skip
    assert table[5][0] == "nano@dtype=float32 − nano@dtype=bfloat16"
    assert "25 captions" in lines[-1]
    with Image.open(tmp_path / "flipped.png") as sheet:
        pixels = np.asarray(sheet)
    assert all((pixels == color).all(-1).any() for color in ((40, 160, 70), (215, 35, 40)))  # right beside wrong

    capsys.readouterr()
    assert main(["nano", "--model", "nano@dtype=bfloat16", "--out", str(tmp_path / "model")]) == 2
    snapshot_message(capsys.readouterr().err, tmp_path / "model")
    assert main(["nano", "--model", *students, "--out", str(tmp_path / "new")]) == 2
    snapshot_message(capsys.readouterr().err, "--against")
    assert not (tmp_path / "new").exists()


def test_variants_of_a_model(tmp_path, snapshot_message):
    variant = Variant.parse("runs/mine@kernel=xla,activations=int8")
    assert variant == Variant("runs/mine", kernel="xla", activations="int8")
    assert Variant.parse(str(variant)) == variant
    assert variant.label() == "mine@activations=int8,kernel=xla"
    assert variant.otherwise(dtype="float32", kernel="triton") == Variant("runs/mine", "float32", "int8", "xla")
    (tmp_path / "odd@name").mkdir()
    assert Variant.parse(str(tmp_path / "odd@name")).model == str(tmp_path / "odd@name")
    for words in ("nano@kernel", "nano@kernel=cuda", "nano@seed=1"):
        with snapshot_message.raises(UserError, words.partition("@")[2]):
            Variant.parse(words)
    with snapshot_message.raises(UserError, "nano-bf16"):
        Variant.parse("nano-bf16@kernel=xla").config()
