"""A run's stores of arrays: whole or not there, killed between any two steps; what is damaged is one sentence."""

import errno
import json
from pathlib import Path
from types import SimpleNamespace

import crash_windows
import jax
import ml_dtypes
import numpy as np
import pytest

from flux_jax.distill import blockwise, memmap_store
from flux_jax.errors import UserError
from flux_jax.io import locks
from flux_jax.training import mesh

ARRAYS = {
    "x": np.arange(24, dtype=np.float16).reshape(4, 2, 3),
    "vec": np.linspace(-1, 1, 5).astype(ml_dtypes.bfloat16),
}


def same(folder: Path, arrays=ARRAYS) -> None:
    found = memmap_store.open_store(folder)
    assert found.keys() == arrays.keys()
    for name, value in arrays.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)


def test_rows_come_back_as_they_were_written(tmp_path):
    memmap_store.save(tmp_path / "whole", ARRAYS)
    same(tmp_path / "whole")
    layout = {name: (value.shape, value.dtype) for name, value in ARRAYS.items()}
    with memmap_store.StoreWriter(tmp_path / "parts", layout) as writer:
        for rows in (slice(2, 4), slice(0, 2)):
            writer.write(rows.start, {"x": ARRAYS["x"][rows]})
        writer.write(0, {"vec": ARRAYS["vec"].astype(np.float32)})
        writer.finish()
    same(tmp_path / "parts")
    memmap_store.save(tmp_path / "parts", {"x": ARRAYS["x"] + 1})
    same(tmp_path / "parts", {"x": ARRAYS["x"] + 1})  # written again where another store was lost


def test_what_fails_in_the_middle_leaves_nothing_and_no_lock(tmp_path):
    with pytest.raises(ZeroDivisionError), memmap_store.StoreWriter(tmp_path / "store", {"x": ((4,), "float32")}):
        1 / 0  # noqa: B018
    assert not list(tmp_path.iterdir())
    memmap_store.save(tmp_path / "store", ARRAYS)


def test_a_full_disk_is_a_sentence(tmp_path):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def fill():
        with memmap_store.StoreWriter(tmp_path / "store", {"x": ((4,), "float32")}) as writer:
            writer._files["x"] = SimpleNamespace(seek=lambda _: None, write=full)
            writer.write(0, {"x": np.zeros(4, np.float32)})

    with pytest.raises(UserError, match="disk is full"):
        fill()
    assert not list(tmp_path.iterdir())


def table(change):
    def damage(folder: Path) -> None:
        path = folder / memmap_store.TABLE
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return damage


