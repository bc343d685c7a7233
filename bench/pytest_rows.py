"""`pytest -p bench.pytest_rows`: a run of tests as rows, like any other step of `bench.gpu_run`.

In: --rows, --label, --seconds and --tiny, as `bench.report.parser` has them. Out: a row for each test that failed, and
each file that could not be read, the moment it did; at the end the numbers of tests and what ended the run. When the
seconds are over it begins no test more, which is no failure. It imports nothing of the packages under test: their
signatures are only checked if they are imported later.
"""

import collections
import time
from pathlib import Path
from typing import Any

import pytest

from bench.journal import SENTENCE, Journal

NO_TIME = "no time is left for the rest"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("rows")
    group.addoption("--rows", type=Path)
    group.addoption("--label", default="pytest")
    group.addoption("--seconds", type=float, default=float("inf"))
    group.addoption("--tiny", action="store_true", help="for the steps' sake: the files say what is run")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Clock(config.option.seconds))
    if not hasattr(config, "workerinput"):  # xdist's other processes report to this one
        config.pluginmanager.register(_Rows(config))


class _Clock:
    """Begins no further test when the time is over: of all processes, the first to see it stops the others."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        if time.monotonic() > self.end:
            item.session.shouldstop = NO_TIME


class _Rows:
    def __init__(self, config: pytest.Config):
        given = config.option
        self.journal, self.counts = Journal(given.rows, given.label, given.seconds), collections.Counter()
        self.begun, self.unread = time.monotonic(), set()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and report.nodeid not in self.unread:  # each of xdist's processes reads all files
            self.unread.add(report.nodeid)
            self._failed(report)

    def _failed(self, report: pytest.CollectReport | pytest.TestReport) -> None:
        lines = str(report.longrepr).strip().splitlines()
        why = next((line for line in lines if line.startswith("E ")), lines[-1] if lines else "")
        self.journal.row(test=report.nodeid, failure=why.removeprefix("E ").strip()[:SENTENCE])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._failed(report)
        if report.when == "call" or not report.passed:
            self.counts[f"tests_{report.outcome}"] += 1

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        ended: dict[str, Any] = {"status": pytest.ExitCode(exitstatus).name, **self.counts}
        if exitstatus == pytest.ExitCode.INTERRUPTED and self.journal.left() < 0:
            ended["skipped"] = NO_TIME
            session.exitstatus = pytest.ExitCode.TESTS_FAILED if self.counts["tests_failed"] else pytest.ExitCode.OK
        self.journal.row(**ended, duration=round(time.monotonic() - self.begun, 1))
