"""Seconds that an operation takes on the device, free of what the host does between two launches.

In: cases, each an operation (x, weights, out) -> new out with its operands. Out: a row for each in the journal: seconds
of one call, sample by sample, or why there are none. A program runs the operation some times in a loop on the device,
over several copies of the weights in turn: their sum is larger than any cache where bytes are what counts, so that
every call finds its weights in memory, as a layer among many does. It is launched again before it ends. A copy's output
lies where its last one lay, so that an operation that writes in the place of an operand, as a product does to the
residual that it adds to, needs no copy.
"""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bench import report
from bench.journal import Journal
from flux_jax.errors import UserError
from flux_jax.models.params import nbytes
from pallas_kernels import Target, compiling_for

SAMPLE_SECONDS = 0.03  # the host's part, of some 0.1 ms, is lost in it
ROUNDS = 16  # of a program: it runs for longer than the host takes to launch the next one
SAMPLES = 7
BATCH = 16  # programs that are compiled before any of them is measured
LEAST_SECONDS = 2.0  # without which a case is not begun
CACHE_BYTES = 2**28  # more than any L2 cache; the copies of the weights take at least as much
MOST_COPIES, LEAST_COPIES = 64, 2
FEW, SOME = 64, 512  # tokens up to which bytes count, and up to which they count a little


class Ran(NamedTuple):
    """What came of a case. operands: as the first call found them; out: what so many calls made of it; seconds: of a
    call."""

    operands: tuple[Any, Any, Any]
    out: Any
    calls: int
    seconds: float


class Case(NamedTuple):
    """An operation to time.

    labels: what its row says of it. operation: (x, weights, out) -> new out, of any trees of arrays. operands: makes x,
    weights and the first out on the device, when the case's turn comes; None for out are zeros. figures: what else the
    row says. copies: of the weights, None flushes the cache.
    """

    labels: dict[str, Any]
    operation: Callable[[Any, Any, Any], Any]
    operands: Callable[[], tuple[Any, Any, Any]]
    figures: Callable[[Ran], dict[str, Any]] = lambda _: {}
    copies: int | None = None

    def start(self) -> tuple[Any, Any, Any]:
        """x, weights and out as the loop finds them."""
        x, weights, out = self.operands()
        if out is None:
            out = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(self.operation, x, weights, None))
        return x, weights, out


@contextlib.contextmanager
def device_for(tiny: bool) -> Iterator[None]:
    """The GPU; with `tiny` any device, on which the kernels are interpreted if it is not a GPU."""
    with contextlib.nullcontext() if report.has_gpu(tiny) else compiling_for(Target("interpret", "9.0")):
        yield


def copies_for(m: int) -> int | None:
    """How many copies of the weights a product of m tokens needs to be timed as in a model: with many tokens its time
    is that of its arithmetic, and few will do."""
    return None if m <= FEW else 8 if m <= SOME else 3


def copies(tree: Any, count: int) -> list[Any]:
    """The arrays, and further ones of the same contents: `count` in all."""
    return [tree, *(jax.tree.map(jnp.copy, tree) for _ in range(count - 1))]


def loop(operation: Callable[[Any, Any, Any], Any], rounds: int) -> Any:
    """A jitted program (x, [weights of each copy], [out of each copy]) -> last outs, in the place of the first, which
    runs all copies `rounds` times in turn. Their number is known when it is compiled, or the device would ask the host
    after each round whether to go on."""
    once = jax.jit(lambda *args: operation(*args))  # traced for the first copy alone

    @functools.partial(jax.jit, donate_argnums=2)
    def program(x: Any, copies: Sequence[Any], outs: Sequence[Any]) -> list[Any]:
        def body(_, carry):
            x, outs = carry
            for i, weights in enumerate(copies):
                # The barrier makes a call depend on what came before: nothing can be left out, merged or moved. Vectors
                # stay outside, or XLA would not add a bias within the product.
                leaves, tree = jax.tree.flatten(weights)
                held = [leaf for leaf in leaves if leaf.ndim > 1]
                x, held, outs = jax.lax.optimization_barrier((x, held, outs))
                own = [held.pop(0) if leaf.ndim > 1 else leaf for leaf in leaves]
                outs = [*outs[:i], once(x, tree.unflatten(own), outs[i]), *outs[i + 1 :]]
            return x, outs

        return jax.lax.fori_loop(0, rounds, body, (x, list(outs)))[1]

    return program


