"""What holds for every test: strict JAX promotion, no network, no cache of an earlier run, the same draws; how many
processes run them; and the checkpoints that many of them read.
"""

import os
import random
import sys
import tempfile
from pathlib import Path

import hypothesis
import jax
import message_snapshots
import numpy as np
import parity
import pytest

CACHE = tempfile.TemporaryDirectory(prefix="flux-jax-tests-")
for chosen in ("FLUX_JAX_CACHE", "JAX_COMPILATION_CACHE_DIR"):
    os.environ.pop(chosen, None)
os.environ["XDG_CACHE_HOME"] = CACHE.name  # nothing is read from, or left in, the user's caches ...
os.environ["HF_HOME"] = os.path.join(CACHE.name, "huggingface")
os.environ["HF_HUB_OFFLINE"] = "1"  # ... nor fetched; processes that tests start inherit this
os.environ["MPLBACKEND"] = "agg"

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# No deadline: the first example of a jitted function compiles it.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("repeatable")


MOST_WORKERS = 4  # each takes up to 3 GB, and one file is a worker's alone


def pytest_addoption(parser):
    parser.addoption("--update-snapshots", action="store_true", help="write tests/snapshots/messages.txt anew")
    parser.addoption(
        "--compile-kernels-for",
        nargs="+",
        default=[],
        metavar="GPU",
        help="also compile, for GPUs that are not here, each call of a kernel that tests/kernels interprets",
    )


def pytest_configure(config):
    config.pluginmanager.register(message_snapshots.Plugin(config))
    if any("::" in word for word in config.args) and config.option.markexpr == "not slow":
        config.option.markexpr = ""  # a test that is named is run, slow or not


def pytest_report_header(config):
    if config.option.markexpr == "not slow":
        return "slow tests are left out: `pytest -m slow` runs them, `pytest -m ''` all"
    return None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """Of `-n auto`, the default: one for each core, and none where it would only be in the way: of one file, of what
    is to be seen while it runs."""
    files = {word.partition("::")[0] for word in config.args}
    one_file = len(files) == 1 and files.pop().endswith(".py")
    if one_file or config.option.capture == "no":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores, MOST_WORKERS) if cores > 1 else 0


@pytest.fixture(scope="session", autouse=True)
def kept_programs():
    """Most of the time goes into compiling, and the same tiny models come again and again. A cache for each worker, and
    for the processes that its tests start one by one: JAX's files are no safe meeting place for two that write."""
    # Only here: what is imported before pytest is configured has unchecked signatures.
    from flux_jax.runtime import compilation_cache

    assert compilation_cache.enable() is not None


@pytest.fixture(scope="module")
def hasty_compiler():
    """For tests that compare runs with runs, most of them of training, whose programs take longer to compile than to
    run: XLA leaves its costly passes out, here and in the processes that such a test starts. What it makes differs in
    the last bits: programs that are in memory do not pass from one kind of module to the other."""
    option = "jax_disable_most_optimizations"
    before = jax.config.read(option)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(option.upper(), "1")
        jax.config.update(option, True)
        jax.clear_caches()
        yield
        jax.config.update(option, before)
        jax.clear_caches()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """tiny_model's, for all tests to read: one that changes it takes a copy."""
    import tiny_model  # here for the reason given above

    return tiny_model.save(tmp_path_factory.mktemp("checkpoint") / "tiny", tiny_model.config())


@pytest.fixture(scope="session")
def tiny_published_checkpoint(tmp_path_factory) -> Path:
    """The same of a model that diffusers' classes can express, too."""
    import tiny_model

    return tiny_model.save(tmp_path_factory.mktemp("checkpoint") / "tiny", tiny_model.published_config())


@pytest.fixture(scope="session")
def tiny_published_folder(tiny_published_checkpoint, tmp_path_factory):
    """That one as a diffusers folder; whoever changes it takes a copy."""
    from convert.export import export

    folder = tmp_path_factory.mktemp("published") / "folder"
    export(tiny_published_checkpoint, folder, quiet=True)
    return folder


@pytest.fixture(autouse=True)
def fixed_seeds():
    """The same draws in every test, whatever ran before it; JAX needs none, its keys are explicit."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - third-party code draws from it
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # one of xdist's processes: the first one prints
        session.config.workeroutput["parity"] = parity.ROWS


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    parity.ROWS.extend(getattr(node, "workeroutput", {}).get("parity", ()))


def pytest_terminal_summary(terminalreporter):
    """The table of the parity tests that ran."""
    if parity.ROWS:
        terminalreporter.section("parity: largest difference over the reference's largest value")
        terminalreporter.write_line(parity.table())
