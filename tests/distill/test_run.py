"""Whole distillations of a tiny teacher: the exported student is the trained one, a killed run ends with the same bits,
two processes learn what one learns, and whatever cannot be done is one sentence."""

import contextlib
import dataclasses
import errno
import io
import json
import os
import socket
from pathlib import Path

import crash_windows
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_distillation as tiny
from flax import nnx

from flux_jax.checkpoints import checkpoint, checksums, writer
from flux_jax.cli.distill import main, usable_cores
from flux_jax.distill import end_to_end, export
from flux_jax.distill.options import Options
from flux_jax.distill.run import prepare, train_student
from flux_jax.distill.trajectories import load_or_make
from flux_jax.errors import UserError
from flux_jax.io.prompts import held_out, split
from flux_jax.training.metrics import Metrics

pytestmark = pytest.mark.usefixtures("hasty_compiler")
PHASES = ("double_blocks.0", "single_blocks.0")


def words(folder: Path, out: str, options: Options = tiny.OPTIONS) -> list[str]:
    teacher, file = str(folder / "teacher"), str(folder / "prompts.txt")
    return [teacher, str(folder / out), "--prompts", file, *tiny.flags(options)]


def contents(out: Path) -> dict:
    """All weights and the manifest: everything but the metrics, which tell the time."""
    stored = checkpoint.Checkpoint.open(out)
    weights = {f"{part}/{n}": v for part in stored.components for n, v in stored.read(part, stored.table(part)).items()}
    return weights | {"manifest": stored.manifest}


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """The command line makes no further devices, in a process that has some already."""
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")


@dataclasses.dataclass
class Run:
    out: Path
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def whole(folder, hasty_compiler):
    """An uninterrupted run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_NUM_CPU_DEVICES", "1")
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            assert main(words(folder, "whole")) == 0, err.getvalue()
    return Run(folder / "whole", out.getvalue(), err.getvalue())


def same_checkpoint(one: Path, two: Path) -> None:
    expected, found = contents(one), contents(two)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    lines = [sorted((row["phase"], row["step"]) for row in metrics(out)) for out in (one, two)]
    assert lines[0] == lines[1]  # no line twice, none lost


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "training" / "metrics.jsonl").read_text().splitlines()]


KILLS = {  # in the order of a run
    "trajectories are written": ["publish", "trajectories/000004"],
    "a block learns": ["step", "blockwise double_blocks.0", 3],
    "what a block learned is written": ["publish", "blockwise/double_blocks.0"],
    "the student's states in front of the next are written": ["publish", "states/student.1"],
    "both have states in front of this block and the next": ["barrier", "remove teacher.0"],
    "phase end_to_end learns": ["step", "end_to_end", 3],
    "rollouts are written": ["publish", "rollouts.3/000000"],
    "floats learn beside frozen codes": ["step", "end_to_end frozen_codes", 1],
}


@pytest.mark.slow
def test_killed_in_every_phase_it_ends_with_the_same_bits(folder, whole, monkeypatch):
    for place in KILLS.values():
        with monkeypatch.context() as patch:
            tiny.die_at(place, patch=patch.setattr)
            patch.setattr(Metrics, "plot", lambda self: None)  # takes longer than the training
            with pytest.raises(tiny.Killed):
                main(words(folder, "killed"))
        assert not (folder / "killed").exists()
    assert main(words(folder, "killed")) == 0
    same_checkpoint(whole.out, folder / "killed")


@pytest.mark.slow
def test_killed_while_orbax_gives_a_save_its_name_it_ends_with_the_same_bits(folder, whole):
    """By SIGKILL: nothing is tidied up behind it."""
    killed = tiny.start(words(folder, "in-a-save"), ["rename", "blockwise/training/double_blocks.0/checkpoints/4"])
    said = killed.communicate(timeout=900)
    assert killed.returncode == -9, said
    assert main(words(folder, "in-a-save")) == 0
    same_checkpoint(whole.out, folder / "in-a-save")


@pytest.mark.slow
def test_two_processes_end_together_learn_what_one_learns_and_one_writes_it(folder, whole):
    def start(place=None):
        """Both, the second of which dies at the place; returns them and what they said."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        several = ["--mesh", "fsdp=2", "--coordinator", address, "--processes", "2", "--process"]
        started = [tiny.start([*words(folder, "pair"), *several, str(i)], place if i else None) for i in range(2)]
        try:
            said = [process.communicate(timeout=900) for process in started]
        finally:
            for process in started:
                process.kill()
        return [process.returncode for process in started], said

    codes, said = start(["barrier", "record read"])
    assert codes == [1, -9], said
    ends = said[0][1].splitlines()[-1].rpartition("\r")[2]
    assert "Another process of this run has stopped" in ends and "Traceback" not in said[0][1]
    codes, said = start()
    assert codes == [0, 0], said
    assert ["held_out_loss" in out for out, _ in said] == [True, False]  # one result, not two
    assert not (folder / "pair").exists()
    assert main(words(folder, "pair")) == 0
    one, two = (
        {(row["phase"], row["step"]): row["loss"] for row in metrics(out)} for out in (whole.out, folder / "pair")
    )
    assert one.keys() == two.keys()
    np.testing.assert_allclose([two[line] for line in one], list(one.values()), rtol=5e-3)


