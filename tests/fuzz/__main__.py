"""Gives wrong inputs to every reader of outside files: `python -m tests.fuzz [TARGET ...] [--inputs N]`.

In: targets of NAMES (default: all), the number of inputs of each. Out: a line for
every fault (a traceback, a hang, a crash, a wrong load, words that are no sentence) with the number that makes it again
(`--only`), and a JSON object with the counts on stdout. Exit status 1 where there is a fault.

Readers run in processes of their own, so that a hang, a crash or a memory hole is an observation like any other.
"""

import argparse
import collections
import json
import os
import random
import resource
import select
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

HANG = 120.0  # seconds for one input
GROWTH = 1.5e9  # bytes of memory that one input may take
NOISE = ("Traceback", "never retrieved", "Exception ignored")  # on stderr, whatever the outcome
NAMES = ("checkpoint", "safetensors", "png", "converter", "prompts", "config")


def work(name: str, start: int, stop: int, seed: int) -> None:
    """Runs inputs start, start + 1, ... and writes a line of JSON about each."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    os.environ["JAX_PLATFORMS"] = "cpu"
    from tests.fuzz.targets import TARGETS, Fault

    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder, tempfile.TemporaryFile() as noise:
        target = TARGETS[name](Path(folder) / "work")
        os.dup2(noise.fileno(), 2)
        for number in range(start, stop):
            print(json.dumps({"begin": number}), file=answers)
            outcome, detail = "", ""
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            try:
                outcome = target.run(random.Random(f"{seed} {number}"), number)
            except Fault as error:
                outcome, detail = "fault", str(error)
            except BaseException:
                outcome, detail = "fault", traceback.format_exc()[-1500:]
            grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
            if outcome != "fault" and grown > GROWTH:
                outcome, detail = "fault", f"took {grown / 1e9:.1f} GB"
            noise.seek(0)
            text = noise.read().decode("utf-8", "replace")
            noise.seek(0)
            noise.truncate()
            if outcome != "fault" and any(word in text for word in NOISE):
                outcome, detail = "fault", text[-800:]
            print(
                json.dumps({"number": number, "done": target.done[:200], "outcome": outcome, "detail": detail}),
                file=answers,
            )


def watch(name: str, numbers: range, seed: int, report) -> None:
    """Has the inputs run by processes, one after the other: the next begins behind the input that ended the last."""
    start = numbers.start
    while start < numbers.stop:
        words = [sys.executable, "-m", "tests.fuzz", "--work", name, str(start), str(numbers.stop), str(seed)]
        child = subprocess.Popen(words, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
        assert child.stdout is not None
        begun, buffer, last = start, b"", time.monotonic()
        while True:
            ready, _, _ = select.select([child.stdout], [], [], 1.0)
            got = os.read(child.stdout.fileno(), 2**16) if ready else None
            if got == b"":
                break
            if got:
                last = time.monotonic()
                *lines, buffer = (buffer + got).split(b"\n")
                for line in map(json.loads, lines):
                    begun = line.get("begin", begun)
                    if "number" in line:
                        report(line)
                        start = line["number"] + 1
            elif time.monotonic() - last > HANG:
                child.kill()
        status = child.wait()
        if start < numbers.stop:
            why = f"no answer after {HANG:.0f} s" if status == -9 else f"the process ended with status {status}"
            report({"number": begun, "done": "", "outcome": "fault", "detail": why})
            start = begun + 1


def main(argv: list[str]) -> int:
    if argv[:1] == ["--work"]:
        work(argv[1], int(argv[2]), int(argv[3]), int(argv[4]))
        return 0
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(NAMES)} (default: all)")
    parser.add_argument("--inputs", type=int, default=10_000, metavar="N", help="of each target (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="N", help="that one input, of one target")
    args = parser.parse_args(argv)
    counts: dict[str, collections.Counter] = {}
    for name in args.targets or NAMES:
        counts[name] = collections.Counter()

        def report(line: dict, name: str = name) -> None:
            counts[name][line["outcome"]] += 1
            if line["outcome"] == "fault" or args.only is not None:
                print(f"{name} {line['number']}: {line['outcome']}: {line['done']}\n{line['detail']}", file=sys.stderr)

        numbers = range(args.inputs) if args.only is None else range(args.only, args.only + 1)
        watch(name, numbers, args.seed, report)
    print(json.dumps({"seed": args.seed, "counts": counts}))
    return int(any(count["fault"] for count in counts.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
