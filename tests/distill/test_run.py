"""Whole distillations of a tiny teacher: the exported student is the trained one, a killed run ends with the same bits,
two processes learn what one learns, and whatever cannot be done is one sentence."""

import dataclasses
import errno
import json
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_distillation as tiny
from flax import nnx

from flux_jax.checkpoints import checkpoint, writer
from flux_jax.cli.distill import main, usable_cores
from flux_jax.distill import end_to_end, export
from flux_jax.distill.options import Options
from flux_jax.distill.run import prepare, train_student
from flux_jax.distill.trajectories import load_or_make
from flux_jax.errors import UserError
from flux_jax.io.prompts import held_out, split
from flux_jax.models import quantize

pytestmark = pytest.mark.usefixtures("hasty_compiler")
PHASES = ("double_blocks.0", "single_blocks.0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distill")
    tiny.teacher(folder)
    tiny.prompts_file(folder)
    return folder


def words(folder: Path, out: str, options: Options = tiny.OPTIONS) -> list[str]:
    teacher, file = str(folder / "teacher"), str(folder / "prompts.txt")
    return [teacher, str(folder / out), "--prompts", file, *tiny.flags(options)]


def contents(out: Path) -> dict:
    """All weights and the manifest: everything but the metrics, which tell the time."""
    stored = checkpoint.Checkpoint.open(out)
    weights = {f"{part}/{n}": v for part in stored.components for n, v in stored.read(part, stored.table(part)).items()}
    return weights | {"manifest": stored.manifest}


@pytest.fixture(scope="module")
def whole(folder):
    """An uninterrupted run, in a process of its own."""
    done = tiny.run(words(folder, "whole"))
    assert done.returncode == 0, done.stderr
    return folder / "whole", done


def test_killed_in_every_phase_and_in_a_save_it_ends_with_the_same_bits(folder, whole):
    """Killed while trajectories are written, while a block learns, while Orbax gives a save its name (in both phases),
    in the middle of phase end_to_end, while the student's own trajectories are written, and while it settles."""
    for die in (("store", 2), ("step", 3), ("orbax", 2), ("step", 7), ("store", 2), ("orbax", 2), ("step", 5)):
        killed = tiny.run(words(folder, "killed"), die=die)
        assert killed.returncode == -9, (die, killed.stderr)
        assert not (folder / "killed").exists()
    done = tiny.run(words(folder, "killed"))
    assert done.returncode == 0, done.stderr
    expected, found = contents(whole[0]), contents(folder / "killed")
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    steps = [
        [(row["phase"], row["step"]) for row in map(json.loads, path.read_text().splitlines())]
        for path in (folder / name / "training" / "metrics.jsonl" for name in ("whole", "killed"))
    ]
    assert sorted(steps[0]) == sorted(steps[1])  # no line twice, none lost


def losses(out: Path) -> dict[tuple[str, int], float]:
    rows = [json.loads(line) for line in (out / "training" / "metrics.jsonl").read_text().splitlines()]
    return {(row["phase"], row["step"]): row["loss"] for row in rows}


