"""The history of a training: one row of numbers per epoch, with the last and the best."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffkd.files.weights import write_text

Row = dict[str, float]


class History:
    """Collects one row per epoch and finds the best one.

    All rows are saved in the checkpoint, so after a resume the history equals that of an uninterrupted run.

    Args:
        metric: the column that selects the best epoch; larger is better, ties go to the earliest.
    """

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.rows: list[Row] = []

    def add(self, row: Row) -> None:
        """Append the row of an epoch."""
        self.rows.append(row)

    @property
    def last(self) -> Row | None:
        """The row of the last epoch, None before the first."""
        return self.rows[-1] if self.rows else None

    @property
    def best(self) -> Row | None:
        """The row of the epoch with the largest metric, None before the first."""
        return max(self.rows, key=lambda row: row[self.metric], default=None)

    def write_csv(self, path: Path) -> None:
        """Write all rows as CSV, replacing the file atomically.

        Raises:
            OSError: if it cannot be written.
        """
        text = io.StringIO()
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(path, text.getvalue())

    def state_dict(self) -> dict[str, Any]:
        """Return the rows."""
        return {"rows": [dict(row) for row in self.rows]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the rows that :meth:`state_dict` returned."""
        self.rows = [dict(row) for row in state["rows"]]


def measurements(row: Row) -> Row:
    """Return the validation measurements: a row without counters, and what is logged of the training.

    >>> measurements({"epoch": 1, "ap": 0.5, "train/task": 1.0, "gamma/layer4": 0.9, "weight/boxes": 5.2})
    {'ap': 0.5}
    """
    counters = ("epoch", "step", "lr", "seconds")
    return {k: v for k, v in row.items() if k not in counters and not k.startswith(("train/", "gamma/", "weight/"))}


def read_csv(path: Path) -> list[Row]:
    """Read the rows that :meth:`History.write_csv` wrote; empty cells are left out.

    Raises:
        ValueError: if it is no table of numbers; the message names the file.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(file)]
    except (ValueError, TypeError, csv.Error) as error:  # a row that is too long has a list of cells
        raise ValueError(
            f"{path} is no table of numbers ({error}): delete it, and resume the run to write it"
        ) from error
