"""Which classes and code a file may name: recipes, run configs and cards are data and run no untrusted code.

A config file names classes, which the command line's parser imports and calls. So every name in a file is checked
before the parser reads the file. Allowed are classes of known packages whose type matches the option, and the user's
own code if it is named on the command line, directly or by `--trust`. Names on the command line itself are not checked.
"""

import dataclasses
import importlib
import inspect
import shlex
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from diffkd.files.values import TooLargeError, read_yaml, read_yaml_file

# Modules and base classes of the classes that these options name without their module.
HOMES = {
    "data": ("diffkd.data", "LightningDataModule"),
    "method": ("diffkd.methods", "Module"),
    "optimizer": ("torch.optim", "Optimizer"),
}

PACKAGES = ("diffkd", "torch", "timm", "torchvision", "transformers", "segmentation_models_pytorch")
"""Packages whose classes a file may name."""

# Functions that a file may name: the distances of this package.
_FUNCTIONS = tuple(
    f"diffkd.diffusion.distances.{name}" for name in ("attention_mse", "dist", "kl_by_position", "kl_divergence", "mse")
)
# What Lightning's loggers and callbacks are named by, and the loggers that write into the run's folder alone.
_TRACKERS = {"logger": "lightning.pytorch.loggers", "callbacks": "lightning.pytorch.callbacks"}
_LOCAL_LOGGERS = ("tensorboard", "csv")
_MODELS = ("student", "teacher", "model")
_CALLED = ("class_path", "method", "optimizer", "data", "pairs", "denoiser", "distance", "logits_distance")
_PLAIN = (str, int, float, bool, bytes, type(None), Path, PathLike)

Leaves = tuple[Any, ...] | None
"""The types that a value may have, with unions and containers replaced by their members; None: unknown."""


class UsageError(Exception):
    """The command line arguments are not valid for the command."""


class Trust:
    """The user's files and modules whose code may run.

    Args:
        names: files such as `nets.py`, or modules or packages such as `mine`.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.names = list(dict.fromkeys(names))
        self._files = {Path(name).expanduser().resolve() for name in self.names if _is_file_name(name)}

    def includes(self, source: str) -> bool:
        """Return whether a file or module, or a package that contains it, is trusted."""
        if _is_file_name(source):
            file = Path(source).expanduser().resolve()
            return file in self._files or file in {_file_of(name) for name in self.names if not _is_file_name(name)}
        around = source.split(".")
        if any(".".join(around[:count]) in self.names for count in range(1, len(around) + 1)):
            return True
        return bool(self._files) and _file_of(source) in self._files


def take_trust(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the command line without `--trust NAME`, and the names.

    Raises:
        UsageError: if a name is missing, does not exist, or is a module of the standard library.
    """
    kept, names = [], []
    rest = iter(words)
    for word in rest:
        option, equals, value = word.partition("=")
        if option != "--trust":
            kept.append(word)
        elif value := value if equals else next(rest, ""):
            names.append(value)
        else:
            raise UsageError("--trust: give a file or a module after it, such as --trust nets.py or --trust mine")
    for name in names:
        if _is_file_name(name) and not Path(name).expanduser().is_file():
            raise UsageError(f"--trust: there is no file {name}; give a file of Python, or a module such as mine")
        if _is_pythons(name):
            raise UsageError(f"--trust: {name} is a module of Python itself, which no file may call; leave it out")
    return kept, names


def code_of_model(name: Any) -> str | None:
    """Return the file or module that a model's name refers to, None for a model of a known library.

    >>> code_of_model("own/nets.py:small"), code_of_model("mine.nets:small"), code_of_model("timm/resnet18")
    ('own/nets.py', 'mine.nets', None)
    >>> code_of_model("hub:alice/resnet18")  # a name of the Hub, which holds weights and no code

    """
    source, colon, function = name.rpartition(":") if isinstance(name, str) else ("", "", "")
    if (
        colon
        and "/" not in function
        and (_is_file_name(source) or all(part.isidentifier() for part in source.split(".")))
    ):
        return str(source)
    return None


def model_names_in(value: Any) -> list[str]:
    """Return the models named by the value of an option: a name, or a list of names or of values with a `name`.

    >>> model_names_in(["timm/resnet18", {"name": "nets.py:large", "weights": "large.pth"}])
    ['timm/resnet18', 'nets.py:large']
    """
    if isinstance(value, (list, tuple)):
        return [name for one in value for name in model_names_in(one)]
    name = value.get("name") if isinstance(value, Mapping) else getattr(value, "name", value)
    return [name] if isinstance(name, str) else []