def run(cases: Sequence[Case], journal: Journal, *, tiny: bool, samples: int = SAMPLES) -> list[dict[str, Any]]:
    """Compiles a batch of cases, several at a time, then measures them one by one, and so on; a row for each, whatever
    becomes of it. tiny: one call of each, on any device."""
    rows = []
    for start in range(0, len(cases), BATCH):
        batch = cases[start : start + BATCH]
        for case, program in zip(batch, compile_all(batch, journal, tiny=tiny), strict=True):

            def job(case=case, program=program) -> dict[str, Any]:
                return measure(case, program.result(), tiny=tiny, samples=samples)

            rows.append(journal.attempt(case.labels, job, LEAST_SECONDS))
    return rows


def compile_all(cases: Sequence[Case], journal: Journal, *, tiny: bool) -> list[Future]:
    """Each case's program, or what it raised. Traced here, one by one, for that is Python's work and `compiling_for`
    does not reach other threads; compiled side by side, for XLA needs no lock of Python's."""
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) * 3 // 4)) as pool:
        found = []
        for case in cases:
            try:
                if journal.left() < LEAST_SECONDS:
                    raise TimeoutError("too little time was left")
                found.append(pool.submit(lower(case, tiny=tiny).compile))
            except Exception as error:  # whatever it is: the case's row says it, and the others go on
                found.append(Future())
                found[-1].set_exception(error)
    return found


def lower(case: Case, *, tiny: bool) -> Any:
    """The case's loop, traced from the shapes of its operands alone."""
    x, weights, out = jax.eval_shape(case.start)
    count = copy_count(case, weights, tiny)
    return loop(case.operation, 1 if tiny else ROUNDS).lower(x, [weights] * count, [out] * count)


def copy_count(case: Case, weights: Any, tiny: bool) -> int:
    flushing = min(MOST_COPIES, max(LEAST_COPIES, -(-CACHE_BYTES // max(1, nbytes(weights)))))
    return 1 if tiny else case.copies or flushing


def measure(case: Case, program: Any, *, tiny: bool, samples: int) -> dict[str, Any]:
    """Runs a case's program: `summary`, and the case's own figures."""
    launch, calls, operands = ready(case, program, tiny=tiny)
    out = jax.tree.map(jnp.copy, launch(1)[0])  # in whose place the next launch writes
    launches = 1 if tiny else launches_for(lambda launches: clock(lambda: launch(launches)))
    seconds = [clock(lambda: launch(launches)) / (launches * calls) for _ in range(1 if tiny else samples)]
    found = summary(seconds)
    rounds = 1 if tiny else ROUNDS
    return found | case.figures(Ran(operands, out, rounds, found["seconds"]))


def ready(case: Case, program: Any, *, tiny: bool) -> tuple[Callable[[int], list[Any]], int, tuple[Any, Any, Any]]:
    """What launches a case's program so many times and waits for its outs, the calls of a launch, and the operands."""
    x, weights, out = operands = case.start()
    count = copy_count(case, weights, tiny)
    sets, outs = copies(weights, count), copies(out, count + 1)[1:]  # the first one is for the case's figures

    def launch(launches: int) -> list[Any]:
        nonlocal outs
        for _ in range(launches):
            outs = program(x, sets, outs)
        return jax.block_until_ready(outs)

    return launch, count * (1 if tiny else ROUNDS), operands


def clock(call: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def launches_for(seconds_of: Callable[[int], float]) -> int:
    """How many launches last about SAMPLE_SECONDS, found by trying more and more: the first one is slow, and a short
    one is mostly the host's part."""
    launches = 1
    while (seconds := seconds_of(launches)) < SAMPLE_SECONDS / 2:
        launches *= max(2, min(20, round(SAMPLE_SECONDS / seconds)))
    return launches


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """Median, the half of the samples around it, and all of them (microseconds, in the order measured)."""
    low, middle, high = np.percentile(seconds, [25, 50, 75])
    return {
        "seconds": float(middle),
        "quartiles": [float(low), float(high)],
        "samples_us": [round(s * 1e6, 3) for s in seconds],
    }


def cells(row: dict[str, Any]) -> list[Any]:
    """For a table: microseconds and their quartiles, or why there are none."""
    if "seconds" not in row:
        return [None, missing(row)]
    low, high = (f"{q * 1e6:.1f}" for q in row["quartiles"])
    return [f"{row['seconds'] * 1e6:.1f}", f"{low}..{high}"]


def missing(row: dict[str, Any]) -> str:
    """Why a row has no times."""
    return row.get("failure") or f"skipped: {row['skipped']}"


def wrong(rows: Sequence[dict[str, Any]]) -> int:
    """How many results were not right."""
    return sum(not row.get("correct", True) for row in rows)


def refuse_wrong(rows: Sequence[dict[str, Any]]) -> None:
    """UserError, with status 1, where a result was not right."""
    if count := wrong(rows):
        raise UserError(f"{count} results were wrong: see the column error", 1)
