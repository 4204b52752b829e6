"""What an error says of a name it does not know: the ones most like it."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return "nearest: 'a', 'b'", the known names most like `name`, for use in an error message.

    Args:
        name: the name that was not found.
        known: the names that exist.
        count: at most so many are returned.

    Returns:
        The text; "nothing is close to it" if no known name is.
    """
    close = difflib.get_close_matches(name, sorted(known), n=count)
    return "nearest: " + ", ".join(f"'{match}'" for match in close) if close else "nothing is close to it"