@pytest.mark.slow
def test_all_that_tells_how_it_was_made_is_in_the_checkpoint_when_it_is_hashed(whole):
    listed = {line.split("  ", 1)[1] for line in (whole.out / checksums.SUMS).read_text().splitlines()}
    present = {path.relative_to(whole.out).as_posix() for path in whole.out.rglob("*") if path.is_file()}
    assert {f"training/{name}" for name in ("metrics.jsonl", "curve.png", "options.json")} <= listed
    assert present == listed | {checksums.SUMS}
    assert checksums.check(whole.out) == len(listed)
    assert json.loads((whole.out / "training" / "options.json").read_text()) == tiny.OPTIONS.to_json()


@pytest.mark.slow
def test_what_is_told_about_a_run(folder, whole):
    out = whole.out
    last = json.loads(whole.stdout.splitlines()[-1])
    told = checkpoint.Checkpoint.open(out).manifest["quantization"]
    assert told["distilled"] is True and told["activations"] == "bf16" and told["method"] == "least-squares"
    last_phase = tiny.OPTIONS.learning_steps + tiny.OPTIONS.settle_steps
    assert told["phases"] == {"blockwise": tiny.OPTIONS.block_steps, "end_to_end": last_phase}
    assert Options(**told["options"]) == tiny.OPTIONS
    training, apart = split(tiny.PROMPTS)
    assert told["prompts"]["training"] == len(training) and told["prompts"]["held_out"] == len(apart)
    assert last["held_out_loss"] == told["held_out_loss"]
    assert set(told["held_out_loss"]) == {"rounding", "blockwise", "end_to_end"}
    rows = metrics(out)
    blocks = {f"blockwise {name}" for name in PHASES}
    assert {row["phase"] for row in rows} == blocks | {"end_to_end", "end_to_end frozen_codes", "held_out"}
    assert [row["after"] for row in rows if row["phase"] == "held_out"] == ["rounding", "blockwise", "end_to_end"]
    assert "end_to_end" in whole.stderr  # the progress bar
    teacher = checkpoint.Checkpoint.open(folder / "teacher")
    for part in ("t5", "clip", "vae"):
        theirs, ours = (c.read(part, c.table(part)) for c in (teacher, checkpoint.Checkpoint.open(out)))
        for name, value in theirs.items():
            np.testing.assert_array_equal(ours[name], value)
    assert not list(out.with_name("whole.run").glob("blockwise/states*"))  # the largest files are gone