def test_two_processes_learn_what_one_learns_and_one_writes_it(folder, whole):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    several = ["--mesh", "fsdp=2", "--coordinator", address, "--processes", "2"]
    command = [sys.executable, "-m", "flux_jax.distill", *words(folder, "pair"), *several, "--process"]
    started = [
        subprocess.Popen([*command, str(i)], env=tiny.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for i in range(2)
    ]
    try:
        ended = [process.communicate(timeout=900) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], ended
    assert [b"held_out_loss" in out for out, _ in ended] == [True, False]  # one result, not two
    assert not (folder / "pair").exists()
    written = tiny.run(words(folder, "pair"))
    assert written.returncode == 0, written.stderr
    one, two = losses(whole[0]), losses(folder / "pair")
    assert one.keys() == two.keys()
    np.testing.assert_allclose([two[line] for line in one], list(one.values()), rtol=5e-3)


def test_what_is_told_about_a_run(folder, whole):
    out, done = whole
    last = json.loads(done.stdout.splitlines()[-1])
    told = checkpoint.Checkpoint.open(out).manifest["quantization"]
    assert told["distilled"] is True and told["activations"] == "bf16" and told["method"] == "least-squares"
    last_phase = tiny.OPTIONS.learning_steps + tiny.OPTIONS.settle_steps
    assert told["phases"] == {"blockwise": tiny.OPTIONS.block_steps, "end_to_end": last_phase}
    assert Options(**told["options"]) == tiny.OPTIONS
    training, apart = split(tiny.PROMPTS)
    assert told["prompts"]["training"] == len(training) and told["prompts"]["held_out"] == len(apart)
    assert last["held_out_loss"] == told["held_out_loss"]
    assert set(told["held_out_loss"]) == {"rounding", "blockwise", "end_to_end"}
    rows = [json.loads(line) for line in (out / "training" / "metrics.jsonl").read_text().splitlines()]
    blocks = {f"blockwise {name}" for name in PHASES}
    assert {row["phase"] for row in rows} == blocks | {"end_to_end", "settle", "held_out"}
    assert [row["after"] for row in rows if row["phase"] == "held_out"] == ["rounding", "blockwise", "end_to_end"]
    assert "end_to_end" in done.stderr  # the progress bar
    teacher = checkpoint.Checkpoint.open(folder / "teacher")
    for part in ("t5", "clip", "vae"):
        theirs, ours = (c.read(part, c.table(part)) for c in (teacher, checkpoint.Checkpoint.open(out)))
        for name, value in theirs.items():
            np.testing.assert_array_equal(ours[name], value)
    assert not list(out.with_name("whole.run").glob("blockwise/states*"))  # the largest files are gone


def test_the_packed_student_gives_the_velocity_of_the_trained_one(folder, tmp_path):
    """With int8 activations, and one scale a matrix."""
    options = dataclasses.replace(
        tiny.OPTIONS, phases="end_to_end", activations="int8", scales="tensor", accumulate=2, timesteps="error",
        learning_steps=3, own_trajectories=0,
    )  # fmt: skip
    work = prepare(folder / "teacher", tmp_path / "out.run", tiny.PROMPTS, options, None)
    graph, params, about = train_student(work)
    export.export(work, params, tmp_path / "out", about, overwrite=False)
    points = load_or_make(work, "held_out", work.held_out, options.held_out).points(np.array([0, 3]), np.array([0, 2]))
    batch = jax.tree.map(jnp.asarray, points)
    expected = jax.jit(lambda p, b: end_to_end.velocity(graph, work.dtype, p, b, end_to_end.constants(work)))(
        params, batch
    )
    packed = checkpoint.Checkpoint.open(tmp_path / "out").load("transformer", jnp.float32)

    @jax.jit
    def velocity(packed, b):
        modulation = packed.modulation(b["t"], jnp.full((2,), work.guidance), b["pooled"])
        return packed(b["x"], b["text"], modulation, work.rope)

    found = velocity(packed, batch)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * float(jnp.abs(expected).max()))
    plain = quantize.quantize_transformer(
        checkpoint.Checkpoint.open(folder / "teacher").load("transformer", jnp.float32)
    )
    assert float(jnp.abs(velocity(plain, batch) - expected).max()) > 0.01  # it has learned something
    stored = {str(v.dtype) for _, v in nnx.to_flat_state(nnx.state(params and packed))}
    assert stored == {"uint8", "float32"}


