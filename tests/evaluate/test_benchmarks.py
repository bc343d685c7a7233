"""The official layouts, file by file; subsets that are always the same; mistakes with their line."""

import json
from collections import Counter
from pathlib import Path

import pytest
from reference_files import reference_file

from flux_jax.errors import UserError
from flux_jax.evaluate import benchmarks
from flux_jax.evaluate.benchmarks import CATEGORIES, Prompt
from flux_jax.evaluate.geneval import TAGS


def write(path: Path, *lines: str, end="\n") -> Path:
    path.write_bytes(end.join([*lines, ""]).encode())
    return path


def test_geneval_layout():
    path = reference_file("prompts/geneval/evaluation_metadata.jsonl")
    prompts = benchmarks.read_geneval(path)
    pictures = benchmarks.folder_pictures(prompts, 4)
    assert len(pictures) == 553 * 4
    lines = path.read_text().splitlines()
    for number, picture in enumerate(pictures):
        prompt, k = divmod(number, 4)
        assert picture.path == Path(f"{prompt:05d}/samples/{k:04d}.png")
        assert picture.sidecar_path == Path(f"{prompt:05d}/metadata.jsonl")
        assert picture.sidecar == json.loads(lines[prompt])
        assert picture.prompt == picture.sidecar["prompt"]
        assert picture.seed == 42 + k
    assert pictures[-1].path == Path("00552/samples/0003.png")


@pytest.mark.parametrize("category", CATEGORIES)
def test_t2i_compbench_layout(category):
    prompts = benchmarks.read_t2i_compbench(reference_file(f"prompts/t2i_compbench/{category}_val.txt"))
    pictures = benchmarks.t2i_pictures(prompts, 10)
    assert len(prompts) == 300
    assert len({picture.path for picture in pictures}) == 3000
    for index, picture in enumerate(pictures):
        assert picture.path.parts == ("samples", f"{picture.prompt}_{index:06d}.png")
        assert picture.path.name.split("_")[0] == picture.prompt == prompts[index // 10].text  # how evaluators find it
        assert picture.seed == 42 + index % 10
        assert "\r" not in picture.prompt


def test_parti_layout():
    prompts = benchmarks.read_parti(reference_file("prompts/parti/PartiPrompts.tsv"))
    assert len(prompts) == 1632
    assert prompts[0].sidecar["category"] == prompts[0].stratum == "Abstract"
    assert prompts[0].text == "bond"
    quoted = [
        prompt for prompt in prompts if prompt.text.startswith('"')
    ]  # as the file has it, in which quotes are words
    assert [prompt.text.split(" painted")[0] for prompt in quoted] == ['"G I G G L E"']
    pictures = benchmarks.folder_pictures(prompts[:1], 2, seed=7)
    assert [p.path for p in pictures] == [Path("00000/samples/0000.png"), Path("00000/samples/0001.png")]
    assert [p.seed for p in pictures] == [7, 8]


def test_subsets_are_fixed_nested_and_in_proportion():
    prompts = benchmarks.read_geneval(reference_file("prompts/geneval/evaluation_metadata.jsonl"))
    previous: set[int] = set()
    for number in (6, 50, 100, 300, 552, 553):
        chosen = benchmarks.subset(prompts, number)
        places = [prompt.place for prompt in chosen]
        assert len(places) == number and places == sorted(places)
        assert previous <= set(places)
        previous = set(places)
        counts = Counter(prompt.stratum for prompt in chosen)
        assert all(abs(counts[tag] - number * total / 553) <= 1 for tag, total in TAGS.items()), number
    assert [prompt.place for prompt in benchmarks.subset(prompts, 6)] == [74, 91, 253, 311, 437, 508]  # for ever


def test_shards_part_the_prompts():
    prompts = [Prompt(i, f"prompt {i}") for i in range(10)]
    parts = [benchmarks.shard(prompts, part, 3) for part in (1, 2, 3)]
    assert sorted((p for part in parts for p in part), key=lambda p: p.place) == prompts
    assert [len(part) for part in parts] == [4, 3, 3]


GOOD = '{"tag": "colors", "prompt": "a", "include": []}'


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        ([GOOD, "{nonsense"], "line 2"),
        ([GOOD, "[1]"], "line 2"),
        ([GOOD, GOOD.replace('"colors"', "[]")], "[]"),
        ([GOOD, GOOD.replace("colors", "shapes")], "shapes"),
        ([GOOD.replace('"a"', '" "')], "line 1"),
        ([GOOD.replace('"include": []', '"count": 1')], "include"),
        ([GOOD, "", GOOD], "line 2"),
        ([], "metadata.jsonl"),
    ],
)
def test_bad_metadata_is_one_sentence(tmp_path, lines, named, snapshot_message):
    path = write(tmp_path / "metadata.jsonl", *lines)
    with snapshot_message.raises(UserError, path, named) as error:
        benchmarks.read_geneval(path)
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("a red/green bench", "'/'"),
        ("a snake_case bench", "'_'"),
        ("é" * 122 + "ab", "255"),
    ],
)
def test_a_prompt_that_fits_no_file_name_is_refused(tmp_path, prompt, named, snapshot_message):
    path = write(tmp_path / "color_val.txt", "a bench", "a bowl", prompt, end="\r\n")
    with snapshot_message.raises(UserError, "line 3", named):
        benchmarks.read_t2i_compbench(path)


def test_the_longest_prompt_that_fits(tmp_path):
    prompt = "é" * 122
    (read,) = benchmarks.read_t2i_compbench(write(tmp_path / "color_val.txt", prompt))
    name = benchmarks.t2i_pictures([read], 1)[0].path.name
    assert len(name.encode()) == 255
    (tmp_path / name).touch()


def test_bad_parti_files(tmp_path, snapshot_message):
    with snapshot_message.raises(UserError, "line 1"):
        benchmarks.read_parti(write(tmp_path / "a.tsv", "a prompt"))
    with snapshot_message.raises(UserError, "line 3"):
        benchmarks.read_parti(write(tmp_path / "b.tsv", "Prompt\tCategory", "a\tb", "c"))


def test_missing_and_binary_files(tmp_path, snapshot_message):
    with snapshot_message.raises(UserError, "none.jsonl"):
        benchmarks.read_geneval(tmp_path / "none.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with snapshot_message.raises(UserError, "binary"):
        benchmarks.read_t2i_compbench(tmp_path / "binary")
