"""Phase `blockwise`: one block after the other becomes ternary, and corrects what the ternary blocks before it did.

In: points of the teacher's trajectories. Out: `FOLDER/blockwise/<block>`, the student's arrays of each block. For
block k, hidden states x [p, t + i, d] (text first) of p points lie on disk twice: as they reach block k in the teacher,
and as they reach it in the student, whose blocks before k are ternary already. Student block k learns, from the
student's states, what the teacher's block gives from the teacher's. Only one block's weights and optimiser state are in
memory at a time.

The loss is the squared error over the energy of what the teacher's block adds, |y_s - y_t|^2 / |y_t - x_t|^2, for text
and image each; it means the same at every depth. Behind the last block only the image counts: its text goes nowhere.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jaxtyping import Array, Float

from flux_jax.distill import memmap_store, student
from flux_jax.distill.run_context import RunContext
from flux_jax.distill.training import FitConfig, fit
from flux_jax.distill.trajectories import Trajectories
from flux_jax.models.blocks import DoubleStreamBlock, SingleStreamBlock
from flux_jax.models.params import dotted
from flux_jax.models.transformer import Transformer
from flux_jax.training import mesh as meshes

MODELS = ("teacher", "student")


def apply(
    block: nnx.Module, text_tokens: int, x: Float[Array, "b n d"], vec: Float[Array, "b d"], rope: Float[Array, "2 n r"]
) -> Float[Array, "b n d"]:
    """One block of either kind, modulation included; vec is what every modulation linear gets."""
    if isinstance(block, DoubleStreamBlock):
        txt, img = x[:, :text_tokens], x[:, text_tokens:]
        img, txt = block(img, txt, block.img.mod(vec), block.txt.mod(vec), rope)
        return jnp.concatenate([txt, img], axis=1)
    assert isinstance(block, SingleStreamBlock)
    return block(x, block.mod(vec), rope)


def in_dtype(params: Any, dtype: Any) -> Any:
    """Floats that stay in the dtype of activations; shadows and scales are the layer's own matter."""

    def cast(path, x):
        return x if path[-1].key in ("shadow", "log_scale") else x.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


@dataclasses.dataclass(frozen=True)
class BlockLoss:
    """See the module's docstring. Equal for all blocks of a kind, which so share one program."""

    graph: Any
    text_tokens: int
    image_only: bool
    dtype: Any

    def __call__(self, params: Any, batch: dict, rope: Any) -> Float[Array, ""]:
        block = nnx.merge(self.graph, in_dtype(params, self.dtype))
        y = apply(block, self.text_tokens, batch["student"], batch["vec"], rope)
        y, target, before = (a.astype(jnp.float32) for a in (y, batch["target"], batch["teacher"]))
        text, image = slice(None, self.text_tokens), slice(self.text_tokens, None)
        terms = [
            jnp.square(y[:, rows] - target[:, rows]).mean() / jnp.square(target[:, rows] - before[:, rows]).mean()
            for rows in ((image,) if self.image_only else (text, image))
        ]
        return sum(terms[1:], terms[0]) / len(terms)


@functools.partial(jax.jit, static_argnames="text_tokens")
def forward(block: nnx.Module, text_tokens: int, x, vec, rope):
    return apply(block, text_tokens, x, vec, rope)


@functools.partial(jax.jit, static_argnames=("graph", "text_tokens", "dtype"))
def forward_student(graph, text_tokens: int, dtype, params: Any, x, vec, rope):
    return apply(nnx.merge(graph, in_dtype(params, dtype)), text_tokens, x, vec, rope)


@jax.jit
def enter(transformer: Transformer, x, t, guidance, text, pooled):
    """Points -> hidden states [b, t + i, d] in front of the first block, and vec [b, d]."""
    vec = transformer.vector(t, jnp.full(t.shape, guidance), pooled)
    return jnp.concatenate([transformer.txt_in(text), transformer.img_in(x)], axis=1), vec


