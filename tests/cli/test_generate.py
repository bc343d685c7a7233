"""`python -m flux_jax.generate`: what it prints and writes, what it refuses, and that a second run starts warm."""

import contextlib
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from flux_jax.checkpoints.checkpoint import Checkpoint
from flux_jax.cli import arguments, dry_run, generate
from flux_jax.errors import UserError, shortened
from flux_jax.io import png
from flux_jax.runtime import memory
from flux_jax.sampling.pipeline import FluxPipeline

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tiny_checkpoint) -> str:
    return str(tiny_checkpoint)


@pytest.fixture(scope="module")
def load():
    """from_checkpoint that loads each model once: reading it takes longer than drawing with it."""
    from_checkpoint, loaded = FluxPipeline.from_checkpoint, {}

    def load(stored, **how):
        key = (stored.directory, str(stored.quantization), *sorted(map(str, how.items())))
        if key not in loaded:
            loaded[key] = from_checkpoint(stored, **how)
        return loaded[key]

    return load


@pytest.fixture
def run(model, load, tmp_path, monkeypatch):
    """Runs the command in an empty folder; gives exit status, stdout and stderr."""
    monkeypatch.setattr(FluxPipeline, "from_checkpoint", load)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")

    def call(*argv, default_model: bool = True):
        out, err = io.StringIO(), io.StringIO()
        options = ["--no-cache", "--model", model] if default_model else []
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = generate.main([*map(str, argv), *options])
        return status, out.getvalue(), err.getvalue()

    return call


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_one_picture(run, tmp_path, snapshot_message):
    status, out, err = run("a red circle", "--seed", 7)
    assert status == 0, err
    (path,) = out.splitlines()
    assert path.startswith("outputs/flux-")
    assert path.endswith("-7.png")
    assert pixels(path).shape == (32, 64, 3)
    assert "denoise 3 x" in err
    (line,) = (line for line in err.splitlines() if line.startswith("seed 7"))
    snapshot_message(line.replace(Path(path).stem, "NAME"), "-C outputs/NAME.png")
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [Path(path).name]  # no temporary file stays


def test_quiet_and_verbose(run):
    status, out, err = run("a red circle", "--seed", 7, "-o", "a.png", "-q")
    assert (status, out, err) == (0, "a.png\n", "")
    _, _, err = run("a red circle", "--seed", 7, "-o", "b.png", "-v")
    assert "float32 on cpu" in err


def test_random_seed_is_printed_and_stored(run):
    _, _, err = run("a red circle", "-o", "a.png")
    seed = png.read_record(Path("a.png"))["seed"]
    assert f"seed {seed} |" in err
    run("a red circle", "-o", "b.png", "--seed", seed)
    np.testing.assert_array_equal(pixels("a.png"), pixels("b.png"))


def test_record_holds_all_it_takes_to_repeat(run, model):
    run("a red “circle”", "--seed", 7, "--steps", 2, "-g", "1.5", "--size", "32x48", "-o", "first.png")
    record = png.read_record(Path("first.png"))
    assert {k: record[k] for k in ("seed", "steps", "guidance", "true_cfg", "width", "height", "dtype")} == {
        "seed": 7, "steps": 2, "guidance": 1.5, "true_cfg": 1.0, "width": 32, "height": 48, "dtype": "float32",
    }  # fmt: skip
    assert record["prompt"] == "a red “circle”"
    assert record["model"]["name"] == "FLUX-tiny"
    assert len(record["model"]["sha256"]) == 64
    assert {"flux_jax", "jax", "python"} <= set(record["versions"])
    with Image.open("first.png") as image:
        text = image.text["parameters"]
    assert text.startswith("a red “circle”\nSteps: 2, ")
    assert "Seed: 7, Size: 32x48" in text

    status, out, _ = run("-C", "first.png", "-o", "again.png")  # but for the model all from the record
    assert (status, out) == (0, "again.png\n")
    np.testing.assert_array_equal(pixels("again.png"), pixels("first.png"))
    assert png.read_record(Path("again.png")) == record

    run("-C", "first.png", "-o", "other.png", "--seed", 8, "-p", "two squares")  # arguments win
    other = png.read_record(Path("other.png"))
    assert (other["seed"], other["prompt"], other["steps"]) == (8, "two squares", 2)
    assert (pixels("other.png") != pixels("first.png")).any()


