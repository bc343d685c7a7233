"""`python -m bench.energy`: watts, and joules a product, while one kind of product has the GPU to itself.

In: a GPU with NVML (or, with --tiny, any device: a small product, to try the program). Out: for bf16 and for int8
activations, given or rounded in front of each product: seconds and millijoules a call over a second and a half, watts
and the clock of the multiprocessors in its later half, and the rate. Where NVML cannot be read, the row says so.
"""

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from bench import power, report, timing
from bench.implementations import plain_case, rate
from bench.products import model_products
from bench.timing import device_for
from flux_jax.config import dev, nano

NAMES = ("bf16", "A8 kernel, int8 given", "A8 kernel")
SECONDS, TINY_SECONDS = 1.5, 0.1  # of each
INTERVAL = 0.05  # between two readings


@contextmanager
def readings(read: Callable[[], Any]) -> Iterator[list[Any]]:
    """What `read` returns, again and again within it."""
    found, stop = [], threading.Event()

    def watch() -> None:
        while not stop.wait(INTERVAL):
            found.append(read())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


def late(values: Sequence[float | None]) -> float | None:
    """The median of the second half, when clock and power have settled; None where nothing was read."""
    known = [value for value in values[len(values) // 2 :] if value is not None]
    return statistics.median(known) if known else None


def spend(call: Callable[[], Any], calls: int, seconds: float) -> dict[str, Any]:
    """Runs `call`, which is so many calls of a product, for so long: {seconds, watts, millijoules, megahertz}, with a
    note where NVML cannot be read."""
    with readings(lambda: (power.watts(), power.megahertz())) as seen:
        before, start, rounds = power.joules(), time.monotonic(), 0
        while (spent := time.monotonic() - start) < seconds or not rounds:
            call()
            rounds += 1
        joules = power.since(before, rounds * calls)
    watts, clocks = ([pair[i] for pair in seen] for i in range(2))
    found = {"seconds": spent / (rounds * calls), "watts": late(watts), "millijoules": joules and 1e3 * joules}
    found["megahertz"] = late(clocks)
    return found if joules else found | {"note": "NVML does not count joules here"}


def main(argv: Sequence[str]) -> None:
    args = report.parser("energy", __doc__, tiny="FLUX-nano on any device, to try the program").parse_args(argv)
    journal, config = report.journal(args), nano() if args.tiny else dev()
    product = next(p for p in model_products(config) if p.epilogue == "gelu")
    with device_for(args.tiny):
        cases = [plain_case(product.m, product.n, product.k, name) for name in NAMES]
        for case, program in zip(cases, timing.compile_all(cases, journal, tiny=args.tiny), strict=True):

            def job(case=case, program=program) -> dict[str, Any]:
                launch, calls, _ = timing.ready(case, program.result(), tiny=args.tiny)
                launches = timing.launches_for(lambda launches: timing.clock(lambda: launch(launches)))
                found = spend(lambda: launch(launches), launches * calls, TINY_SECONDS if args.tiny else SECONDS)
                return found | rate(product.m, product.n, product.k, found["seconds"])

            journal.attempt(case.labels, job, SECONDS + timing.LEAST_SECONDS)
    columns = ["implementation", "seconds", "watts", "millijoules", "megahertz", "tflops", "note", "failure", "skipped"]
    print(report.table(columns, ([row.get(column) for column in columns] for row in journal.rows)), "\n")
    report.finish("energy", {"tiny": args.tiny, "rows": journal.rows}, save=args.save)


if __name__ == "__main__":
    raise SystemExit(report.run(main))
