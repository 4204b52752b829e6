"""What the tests of commands share."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def _short_comparisons(short_comparisons: None) -> None:
    """Give all of these tests short comparisons."""