def named_code(words: Sequence[str]) -> list[str]:
    """Return the user's files and modules named on a command line."""
    found: list[str] = []
    for option, text in _options(words):
        key, _, rest = option.partition(".")
        last = rest.rpartition(".")[2]
        if key in _MODELS:
            found.extend(filter(None, map(code_of_model, [text, *model_names_in(_as_yaml(text))])))
        elif key in _TRACKERS:
            found.extend(code for _, code in _tracker_code(key, _as_yaml(text)))
        elif (key == "config" and not _exists(text)) or (key in _CALLED and (not rest or last in _CALLED)):
            found.extend(_code_in(_as_yaml(text), key != "config"))
    return list(dict.fromkeys(found))


def given_value(words: Sequence[str], name: str) -> Any:
    """Return the last value of an option on the command line or in its config files; None if it is not given."""
    found = None
    for option, text in _options(words):
        if option == name:
            found = _as_yaml(text)
        elif option == "config" and isinstance(values := _content(text) if _exists(text) else _as_yaml(text), Mapping):
            found = values.get(name, found)
    return found


def own_code(values: Mapping[str, Any]) -> list[str]:
    """Return the user's files and modules named in the values of a run."""
    models = (model for name in _MODELS for model in model_names_in(values.get(name)))
    found = [source for model in models if (source := code_of_model(model))]
    found.extend(_code_in({key: value for key, value in values.items() if key in _CALLED}, False))
    found.extend(code for key in _TRACKERS for _, code in _tracker_code(key, values.get(key)))
    return [name for name in dict.fromkeys(found) if "__main__" not in name and "<" not in name]


def trust_words(names: Iterable[str]) -> str:
    """Return the `--trust` options for files and modules, each after a space.

    >>> trust_words(["nets.py", "mine"])
    ' --trust nets.py --trust mine'
    """
    return "".join(f" --trust {shlex.quote(name)}" for name in names)