DAMAGE = {
    "a short file": lambda folder: (folder / "x.bin").write_bytes(b"\0" * 47),
    "a long file": lambda folder: (folder / "x.bin").write_bytes(b"\0" * 49),
    "a missing file": lambda folder: (folder / "x.bin").unlink(),
    "no table": lambda folder: (folder / memmap_store.TABLE).unlink(),
    "half a table": lambda folder: (folder / memmap_store.TABLE).write_text('{"x": [[4,'),
    "a table of another kind": table(lambda _: []),
    "an entry of another kind": table(lambda found: found | {"x": 3}),
    "a type that is none": table(lambda found: found | {"x": [[4, 2, 3], "float17"]}),
    "a type that is no number": table(lambda found: found | {"x": [[4, 2, 3], "object"]}),
    "half a row": table(lambda found: found | {"x": [[4, 2, 3.5], "float16"]}),
    "fewer than no rows": table(lambda found: found | {"x": [[-4, -2, 3], "float16"]}),
    "more rows than a file can have": table(lambda found: found | {"x": [[10**30], "float16"]}),
    "another array": table(lambda found: {"vec": found["vec"]}),
    "a file elsewhere": table(lambda found: {"../x": [[4, 2, 3], "float16"]}),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_store_is_a_sentence_that_says_what_to_delete(case, tmp_path):
    memmap_store.save(folder := tmp_path / "store", ARRAYS)
    (tmp_path / "x.bin").write_bytes(b"\0" * 48)
    DAMAGE[case](folder)
    with pytest.raises(UserError, match=f"{folder}.*delete its folder, and the same call makes it again"):
        memmap_store.open_store(folder, "x")


def alone() -> None:
    """One process, without starting JAX to ask."""
    jax.process_index, jax.process_count = lambda: 0, lambda: 1


class Stores:
    """One that is written where there was none, and then one that goes."""

    @staticmethod
    def before(folder: Path) -> None:
        alone()
        memmap_store.save(folder / "gone", ARRAYS)

    @staticmethod
    def work(folder: Path) -> None:
        alone()
        memmap_store.save(folder / "deep" / "store", ARRAYS)
        memmap_store.remove(folder / "gone")

    @staticmethod
    def whole(folder: Path) -> str:
        there = [store for store in (folder / "gone", folder / "deep" / "store") if store.exists()]
        for store in there:
            same(store)
        return "new" if [store.name for store in there] == ["store"] else "nothing"


class States:
    """All stores of phase `blockwise`, with blocks that add their number: what is in front of a block, what it learned,
    its training."""

    BLOCKS = ("double_blocks.0", "single_blocks.0", "single_blocks.1")
    POINTS, WIDTH, SIZE = 6, 2, 3

    @staticmethod
    def work(folder: Path) -> None:
        alone()
        locks.sweep(folder)
        trajectories = SimpleNamespace(
            draw=lambda *_: (np.arange(States.POINTS), np.zeros(States.POINTS, int)),
            points=lambda rows, steps: dict.fromkeys(("x", "text", "pooled", "t"), rows.astype(np.float32)),
        )
        options = SimpleNamespace(block_points=States.POINTS, block_batch=4, seed=0)
        transformer = SimpleNamespace(hidden_size=States.SIZE)
        work = SimpleNamespace(
            folder=folder, blocks=States.BLOCKS, options=options, grid=(1, 1), text_tokens=1, dtype=np.float32,
            guidance=1.0, mesh=None, rope=np.zeros(1), config=SimpleNamespace(transformer=transformer),
            load_teacher=lambda: None, load_block=lambda name, dtype: States.BLOCKS.index(name),
        )  # fmt: skip
        mesh.put, mesh.whole, mesh.fetch = lambda tree, _: tree, lambda _: None, lambda tree: tree
        blockwise.enter = lambda _, x, *rest: (
            np.broadcast_to(x[:, None, None], (len(x), States.WIDTH, States.SIZE)),
            np.broadcast_to(x[:, None], (len(x), States.SIZE)),
        )
        blockwise.forward = lambda block, _, x, vec, rope: x + block
        blockwise.jnp = SimpleNamespace(float32=np.float32)
        phase = Counting(work, trajectories)
        phase.run()

    @staticmethod
    def whole(folder: Path) -> str:
        """What a block learned is the sum of all that reached it, so that no block was passed over or done twice."""
        done = 0
        for number, name in enumerate(States.BLOCKS):
            if (result := folder / "blockwise" / name).exists():
                before = sum(range(number))
                teacher, student = States.POINTS * before + 15, States.POINTS * 2 * before + 15
                same(result, {"learned": np.float32([teacher, student])})
                done += 1
        if done < len(States.BLOCKS) or (folder / "blockwise" / "states").exists():
            return "nothing"
        return "nothing" if (folder / "blockwise" / "training").exists() else "new"


class Counting(blockwise.Blockwise):
    """Whose student adds twice what the teacher adds."""

    def __init__(self, work, trajectories):
        self.work, self.trajectories, self.options = work, trajectories, work.options
        self.folder, self.rope = work.folder / "blockwise", None

    def _put(self, rows):
        return rows

    def _train_block(self, k, last):
        name = self.work.blocks[k]
        if not self.result(name).exists():
            (self.folder / "training" / name).mkdir(parents=True, exist_ok=True)
            reached = [memmap_store.open_store(self.states(who, k))["x"][:, 0, 0].sum() for who in blockwise.MODELS]
            memmap_store.open_store(self.states("teacher", k + 1))
            memmap_store.save(self.result(name), {"learned": np.float32(reached)})
        memmap_store.remove(self.folder / "training")
        return k

    def _propagate_student(self, k, graph):
        self._propagate("student", k, lambda x, vec, rope: x + 2 * graph)


def test_a_store_is_killed_between_any_two_steps(tmp_path):
    assert crash_windows.survive(__file__, "Stores", tmp_path) >= 16


@pytest.mark.slow
def test_killed_between_any_two_steps_no_block_is_lost_or_done_twice(tmp_path):
    assert crash_windows.survive(__file__, "States", tmp_path, every=4) >= 150
