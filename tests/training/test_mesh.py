"""Several devices: the losses are one device's, to the noise of float32; parameters are cut."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tiny_distillation as tiny

from flux_jax.errors import UserError
from flux_jax.training import mesh as meshes

pytestmark = pytest.mark.usefixtures("hasty_compiler")
EIGHT = """
import json, sys, pathlib
import jax, numpy as np
from jax.sharding import AxisType
from flux_jax.distill import end_to_end, run
from flux_jax.distill.trajectories import load_or_make
from flux_jax.training import mesh as meshes
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
    graph, params = end_to_end.build(work, end_to_end.read_rounded)
    mean = end_to_end.train(work, graph, params, trajectories, [])
    leaf = mean["single_blocks"]["linear1"]["shadow"]
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    found[name] = {
        "losses": [row["loss"] for row in rows],
        "devices": len(leaf.sharding.device_set),
        "share": leaf.addressable_shards[0].data.size / leaf.size,
        "sum": float(np.abs(np.asarray(leaf)).sum()),
    }
print(json.dumps(found))
"""


@pytest.mark.slow
def test_eight_devices_have_one_devices_losses(tmp_path):
    tiny.teacher(tmp_path)
    command = [sys.executable, "-c", EIGHT, str(tmp_path)]
    done = subprocess.run(command, env=tiny.environment(8), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    one = found.pop("one")
    assert len(one["losses"]) == 6 + tiny.OPTIONS.settle_steps and one["losses"][-1] < one["losses"][0]
    several = found["several"]
    assert several["devices"] == 8 and several["share"] == 1 / 4
    np.testing.assert_allclose(several["losses"], one["losses"], rtol=1e-4)
    np.testing.assert_allclose(several["losses"][0], one["losses"][0], rtol=1e-5)
    assert several["sum"] == pytest.approx(one["sum"], rel=1e-3)


def test_parameters_are_cut_along_the_largest_axis_that_divides():
    cut = {(8, 12): 1, (12, 12): 1, (16, 12): 0, (6, 12): 1, (6, 10): None, (7,): None, (): None, (3, 16, 5): 1}
    assert {shape: meshes.axis_to_cut(4, shape) for shape in cut} == cut
    assert meshes.axis_to_cut(1, (8, 8)) is None


@pytest.mark.parametrize("words", ["data=2,fsdp", "gpu=2", "data=0", "fsdp=-1"])
def test_a_mesh_is_named_by_its_axes(words):
    with pytest.raises(UserError, match="must read"):
        meshes.make(words, {})
