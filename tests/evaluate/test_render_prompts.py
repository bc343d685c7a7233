"""The commands that fill official folders, with a whole tiny model behind them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flux_jax.cli.evaluate import main
from flux_jax.sampling.pipeline import FluxPipeline

pytestmark = pytest.mark.usefixtures("hasty_compiler")
ROOT = Path(__file__).parents[2]
LINES = [{"tag": "colors", "include": [], "prompt": f"a {color} circle"} for color in ("red", "blue", "green")]


@pytest.fixture(scope="module")
def model(tiny_checkpoint) -> str:
    return str(tiny_checkpoint)


@pytest.fixture
def metadata(tmp_path) -> Path:
    path = tmp_path / "metadata.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def files(out):
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def geneval(model, metadata, out, *more):
    return main(["geneval", "--metadata", str(metadata), "--model", model, "--out", str(out), "--steps", "2", *more])


def test_geneval_command(model, metadata, tmp_path, capsys, snapshot_message):
    assert geneval(model, metadata, tmp_path / "a", "--images", "2", "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["made"] == 6
    assert "6 pictures, 0 of them there already." in err
    assert "6/6" in err  # the bar, with the time that is left
    assert {name for name in files(tmp_path / "a") if not name.endswith(".json")} == {
        *(f"{p:05d}/samples/{k:04d}.png" for p in range(3) for k in range(2)),
        *(f"{p:05d}/metadata.jsonl" for p in range(3)),
    }
    expected = FluxPipeline.from_pretrained(model)("a blue circle", seed=43, num_inference_steps=2).images[0]
    with Image.open(tmp_path / "a/00001/samples/0001.png") as image:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))
        keys = "prompt seed format negative_prompt steps guidance true_cfg height width max_sequence_length dtype model"
        record = json.loads(image.text["flux_jax"])
        assert " ".join(record) == f"{keys} device versions"  # in the order of earlier versions, which began folders
        assert (record["prompt"], record["seed"], record["steps"], record["format"]) == ("a blue circle", 43, 2, 1)

    for shard in ("2/2", "1/2", "1/2"):
        assert geneval(model, metadata, tmp_path / "b", "--images", "2", "--shard", shard) == 0
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert "4 pictures, 4 of them there already." in capsys.readouterr().err

    assert geneval(model, metadata, tmp_path / "a", "--images", "2", "--seed", "7") == 2
    snapshot_message(capsys.readouterr().err, tmp_path / "a", "seed")
    assert files(tmp_path / "a") == files(tmp_path / "b")


@pytest.mark.slow
def test_several_devices_make_the_same_pictures(model, metadata, tmp_path):
    assert geneval(model, metadata, tmp_path / "one") == 0
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    command = [sys.executable, "-m", "flux_jax.evaluate", "geneval", "--metadata", str(metadata), "--model", model]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "two"), "--steps", "2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    assert "on 2 x cpu" in done.stderr
    assert files(tmp_path / "one") == files(tmp_path / "two")


@pytest.mark.slow
def test_t2i_compbench_command_for_all_categories(model, tmp_path, capsys):
    from flux_jax.evaluate.benchmarks import CATEGORIES

    prompts = tmp_path / "prompts"
    prompts.mkdir()
    for category in CATEGORIES:
        (prompts / f"{category}_val.txt").write_bytes(b"a red circle\r\na blue square\r\n")
    common = ["--model", model, "--steps", "1", "--images", "2", "--subset", "1"]
    every = ["t2i-compbench", "--category", "all", "--prompts", str(prompts)]
    assert main([*every, "--out", str(tmp_path / "all"), *common]) == 0
    found = set(files(tmp_path / "all"))
    assert {name for name in found if name.startswith("3d_spatial/")} == {
        "3d_spatial/run.json",
        "3d_spatial/samples/a blue square_000002.png",  # the second prompt's own indices, though the first is not made
        "3d_spatial/samples/a blue square_000003.png",
    }
    assert len(found) == 8 * 3
    single = ["t2i-compbench", "--category", "color", "--prompts", str(prompts / "color_val.txt")]
    assert main([*single, "--out", str(tmp_path / "color"), *common]) == 0
    assert set(files(tmp_path / "color")) == {name[6:] for name in found if name.startswith("color/")}


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["--shard", "3/2"], 2, "--shard"),
        (["--subset", "0"], 2, "--subset"),
        (["--images", "0"], 2, "--images"),
        (["--size", "100x100"], 2, "100"),
        (["--steps", "0"], 2, "0"),
        (["--seed", "-1"], 2, "-1"),
        (["--model", "nowhere"], 3, "nowhere"),
        (["--model", "nano@dtype=int3"], 2, "dtype=int3"),
        (["--metadata", "missing.jsonl"], 2, "missing.jsonl"),
        (["--nonsense"], 2, "--nonsense"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    model, metadata, tmp_path, capsys, arguments, code, named, snapshot_message
):
    assert geneval(model, metadata, tmp_path / "out", *arguments) == code
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and not out
    snapshot_message(err, named)
    assert not (tmp_path / "out").exists()


def test_unknown_category_is_one_sentence(model, tmp_path, capsys, snapshot_message):
    arguments = ["--prompts", "p.txt", "--model", model, "--out", str(tmp_path / "out")]
    assert main(["t2i-compbench", "--category", "colour", *arguments]) == 2
    snapshot_message(capsys.readouterr().err, "'colour'", "color, shape")
    assert not (tmp_path / "out").exists()


def test_dry_run_only_says(metadata, tmp_path, capsys, model):
    assert geneval(model, metadata, tmp_path / "out", "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["planned"] == 12
    assert not (tmp_path / "out").exists()
