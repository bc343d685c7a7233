"""Several devices, several processes: the losses are one device's, to the noise of float32; parameters are cut."""

import json
import socket
import subprocess
import sys

import numpy as np
import pytest
import tiny_distillation as tiny

from flux_jax.distill import mesh as meshes
from flux_jax.errors import UserError

EIGHT = """
import json, sys, pathlib
import jax, numpy as np
from jax.sharding import AxisType
from flux_jax.distill import mesh as meshes, run
from flux_jax.distill import end_to_end
from flux_jax.distill.trajectories import load_or_make
import dataclasses, tiny_distillation as tiny

folder, found = pathlib.Path(sys.argv[1]), {}
own = dict(batch=8, block_batch=8, phases="end_to_end", learning_steps=6, log_every=1, ema=0.5)
options = dataclasses.replace(tiny.OPTIONS, **own)
for name, shape in {"one": (1, 1), "several": (2, 4)}.items():
    count = shape[0] * shape[1]
    made = lambda *_: jax.make_mesh(shape, meshes.AXES, axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:count])
    meshes.make = made
    work = run.prepare(folder / "teacher", folder / name, tiny.PROMPTS, options, None)
    trajectories = load_or_make(work, "trajectories", work.training, options.trajectories)
    graph, params = end_to_end.build(work, end_to_end.rounded(work))
    mean = end_to_end.train(work, graph, params, trajectories, [])
    leaf = mean["single_blocks"]["linear1"]["latent"]
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    found[name] = {
        "losses": [row["loss"] for row in rows],
        "devices": len(leaf.sharding.device_set),
        "share": leaf.addressable_shards[0].data.size / leaf.size,
        "sum": float(np.abs(np.asarray(leaf)).sum()),
    }
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mesh")
    tiny.teacher(folder)
    tiny.prompts_file(folder)
    return folder


def test_eight_devices_have_one_devices_losses(folder):
    environment = tiny.environment(8)
    environment["PYTHONPATH"] += f":{tiny.ROOT / 'tests'}"
    done = subprocess.run(
        [sys.executable, "-c", EIGHT, str(folder)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    one = found.pop("one")
    assert len(one["losses"]) == 6 and one["losses"][-1] < one["losses"][0]
    several = found["several"]
    assert several["devices"] == 8 and several["share"] == 1 / 4
    np.testing.assert_allclose(several["losses"], one["losses"], rtol=1e-4)
    np.testing.assert_allclose(several["losses"][0], one["losses"][0], rtol=1e-5)
    assert several["sum"] == pytest.approx(one["sum"], rel=1e-3)


def losses(out):
    rows = [json.loads(line) for line in (out / "training" / "metrics.jsonl").read_text().splitlines()]
    return {(row["phase"], row["step"]): row["loss"] for row in rows}


def test_two_processes_learn_what_one_learns_and_one_writes_it(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    words = [str(folder / "teacher"), "--prompts", str(folder / "prompts.txt"), *tiny.flags(tiny.OPTIONS)]
    alone = tiny.run([*words, str(folder / "alone")])
    assert alone.returncode == 0, alone.stderr
    several = [*words, str(folder / "pair"), "--mesh", "fsdp=2", "--coordinator", address, "--processes", "2"]
    command = [sys.executable, "-m", "flux_jax.distill", *several, "--process"]
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
    written = tiny.run([*words, str(folder / "pair")])
    assert written.returncode == 0, written.stderr
    one, two = losses(folder / "alone"), losses(folder / "pair")
    assert one.keys() == two.keys()
    np.testing.assert_allclose([two[line] for line in one], list(one.values()), rtol=5e-3)


def test_parameters_are_cut_along_the_largest_axis_that_divides():
    cut = {(8, 12): 1, (12, 12): 1, (16, 12): 0, (6, 12): 1, (6, 10): None, (7,): None, (): None, (3, 16, 5): 1}
    assert {shape: meshes.axis_to_cut(4, shape) for shape in cut} == cut
    assert meshes.axis_to_cut(1, (8, 8)) is None


@pytest.mark.parametrize("words", ["data=2,fsdp", "gpu=2", "data=0", "fsdp=-1"])
def test_a_mesh_is_named_by_its_axes(words):
    with pytest.raises(UserError, match="must read"):
        meshes.make(words, {})
