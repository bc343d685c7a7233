"""What all programs share: the script `flux-jax`, the guard with its exit statuses, the library's words as flags."""

import importlib
import importlib.util
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from flux_jax import validation
from flux_jax.cli import launch, main
from flux_jax.errors import UserError
from flux_jax.runtime import stopping
from pallas_kernels.dispatch import ACTIVATIONS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", main.PROGRAMS)
def test_every_program_is_behind_the_script_and_behind_python_m(name, capsys, monkeypatch):
    module, _ = main.PROGRAMS[name]
    with pytest.raises(SystemExit) as stopped:
        main.main([name, "--help"])
    assert stopped.value.code == 0
    called = "convert" if name == "convert" else f"flux_jax.{name}"
    assert f"usage: python -m {called}" in capsys.readouterr().out
    launched = []
    monkeypatch.setattr(launch, "launch", launched.append)
    spec = importlib.util.find_spec(called)
    if spec.submodule_search_locations:
        spec = importlib.util.find_spec(f"{called}.__main__")
    runpy.run_path(spec.origin, run_name="__main__")
    assert launched == [module]


def test_the_script_says_what_there_is(capsys):
    with pytest.raises(SystemExit):
        main.main([])
    shown = capsys.readouterr().out
    assert all(name in shown for name in main.PROGRAMS)
    assert main.main(["draw"]) == 2
    assert "'draw'" in capsys.readouterr().err
    assert main.main(["--", "generate"]) == 2
    assert "program" in capsys.readouterr().err


def test_the_script_runs_a_program():
    command = [sys.executable, "-m", "flux_jax", "prompts", "count", "missing.txt"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "missing.txt" in done.stderr


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (UserError("Nothing to draw."), 2, "Nothing to draw."),
        (UserError("No weights.", 3), 3, "No weights."),
        (UserError('Try offload="layers" or overwrite=True.'), 2, "Try --offload layers or --overwrite."),
        (KeyboardInterrupt(), 130, "Interrupted."),
        (MemoryError(), 4, "Out of memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes."), 4, "Out of memory"),
        (OSError(28, "No space left on device"), 2, "The disk is full"),
        (PermissionError(13, "Permission denied", "a.txt"), 2, "Cannot use a.txt: Permission denied."),
        (stopping.Terminated(), 143, "Interrupted."),
    ],
)
def test_foreseeable_failures_are_a_sentence_and_a_status(error, status, words, capsys):
    def fail(argv):
        raise error

    assert main.guarded(fail) == status
    assert capsys.readouterr().err.startswith(words)


def test_other_failures_are_raised_and_warnings_are_sentences(capsys):
    with pytest.raises(ZeroDivisionError):
        main.guarded(lambda argv: 1 / 0)
    assert main.guarded(lambda argv: warnings.warn("Expect noise.", stacklevel=1)) == 0
    assert capsys.readouterr().err == "Expect noise.\n"


@pytest.mark.parametrize("text", ["0", "-1", "11", "1.5", "", "1" * 5000, "a\n"])
def test_numbers_of_arguments_have_bounds(text, capsys):
    def run(argv):
        parser = main.Parser(prog="a")
        parser.add_argument("--count", type=main.whole(1, 10))
        parser.parse_args([f"--count={text}"])

    assert main.guarded(run) == 2
    said = capsys.readouterr().err
    assert "--count" in said
    assert "from 1 to 10" in said
    assert said.count("\n") == 1
    assert main.whole(1, 10)("10") == 10


def test_words_that_are_no_arguments_stay():
    words = 'height 30 is no multiple; a mesh of data=2,model=4, "quoted", x == True'
    assert main.in_flags(words) == words


def test_what_is_said_without_jax_is_what_the_kernels_know():
    assert validation.ACTIVATIONS == ACTIVATIONS
