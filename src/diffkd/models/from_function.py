"""Models that a function of the user's own code builds."""

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from torch import nn

from diffkd.models.extras import nearest


def build_from_function(
    name: str, num_classes: int | None, in_channels: int | None, pretrained: bool, **others: object
) -> nn.Module:
    """Call a function or class that returns a model. Its file or module is imported, hence run: trusted code only.

    Args:
        name: "package.module:function" or "path/to/file.py:function".
        num_classes: passed as `num_classes` unless None, if the function takes that.
        in_channels: passed as `in_channels`, likewise.
        pretrained: passed as `pretrained` if True.
        others: each passed under its own name if the function has such a parameter; required for values that are True.

    Returns:
        What the function returns.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if there is no such module or function, or it lacks a parameter for a value that is True.
        TypeError: if it is not callable, or returns no model.
    """
    source, _, function = name.rpartition(":")
    module = _import_file(source) if source.endswith(".py") else _import_module(source)
    build = getattr(module, function, None)
    if build is None:
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"model '{name}': {source} has no function '{function}'; {nearest(function, public)}")
    if not callable(build):
        raise TypeError(
            f"model '{name}': '{function}' is a {type(build).__name__}; name a function that builds a model"
        )
    required = [switch for switch, on in {"pretrained": pretrained, **others}.items() if on is True]
    for switch in required:
        if not _accepts(build, switch):
            raise ValueError(
                f"model '{name}': '{function}' takes no argument {switch}: add it to the function, or leave it out here"
            )
    asked = {"num_classes": num_classes, "in_channels": in_channels, "pretrained": pretrained or None}
    arguments: dict[str, object] = {
        key: value for key, value in asked.items() if value is not None and _accepts(build, key)
    }
    named = inspect.signature(build).parameters
    arguments |= {key: value for key, value in others.items() if key in named or key in required}
    model: object = build(**arguments)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model '{name}': '{function}' returned a {type(model).__name__}; it must return an nn.Module")
    return model


def _accepts(build: Callable[..., object], argument: str) -> bool:
    parameters = inspect.signature(build).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return True
    found = parameters.get(argument)
    return found is not None and found.kind in (found.POSITIONAL_OR_KEYWORD, found.KEYWORD_ONLY)


def _import_module(name: str) -> ModuleType:
    if all(part.isidentifier() for part in name.split(".")):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
    hub = "; a student of the Hub is hub:USER/NAME" if name == "hub" else ""
    raise ValueError(
        f"module '{name}' cannot be found: install it, add its folder to PYTHONPATH, "
        f"or give a path as path/to/file.py:function{hub}"
    )


def _import_file(name: str) -> ModuleType:
    path = Path(name).expanduser().resolve()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}, from which a model was to be built: correct the path")
    # Dataclasses look their module up by name, so it must be known while the file runs; the digest of the path keeps
    # files of one name apart.
    key = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(key, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} cannot be imported as a Python file: check its name and permissions")
    module = importlib.util.module_from_spec(spec)
    sys.modules[key] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[key]
        raise
    return module
