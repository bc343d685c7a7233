"""The official evaluators' files, as their code writes them, become the paper's tables; others are refused."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from flux_jax.cli.evaluate import main
from flux_jax.errors import UserError
from flux_jax.evaluate import paper, results, scoring
from flux_jax.evaluate.benchmarks import CATEGORIES
from flux_jax.evaluate.geneval import TAGS

RESULT = "annotation_blip/vqa_result.json"


def geneval_rows(right, prompts=3, images=4):
    """As GenEval's evaluate_images.py writes them; right(tag, prompt, image) says which are correct."""
    rows, number = [], 0
    for tag in TAGS:
        for prompt in range(prompts):
            meta = {"tag": tag, "include": [{"class": "dog", "count": 1}], "prompt": f"{tag} {prompt}"}
            for image in range(images):
                rows.append({
                    "filename": f"images/{number:05d}/samples/{image:04d}.png",
                    "tag": tag,
                    "prompt": meta["prompt"],
                    "correct": right(tag, prompt, image),
                    "reason": "",
                    "metadata": json.dumps(meta),
                    "details": "{}",
                })  # fmt: skip
            number += 1
    return rows


def write_lines(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def t2i_folder(root: Path, category: str, scores: dict[str, list[float]], *, first=0, ranks=True) -> Path:
    """One category's folder as generator and evaluator leave it: prompt -> scores of its pictures."""
    folder = root / category
    (folder / "samples").mkdir(parents=True)
    entries, index = [], first
    for prompt, values in scores.items():
        for value in values:
            (folder / "samples" / f"{prompt}_{index:06d}.png").touch()
            answer = f"{value:.4f}" if category in ("color", "shape", "texture") else value
            if category in ("non_spatial", "complex"):
                answer = 100 * value
            entries.append({"question_id": len(entries) if ranks else index, "answer": answer})
            index += 1
    result = folder / results.WHERE[category][0] / "vqa_result.json"
    result.parent.mkdir(parents=True)
    result.write_text(json.dumps(entries))
    return folder


def test_geneval_scores_are_the_official_ones(tmp_path, capsys):
    """The official summary: share of correct pictures per tag, overall their unweighted mean."""
    rows = geneval_rows(lambda tag, prompt, image: (prompt + image) % 3 == 0 or tag == "colors")
    path = write_lines(tmp_path / "results.jsonl", rows[::-1])  # the evaluator walks folders in any order
    assert main(["score", f"ours={path}", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)["geneval"]["scores"]["ours"]
    for tag in TAGS:
        verdicts = [row["correct"] for row in rows if row["tag"] == tag]
        assert scores[tag]["score"] == pytest.approx(np.mean(verdicts))
        assert (scores[tag]["prompts"], scores[tag]["pictures"]) == (3, 12)
    assert scores["overall"]["score"] == pytest.approx(np.mean([scores[tag]["score"] for tag in TAGS]))
    low, high = scores["overall"]["interval"]
    assert low < scores["overall"]["score"] < high


def test_table_has_the_papers_layout_and_rows(tmp_path, capsys):
    path = write_lines(tmp_path / "results.jsonl", geneval_rows(lambda *_: True))
    assert main(["score", f"ours={path}"]) == 0
    text = capsys.readouterr().out
    rows = [
        [cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    assert rows[0] == ["model", "Overall", "Single", "Two", "Counting", "Colors", "Position", "Color attr."]
    assert rows[2] == ["SDXL (paper)", "0.55", "0.98", "0.74", "0.39", "0.85", "0.15", "0.23"]
    assert rows[5] == ["1.58-bit FLUX (paper)", "0.64", "0.98", "0.77", "0.68", "0.79", "0.21", "0.44"]
    assert rows[6][0] == "**ours**"
    assert re.fullmatch(r"1\.000 \[0\.\d{3}, 1\.000\]", rows[6][2])
    assert "18 of GenEval's 553 prompts" in text


def test_published_averages_are_means_of_their_columns():
    for row in paper.T2I.values():
        assert len(row) == len(paper.T2I_COLUMNS) == 9
        assert row[0] == pytest.approx(np.mean(row[1:]), abs=6e-5)
    for row in paper.GENEVAL.values():
        assert len(row) == len(paper.GENEVAL_COLUMNS) == 7
        assert row[0] == pytest.approx(np.mean(row[1:]), abs=0.01)  # two digits each


def test_t2i_compbench_from_all_eight_evaluators(tmp_path, capsys):
    rng = np.random.default_rng(0)
    expected = {}
    for category in CATEGORIES:
        scores = {f"a {category.replace('_', ' ')} of {i}": rng.random(10).round(4).tolist() for i in range(5)}
        t2i_folder(tmp_path, category, scores)
        expected[category] = np.mean(list(scores.values()))
    assert main(["score", f"ours={tmp_path}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["t2i-compbench"]
    scores = found["scores"]["ours"]
    for category in CATEGORIES:
        assert scores[category]["score"] == pytest.approx(expected[category])
        assert (scores[category]["prompts"], scores[category]["pictures"]) == (5, 50)
    assert scores["overall"]["score"] == pytest.approx(np.mean(list(expected.values())))
    assert found["notes"] == [f"ours: 40 of T2I-CompBench's 2400 prompts in {', '.join(CATEGORIES)}"]


def test_an_average_of_other_quantities_is_not_given(tmp_path, capsys):
    """The paper's non-spatial and complex columns are a language model's marks; CLIP's score is not comparable."""
    for category in CATEGORIES:
        t2i_folder(tmp_path, category, {"a dog": [0.3] * 10, "a cat": [0.4] * 10})
    old = tmp_path / "non_spatial" / "sharegpt4v"
    old.rename(tmp_path / "non_spatial" / "annotation_clip")
    result = tmp_path / "non_spatial" / "annotation_clip" / "vqa_result.json"
    result.write_text(json.dumps([{"question_id": i, "answer": 0.31} for i in range(20)]))
    assert main(["score", f"ours={tmp_path}"]) == 0
    text = capsys.readouterr().out
    assert "non_spatial is the CLIP score" in text
    row = next(line for line in text.splitlines() if "**ours**" in line)
    assert row.split("|")[2].strip() == scoring.ABSENT
    assert "0.3100" in row


@pytest.mark.parametrize("ranks", [True, False])
def test_a_subset_keeps_its_indices(tmp_path, ranks):
    """Some evaluators number pictures by rank, others by the index in the name."""
    t2i_folder(tmp_path, "spatial", {"a dog": [0.1] * 10, "a cat": [0.9] * 10}, first=40, ranks=ranks)
    assert results.read_t2i_compbench(tmp_path, "x").scores == {"spatial": {"a dog": [0.1] * 10, "a cat": [0.9] * 10}}


def test_two_models_are_compared_on_their_prompts(tmp_path, capsys):
    ours = write_lines(tmp_path / "a.jsonl", geneval_rows(lambda tag, prompt, image: image > 0))
    theirs = write_lines(tmp_path / "b.jsonl", geneval_rows(lambda tag, prompt, image: image > 1))
    assert main(["score", f"teacher={ours}", f"student={theirs}", "--json"]) == 0
    change = json.loads(capsys.readouterr().out)["geneval"]["differences_to_first"]["student"]
    assert change["overall"]["score"] == pytest.approx(-0.25)
    np.testing.assert_allclose(change["counting"]["interval"], [-0.25, -0.25], atol=1e-9)  # every prompt lost as much
    assert main(["score", f"teacher={ours}", f"student={theirs}"]) == 0
    assert "| student − teacher | -0.250 [-0.250, -0.250]" in capsys.readouterr().out


def geneval_folder(root: Path, rows) -> Path:
    for row in rows:
        path = root / Path(row["filename"]).relative_to("images")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        (path.parent.parent / "metadata.jsonl").write_text(row["metadata"])
    write_lines(root / "results.jsonl", rows)
    return root


def test_a_folder_of_another_system(tmp_path):
    """diffusers' generator names pictures 00000.png and adds a grid."""
    rows = geneval_rows(lambda *_: True)
    for row in rows:
        row["filename"] = re.sub(r"(\d{4})\.png", r"0\1.png", row["filename"])
    folder = geneval_folder(tmp_path / "sdxl", rows)
    (folder / "00000" / "grid.png").touch()
    benchmark, measured = results.read(folder, "SDXL")
    assert benchmark == "geneval"
    assert measured.scores["counting"] == {f"counting {i}": [1.0] * 4 for i in range(3)}


ALL_RIGHT = geneval_rows(lambda *_: True)


def remove(name):
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (remove("00003/samples/0001.png"), "picture 1"),
        (remove("00003/samples/0003.png"), "00003/samples"),
        (remove("00003/metadata.jsonl"), "metadata.jsonl"),
        (lambda folder: [p.unlink() for p in (folder / "00003/samples").iterdir()], "picture 0"),
        (lambda folder: (folder / "00003/samples/3.png").touch(), "picture 3 twice"),
        (lambda folder: (folder / "00003/samples/999999999999.png").touch(), "picture 4"),
        (lambda folder: write_lines(folder / "results.jsonl", ALL_RIGHT[:-4]), "72"),
        (lambda folder: write_lines(folder / "results.jsonl", ALL_RIGHT[:-1]), "color_attr 2"),
    ],
)
def test_geneval_folders_with_holes(tmp_path, capsys, damage, named, snapshot_message):
    folder = geneval_folder(tmp_path / "images", geneval_rows(lambda *_: True))
    damage(folder)
    assert main(["score", f"ours={folder}"]) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and not out
    snapshot_message(err, named)


def test_names_that_only_look_like_numbers(tmp_path):
    """A digit to Python need not be a number to it."""
    folder = geneval_folder(tmp_path / "images", ALL_RIGHT)
    (folder / "²").mkdir()
    (folder / "00003/samples/².png").touch()
    assert results.read(folder, "x")[0] == "geneval"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"correct": "yes"}, "line 2"),
        ({"tag": "style"}, "style"),
    ],
)
def test_bad_geneval_results(tmp_path, change, named, snapshot_message):
    rows = geneval_rows(lambda *_: True)
    rows[1] |= change
    with snapshot_message.raises(UserError, named):
        results.read_geneval(write_lines(tmp_path / "results.jsonl", rows), "x")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda f: next((f / "samples").iterdir()).unlink(), "9 of 10"),
        (lambda f: [p.unlink() for p in (f / "samples").glob("a cat*")], "20"),
        (lambda f: (f / "samples" / "grid.png").touch(), "grid.png"),
        (lambda f: (f / "samples" / "a dog_7.png").touch(), "a dog_7.png"),
        (remove(RESULT), "color"),
        (lambda f: (f / RESULT).write_text("[{}]"), "entry 1"),
        (lambda f: (f / RESULT).write_text("["), RESULT),
        (lambda f: (f / RESULT).write_text('[{"question_id": 0, "answer": "31"}]'), "31"),
    ],
)
def test_t2i_folders_with_holes(tmp_path, damage, named, snapshot_message):
    damage(t2i_folder(tmp_path, "color", {"a dog": [0.5] * 10, "a cat": [0.4] * 10}))
    with snapshot_message.raises(UserError, named, volatile="Expecting.*"):
        results.read_t2i_compbench(tmp_path / "color", "x")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 99999, "not valid JSON"),
        ('[{"question_id": 0, "answer": NaN}]', "not valid JSON"),
        ('[{"question_id": 0, "answer": "nan"}]', "answer nan is out of range"),
        ('[{"question_id": 0, "answer": 1e400}]', "answer inf is out of range"),
        (f'[{{"question_id": 0, "answer": 1{"0" * 400}}}]', 'a numeric "answer"'),
        ('[{"question_id": 1e400, "answer": 1}]', 'needs a "question_id"'),
        ('[{"question_id": 0.5, "answer": 1}]', 'needs a "question_id"'),
        ('[{"question_id": true, "answer": 1}]', 'needs a "question_id"'),
        (f'[{{"question_id": "{"9" * 5000}", "answer": 1}}]', 'needs a "question_id"'),
        ('[{"question_id": -1, "answer": 1}]', "out of range"),
        ("{}", "entry 1"),
    ],
)
def test_answers_that_are_none(tmp_path, text, said):
    folder = t2i_folder(tmp_path, "color", {"a dog": [0.5]})
    (folder / RESULT).write_text(text)
    with pytest.raises(UserError, match=re.escape(said)):
        results.read_t2i_compbench(folder, "x")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["results.jsonl"], "ours=results.jsonl"),
        (["ours=nowhere"], "nowhere"),
        (["ours=."], "T2I-CompBench"),
        ([], "see --help"),
    ],
)
def test_bad_arguments(tmp_path, monkeypatch, capsys, arguments, named, snapshot_message):
    monkeypatch.chdir(tmp_path)
    assert main(["score", *arguments]) == 2
    snapshot_message(capsys.readouterr().err, named)
