"""Legends of class names, which are text of anybody's."""

from matplotlib.legend import Legend

MOST_NAMES = 40
"""Classes in a legend; more would leave no room for the picture."""


def as_written(legend: Legend) -> None:
    """Show the names as they are: a dollar in them begins no formula."""
    for text in legend.get_texts():
        text.set_parse_math(False)