class Gate:
    """Checks the names in the config files of a command line, before anything is imported or built.

    Args:
        function: the function whose arguments the values are.
        trust: the user's code that may run.
        resume: whether a run is resumed; messages then show the command to resume it.
    """

    def __init__(self, function: Callable[..., Any], trust: Trust, *, resume: bool = False) -> None:
        self.trust = trust
        self._hints = _leaves_by_name(function)
        self._resume = resume
        self._classes: dict[str, Any] = {}
        self._models: dict[str, tuple[str, str]] = {}
        self._source = ""
        self._inside: list[Path] = []

    def check_words(self, words: Sequence[str]) -> None:
        """Check all config files on the command line, in order.

        Raises:
            UsageError: if a file contains a name that is not allowed.
        """
        for option, text in _options(words):
            key, _, rest = option.partition(".")
            if key == "config" and not rest:
                if text == "-" or (_exists(text) and not Path(text).is_file() and not Path(text).is_dir()):
                    raise UsageError(f"--config: {text} is no file that can be read twice; save it as a file first")
                values = _content(text) if _exists(text) else _as_yaml(text)
                if not isinstance(values, Mapping):
                    continue  # reported by the parser
                if _exists(text):
                    self.check(values, text)
                else:
                    self._note(values)
            elif key in self._hints and key not in _TRACKERS:
                leaves = self._hints[key]
                kind = self._classes.get(key) or _dataclass_in(leaves)
                for name in rest.split(".") if rest else []:
                    if name not in ("init_args", "dict_kwargs"):
                        leaves = self._fields(kind).get(name)
                        kind = _dataclass_in(leaves)
                if _exists(text) and not Path(text).is_dir() and not _is_plain(leaves):
                    self._check_file(Path(text), leaves, option)
                elif not rest:
                    self._note({key: _as_yaml(text)})

    def check(self, values: Mapping[str, Any], source: str) -> None:
        """Check values given by option name.

        Args:
            values: the content of a file.
            source: the file, for messages.

        Raises:
            UsageError: if they contain a name that is not allowed in a file.
        """
        self._source = source
        for name, value in values.items():
            key, dot, rest = str(name).partition(".")
            key = key.rstrip("+")
            if key in ("config", "trust"):
                raise UsageError(f"{source}: {key!r} can be given on the command line alone: take it out of the file")
            if key in _MODELS and model_names_in(value):
                self._models[key] = (str(value), source)
            if key in _TRACKERS:
                self._check_trackers(key, value)
                continue
            self._check({rest: value} if dot else value, self._hints.get(key), key, option=key)

    def _check_trackers(self, option: str, value: Any) -> None:
        for name, code in _tracker_code(option, _as_yaml(value) if isinstance(value, str) else value):
            if _is_pythons(code) or not self.trust.includes(code):
                raise UsageError(self._untrusted_message(name, option, code))

    def check_models(self, values: Mapping[str, Any]) -> None:
        """Check the model names of a run, by option.

        Raises:
            UsageError: if one of them is custom code that is named only in a file.
        """
        for option, value in values.items():
            for name in model_names_in(value):
                code = code_of_model(name)
                if code is not None and not self.trust.includes(code):
                    self._source = self._models.get(option, ("", "a file"))[1]
                    raise UsageError(self._untrusted_message(name, option, code))

    def _check(self, value: Any, leaves: Leaves, where: str, option: str = "", around: tuple[int, ...] = ()) -> None:
        if id(value) in around:
            raise UsageError(f"{self._source}: {where} holds itself, by an alias: write the values out")
        if isinstance(value, str) and not _is_plain(leaves):
            parsed = _as_yaml(value)  # as the parser reads text
            for file in self._files_named(value):
                self._check_file(file, leaves, where)
            if isinstance(parsed, (list, Mapping)):
                self._check(parsed, leaves, where, option, around)
            elif leaves is None or any(_imports(leaf) for leaf in leaves):
                self._keep(option, self._check_name(value.strip(), leaves, where))
        elif isinstance(value, list):
            for index, item in enumerate(value):
                self._check(item, leaves, f"{where}[{index}]", "", (*around, id(value)))
        elif isinstance(value, Mapping):
            self._check_mapping(value, leaves, where, option, (*around, id(value)))

    def _files_named(self, text: str) -> list[Path]:
        """Return the files that a string in a file may refer to, relative to that file or to the working directory."""
        named = [str(Path(self._source).parent / text), text]
        return [Path(name) for name in dict.fromkeys(named) if _exists(name) and not Path(name).is_dir()]

    def _check_file(self, file: Path, leaves: Leaves, where: str) -> None:
        """Check a config file that is the value of an option."""
        if not file.is_file():
            raise UsageError(f"{where}: {file} is no file that can be read twice; save it as a file first")
        if file.resolve() in self._inside:
            raise UsageError(f"{self._source}: {where} names {file}, inside of which it is: write the values out")
        before, self._source = self._source, str(file)
        self._inside.append(file.resolve())
        self._check(_content(file), leaves, where)
        self._inside.pop()
        self._source = before

    def _check_mapping(
        self, value: Mapping[Any, Any], leaves: Leaves, where: str, option: str, around: tuple[int, ...]
    ) -> None:
        kind = self._classes.get(option) or _dataclass_in(leaves)
        if isinstance(path := value.get("class_path"), str):
            kind = self._check_name(path.strip(), leaves, where)
            self._keep(option, kind)
        fields = self._fields(kind)
        for name, item in value.items():
            key, dot, rest = str(name).partition(".")
            key = key.rstrip("+")
            item = {rest: item} if dot else item
            if key in ("init_args", "dict_kwargs") and isinstance(item, Mapping):
                # The class is kept, so that its arguments are checked by their types.
                for inner, argument in item.items():
                    first, inner_dot, inner_rest = str(inner).partition(".")
                    first = first.rstrip("+")
                    argument = {inner_rest: argument} if inner_dot else argument
                    self._check(argument, fields.get(first), f"{where}.{first}", "", (*around, id(item)))
            elif key != "class_path":
                self._check(item, fields.get(key), f"{where}.{key}", "", around)
            elif not isinstance(name, str) or dot or not isinstance(item, str):
                self._check(item, None, where, "", around)
            elif name != "class_path":  # "class_path+"
                self._check_name(item.strip(), leaves, where)

    def _check_name(self, name: str, leaves: Leaves, where: str) -> Any:
        """Return the class of a name, None if the parser resolves or reports it itself; raise if it is not allowed."""
        parts = name.split(".")
        if not all(part.isidentifier() for part in parts) or name in _FUNCTIONS:
            return None
        if len(parts) == 1:
            return _short(name, where)
        trusted = not _is_pythons(name) and self.trust.includes(".".join(parts[:-1]))
        if not trusted and parts[0] not in PACKAGES:
            if not _importable(parts[0]):
                return None
            raise UsageError(self._untrusted_message(name, where, ".".join(parts[:-1])))
        if any(part.startswith("__") for part in parts):
            raise UsageError(self._wrong_kind_message(name, where, "no class", leaves))
        try:
            thing = _resolve(parts)
        except (ImportError, AttributeError):
            return None
        if not isinstance(thing, type):
            if trusted and inspect.isfunction(thing) and self.trust.includes(thing.__module__):
                return None
            article = "a module" if inspect.ismodule(thing) else "a function" if callable(thing) else "no class"
            raise UsageError(self._wrong_kind_message(name, where, article, leaves))
        if trusted and self.trust.includes(thing.__module__):
            return thing
        anything = leaves is None or Any in leaves
        fits = issubclass(thing, _kinds(leaves)) or (anything and _is_ours(thing))
        if not fits or not (trusted or thing.__module__.partition(".")[0] in PACKAGES):
            raise UsageError(self._wrong_kind_message(name, where, "a class of another kind", leaves))
        return thing

    def _fields(self, kind: Any) -> dict[str, Leaves]:
        if isinstance(kind, str):
            kind = None if "." not in kind else _found(kind)
        return {} if kind is None else _leaves_by_name(kind)

    def _keep(self, option: str, kind: Any) -> None:
        if option and kind is not None:
            self._classes[option] = kind

    def _note(self, values: Mapping[str, Any]) -> None:
        """Record the classes named on the command line, which are not checked."""
        for key, value in values.items():
            path = value.get("class_path") if isinstance(value, Mapping) else value
            if isinstance(path, str) and key in HOMES:
                self._classes[key] = path if "." in path else _short(path, key)

    def _untrusted_message(self, name: str, where: str, code: str) -> str:
        start = f"{self._source}: {where} names {name!r}, which is of none of {', '.join(PACKAGES)}"
        if _is_pythons(code):
            return f"{start}; a file is data, and runs no other code: name a class of these"
        mend = f"if you trust it, add{trust_words([code])}"
        if self._resume and Path(self._source).name == "config.yaml":
            mend += f": diffkd fit {shlex.quote(self._source)} --resume{trust_words([code])}"
        return f"{start}; a file is data, and runs no other code: {mend}"

    def _wrong_kind_message(self, name: str, where: str, what: str, leaves: Leaves) -> str:
        kinds = " or ".join(kind.__name__ for kind in _kinds(leaves))
        return (
            f"{self._source}: {where} names {name!r}, {what}, where a file may name only classes below {kinds}: name "
            "such a class, or call what you mean from Python"
        )


