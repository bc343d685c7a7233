"""A visit to a GPU: whatever becomes of a step costs only itself, and the rest is on disk and in the summary."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import gpu_run, journal, process
from bench.gpu_run import Step
from flux_jax.errors import UserError

ROW = """import os, sys
from pathlib import Path
from bench.journal import Journal
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
rows = Journal(Path(given["--rows"]), given["--label"])
rows.row(value=1, pid=os.getpid())
"""


def step(code="", box=30.0, least=0.0, **options):
    """One that writes a row, and then does what `code` says."""
    return Step(["-c", ROW + code], box, least, **options)


GRANDCHILD = "import subprocess, time; rows.row(grandchild=subprocess.Popen(['sleep', '60']).pid)"
FAKES = {
    "good": step(),
    "raises": step("raise RuntimeError('no tile fits')"),
    "hangs": step(f"{GRANDCHILD}; time.sleep(60)", box=2),
    "killed": step("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"),
    "segfault": step("import ctypes; ctypes.string_at(0)"),
    "floods": step("for i in range(4000): print(i, 'x' * 80)"),
    "half": step("open(given['--rows'], 'a').write('{\"value\": 2, \"te'); sys.exit(3)"),
    "last": step("rows.row(value=2.5, wrong='error 0.3'); rows.row(value=3)"),
}
FAILURES = {
    "raises": "RuntimeError: no tile fits",
    "hangs": "killed at its time box",
    "killed": "killed by SIGKILL",
    "segfault": "killed by SIGSEGV",
    "half": "exit status 3",
}


def visit(out, steps, *arguments):
    """The rows, after a visit that is not all right."""
    with pytest.raises(UserError) as error:
        gpu_run.main(["--out", str(out), *arguments], steps)
    assert error.value.exit_code == 1
    return journal.read(out / "results.jsonl")


def ends(rows):
    return {row["step"]: row for row in rows if "exit" in row}


def test_whatever_becomes_of_a_step_costs_only_itself(tmp_path, capsys, dies):
    rows = visit(tmp_path / "new" / "out", FAKES)
    assert [row["step"] for row in rows if row.get("value") == 1] == list(FAKES)
    failures = {name: row["failure"].partition(", after")[0] for name, row in ends(rows).items() if "failure" in row}
    assert failures == FAILURES
    (grandchild,) = (row["grandchild"] for row in rows if "grandchild" in row)
    assert dies(grandchild)
    assert list(ends(rows)) == list(FAKES) and all(row["seconds"] < 50 for row in ends(rows).values())
    printed, summary = capsys.readouterr().out, (tmp_path / "new" / "out" / "summary.txt").read_text()
    for text in (printed, summary):
        places = [
            text.index(part)
            for part in ("== WRONG (1)\nlast: value 2.5, wrong error 0.3", "== FAILED (5)", "== good (2)")
        ]
        assert places == sorted(places)
        assert all(f"failure {failure}" in text for failure in FAILURES.values())
    assert "3999 xxx" in (tmp_path / "new" / "out" / "log.txt").read_text()


def test_a_step_for_which_there_is_no_process_costs_only_itself(tmp_path, monkeypatch):
    run = process.run

    def refused(arguments, **how):
        if "--label" in arguments and arguments[arguments.index("--label") + 1] == "last":
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return run(arguments, **how)

    monkeypatch.setattr(process, "run", refused)
    rows = visit(tmp_path, {"last": step(), "good": step()})
    assert rows[0]["failure"] == "BlockingIOError: [Errno 11] Resource temporarily unavailable"
    assert rows[-1]["step"] == "good" and rows[-1]["exit"] == 0


def test_a_visit_that_is_all_right_raises_nothing(tmp_path, capsys):
    gpu_run.main(["--out", str(tmp_path)], {"good": step()})
    assert "good: exit 0" in capsys.readouterr().out


def test_steps_are_told_where_how_long_and_how(tmp_path):
    code = "rows.row(box=float(given['--seconds']), tiny='--tiny' in sys.argv, flags=os.environ['XLA_FLAGS'],"
    code += " offline=os.environ['HF_HUB_OFFLINE'])"
    steps = {
        "plain": step(code, box=20),
        "other": step(
            code,
            env={"HF_HUB_OFFLINE": "ours"},
            triton_gemm=True,
            tiny=["-c", ROW + code + "; rows.row(table=given['--table'])", "--table", f"{gpu_run.OUT}/table"],
        ),
    }
    gpu_run.main(["--out", str(tmp_path), "--seconds", "25"], steps)
    gpu_run.main(["--out", str(tmp_path), "--seconds", "15", "--tiny", "--steps", "other"], steps)
    rows = journal.read(tmp_path / "results.jsonl")
    first, second, third = (row for row in rows if "flags" in row)
    assert first["box"] == 20 - gpu_run.MARGIN and not first["tiny"] and gpu_run.NO_TRITON_GEMM in first["flags"]
    assert (first["offline"], second["offline"]) == ("1", "ours")
    assert gpu_run.NO_TRITON_GEMM not in second["flags"] and second["box"] < 25 - gpu_run.RESERVE - gpu_run.MARGIN
    assert third["tiny"] and third["box"] < 15 and gpu_run.QUICK_COMPILING in third["flags"]
    assert gpu_run.QUICK_COMPILING not in first["flags"] + second["flags"]
    assert [row["table"] for row in rows if "table" in row] == [str(tmp_path / "table")]


def test_a_step_is_not_begun_when_too_little_time_is_left(tmp_path, capsys):
    steps = {"long": step(least=100), "short": step(least=1)}
    gpu_run.main(["--out", str(tmp_path), "--seconds", "30"], steps)
    rows = journal.read(tmp_path / "results.jsonl")
    assert rows[0]["step"] == "long" and rows[0]["skipped"].endswith("s left")
    assert [row["step"] for row in rows[1:]] == ["short", "short"]
    assert f"== not done (1)\nlong: skipped {rows[0]['skipped']}" in capsys.readouterr().out


def test_a_second_visit_adds_to_the_folder_and_sums_up_its_own(tmp_path, capsys):
    steps = {"good": step(), "raises": FAKES["raises"]}
    visit(tmp_path, steps)
    capsys.readouterr()
    gpu_run.main(["--out", str(tmp_path), "--steps", "good"], steps)
    assert "FAILED" not in capsys.readouterr().out
    assert len(ends(journal.read(tmp_path / "results.jsonl"))) == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_on_a_full_disk_all_rows_are_in_what_is_printed(tmp_path, capsys):
    for name in ("results.jsonl", "log.txt", "summary.txt"):
        (tmp_path / name).symlink_to("/dev/full")
    assert visit(tmp_path, {name: each for name, each in FAKES.items() if name != "half"}) == []
    printed = capsys.readouterr().out
    assert "== WRONG (1)\nlast: value 2.5, wrong error 0.3" in printed
    assert all(f"== {name}" in printed for name in ("good (2)", "floods (2)", "last (3)"))
    assert all(f"failure {failure}" in printed for name, failure in FAILURES.items() if name != "half")


def test_what_fits_on_the_disk_is_there_and_the_rest_is_printed(tmp_path):
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_gpu_run import FAKES; from bench import gpu_run; gpu_run.main(['--out', sys.argv[1]], FAKES)"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path)]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}  # the limit would cut it, and Python would keep it
    ended = subprocess.run(arguments, cwd=process.ROOT, env=environment, capture_output=True, text=True)
    rows = journal.read(tmp_path / "results.jsonl")
    assert 0 < len(rows) < 10 and rows[0]["step"] == "good"
    assert "== WRONG (1)" in ended.stdout and "== FAILED (5)" in ended.stdout and "== good (2)" in ended.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_who_ends_the_visit_gets_its_summary(number, tmp_path, dies):
    """The step in progress dies, nothing more is begun, and what is known is printed, also when the signal comes again
    in the middle of it."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_gpu_run import step; from bench import gpu_run, summary; import os\n"
        f"whole = summary.whole; summary.whole = lambda rows: (os.kill(os.getpid(), {int(number)}), whole(rows))[1]\n"
        "steps = {'good': step(), 'hangs': step('import time; time.sleep(60)'), 'last': step()}\n"
        "gpu_run.main(['--out', sys.argv[1]], steps)"
    )
    arguments, path = [sys.executable, "-c", code, str(tmp_path)], tmp_path / "results.jsonl"
    with subprocess.Popen(arguments, cwd=process.ROOT, stdout=subprocess.PIPE, text=True) as visiting:
        end = time.monotonic() + 30
        while not (held := [r for r in journal.read(path) if r["step"] == "hangs"]) and time.monotonic() < end:
            time.sleep(0.02)
        visiting.send_signal(number)
        printed, _ = visiting.communicate(timeout=20)
    assert dies(held[0]["pid"])
    rows = journal.read(path)
    assert rows[-1]["step"] == "hangs" and rows[-1]["failure"] == f"interrupted by {signal.Signals(number).name}"
    assert "== FAILED (1)" in printed and "== good (2)" in printed
    assert "interrupted" in (tmp_path / "summary.txt").read_text()