def test_batch_position_and_progress_bar_do_not_change_a_picture(run, monkeypatch):
    run("a red circle", "--seed", 5, "--num-images", 3, "-o", "batch-{seed}.png")
    run("a red circle", "--seed", 6, "-o", "alone.png")
    monkeypatch.setattr(generate, "shows_progress", lambda args: True)
    _, out, err = run("a blue square", "a red circle", "--seed", 5, "-o", "bar-{i}.png")
    assert out.split() == ["bar-0.png", "bar-1.png"]
    assert "compiling, once for each size" in err and "/3 [" in err
    expected = pixels("alone.png")
    np.testing.assert_array_equal(pixels("batch-6.png"), expected)
    np.testing.assert_array_equal(pixels("bar-1.png"), expected)


def test_json(run):
    status, out, _ = run("a red circle", "--seed", "1", "4", "--json", "-o", "{seed}.png")
    assert status == 0
    report = json.loads(out)  # one object and nothing else
    assert set(report) == {"model", "skipped", "images", "timings", "peak_bytes"}
    assert (report["skipped"], report["peak_bytes"]) == ([], None)  # a CPU does not count it
    assert set(report["timings"]) == {"load", "compile", "text", "denoise", "decode", "steps"}
    assert [(entry["path"], entry["seed"]) for entry in report["images"]] == [("1.png", 1), ("4.png", 4)]
    for entry in report["images"]:
        record = png.read_record(Path(entry["path"]))
        assert {**record, "path": entry["path"], "id": None} == entry


def test_dry_run_writes_nothing(run, model, tmp_path, snapshot_message):
    status, out, err = run("a red circle", "--seed", 7, "--num-images", 2, "--dry-run", "-o", "{i}.png")
    assert (status, out) == (0, "0.png\n1.png\n")
    opened = Checkpoint.open(model)
    count = sum(math.prod(shape) for part in opened.components for _, shape in opened.table(part).values())
    named = f"{count:,} parameters", "64x32, 3 steps, seed 8: a red circle", "It fits"
    snapshot_message(err, *named, volatile=r"\d+[.,]\d+")
    report = json.loads(run("a red circle", "--dry-run", "--json")[1])
    assert sum(report["parameters"].values()) == count
    assert report["dry_run"] is True
    assert report["weights"] == {"form": "float32", "bytes": 4 * sum(report["parameters"].values())}
    assert report["images"][0]["steps"] == 3
    assert list(tmp_path.iterdir()) == []


def test_the_peak_of_a_device_that_counts_it_is_told(run, monkeypatch):
    monkeypatch.setattr(memory, "peak", lambda device: 3_570_000_000)
    assert run("a red circle", "-o", "a.png")[2].rstrip().endswith("| at most 3.57 GB on the device")


def test_weights_that_a_ternary_checkpoint_takes():
    """Neither bfloat16's size nor its name for codes."""
    tables = {
        "transformer": {"a.packed": (np.dtype("uint8"), (4, 32)), "a.scale": (np.dtype("float32"), (4,))},
        "clip": {"b.weight": (np.dtype("float16"), (3, 5))},
    }
    stored = SimpleNamespace(components=tuple(tables), table=tables.get, quantization={"layout": 1})
    assert dry_run.weights(stored) == {"form": "ternary, the rest float16", "bytes": 4 * 32 + 4 * 4 + 2 * 15}


def test_prompts_from_a_file_go_on_where_they_stopped(run, snapshot_message):
    Path("few.txt").write_text("# colours\na red circle\n\na blue square\n")
    command = ("--prompts-file", "few.txt", "--seed", 3, "-o", "out/")
    assert run(*command)[1].split() == ["out/00000.png", "out/00001.png"]
    first = pixels("out/00000.png")
    Path("out/00001.png").unlink()
    status, out, err = run(*command)
    assert (status, out) == (0, "out/00001.png\n")
    snapshot_message(next(line for line in err.splitlines() if "exist" in line), "1 of 2")
    assert json.loads(run(*command, "--json")[1])["skipped"] == ["out/00000.png", "out/00001.png"]
    status, _, err = run(*command, "--steps", 2)
    assert status == 2
    snapshot_message(err, "out/00000.png", "steps")
    assert run(*command, "--steps", 2, "--overwrite")[0] == 0
    assert (pixels("out/00000.png") != first).any()


def test_prompts_from_json_lines(run, snapshot_message):
    lines = [
        {"prompt": "a red circle", "id": "first/1", "seed": 9, "width": 32, "tag": "single_object"},
        {"prompt": "a blue square", "guidance": 2},
    ]
    Path("some.jsonl").write_text("\n".join(map(json.dumps, lines)))
    _, out, err = run("--prompts-file", "some.jsonl", "--seed", 3)
    assert out.split() == ["outputs/some/first-1.png", "outputs/some/00001.png"]
    snapshot_message(err.splitlines()[0], "some.jsonl", "tag")
    first, second = (png.read_record(Path(path)) for path in out.split())
    assert (first["seed"], first["width"]) == (9, 32)
    assert (second["seed"], second["width"], second["guidance"]) == (4, 64, 2.0)