def _options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the options on the command line, without dashes, each with the text that may be its value."""
    for word, after in zip(words, [*words[1:], ""], strict=False):
        option, equals, text = word.partition("=")
        if option.startswith("--"):
            yield option[2:].rstrip("+"), text if equals else after


def _exists(text: str) -> bool:
    try:
        return bool(text) and Path(text).expanduser().exists()
    except (OSError, ValueError):  # inline values are not file names
        return False


def _content(file: str | Path) -> Any:
    """Return the content of a config file, None if it is not one.

    Raises:
        UsageError: if it stands for too many values: the parser, which would read it next, has no bounds.
    """
    try:
        return read_yaml_file(Path(file).expanduser())
    except TooLargeError as error:
        raise UsageError(str(error)) from error
    except ValueError:
        return None


def _as_yaml(text: str) -> Any:
    try:
        return read_yaml(text)
    except TooLargeError as error:
        raise UsageError(f"the value {text[:40]!r}... cannot be read as YAML ({error}): correct it") from error
    except ValueError:
        return text


def _code_in(value: Any, called: bool) -> Iterator[str]:
    """Yield the user's modules and files named in values; `called`: whether a string is a class name."""
    if isinstance(value, str) and called:
        parts = value.split(".")
        known = parts[0] in PACKAGES or _is_pythons(value)
        if len(parts) > 1 and all(part.isidentifier() for part in parts) and not known:
            yield ".".join(parts[:-1])
    elif isinstance(value, list):
        for item in value:
            yield from _code_in(item, called)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key in _MODELS and (source := code_of_model(item)):
                yield source
            yield from _code_in(item, key in _CALLED)


