"""Write a figure to a file."""

from pathlib import Path

from matplotlib.figure import Figure

from diffkd.weights import write_whole


def write_figure(path: str | Path, figure: Figure) -> Path:
    """Write a figure whole or not at all, in the format that the path's suffix names, PNG without one.

    Args:
        path: PNG, SVG or any other file that matplotlib writes.
        figure: what to write.

    Returns:
        The path.

    Raises:
        ValueError: if matplotlib does not know the suffix.
    """
    path = Path(path)
    write_whole(path, lambda file: figure.savefig(file, dpi=120, format=path.suffix.lstrip(".") or "png"))
    return path