def test_stdin(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfa red circle\n")))
    run("-", "--seed", 7, "-o", "{prompt}.png")
    assert png.read_record(Path("a-red-circle.png"))["prompt"] == "a red circle"


def test_seed_before_the_prompt(run):
    assert run("--seed", 1, 2, "a red circle", "-o", "{seed}.png")[1].split() == ["1.png", "2.png"]


def test_nothing_is_overwritten_unless_asked(run, snapshot_message):
    Path("kept.png").write_bytes(b"mine")
    status, out, err = run("a red circle", "-o", "kept.png")
    assert (status, out) == (2, "")
    snapshot_message(err, "kept.png", "--overwrite")
    assert Path("kept.png").read_bytes() == b"mine"
    assert run("a red circle", "-o", "kept.png", "--overwrite")[0] == 0
    assert pixels("kept.png").shape == (32, 64, 3)


def test_size_is_rounded_and_said(run, snapshot_message):
    _, _, err = run("a red circle", "-H", 30, "-W", 64, "-o", "a.png")
    snapshot_message(err.splitlines()[0], "height 30", 32, "--strict-size")
    assert pixels("a.png").shape == (32, 64, 3)
    assert arguments.aspect_size("16:9", 1024 * 1024, 16) == (1360, 768)
    assert arguments.aspect_size("1:1", 128 * 128, 16) == (128, 128)


BAD = [  # what is typed, and what the sentence must name
    ((), "prompt"),
    (("",), "prompt"),
    (("   ",), "prompt"),
    (("x", "-H", "30", "--strict-size"), "height 30"),
    (("x", "--size", "0x32"), "width"),
    (("x", "--size", "big"), "--size"),
    (("x", "-W", "-5"), "-5"),
    (("x", "-W", "0", "--size", "32x32"), "--size"),
    (("x", "-W", "ten"), "ten"),
    (("x", "--size", "99999x32"), "99999"),
    (("x", "--size", "16384x16384"), "65536"),
    (("x", "--size", "32x32", "--aspect", "1:1"), "--aspect"),
    (("x", "--aspect", "wide"), "wide"),
    (("x", "--aspect", "1:0"), "1:0"),
    (("x", "--steps", "0"), "0"),
    (("x", "--steps", "1001"), "1001"),
    (("x", "-g", "nan"), "nan"),
    (("x", "--true-cfg", "0"), "0.0"),
    (("x", "--seed", "-2"), "-2"),
    (("x", "--seed", "4294967296"), "4294967296"),
    (("x", "--seed", "4294967295", "-b", "2"), "4294967296"),
    (("--seed", "abc"), "abc"),
    (("x", "--seed", "9" * 5000), "64 bits"),
    (("x", "--size", "9" * 5000 + "x1"), "--size"),
    (("x", "--mesh", "data=" + "9" * 5000), "--mesh"),
    (("x", "--steps", "9" * 5000), "--steps"),
    (("x", "--num-images", "1000000000"), "100000"),
    (("x", "y", "--num-images", "60000"), "120000"),
    (("a\udce9b",), "UTF-8"),
    (("x", "-n", "a\udce9b"), "negative prompt"),
    (("x" * 100_001,), "100001"),
    (("x", "--num-images", "0"), "--num-images"),
    (("x", "--seed", "1", "2", "--num-images", "2"), "--num-images"),
    (("x", "--max-sequence-length", "13"), "12"),
    (("x", "-n", "y"), "--true-cfg"),
    (("x", "-o", "a.jpg"), "a.jpg"),
    (("x", "-o", "{what}.png"), "{seed}"),
    (("x", "-o", "{seed"), "{seed}"),
    (("x", "-o", "{prompt.__class__}.png"), "{seed}"),
    (("x", "-o", "{prompt:>9999999999}.png"), "{seed}"),
    (("x", "-o", "n" * 300 + ".png"), "bytes"),
    (("x", "-o", "n" * 300 + "/a.png"), "too long"),
    (("x", "-o", "{prompt:.0}"), "folder"),
    (("x", "y", "-o", "{prompt:.1}{seed:.0f}.png", "--seed", "1", "1"), "x1.png"),
    (("x", "-q", "-v"), "-q"),
    (("x", "--nonsense"), "--nonsense"),
    (("x", "--dtype", "int3"), "int3"),
    (("x", "--prompts-file", "missing.txt"), "--prompts-file"),
    (("--prompts-file", "missing.txt"), "missing.txt"),
    (("--prompts-file", "empty.txt"), "empty.txt"),
    (("--prompts-file", "broken.jsonl"), "broken.jsonl, line 2"),
    (("--prompts-file", "list.jsonl"), "list.jsonl, line 1"),
    (("--prompts-file", "type.jsonl"), "type.jsonl, line 1"),
    (("--prompts-file", "blank.jsonl"), "blank.jsonl, line 1"),
    (("--prompts-file", "steps.jsonl"), "steps.jsonl, line 2"),
    (("--prompts-file", "seeds.jsonl"), "seeds.jsonl, line 1"),
    (("--prompts-file", "binary.txt"), "binary.txt"),
    (("-C", "missing.png"), "missing.png"),
    (("-C", "empty.txt"), "empty.txt"),
    (("-C", "plain.png"), "plain.png"),
    (("-C", "foreign.json"), "99"),
    (("-C", "partial.json"), "seed, steps"),
]


@pytest.mark.parametrize(("argv", "named"), BAD, ids=[shortened(" ".join(argv), quote=False) for argv, _ in BAD])
def test_bad_input_is_one_sentence(run, argv, named, tmp_path, snapshot_message):
    Path("empty.txt").write_text("\n# nothing\n")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00")
    Path("broken.jsonl").write_text('{"prompt": "x"}\n{"prompt"\n')
    Path("list.jsonl").write_text("[1]\n")
    Path("type.jsonl").write_text('{"prompt": "x", "seed": "7"}\n')
    Path("steps.jsonl").write_text('{"prompt": "x"}\n{"prompt": "x", "steps": 0}\n')
    Path("seeds.jsonl").write_text('{"prompt": "x", "seed": 648312782957426}\n')
    Path("blank.jsonl").write_text('{"prompt": " "}\n')
    Path("foreign.json").write_text('{"format": 99}')
    Path("partial.json").write_text('{"format": 1, "prompt": "x", "seed": "7"}')
    Image.new("RGB", (4, 4)).save("plain.png")
    before = sorted(tmp_path.rglob("*"))
    status, out, err = run(*argv)
    assert status == 2, err
    assert out == ""
    assert err.count("\n") == 1, "one sentence"
    snapshot_message(err, named)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_picture_chooses_among_the_packages_models_only(run, model, snapshot_message):
    """A stranger's picture may name any folder; none is opened unasked."""
    run("a red circle", "--seed", 7, "-o", "first.png")
    snapshot_message(run("-C", "first.png", "-o", "a.png", default_model=False)[2], "first.png", "--model PATH")
    args, record = arguments.parse(["-C", "first.png"]), png.read_record(Path("first.png"))

    def opened(name):
        return generate.open_session(args, record | {"model": record["model"] | {"id": name}}).name

    assert [opened(name) for name in ("nano", "nano-bf16", None)] == ["nano", "nano-bf16", "nano"]
    for name in ("./nano", "..", "\x1b[2J" + "/x" * 900):
        with pytest.raises(UserError, match="a picture opens no folder") as caught:
            opened(name)
        assert str(caught.value).isprintable()


def test_a_key_of_a_record_that_is_not_known_is_said(run):
    run("a red circle", "--seed", 7, "-o", "first.png", "-q")
    Path("r.json").write_text(json.dumps(png.read_record(Path("first.png")) | {"lora": "x"}))
    assert "leaves out: lora." in run("-C", "r.json", "--steps", 0)[2]


def test_json_tells_what_was_made_before_a_failure(run, monkeypatch):
    draw, drawn = FluxPipeline.draw, []

    def fail_at_the_second(*given, **named):
        if drawn:
            raise KeyboardInterrupt
        drawn.append(draw(*given, **named))
        return drawn[0]

    monkeypatch.setattr(FluxPipeline, "draw", fail_at_the_second)
    status, out, _ = run("a red circle", "a blue square", "--seed", 7, "-o", "{i}.png", "--json")
    report = json.loads(out)
    assert (status, [image["path"] for image in report["images"]]) == (130, ["0.png"])
    assert report["error"] == "KeyboardInterrupt" and Path("0.png").exists()


def test_a_picture_that_cannot_be_written_goes_elsewhere_and_the_rest_is_drawn(run, monkeypatch):
    draw = FluxPipeline.draw

    def twin(*given, **named):
        Path("0.png").write_bytes(b"another's")
        return draw(*given, **named)

    monkeypatch.setattr(FluxPipeline, "draw", twin)
    status, out, err = run("a red circle", "a blue square", "--seed", 7, "-o", "{i}.png")
    assert (status, out) == (2, "0-2.png\n1.png\n")
    assert "0.png exists" in err and "the picture is 0-2.png now" in err
    assert Path("0.png").read_bytes() == b"another's"
    assert png.read_record(Path("0-2.png"))["prompt"] == "a red circle"


def test_what_a_twin_made_of_the_same_prompts_file_is_skipped(run, monkeypatch):
    Path("few.txt").write_text("a red circle\na blue square\n")
    run("--prompts-file", "few.txt", "-o", "twin/", "--seed", 7)
    draw = FluxPipeline.draw

    def twin(*given, **named):
        Path("out").mkdir(exist_ok=True)
        Path("out/00000.png").write_bytes(Path("twin/00000.png").read_bytes())
        return draw(*given, **named)

    monkeypatch.setattr(FluxPipeline, "draw", twin)
    command = ("--prompts-file", "few.txt", "-o", "out/", "--seed", 7, "--json")
    status, out, err = run(*command)
    report = json.loads(out)
    assert (status, report["skipped"]) == (0, ["out/00000.png"])
    assert [image["path"] for image in report["images"]] == ["out/00001.png"]
    assert "out/00000.png was made by another process meanwhile" in err
    Path("out/00001.png").write_bytes(b"no picture")
    status, _, err = run(*command)
    assert status == 2 and err.startswith(
        "Cannot read out/00001.png: it is not a readable PNG picture; choose another -o"
    )


def test_another_dtype_is_another_picture(run):
    Path("few.txt").write_text("a red circle\n")
    command = ("--prompts-file", "few.txt", "-o", "out/", "--seed", 7)
    assert run(*command)[0] == 0
    assert run(*command, "--dtype", "float32")[0] == 0
    status, _, err = run(*command, "--dtype", "bfloat16")
    assert status == 2 and "another dtype" in err


def test_missing_model(run, snapshot_message):
    for name in ("nowhere", "someone/some-model"):
        status, out, err = run("x", "-m", name, default_model=False)
        assert (status, out) == (3, "")
        assert err.count("\n") == 1
        snapshot_message(err, name)
    Path("folder").mkdir()
    assert run("x", "-m", "folder", default_model=False)[0] == 2


def test_unwritable_output(run, snapshot_message):
    Path("file").write_text("in the way")
    status, out, err = run("a red circle", "-o", "file/picture.png")
    assert (status, out) == (2, "")
    snapshot_message(err, "file/picture.png")


def test_no_gpu_is_no_silent_fallback(run, snapshot_message):
    status, _, err = run("a red circle", "--device", "gpu")
    assert status == 2
    snapshot_message(err, "GPU")


def test_out_of_memory(run, monkeypatch, snapshot_message):
    import jax

    def exhausted(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")

    monkeypatch.setattr(FluxPipeline, "draw", exhausted)
    status, _, err = run("a red circle")
    assert status == 4
    snapshot_message(err, "Out of memory")


def test_interrupted(run, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(FluxPipeline, "draw", stop)
    assert run("a red circle")[0] == 130


def test_help_version_and_list_need_no_model(run):
    for argv in (["--help"], ["--version"]):
        with pytest.raises(SystemExit) as stopped:
            run(*argv, default_model=False)
        assert stopped.value.code == 0
    assert run("--list-models", default_model=False)[0] == 0


COUNTED = """
import sys, collections, jax
events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event.rsplit("/", 1)[-1]]))
from flux_jax.cli.generate import main
status = main(sys.argv[1:])
print("misses", events["cache_misses"], "hits", events["cache_hits"], file=sys.stderr)
sys.exit(status)
"""


@pytest.mark.slow
def test_second_process_compiles_nothing_and_repeats_the_bits(model, tmp_path):
    environment = {**os.environ, "FLUX_JAX_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}

    def process(*argv):
        command = [sys.executable, "-c", COUNTED, *argv]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        misses, hits = (int(word) for word in done.stderr.split()[-3::2])
        return done.stdout, misses, hits

    out, misses, hits = process("a red circle", "--seed", "7", "-o", "cold.png", "-m", model, "--device", "cpu")
    assert out == "cold.png\n"
    assert misses > 0
    assert list((tmp_path / "cache").rglob("*-cache"))
    out, again, hits = process("-C", "cold.png", "-o", "warm.png", "-m", model, "--device", "cpu")
    assert (again, hits) == (0, misses)
    np.testing.assert_array_equal(pixels(tmp_path / "warm.png"), pixels(tmp_path / "cold.png"))