@pytest.mark.slow
def test_the_packed_student_gives_the_velocity_of_the_trained_one(folder, tmp_path):
    """With int8 activations, and one scale a matrix."""
    options = dataclasses.replace(
        tiny.OPTIONS, phases="end_to_end", activations="int8", scales="tensor", timesteps="error",
        learning_steps=3, settle_steps=0, own_trajectories=0,
    )  # fmt: skip
    work = prepare(folder / "teacher", tmp_path / "out.run", tiny.PROMPTS, options, None)
    graph, params, about = train_student(work)
    export.export(work, params, tmp_path / "out", about, overwrite=False)
    points = load_or_make(work, "held_out", work.held_out, options.held_out).points(np.array([0, 3]), np.array([0, 2]))
    batch = jax.tree.map(jnp.asarray, points)
    constants = end_to_end.constants_of(work)
    expected = jax.jit(lambda p, b: end_to_end.velocity(graph, work.dtype, p, b, constants))(params, batch)
    packed = checkpoint.Checkpoint.open(tmp_path / "out").load("transformer", jnp.float32)

    @jax.jit
    def velocity(packed, b):
        modulation = packed.modulation(b["t"], jnp.full((2,), work.guidance), b["pooled"])
        return packed(b["x"], b["text"], modulation, work.rope)

    found = velocity(packed, batch)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * float(jnp.abs(expected).max()))
    losses = about["held_out_loss"]
    assert losses["end_to_end"] < 0.99 * losses["rounding"]  # it has learned something
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


@pytest.mark.slow
def test_while_codes_are_frozen_none_flips_and_all_floats_learn(folder, tmp_path):
    options = dataclasses.replace(tiny.OPTIONS, dtype="float32", phases="end_to_end", own_trajectories=0)
    means = []
    for steps in (0, tiny.OPTIONS.settle_steps):
        changed = dataclasses.replace(options, settle_steps=steps)
        work = prepare(folder / "teacher", tmp_path / f"frozen-{steps}", tiny.PROMPTS, changed, None)
        graph, params = end_to_end.build(work, end_to_end.read_rounded)
        theirs = load_or_make(work, "trajectories", work.training, options.trajectories)
        means.append(end_to_end.train(work, graph, params, theirs, []))
    for (path, before), after in zip(
        jax.tree_util.tree_leaves_with_path(means[0]), jax.tree.leaves(means[1]), strict=True
    ):
        same = bool((before == after).all())
        assert same == (path[-1].key == "shadow"), path