def script(*arguments, cwd=None):
    """By its path, as from a folder that knows nothing of the clone."""
    arguments = [sys.executable, str(process.ROOT / "bench" / "gpu_run.py"), *arguments]
    return subprocess.run(arguments, cwd=cwd, capture_output=True, text=True)


def test_a_mistake_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    unknown = script("--out", "out", "--steps", "tune", "nonesuch", cwd=tmp_path)
    assert unknown.returncode == 2
    assert unknown.stderr == f"nonesuch is no step: expected some of {', '.join(gpu_run.STEPS)}.\n"
    blocked = script("--out", "file/out", cwd=tmp_path)
    assert (blocked.returncode, blocked.stderr) == (2, "file/out cannot be made: Not a directory.\n")


def test_by_its_path_it_hides_no_package():
    """bench/convert.py has the name of the package `convert`."""
    folder = process.ROOT / "bench"
    code = f"import runpy, sys; sys.path[0] = {str(folder)!r}; runpy.run_path({str(folder / 'gpu_run.py')!r})"
    code += "; import convert; print(convert.__file__); print('jax' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True)
    assert ended.stdout.split() == [str(process.ROOT / "convert" / "__init__.py"), "False"]


def test_every_step_is_a_program_and_its_time_fits():
    for name, each in gpu_run.STEPS.items():
        arguments = [*each.arguments, *(each.tiny or [])]
        for module in (word for word in arguments if word.startswith("bench.")):
            assert (process.ROOT / f"{module.replace('.', '/')}.py").is_file(), name
        assert 0 < each.least < each.box <= 120
    assert set(gpu_run.LATER) < set(gpu_run.STEPS)
    for file in gpu_run.DEVICE_TESTS:
        assert (process.ROOT / file).is_file()