class Blockwise:
    """The phase, in a run's folder:

        result(block)      the student's arrays of a block, once it has learned
        states("teacher", k), states("student", k)      hidden states in front of block k, and of no other block
        vectors            what every modulation linear gets, the same for all blocks

    Each of these is there whole or not at all, and what is there is not made again: that is all that a killed run
    needs to go on.
    """

    def __init__(self, work: RunContext, trajectories: Trajectories):
        self.work, self.trajectories, self.options = work, trajectories, work.options
        self.folder = work.folder / "blockwise"
        self.rope = work.rope.astype(jnp.float32)

    def result(self, block: str) -> Path:
        return self.folder / block

    def states(self, who: str, index: int) -> Path:
        """The store of hidden states in front of block `index`; who: one of MODELS."""
        return self.folder / "states" / f"{who}.{index}"

    @property
    def vectors(self) -> Path:
        return self.folder / "states" / "vectors"

    def run(self) -> None:
        """Does what is not done yet."""
        blocks = self.work.blocks
        if not all(self.result(block).exists() for block in blocks):
            for k in range(self._first(), len(blocks)):
                last = k == len(blocks) - 1
                self._propagate_teacher(k)
                graph = self._train_block(k, last)
                if not last:
                    self._propagate_student(k, graph)
                for who in MODELS:
                    memmap_store.remove(self.states(who, k))
        for folder in ("training", "states"):
            memmap_store.remove(self.folder / folder)

    def _first(self) -> int:
        """The block to begin or go on with: the last whose states are there in both models. Those of block k go when
        the ones in front of k + 1 are complete: after a kill in between, both pairs are there, and k is done."""
        blocks = range(len(self.work.blocks))
        begun = [k for k in blocks if all(self.states(who, k).exists() for who in MODELS)]
        if begun and self.vectors.exists():
            return max(begun)
        self._enter()
        return 0

    def _chunks(self):
        size = self.options.block_batch
        return [slice(i, i + size) for i in range(0, self.options.block_points, size)]

    def _layout(self, width: int) -> tuple[tuple[int, ...], Any]:
        return (self.options.block_points, width, self.work.config.transformer.hidden_size), self.work.dtype

    def _put(self, rows: np.ndarray) -> jax.Array:
        """Rows as a batch of the full size; the last ones are filled up with copies of the last."""
        lacking = self.options.block_batch - len(rows)
        filled = np.concatenate([rows, np.repeat(rows[-1:], lacking, 0)]) if lacking else rows
        return meshes.put(filled, meshes.by_row(self.work.mesh))

    def _enter(self) -> None:
        work, count = self.work, self.options.block_points
        transformer = work.load_teacher()
        tokens = work.grid[0] * work.grid[1] + work.text_tokens
        shape, dtype = self._layout(1)
        stores = [(self.vectors, {"vec": ((shape[0], shape[2]), dtype)})]
        stores += [(self.states(who, 0), {"x": self._layout(tokens)}) for who in MODELS]
        rows, steps = self.trajectories.draw(self.options.seed, 0, 0, count, None)
        guidance = meshes.put(np.float32(work.guidance), meshes.whole(work.mesh))
        with contextlib.ExitStack() as held:
            vectors, *writers = [held.enter_context(memmap_store.StoreWriter(*store)) for store in stores]
            for part in self._chunks():
                points = self.trajectories.points(rows[part], steps[part])
                x, text, pooled = (self._put(points[name].astype(work.dtype)) for name in ("x", "text", "pooled"))
                states, vec = meshes.fetch(enter(transformer, x, self._put(points["t"]), guidance, text, pooled))
                taken = len(points["t"])
                for writer in writers:
                    writer.write(part.start, {"x": states[:taken]})
                vectors.write(part.start, {"vec": vec[:taken]})
            for writer in (vectors, *writers):
                writer.finish()

    def _states(self, who: str, index: int) -> np.memmap:
        return memmap_store.open_store(self.states(who, index), "x")["x"]

    def _vectors(self) -> np.memmap:
        return memmap_store.open_store(self.vectors, "vec")["vec"]

    def _propagate(self, who: str, index: int, block: Callable[[Any, Any, Any], jax.Array]) -> None:
        """States in front of block index + 1: block(x, vec, rope) of those in front of block `index`."""
        if self.states(who, index + 1).exists():
            return
        x, vec = self._states(who, index), self._vectors()
        with memmap_store.StoreWriter(self.states(who, index + 1), {"x": (x.shape, x.dtype)}) as writer:
            for part in self._chunks():
                y = meshes.fetch(block(self._put(x[part]), self._put(vec[part]), self.rope))
                writer.write(part.start, {"x": y[: len(x[part])]})
            writer.finish()

    def _propagate_teacher(self, k: int) -> None:
        block = self.work.load_block(self.work.blocks[k], self.work.dtype)
        self._propagate("teacher", k, functools.partial(forward, block, self.work.text_tokens))

    def _propagate_student(self, k: int, graph: Any) -> None:
        work, learned = self.work, memmap_store.open_store(self.result(self.work.blocks[k]))
        params = traverse_util.unflatten_dict(learned, sep=".")
        params = meshes.put(params, lambda shape: meshes.parameter(work.mesh, shape))
        block = functools.partial(forward_student, graph, work.text_tokens, work.dtype, params)
        self._propagate("student", k, block)

    def _train_block(self, k: int, last: bool) -> Any:
        """Student block k learns, unless its result is there; returns the block's graph."""
        work, name, options = self.work, self.work.blocks[k], self.options
        inputs = {
            "student": self._states("student", k),
            "teacher": self._states("teacher", k),
            "target": self._states("teacher", k + 1),
            "vec": self._vectors(),
        }

        def batch(step: int, mean: Any = None) -> dict[str, np.ndarray]:
            rng = np.random.default_rng((options.seed, 1 + k, step))
            rows = rng.integers(0, options.block_points, options.block_batch)
            return {key: np.asarray(value[rows]) for key, value in inputs.items()}

        graph, state = nnx.split(self._start(name, batch(0)))
        training = self.folder / "training"
        if not self.result(name).exists():
            own = {"steps": options.block_steps, "learning_rate": options.block_learning_rate, "accumulate": 1}
            plan = FitConfig.of(options, seed=options.seed + k, **own)
            trainer = work.trainer(training / name, f"blockwise {name}")
            loss = BlockLoss(graph, work.text_tokens, last, work.dtype)
            mean = meshes.fetch(fit(trainer, plan, work.mesh, loss, nnx.to_pure_dict(state), batch, self.rope))
            flat = {dotted(path): np.asarray(x) for path, x in nnx.to_flat_state(nnx.State(mean))}
            memmap_store.save(self.result(name), flat)
        memmap_store.remove(training)
        return graph

    def _start(self, name: str, batch: dict[str, np.ndarray]) -> nnx.Module:
        """The student's block before its first step: rounded, with the inputs' second moments where asked for."""
        prefix = name.split(".")[0] + "."
        moments = None
        if self.options.weighted and self.options.method == "least-squares":
            x, vec = self._put(batch["student"]), self._put(batch["vec"])
            probed = _probed(self.work.load_block(name, self.work.dtype), prefix, self.options)
            moments = measure(probed, self.work.text_tokens, x, vec, self.rope)
        block = self.work.load_block(name, jnp.float32)
        return student.student_of(block, prefix, self.options, moments, meshes.by_row(self.work.mesh))


def _probed(block: nnx.Module, prefix: str, options) -> nnx.Module:
    return student.replace_linears_in_place(block, prefix, options, lambda _, linear: student.Probe(linear))


@functools.partial(jax.jit, static_argnames="text_tokens")
def measure(probed: nnx.Module, text_tokens: int, x, vec, rope) -> dict[str, Array]:
    """Mean square of each input of each linear that carries a probe, by path."""
    apply(probed, text_tokens, x, vec, rope)
    kind = "double_blocks." if isinstance(probed, DoubleStreamBlock) else "single_blocks."
    return {
        kind + dotted(path): node.moment[...]
        for path, node in nnx.iter_modules(probed)
        if isinstance(node, student.Probe)
    }