def test_trajectories_are_the_pipelines(folder, tmp_path):
    """The last point and its velocity lead to the picture that the pipeline draws from the same noise."""
    from flux_jax.distill.trajectories import TrajectorySampler
    from flux_jax.sampling.pipeline import FluxPipeline

    options = dataclasses.replace(tiny.OPTIONS, dtype="float32", phases="none")
    work = prepare(folder / "teacher", tmp_path / "run", tiny.PROMPTS, options, None)
    found = TrajectorySampler(work, 0).chunk(tiny.PROMPTS[:2], 0, 4)
    pipe = FluxPipeline.from_pretrained(folder / "teacher", dtype="float32")
    for i in range(2):
        x, v = found["x"][i].astype(np.float32), found["velocity"][i].astype(np.float32)
        drawn = pipe(tiny.PROMPTS[i], latents=x[:1], output_type="latent").images[0]
        end = x[-1] + (work.sigmas[-1] - work.sigmas[-2]) * v[-1]
        np.testing.assert_allclose(end, drawn, atol=2e-2)
        assert np.abs(end - x[0]).max() > 0.5


def test_while_the_student_settles_no_code_flips_and_all_floats_learn(folder, tmp_path):
    options = dataclasses.replace(tiny.OPTIONS, dtype="float32", phases="end_to_end", own_trajectories=0)
    means = []
    for steps in (0, tiny.OPTIONS.settle_steps):
        changed = dataclasses.replace(options, settle_steps=steps)
        work = prepare(folder / "teacher", tmp_path / f"settle-{steps}", tiny.PROMPTS, changed, None)
        graph, params = end_to_end.build(work, end_to_end.rounded(work))
        theirs = load_or_make(work, "trajectories", work.training, options.trajectories)
        means.append(end_to_end.train(work, graph, params, theirs, []))
    for (path, before), after in zip(
        jax.tree_util.tree_leaves_with_path(means[0]), jax.tree.leaves(means[1]), strict=True
    ):
        same = bool((before == after).all())
        assert same == (path[-1].key == "shadow"), path


