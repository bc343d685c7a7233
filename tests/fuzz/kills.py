"""Kills programs at random moments, and looks at what is left: `python -m tests.fuzz.kills [PROGRAM ...] [--runs N]`.

In: programs (default: convert, distill, evaluate, generate) and how often each is killed. Each is run once to its end,
which gives the result and the time that it takes. Then it is started in a fresh folder and killed (SIGKILL) at a
moment of that time; what lies there must be whole, the same command must go on, and end with the same result and
nothing beside it. Out: a line for every kill that did not come through, and a JSON object with the counts on stdout;
exit status 1 where there was one.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATIENCE = 600  # seconds for a command
ENDED = "exists already"  # what a command says that was killed behind its last step


def files_of(folder: Path) -> dict[str, str]:
    """Name -> hash of every file."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def evaluation_of(folder: Path) -> dict[str, str]:
    """The same of an evaluation, but for the seconds that it took."""
    found = files_of(folder)
    if "summary.json" in found:
        summary = json.loads((folder / "summary.json").read_text())
        del summary["seconds"]
        found["summary.json"] = json.dumps(summary)
    return found


def checkpoint_of(folder: Path) -> dict[str, str]:
    """Component -> hash of its weights; of a checkpoint that verifies. Orbax's own files have random names."""
    if not folder.exists():
        return {}
    from flux_jax.checkpoints import checksums
    from flux_jax.checkpoints.checkpoint import Checkpoint

    checksums.check(folder)
    stored = Checkpoint.open(folder)
    found = {}
    for component in stored.components:
        weights = stored.read(component, stored.table(component))
        text = [
            f"{name} {value.dtype} {hashlib.sha256(value.tobytes()).hexdigest()}" for name, value in weights.items()
        ]
        found[component] = hashlib.sha256("\n".join(sorted(text)).encode()).hexdigest()
    return found | {"tokenizers": hashlib.sha256(str(files_of(folder / "tokenizers")).encode()).hexdigest()}


class Program:
    """words: of its command, which writes OUT in the folder where it runs; result: of OUT, {} where there is none."""

    def __init__(self, words: list[str], result: Callable[[Path], dict[str, str]], part: bool):
        self.words, self.result, self.part = words, result, part

    def whole(self, folder: Path, expected: dict[str, str]) -> None:
        """What a kill left is all of the result, nothing, or, of files that come one by one, some of them."""
        found = self.result(folder / "out")
        finished = {name: found[name] for name in found if not hidden(name)}
        same = all(expected.get(name) == digest for name, digest in finished.items() if name in expected)
        assert same if self.part else finished in ({}, expected), "what the kill left is not whole"


def hidden(name: str) -> bool:
    return any(part.startswith(".") for part in Path(name).parts)


def programs(folder: Path) -> dict[str, Program]:
    sys.path[:0] = [str(ROOT / "tests")]
    import tiny_distillation

    (folder / "teacher").parent.mkdir(parents=True, exist_ok=True)
    teacher, prompts = tiny_distillation.teacher(folder), tiny_distillation.prompts_file(folder)
    captions = folder / "captions.txt"
    captions.write_text("a red circle\ntwo green squares\na blue star\nthree yellow crosses\n")
    options = tiny_distillation.flags(tiny_distillation.OPTIONS)
    run = ["-m", "flux_jax.generate", "--prompts-file", str(captions), "--model", "nano", "--steps", "2", "--seed", "1"]
    return {
        "convert": Program(["-m", "convert", "nano-bf16", "out", "--ternary", "-q"], checkpoint_of, False),
        "generate": Program([*run, "-o", "out/", "-q"], files_of, True),
        "evaluate": Program(
            ["-m", "flux_jax.evaluate", "nano", "--model", "nano", "--every", "60", "--steps", "2", "--out", "out"],
            evaluation_of,
            True,
        ),
        "distill": Program(
            ["-m", "flux_jax.distill", str(teacher), "out", "--prompts", str(prompts), *options], checkpoint_of, False
        ),
    }


def start(words: list[str], folder: Path, cache: Path) -> subprocess.Popen:
    variables = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(cache)}
    return subprocess.Popen(
        [sys.executable, *words], cwd=folder, env=os.environ | variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def kill(program: Program, folder: Path, cache: Path, after: float, expected: dict[str, str]) -> str:
    """Starts, kills, looks, and does it again; returns "killed", or "ended" where it was quicker. AssertionError where
    that is not as it must be."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    child = start(program.words, folder, cache)
    try:
        _, words = child.communicate(timeout=after)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGKILL)
        _, words = child.communicate()
    status = child.returncode
    assert status in (0, -signal.SIGKILL), f"exit status {status}: {words.decode()[-600:]}"
    program.whole(folder, expected)
    again = start(program.words, folder, cache)
    _, words = again.communicate(timeout=PATIENCE)
    text = words.decode("utf-8", "replace")
    assert "Traceback" not in text, f"a traceback: {text[-1500:]}"
    ended = again.returncode == 2 and ENDED in text
    assert again.returncode == 0 or ended, f"does not go on, exit status {again.returncode}: {text[-600:]}"
    assert program.result(folder / "out") == expected, f"ends with another result: {sorted(files_of(folder))[:20]}"
    left = [name for name in files_of(folder) if ".flux-" in name and not name.endswith("flux-lock")]
    assert not left, f"leaves {left}"
    return "ended" if status == 0 else "killed"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.kills", description=__doc__)
    parser.add_argument("programs", nargs="*", metavar="PROGRAM")
    parser.add_argument(
        "--runs", type=int, default=50, metavar="N", help="kills of each program (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    counts: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory(prefix="kills-") as place:
        folder, cache = Path(place), Path(place) / "cache"
        for name, program in programs(folder / "inputs").items():
            if args.programs and name not in args.programs:
                continue
            counts[name] = {"killed": 0, "ended": 0, "lost": 0}
            for _ in range(2):  # the second one finds every program compiled, as those do that are killed
                shutil.rmtree(folder / "first", ignore_errors=True)
                (folder / "first").mkdir()
                begun = time.monotonic()
                first = start(program.words, folder / "first", cache)
                _, words = first.communicate(timeout=PATIENCE)
                seconds = time.monotonic() - begun
                assert first.returncode == 0, words.decode()
            expected = program.result(folder / "first" / "out")
            print(f"{name}: {seconds:.1f} s, {len(expected)} results", file=sys.stderr)
            moments = random.Random(f"{args.seed} {name}")
            for number in range(args.runs):
                after = moments.uniform(0, 1.02 * seconds)
                try:
                    counts[name][kill(program, folder / "run", cache, after, expected)] += 1
                except Exception as error:
                    counts[name]["lost"] += 1
                    print(f"{name} {number}, killed after {after:.3f} s: {error}", file=sys.stderr, flush=True)
            print(f"{name}: {counts[name]}", file=sys.stderr, flush=True)
    print(json.dumps({"seed": args.seed, "counts": counts}))
    return int(any(count["lost"] for count in counts.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
