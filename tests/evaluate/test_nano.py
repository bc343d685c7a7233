"""The evaluation: a perfect painter scores 1, a blind one 0, intervals are Wilson's, nothing is drawn twice."""

import json
from types import SimpleNamespace

import crash_windows
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from flux_jax.cli.evaluate import main
from flux_jax.errors import UserError
from flux_jax.evaluate import nano
from flux_jax.io import locks
from flux_jax.nano.captions import EVALUATION, evaluation_captions, parse, scene_for
from flux_jax.nano.scenes import render

EVERY = 23  # a subset with every tag in it


class Painter:
    """Stands for a pipeline: draws through `paint(prompt, seed)` and counts."""

    def __init__(self, paint):
        self.paint, self.calls = paint, []

    def __call__(self, prompt, seed, **sampling):
        self.calls.append((prompt, seed))
        return SimpleNamespace(images=[Image.fromarray(self.paint(prompt, seed))])


def perfect(prompt, seed):
    return render(scene_for(np.random.default_rng(seed), parse(prompt), "held_out"))


def blind(prompt, seed):
    return np.random.default_rng(seed).integers(0, 256, (128, 128, 3)).astype(np.uint8)


def test_a_perfect_painter_scores_one_and_is_not_asked_twice(tmp_path):
    painter = Painter(perfect)
    result = nano.evaluate(painter, tmp_path, seed=5, every=EVERY)
    assert result["overall"]["score"] == result["exact"] == 1
    assert result["tags"].keys() == EVALUATION.keys()
    planned = nano.tasks(5, EVERY)
    assert painter.calls == [(task.caption.text, task.seed) for task in planned]
    assert all(task.path(tmp_path).is_file() for task in planned)
    rows = [json.loads(line) for line in (tmp_path / "verdicts.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [task.caption.text for task in planned]
    assert all(row["objects"] for row in rows)

    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet)
    assert (pixels == (40, 160, 70)).all(-1).any()  # a green frame, and not a red one
    assert pixels.shape[0] > 6 * 128
    assert pixels.shape[1] > 8 * 128

    planned[3].path(tmp_path).unlink()
    assert nano.evaluate(painter, tmp_path, seed=5, every=EVERY)["overall"] == result["overall"]
    assert len(painter.calls) == len(planned) + 1


class Evaluation:
    """A whole one, of few captions."""

    EVERY = 97

    @staticmethod
    def work(folder):
        locks.sweep(folder)
        nano.evaluate(Painter(perfect), folder / "out", every=Evaluation.EVERY)

    @staticmethod
    def whole(folder):
        for path in folder.rglob("*.png"):
            Image.open(path).load()
        if not (folder / "out" / "sheet.png").exists():
            return "nothing"
        assert len(nano.verdicts(folder / "out")) == len(nano.tasks(0, Evaluation.EVERY))
        assert json.loads((folder / "out" / "summary.json").read_text())["exact"] == 1
        return "new"


@pytest.mark.slow
def test_killed_between_its_steps_it_goes_on(tmp_path):
    assert crash_windows.survive(__file__, "Evaluation", tmp_path, every=3) >= 30


def test_a_damaged_picture_is_named_and_drawn_again_once_it_is_deleted(tmp_path):
    painter, every = Painter(perfect), 200
    whole = nano.evaluate(painter, tmp_path, every=every)
    path, drawn = nano.tasks(0, every)[1].path(tmp_path), len(painter.calls)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=f"{path}: it is not a readable PNG picture; delete it, and the same command"):
        nano.evaluate(painter, tmp_path, every=every)
    path.unlink()
    assert nano.evaluate(painter, tmp_path, every=every)["overall"] == whole["overall"]
    assert len(painter.calls) == drawn + 1


def test_a_blind_painter_scores_nothing(tmp_path):
    result = nano.evaluate(Painter(blind), tmp_path, every=EVERY)
    assert result["overall"]["score"] == result["recognisable"] == 0


def test_overall_is_the_mean_over_tags():
    rows = [
        {"tag": tag, "correct": i < right, "exact": False, "recognisable": True}
        for tag, right, count in (("colors", 3, 4), ("counting", 1, 10))
        for i in range(count)
    ]
    result = nano.summary(rows)
    assert result["overall"]["score"] == pytest.approx((0.75 + 0.1) / 2)
    (low1, high1), (low2, high2) = nano.wilson(3, 4), nano.wilson(1, 10)
    margins = np.hypot(0.75 - low1, 0.1 - low2) / 2, np.hypot(high1 - 0.75, high2 - 0.1) / 2
    np.testing.assert_allclose(result["overall"]["interval"], [0.425 - margins[0], 0.425 + margins[1]], atol=1e-6)


@pytest.mark.parametrize(("right", "count"), [(0, 7), (7, 7), (40, 99), (1, 1)])
def test_interval_is_wilsons(right, count):
    expected = stats.binomtest(right, count).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose(nano.wilson(right, count), [expected.low, expected.high], atol=1e-6)


def test_tasks_are_genevals():
    captions = evaluation_captions()
    assert [task.caption for task in nano.tasks()] == list(captions)
    assert {tag: sum(c.tag == tag for c in captions) for tag in EVALUATION} == EVALUATION


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [(["--model", "no-such-model"], 3, "no-such-model"), (["--every", "0"], 2, "--every")],
)
def test_bad_input_is_one_sentence(tmp_path, capsys, arguments, code, message, snapshot_message):
    assert main(["nano", "--out", str(tmp_path / "out"), *arguments]) == code
    snapshot_message(capsys.readouterr().err, message)
    assert not (tmp_path / "out").exists()


def test_examples_are_four_of_each_tag_with_their_own_seeds():
    found, planned = nano.examples(4, seed=10), nano.tasks(10)
    assert len(found) == 24 and all(task == planned[task.index] for task in found)
    for column, tag in enumerate(EVALUATION):  # of a grid of six
        of_tag = [task.index for task in planned if task.caption.tag == tag]
        places = [of_tag.index(task.index) for task in found[column::6]]
        assert places[0] == 0 and set(np.diff([*places, len(of_tag)])) <= {len(of_tag) // 4, len(of_tag) // 4 + 1}
