"""The folder of a run: its file names, whether it may be written, and whether a resumed run has the same config."""

import importlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from diffkd.files.config import describe, differences
from diffkd.files.lock import LOCK
from diffkd.files.values import read_json_file, read_yaml_file
from diffkd.files.weights import is_partial, remove_partial, write_text

# Values that may change on resume without changing the training.
_FREE = {
    "out",
    "resume",
    "accelerator",
    "devices",
    "progress",
    "logger",
    "sample_every",
    "log_every",
    "save_every_steps",
    "config",
    "teacher_cache",
}
# Likewise of the data modules of this package: neither order nor pixels of the training depend on them. The root is not
# among them, as another folder with the same names may hold other pixels.
_FREE_OF_DATA = {"num_workers", "verify", "cache", "val_batch_size"}


class RunFolder:
    """The paths of a run's files.

    Args:
        path: the folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.config = self.path / "config.yaml"
        self.checkpoint = self.path / "checkpoints" / "last.ckpt"
        self.metrics = self.path / "metrics.csv"
        self.student = self.path / "student.safetensors"
        self.best = self.path / "best.safetensors"
        self.result = self.path / "result.json"

    def check(self, config: Mapping[str, Any], *, resume: bool) -> dict[str, Any] | None:
        """Check whether a run may be started or resumed here, without changing anything.

        Files of a run that ended before its first checkpoint are ignored, since no work would be lost.

        Args:
            config: the run's values by name.
            resume: continue the run in the folder.

        Returns:
            The result of the run if it is finished, None otherwise.

        Raises:
            FileExistsError: if the folder is not empty and `resume` is off, or it does not contain a run.
            ValueError: if the run was started with other values.
        """
        if not self._holds_work():
            return None
        if not self.config.is_file():
            raise FileExistsError(f"{self.path} is not empty and holds no run to resume; give another --out")
        if not resume:
            raise FileExistsError(f"{self.path} is not empty; add --resume to go on there, or give another --out")
        stored = self.read_config()
        if changed := changed_values(stored, config):
            raise ValueError(
                f"{self.path} was started with other values: {'; '.join(changed)}; give the same ones, or another "
                f"--out, to which --student_weights {self.path} brings what was learned"
            )
        if not self.result.is_file():
            return None
        return self.read_result()

    def read_config(self) -> dict[str, Any]:
        """Return the recorded values.

        Raises:
            ValueError: if the file is damaged; the message names it.
        """
        content = read_yaml_file(self.config) or {}
        if not isinstance(content, dict):
            raise ValueError(f"{self.config} holds no values by name: give the folder of a run")
        return content

    def read_result(self) -> dict[str, Any]:
        """Return the result of the finished run.

        Raises:
            ValueError: if the file is damaged; the message names it.
        """
        content = read_json_file(self.result)
        score = content.get("score") if isinstance(content, dict) else None
        rows = [content.get(which) for which in ("last", "best")] if isinstance(score, str) else []
        if not rows or not all(
            isinstance(row, dict) and isinstance(row.get(score), int | float) and isinstance(row.get("epoch"), int)
            for row in rows
        ):
            raise ValueError(f"{self.result} is no result of a run: delete it, and add --resume to write it again")
        return dict(content)

    def start(self, config: Mapping[str, Any]) -> None:
        """Create the folder, remove what a killed run left half written, and record the run's values.

        The folder must be locked: no other process may write there.

        Raises:
            OSError: if they cannot be written.
        """
        remove_partial(self.path)
        text = yaml.safe_dump(to_yaml_values(config), sort_keys=False, allow_unicode=True)
        write_text(self.config, text)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write the result, which marks the run as finished."""
        text = json.dumps(result, indent=2) + "\n"
        write_text(self.result, text)

    def _holds_work(self) -> bool:
        if self.path.is_file():
            raise FileExistsError(f"{self.path} is a file; give a folder as --out")
        remains = {self.config, self.path / "tensorboard", self.path / LOCK}
        return self.path.is_dir() and any(
            path not in remains
            and (any(not is_partial(one) for one in path.iterdir()) if path.is_dir() else not is_partial(path))
            for path in self.path.iterdir()
        )


def changed_values(stored: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """List the differences between two configs, as "lr is 0.1 there, 0.2 here".

    Values that do not change the training, such as the device or the data's worker processes, are left out. An option
    that did not exist when the run was started is not recorded and counts as its default; a switch counts as off.
    """
    there, here = _that_matters(stored), _that_matters(given)
    found = differences(_with_later_options(there, here), here, same=_same)
    return [one.replace(".init_args.", ".") for one in found]


def _that_matters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without the values that do not change the training."""
    kept = {key: value for key, value in config.items() if key not in _FREE}
    data = kept.get("data")
    if isinstance(data, Mapping) and str(data.get("class_path")).startswith("diffkd."):
        options = data.get("init_args") or {}
        if isinstance(options, Mapping):
            options = {key: value for key, value in options.items() if key not in _FREE_OF_DATA}
        kept["data"] = {**data, "init_args": options}
    return kept


def _with_later_options(stored: Any, given: Any) -> Any:
    """Add to a stored config the class options that only `given` has, if they have their default value."""
    if isinstance(stored, list) and isinstance(given, (list, tuple)) and len(stored) == len(given):
        return [_with_later_options(one, other) for one, other in zip(stored, given, strict=True)]
    if not isinstance(stored, Mapping) or not isinstance(given, Mapping):
        return stored
    filled = {key: _with_later_options(value, given.get(key)) for key, value in stored.items()}
    if {"student", "method"} <= set(stored) and "class_path" not in stored:  # a pair, recorded without its class
        later = {key: value for key, value in given.items() if key not in filled}
        defaults = _defaults("diffkd.Pair") if later else {}
        filled |= {key: value for key, value in later.items() if defaults.get(key, later) == to_yaml_values(value)}
    options, chosen = filled.get("init_args"), given.get("init_args")
    if (
        stored.get("class_path") == given.get("class_path")
        and isinstance(options, dict)
        and isinstance(chosen, Mapping)
    ):
        later = {key: value for key, value in chosen.items() if key not in options}
        defaults = _defaults(str(stored["class_path"])) if later else {}
        options |= {
            key: value for key, value in later.items() if key in defaults and defaults[key] == to_yaml_values(value)
        }
    return filled


def _defaults(class_path: str) -> dict[str, Any]:
    """Return the default of each argument of a class as plain data; {} if it cannot be imported."""
    module, _, name = class_path.rpartition(".")
    try:
        parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    except (ImportError, AttributeError, ValueError, TypeError):
        return {}
    return {
        name: to_yaml_values(describe(one.default)) for name, one in parameters.items() if one.default is not one.empty
    }


def _same(there: Any, here: Any) -> bool:
    """Whether two values are equal, also within lists of mappings; a missing key counts as off."""
    if isinstance(there, (list, tuple)) and isinstance(here, (list, tuple)):
        return len(there) == len(here) and all(map(_same, there, here))
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        return all(_same(there.get(key), here.get(key)) for key in {**there, **here})
    return bool(to_yaml_values(there) == to_yaml_values(here)) or (there is None and here is False)


def to_yaml_values(value: Any) -> Any:
    """Return `value` as after a YAML round trip: sequences as lists, paths as strings."""
    if isinstance(value, Mapping):
        return {str(key): to_yaml_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_yaml_values(item) for item in value]
    return str(value) if isinstance(value, Path) else value