def test_on_its_own_way_the_student_learns_the_teachers_velocity(folder, tmp_path):
    """Points of own trajectories: the student's Euler steps lead from one to the next, the velocity is the teacher's.
    They are half of a batch from their first round on, and each round has its own noise."""
    options = dataclasses.replace(tiny.OPTIONS, dtype="float32", phases="end_to_end", learning_steps=8)
    work = prepare(folder / "teacher", tmp_path / "run", tiny.PROMPTS, options, None)
    graph, params = end_to_end.build(work, end_to_end.rounded(work))
    theirs = load_or_make(work, "trajectories", work.training, options.trajectories)
    points = end_to_end.BatchSampler(work, graph, theirs, None)
    assert points.starts == [2, 4, 6, 8]
    alone = points(1, None)
    drawn = theirs.points(*theirs.draw(options.seed, 1_000_000, 1, options.batch, None))
    jax.tree.map(np.testing.assert_array_equal, alone, drawn)
    both, own = points(2, params), points.own
    assert len(both["t"]) == options.batch and own.count == options.own_trajectories
    half = own.points(*own.draw(options.seed, 1_000_001, 2, options.batch // 2, None))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[options.batch // 2 :], b), both, half)

    rows, steps = np.arange(own.count), np.zeros(own.count, int)
    now, after = (jax.tree.map(jnp.asarray, own.points(rows, steps + i)) for i in range(2))
    teacher_graph, teacher = nnx.split(work.load_teacher())
    given = end_to_end.constants(work)
    told = end_to_end.velocity(teacher_graph, work.dtype, nnx.to_pure_dict(teacher), now, given)
    np.testing.assert_allclose(now["velocity"], told, atol=2e-2)
    way = end_to_end.velocity(graph, work.dtype, params, now, given)
    np.testing.assert_allclose(after["x"], now["x"] + (work.sigmas[1] - work.sigmas[0]) * way, atol=1e-2)
    assert np.abs(told - way).max() > 0.1  # the two are told apart
    points(4, params)
    assert not (work.folder / "own.1").exists()  # one round's room on the disk is enough
    assert (points.own.points(rows, steps)["x"] != np.asarray(now["x"])).all()  # other noise


REFUSED = {
    "an unknown phase": (["--phases", "blockwise,magic"], "Unknown phase 'magic'"),
    "phases in the wrong order": (["--phases", "end_to_end,blockwise"], "in order"),
    "a mesh that does not divide": (["--mesh", "data=3"], "3 devices"),
    "a mesh that is none": (["--mesh", "rows=2"], "must read such as"),
    "a batch that does not divide": (["--batch", "3", "--accumulate", "2"], "--accumulate 2"),
    "no steps": (["--block-steps", "0"], "--block-steps must be at least 1"),
    "words for a number": (["--batch", "many"], "--batch"),
    "no ternary modulation": (["--no-modulation"], "--no-modulation"),
    "a size of no whole tokens": (["--height", "33"], "33"),
    "one process of several": (["--processes", "2"], "--coordinator"),
    "two settings": (["--quick", "--large"], "not allowed with"),
    "a large model's batch that does not divide": (["--large", "--accumulate", "3"], "--batch 16"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_one_sentence(folder, case, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    extra, says = REFUSED[case]
    out = tmp_path / "out"
    assert main([str(folder / "teacher"), str(out), "--prompts", str(folder / "prompts.txt"), *extra]) == 2
    error = capsys.readouterr().err.strip()
    assert says in error and "\n" not in error
    assert not any(tmp_path.iterdir())


def refused(folder, out, texts, says, **options):
    with pytest.raises(UserError, match=says) as caught:
        prepare(
            options.pop("teacher", folder / "teacher"), out, texts, dataclasses.replace(tiny.OPTIONS, **options), None
        )
    assert "\n" not in str(caught.value) and caught.value.exit_code in (2, 3)


def test_teachers_prompts_and_folders_that_will_not_do(folder, tmp_path, monkeypatch):
    run = tmp_path / "run"
    refused(folder, run, ["a red circle"] * 5, "1 different")
    apart = [p for p in tiny.PROMPTS if held_out(p)]
    refused(folder, run, apart, "left for training")
    refused(folder, run, [p for p in tiny.PROMPTS if p not in apart], "held out")
    refused(folder, run, tiny.PROMPTS, "no checkpoint", teacher=tmp_path / "nowhere")
    made = tiny.config()
    ternary = tmp_path / "ternary"
    modules = {"transformer": quantize.quantize_transformer(tiny.tiny_model.modules(made)["transformer"])}
    about = {"layout": 1, "method": "least-squares", "distilled": False, "activations": "bf16"}
    writer.save(ternary, made, modules, quantization=about)
    refused(folder, run, tiny.PROMPTS, "ternary already", teacher=ternary)
    (tmp_path / "file").write_text("")
    refused(folder, tmp_path / "file" / "run", tiny.PROMPTS, "Cannot write")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("")
    refused(folder, tmp_path / "other", tiny.PROMPTS, "no folder of a distillation")
    refused(folder, run, tiny.PROMPTS, "GB free", trajectories=10**9)
    prepare(folder / "teacher", run, tiny.PROMPTS, tiny.OPTIONS, None)
    refused(folder, run, tiny.PROMPTS, "another --seed", seed=1)
    refused(folder, run, tiny.PROMPTS[1:], "another prompts")
    prepare(folder / "teacher", run, tiny.PROMPTS, dataclasses.replace(tiny.OPTIONS, save_every=3), None)


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (RuntimeError("RESOURCE_EXHAUSTED: out of memory"), 4, "--block-batch"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "disk is full"),
        (KeyboardInterrupt(), 130, "goes on"),
    ],
)
def test_what_the_machine_lacks_is_one_sentence(folder, tmp_path, monkeypatch, capsys, error, code, says):
    def fail(*args, **options):
        raise error

    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    monkeypatch.setattr("flux_jax.distill.run.distill", fail)
    assert main(words(folder, "none")) == code
    printed = capsys.readouterr().err.strip()
    assert says in printed and "\n" not in printed


def test_cores_divide_every_batch():
    assert [usable_cores(n, [64, 32]) for n in (1, 2, 3, 7, 96)] == [1, 2, 2, 4, 32]
    assert usable_cores(4, [6, 4]) == 2