def _tracker_code(option: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield the names of loggers or callbacks that a file may not name unasked, and the module to trust for each.

    These are the user's own, and loggers that may send what they log to a server.
    """
    home = _TRACKERS[option]
    for one in value if isinstance(value, list) else [value]:
        name = one.get("class_path") if isinstance(one, Mapping) else one
        if not isinstance(name, str):
            continue
        module, _, last = name.rpartition(".")
        local = option == "callbacks" or last.lower().removesuffix("logger") in _LOCAL_LOGGERS
        if module not in ("", home) or not local:
            yield name, module or home


def _is_file_name(name: str) -> bool:
    return name.endswith(".py")


def _is_pythons(name: str) -> bool:
    return name.partition(".")[0] in sys.stdlib_module_names and not _is_file_name(name)


def _file_of(module: str) -> Path | None:
    """Return the file of a module without importing it."""
    head, *rest = module.split(".")
    with suppress(ImportError, ValueError):
        spec = find_spec(head)
        if spec is not None and not rest and spec.origin is not None:
            return Path(spec.origin).resolve()
        for folder in spec.submodule_search_locations or () if spec is not None else ():
            stem = Path(folder, *rest)
            for file in (stem.with_name(f"{stem.name}.py"), stem / "__init__.py"):
                if file.is_file():
                    return file.resolve()
    return None


def _importable(head: str) -> bool:
    """Return whether a top-level module of that name exists, without importing it."""
    if head in sys.modules:
        return True
    try:
        return find_spec(head) is not None
    except (ImportError, ValueError):
        return True


def _resolve(parts: Sequence[str]) -> Any:
    """Resolve a dotted name: import its longest module prefix, then get attributes."""
    for count in range(len(parts) - 1, 0, -1):
        try:
            thing = __import__(".".join(parts[:count]), fromlist=[parts[count]])
        except ModuleNotFoundError:
            if count == 1:
                raise
            continue
        for part in parts[count:]:
            thing = getattr(thing, part)
        return thing
    raise ModuleNotFoundError(".".join(parts))


def _found(name: str) -> Any:
    with suppress(ImportError, AttributeError):
        return _resolve(name.split("."))
    return None


def _short(name: str, where: str) -> Any:
    """Return the class that an option names without its module, None if it is not in the option's module."""
    home = HOMES.get(where.partition("[")[0])
    return None if home is None else getattr(importlib.import_module(home[0]), name, None)


def _leaves_by_name(thing: Callable[..., Any]) -> dict[str, Leaves]:
    """Return the types of the arguments of a function or class, None for unknown types."""
    function = thing.__init__ if isinstance(thing, type) else thing  # type: ignore[misc]
    try:
        hints = typing.get_type_hints(function)
    except Exception:  # annotations run as code, and names in them may be missing
        return {}
    return {name: tuple(_leaves(hint)) for name, hint in hints.items() if name != "return"}


def _leaves(hint: Any) -> Iterator[Any]:
    origin = typing.get_origin(hint)
    if origin is Literal:
        yield str
    elif origin in (typing.Union, types.UnionType, typing.Annotated) or (
        isinstance(origin, type) and issubclass(origin, (list, tuple, set, frozenset, Sequence, Mapping))
    ):
        for inner in typing.get_args(hint):
            if inner is not ...:
                yield from _leaves(inner)
    elif origin is PathLike:
        yield PathLike
    else:
        yield hint


def _is_plain(leaves: Leaves) -> bool:
    """Return whether a string value of these types stays a string, without import or parsing."""
    return leaves is not None and all(leaf in _PLAIN for leaf in leaves)


def _imports(leaf: Any) -> bool:
    return leaf is not Any and leaf not in _PLAIN


def _dataclass_in(leaves: Leaves) -> Any:
    found = [leaf for leaf in leaves or () if isinstance(leaf, type) and dataclasses.is_dataclass(leaf)]
    return found[0] if len(found) == 1 else None


def _kinds(leaves: Leaves) -> tuple[type, ...]:
    """Return the base classes that a class named in a value of these types must have."""
    from lightning.pytorch import LightningDataModule
    from torch import nn
    from torch.optim import Optimizer

    bases = (nn.Module, Optimizer, LightningDataModule)
    found = []
    for leaf in leaves or ():
        arguments = typing.get_args(leaf)
        made = arguments[-1] if arguments else leaf  # the return type of Callable, the class of type[...]
        if isinstance(made, type) and (issubclass(made, bases) or _is_ours(made)):
            found.append(made)
    return tuple(dict.fromkeys(found)) or bases


def _is_ours(kind: type) -> bool:
    return dataclasses.is_dataclass(kind) and kind.__module__.partition(".")[0] == "diffkd"