def test_on_rollouts_the_student_learns_the_teachers_velocity(folder, tmp_path):
    """Points of on-policy rollouts: the student's Euler steps lead from one to the next, the velocity is the teacher's.
    They are half of a batch from their first round on, and each round has its own noise."""
    options = dataclasses.replace(tiny.OPTIONS, dtype="float32", phases="end_to_end", learning_steps=8)
    work = prepare(folder / "teacher", tmp_path / "run", tiny.PROMPTS, options, None)
    graph, params = end_to_end.build(work, end_to_end.read_rounded)
    theirs = load_or_make(work, "trajectories", work.training, options.trajectories)
    points = end_to_end.BatchSampler(work, graph, theirs, None)
    assert points.starts == [2, 4, 6, 8]
    alone = points(1, None)
    drawn = theirs.points(*theirs.draw(options.seed, 1_000_000, 1, options.batch, None))
    jax.tree.map(np.testing.assert_array_equal, alone, drawn)
    both, rollouts = points(2, params), points.rollouts
    assert len(both["t"]) == options.batch and rollouts.count == options.own_trajectories
    half = rollouts.points(*rollouts.draw(options.seed, 1_000_001, 2, options.batch // 2, None))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[options.batch // 2 :], b), both, half)

    rows, steps = np.arange(rollouts.count), np.zeros(rollouts.count, int)
    now, after = (jax.tree.map(jnp.asarray, rollouts.points(rows, steps + i)) for i in range(2))
    teacher_graph, teacher = nnx.split(work.load_teacher())
    constants = end_to_end.constants_of(work)
    told = end_to_end.velocity(teacher_graph, work.dtype, nnx.to_pure_dict(teacher), now, constants)
    np.testing.assert_allclose(now["velocity"], told, atol=2e-2)
    leading = end_to_end.velocity(graph, work.dtype, params, now, constants)
    np.testing.assert_allclose(after["x"], now["x"] + (work.sigmas[1] - work.sigmas[0]) * leading, atol=1e-2)
    assert np.abs(told - leading).max() > 0.1  # the two are told apart
    points(4, params)
    assert not (work.folder / "rollouts.1").exists()  # one round's room on the disk is enough
    assert (points.rollouts.points(rows, steps)["x"] != np.asarray(now["x"])).all()  # other noise


REFUSED = {
    "an unknown phase": (["--phases", "blockwise,magic"], "Unknown phase 'magic'"),
    "phases in the wrong order": (["--phases", "end_to_end,blockwise"], "in order"),
    "a mesh that does not divide": (["--mesh", "data=3"], "3 devices"),
    "a mesh that is none": (["--mesh", "rows=2"], "must read such as"),
    "a batch that does not divide": (["--batch", "3", "--accumulate", "2"], "--accumulate 2"),
    "no steps": (["--block-steps", "0"], "--block-steps 0 must be at least 1"),
    "words for a number": (["--batch", "many"], "--batch"),
    "no ternary modulation": (["--no-modulation"], "float modulation"),
    "a size of no whole tokens": (["--height", "33"], "33"),
    "one process of several": (["--processes", "2"], "--coordinator"),
    "two settings": (["--quick", "--large"], "not allowed with"),
    "a large model's batch that does not divide": (["--large", "--accumulate", "3"], "--batch 16"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_one_sentence(folder, case, tmp_path, capsys):
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
        ).begin()
    assert "\n" not in str(caught.value) and caught.value.exit_code in (2, 3)


def test_a_run_is_one_processs_alone_and_clears_what_a_killed_one_left(folder, tmp_path, capsys):
    out, run = tmp_path / "deep" / "out", tmp_path / "deep" / "out.run"
    work = prepare(folder / "teacher", run, tiny.PROMPTS, tiny.OPTIONS, None)
    with work.alone():
        work.begin()
        command = [str(folder / "teacher"), str(out), "--prompts", str(folder / "prompts.txt")]
        assert main([*command, *tiny.flags(tiny.OPTIONS)]) == 2
        assert f"{run} is being written by another process" in (error := capsys.readouterr().err)
        assert len(error.splitlines()) == 1
        (run / "trajectories" / ".000000.flux-partial").mkdir(parents=True)
        (run / "trajectories" / ".000000.flux-lock").touch()
    with work.alone():
        assert [path.name for path in run.rglob(".*")] == [".all.flux-lock"]
    (run / "run.json").write_text("[")
    refused(folder, run, tiny.PROMPTS, "run.json: not valid JSON")
    (run / "run.json").write_text('{"options": 3}')
    refused(folder, run, tiny.PROMPTS, "begun with")
    out.mkdir()
    assert main([*command, *tiny.flags(tiny.OPTIONS), "--overwrite"]) == 2
    assert f"{out} is not a checkpoint" in capsys.readouterr().err  # before hours of training
    assert sorted(path.name for path in out.parent.iterdir()) == ["out", "out.run"]


@pytest.mark.slow
def test_a_student_that_is_finished_is_told_of_again_and_only_by_its_own_run(folder, whole, monkeypatch, capsys):
    """It was killed, perhaps, between the student's name and the last line."""

    def update(*_):
        raise AssertionError("trains again")

    monkeypatch.setattr("flux_jax.distill.training.update", update)
    assert main(words(folder, "whole")) == 0
    assert capsys.readouterr().out.splitlines()[-1] == whole.stdout.splitlines()[-1]
    before = contents(whole.out)
    assert main([*words(folder, "whole"), "--overwrite"]) == 0  # from the last training states
    after = contents(whole.out)
    assert before.keys() == after.keys() and before["manifest"] == after["manifest"]
    record = folder / "whole.run" / "run.json"
    kept = record.read_text()
    for name in (record, whole.out / "flux_jax.json"):
        text = name.read_text()
        name.write_text(text.replace('"block_steps": 4', '"block_steps": 5'))
        assert main(words(folder, "whole")) == 2
        assert f"{whole.out} exists already" in capsys.readouterr().err
        name.write_text(text)
    record.unlink()
    assert main(words(folder, "whole")) == 2
    assert f"{whole.out} exists already" in capsys.readouterr().err
    record.write_text(kept)


class Distillation:
    """A whole one, of the teacher in a folder that the environment names."""

    @staticmethod
    def work(folder: Path) -> None:
        Metrics.plot = lambda self: None  # takes longer than the training
        assert main(words(Path(os.environ["TINY_TEACHER"]), str(folder / "out"))) == 0

    @staticmethod
    def whole(folder: Path) -> str:
        if not (folder / "out").exists():
            return "nothing"
        same_checkpoint(Path(os.environ["TINY_TEACHER"]) / "whole", folder / "out")
        return "new"


@pytest.mark.slow
@pytest.mark.skipif("CRASH_WINDOWS_EVERY" not in os.environ, reason="minutes: CRASH_WINDOWS_EVERY=97 runs it")
def test_killed_at_steps_from_beginning_to_end_it_ends_with_the_same_bits(folder, whole, tmp_path, monkeypatch):
    monkeypatch.setenv("TINY_TEACHER", str(folder))
    assert crash_windows.survive(__file__, "Distillation", tmp_path, every=260, timeout=1500) >= 260


def test_teachers_prompts_and_folders_that_will_not_do(folder, tmp_path, monkeypatch):
    run = tmp_path / "run"
    refused(folder, run, ["a red circle"] * 5, "1 different")
    apart = [p for p in tiny.PROMPTS if held_out(p)]
    refused(folder, run, apart, "left for training")
    refused(folder, run, [p for p in tiny.PROMPTS if p not in apart], "held out")
    refused(folder, run, tiny.PROMPTS, "no checkpoint", teacher=tmp_path / "nowhere")
    made = tiny.config()
    ternary = tmp_path / "ternary"
    modules = {"transformer": tiny.tiny_model.quantized(tiny.tiny_model.modules(made)["transformer"])}
    about = {"layout": 1, "method": "least-squares", "distilled": False, "activations": "bf16"}
    writer.save(ternary, made, modules, quantization=about)
    refused(folder, run, tiny.PROMPTS, "ternary already", teacher=ternary)
    (tmp_path / "file").write_text("")
    refused(folder, tmp_path / "file" / "run", tiny.PROMPTS, "Cannot write")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("")
    refused(folder, tmp_path / "other", tiny.PROMPTS, "no folder of a distillation")
    refused(folder, run, tiny.PROMPTS, "GB more than its disk has free", trajectories=10**9)
    assert not run.exists()
    prepare(folder / "teacher", run, tiny.PROMPTS, tiny.OPTIONS, None).begin()
    refused(folder, run, tiny.PROMPTS, 'begun with seed="0":', seed=1)
    refused(folder, run, tiny.PROMPTS[1:], "another prompts")
    prepare(folder / "teacher", run, tiny.PROMPTS, dataclasses.replace(tiny.OPTIONS, save_every=3), None).begin()


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

    monkeypatch.setattr("flux_jax.distill.run.distill", fail)
    assert main(words(folder, "none")) == code
    printed = capsys.readouterr().err.strip()
    assert says in printed and "\n" not in printed


def test_cores_divide_every_batch():
    assert [usable_cores(n, [64, 32]) for n in (1, 2, 3, 7, 96)] == [1, 2, 2, 4, 32]
    assert usable_cores(4, [6, 4]) == 2
