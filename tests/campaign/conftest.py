"""The reliability campaign: long experiments that are run by hand or nightly, not with the tests.

    pytest -n 0 tests/campaign/test_kill.py

runs one of them; `-m campaign tests/campaign` runs all. Each prints a line of the table in docs/reliability.md, and
environment variables set how much is tried, such as DIFFKD_KILLS=5.
"""

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Ignore the campaign unless its marker is asked for; files named on the command line are always collected."""
    return None if "campaign" in config.option.markexpr else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests of the campaign."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("campaign")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the lines that the tests have recorded."""
    reports = [one for kind in ("passed", "failed") for one in terminalreporter.stats.get(kind, [])]
    lines = [value for one in reports for name, value in one.user_properties if name == "campaign"]
    if lines:
        terminalreporter.section("campaign")
        terminalreporter.write_line("| experiment | tried | outcome | seconds |")
        for line in lines:
            terminalreporter.write_line(line)
