"""The loop that is timed, and the one way to measure many programs: whatever becomes of one costs its own row alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import journal, timing
from bench.journal import Journal
from bench.timing import Case


def case(name, operation=lambda x, weights, out: x + weights, figures=lambda *_: {"correct": True}):
    return Case({"case": name}, operation, lambda: (jnp.ones((2, 3)), jnp.ones((2, 3)), None), figures, 2)


def fails(*_):
    raise RuntimeError("too much shared memory\nand more")


def test_loop_runs_every_round_of_every_copy_and_traces_once():
    calls, traces = [], []

    def operation(x, weights, out):
        traces.append(1)
        jax.debug.callback(lambda: calls.append(1))
        return x * weights["matrix"] + weights["vector"][None]

    weights, x = {"matrix": jnp.full((2, 3), 2.0), "vector": jnp.arange(3.0)}, jnp.ones((2, 3))
    program = timing.loop(operation, 4).lower(x, [weights] * 3, [x] * 3).compile()
    outs = program(x, timing.copies(weights, 3), timing.copies(x, 4)[1:])
    jax.effects_barrier()
    assert len(calls) == 4 * 3 and len(traces) == 1
    for y in outs:
        np.testing.assert_array_equal(y, [[2, 3, 4], [2, 3, 4]])


def test_an_out_is_what_its_copy_left():
    """As a residual is: each copy adds to its own, round after round."""
    weights = jnp.ones((2, 3))
    program = timing.loop(lambda x, weights, out: out + x * weights, 5)
    first, second = program(jnp.float32(1), [weights, 2 * weights], [jnp.zeros((2, 3)), jnp.zeros((2, 3))])
    np.testing.assert_array_equal(first, jnp.full((2, 3), 5))
    np.testing.assert_array_equal(second, jnp.full((2, 3), 10))


def test_as_many_copies_as_flush_the_cache():
    weights, none = jax.ShapeDtypeStruct((2**20, 64), jnp.float32), Case({}, None, None)
    assert timing.copy_count(none, weights, False) == timing.LEAST_COPIES
    assert timing.copy_count(none, jax.ShapeDtypeStruct((2**20,), jnp.float32), False) == timing.MOST_COPIES
    assert timing.copy_count(none._replace(copies=3), weights, False) == 3
    assert timing.copy_count(none, weights, True) == 1


def test_launches_are_found_by_trying_more_and_more():
    """100 us of the host's, 5 us a launch."""
    runs = []

    def seconds(launches):
        runs.append(launches)
        return 1e-4 + 5e-6 * launches

    assert timing.SAMPLE_SECONDS / 2.1 <= 5e-6 * timing.launches_for(seconds) <= 2 * timing.SAMPLE_SECONDS
    assert len(runs) < 8


def test_what_becomes_of_a_program_costs_its_own_row_alone(tmp_path, monkeypatch):
    """One cannot be traced, one not compiled, one raises while it runs, one cannot be checked, one is wrong."""
    path = tmp_path / "rows.jsonl"

    def runs_badly(x, weights, out):
        return jax.pure_callback(fails, jax.ShapeDtypeStruct((2, 3), jnp.float32), weights)

    def last(*_):
        return {"before": len(journal.read(path))}

    lower = timing.lower

    def compiled_badly(given, **how):
        return type("Lowered", (), {"compile": fails})() if given.labels["case"] == "compile" else lower(given, **how)

    monkeypatch.setattr(timing, "lower", compiled_badly)
    cases = [
        case("good"),
        case("trace", fails),
        case("compile"),
        case("run", runs_badly),
        case("check", figures=fails),
        case("wrong", figures=lambda *_: {"correct": False}),
        case("last", figures=last),
    ]
    rows = timing.run(cases, Journal(path, "test"), tiny=True)
    assert [row["case"] for row in rows] == [case.labels["case"] for case in cases]
    found = {row["case"]: row for row in rows}
    assert {name for name, row in found.items() if "failure" in row} == {"trace", "compile", "run", "check"}
    assert found["compile"]["failure"] == "RuntimeError: too much shared memory"
    assert {name for name, row in found.items() if row.get("seconds", 0) > 0} == {"good", "wrong", "last"}
    assert found["last"]["before"] == 6, "the rows before it were on disk"
    assert [row["case"] for row in journal.read(path)] == list(found)
    assert timing.wrong(rows) == 1


@pytest.mark.parametrize("seconds", [0, timing.LEAST_SECONDS / 2])
def test_nothing_is_begun_when_the_time_is_over(seconds):
    traced = []
    rows = timing.run([case("a", lambda *_: traced.append(1))] * 2, Journal(None, "test", seconds), tiny=True)
    assert all("skipped" in row for row in rows) and not traced


def test_a_batch_is_compiled_before_any_of_it_is_measured(monkeypatch):
    order = []

    def operation(name, x, weights, out):
        order.append(f"trace {name}")
        return x + weights

    def figures(name, *_):
        order.append(f"measure {name}")
        return {}

    monkeypatch.setattr(timing, "BATCH", 2)
    cases = [case(n, functools.partial(operation, n), functools.partial(figures, n)) for n in "abc"]
    cases = [c._replace(operands=lambda: (jnp.ones((2, 3)),) * 3) for c in cases]
    timing.run(cases, Journal(None, "test"), tiny=True)
    assert order == ["trace a", "trace b", "measure a", "measure b", "trace c", "measure c"]


def test_a_row_without_times_says_why():
    assert timing.cells({"skipped": "1 s left"}) == [None, "skipped: 1 s left"]
    assert timing.cells({"seconds": 2e-6, "quartiles": [1e-6, 3e-6]}) == ["2.0", "1.0..3.0"]


def test_more_tokens_need_fewer_copies():
    assert [timing.copies_for(m) for m in (1, 28, 512, 4608)] == [None, None, 8, 3]


@pytest.mark.parametrize("count", [1, 4])
def test_copies_are_arrays_of_their_own(count):
    made = timing.copies({"a": jnp.ones(2)}, count)
    assert len(made) == count
    assert len({each["a"].unsafe_buffer_pointer() for each in made}) == count
