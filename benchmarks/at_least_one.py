"""Options of the command line that count something."""

import argparse


def at_least_one(word: str) -> int:
    """Return the number that a word says, for `type=` of an argument.

    Raises:
        ArgumentTypeError: if it is below 1.

    >>> at_least_one("3")
    3
    """
    if (count := int(word)) < 1:
        raise argparse.ArgumentTypeError(f"{count} is too few: it must be at least 1")
    return count
