"""Options of the command line, made from the arguments of typed functions."""

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from diffkd.commands.usage_errors import Misuse, check_idle, explain

# Arguments of `fit` for callers in Python alone.
_NO_OPTIONS: set[str | int] = {"config", "on_epoch"}
# What the parser forgets the values of an earlier method, and of an earlier optimiser, by.
_NONE = {"method": "null", "optimizer": "torch.optim.Optimizer"}


def with_own_values(words: list[str], optimizer: Any) -> list[str]:
    """Make the words of a command line forget a method's or optimiser's values where they name one of another class.

    The parser would keep those that both know by the same name: AT would count with the weight of KD, and AdamW take
    the learning rate of SGD. One of the same class keeps what is not given anew.

    Args:
        words: of the command line, which may name files of values.
        optimizer: what the words find, `{"class_path": ...}`.

    Returns:
        The words, with more between them.
    """
    classes = {"method": _classes(None), "optimizer": _classes(optimizer)}
    result = []
    for word, after in zip(words, [*words[1:], ""], strict=False):
        for option, value in _values(word, after):
            given = _classes(value)
            if given and classes[option] and given != classes[option]:
                result.append(f"--{option}={_NONE[option]}")
            classes[option] = classes[option] if given is None else given
        result.append(word)
    return result


def _values(word: str, after: str) -> Iterator[tuple[str, Any]]:
    """Yield the methods and optimisers that a word names, itself or in a file."""
    option, equals, value = word.partition("=")
    text = value if equals else after
    if option == "--config" and Path(text).is_file():
        values = yaml.safe_load(Path(text).read_text(encoding="utf-8"))
        yield from ((name, value) for name, value in values.items() if name in _NONE)
    elif option[2:] in _NONE:
        with suppress(yaml.YAMLError):  # of which the parser complains
            yield option[2:], yaml.safe_load(text)


def _classes(value: Any) -> tuple[str, ...] | None:
    """Return the classes of a method, of several, or of an optimiser; () for none, None if the value does not say."""
    if isinstance(value, list):
        found = [_classes(one) for one in value]
        return tuple(name for one in found for name in one or ())
    if isinstance(value, Mapping):
        value = value.get("class_path", "")
    if value is None:
        return ()
    return (str(value).rpartition(".")[2],) if value else None


def fit_with(words: list[str], use: Callable[..., Any] | None = None) -> Any:
    """Call :func:`~diffkd.training.fit.fit` with the words of a command line: [RECIPE] [OPTIONS].

    Args:
        words: of the command line.
        use: something else to call with the arguments meant for `fit`.

    Raises:
        Misuse: if the words do not fit.
        FileNotFoundError: if there is no such recipe.
    """
    from diffkd.training.fit import fit

    return call(fit, _with_recipe(words), "fit", skip=_NO_OPTIONS, configurable=True, use=use)


def values_of_fit(words: list[str]) -> dict[str, Any]:
    """Return the values that :func:`fit_with` would record as those of the run, building nothing.

    Args:
        words: of the command line.

    Raises:
        Misuse: if the words do not fit.
        FileNotFoundError: if there is no such recipe.
    """
    from diffkd.training.fit import fit

    parser = _parser(fit, "fit", skip=_NO_OPTIONS, configurable=True)
    return _recorded(parser, _parsed(parser, fit, _with_recipe(words)))


def call(
    function: Callable[..., Any],
    words: list[str],
    command: str,
    *,
    skip: set[str | int] | None = None,
    fixed: Mapping[str, Any] | None = None,
    positional: str | None = None,
    configurable: bool = False,
    use: Callable[..., Any] | None = None,
) -> Any:
    """Make options of a function's arguments, parse `words`, and call it.

    Args:
        function: typed; its docstring describes the options.
        words: of the command line.
        command: the command's name, for messages.
        skip: arguments that are no options.
        fixed: values of arguments that are no options.
        positional: the argument that the first word stands for, where it is no option.
        configurable: take `--config FILE` for any number of files of values, later ones before earlier ones, and hand
            the function what was resolved as its argument `config`.
        use: what to call with the arguments instead of `function`.

    Returns:
        What the function returns; None after `--help`.

    Raises:
        Misuse: if the words do not fit.
    """
    if positional is not None and words and not words[0].startswith("-"):
        words = [f"--{positional}={words[0]}", *words[1:]]
    parser = _parser(function, command, skip={*(skip or ()), *(fixed or ())}, configurable=configurable)
    if {"-h", "--help"} & set(words):
        # The parser lists every known subclass of Module, pages of them.
        print(re.sub(r",\s+known\s+subclasses:[^)]*\)", ")", parser.format_help()), end="")  # noqa: T201
        return None
    values = _parsed(parser, function, words)
    arguments = parser.instantiate(values).as_dict()
    arguments.pop("config", None)
    if configurable:
        arguments["config"] = _recorded(parser, values)
    return (use or function)(**arguments, **(fixed or {}))


def _with_recipe(words: list[str]) -> list[str]:
    """Let `RECIPE` stand for `--config=FILE`, and resume the run whose `config.yaml` it is where that lies now."""
    import diffkd.data  # noqa: F401  (its modules can then be named without their package)
    from diffkd.files.run_folder import RunFolder
    from diffkd.recipes import find_recipe

    if not words or words[0].startswith("-"):
        return words
    recipe = find_recipe(words[0])
    run = RunFolder(recipe.parent)
    begun = recipe == run.config and (run.checkpoint.is_file() or run.result.is_file())
    resumes = begun and not {"--resume", "--resume=true"}.isdisjoint(words)
    # Before the other words, so that an --out among them counts.
    return [f"--config={recipe}", *([f"--out={run.path}"] if resumes else []), *words[1:]]


def _parser(function: Callable[..., Any], command: str, *, skip: set[str | int], configurable: bool) -> Any:
    """Return a parser whose options are the arguments of a function."""
    from jsonargparse import ArgumentParser

    parameters = inspect.signature(function).parameters
    parser = ArgumentParser(prog=f"diffkd {command}", exit_on_error=False)
    if configurable:
        parser.usage = f"diffkd {command} [RECIPE] [OPTIONS]"  # which are too many to be named twice
        parser.add_argument("--config", action="config", help="recipe: a file of values for these options")
    parser.add_function_arguments(function, skip=skip)
    if "seed" in parameters and "data" in parameters:
        parser.link_arguments("seed", "data.init_args.seed")
    if "optimizer" in parameters:
        from diffkd.files.config import describe

        parser.set_defaults({"optimizer": describe(parameters["optimizer"].default)})
    return parser


def _parsed(parser: Any, function: Callable[..., Any], words: list[str]) -> Any:
    from jsonargparse import ArgumentError

    for word, after in zip(words, [*words[1:], ""], strict=False):
        if word == "--config" or word.startswith("--config="):
            _check_file(Path(after if word == "--config" else word.removeprefix("--config=")))
    parameters = inspect.signature(function).parameters
    if "optimizer" in parameters:
        words = with_own_values(words, parser.get_default("optimizer"))
    flags = {f"--{name}" for name, parameter in parameters.items() if parameter.annotation is bool}
    bare = {word for word, after in zip(words, [*words[1:], "--"], strict=False) if _stands_alone(word, after)}
    try:
        values = parser.parse_args(_with_lists(_with_values(words, flags | bare), parameters))
    except ArgumentError as error:
        options = [option for action in parser._actions for option in action.option_strings]
        raise Misuse(explain(str(error), options, parser.prog.removeprefix("diffkd "))) from error
    for option in sorted(bare):
        if not _is_on(values, option.removeprefix("--").split(".")):
            raise Misuse(f"{option}: give its value after it; only what is true or false can stand alone")
    if "optimizer" in parameters:
        check_idle(words, values)
    return values


def _check_file(file: Path) -> None:
    """Raise Misuse, naming the file, which the parser would not do, if it is there and holds no values by name."""
    import yaml

    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = str(error).replace('in "<unicode string>", ', "")
        raise Misuse(f"{file} cannot be read as YAML ({where}): correct it") from error
    if not isinstance(values, dict):
        raise Misuse(f"{file} holds no values by name, such as `epochs: 3`: give a recipe, or the config.yaml of a run")


def _stands_alone(word: str, after: str) -> bool:
    """Return whether a word is an option of a part, such as `--data.verify`, that has no value after it."""
    option = re.fullmatch(r"--\w+\.[\w.]+", word)
    return option is not None and not word.endswith(".help") and after.startswith("--")


def _is_on(values: Any, keys: list[str]) -> bool:
    """Return whether the value of those names is true, below the arguments of a class or of one of a list too."""
    if isinstance(values, list):
        return any(_is_on(one, keys) for one in values)
    if not keys:
        return values is True
    inner = values.get(keys[0], values.get("init_args")) if hasattr(values, "get") else None
    if inner is None:
        return False
    return _is_on(inner, keys[1:] if keys[0] in values else keys)


def _recorded(parser: Any, values: Any) -> dict[str, Any]:
    """Return parsed values in plain numbers, text, lists and mappings."""
    import yaml

    dumped = parser.dump(values, skip_validation=True)
    return {k: v for k, v in yaml.safe_load(dumped).items() if k != "config"}


def _with_values(words: list[str], flags: set[str]) -> list[str]:
    """Let `--resume` stand for `--resume=true`."""
    spoken = ("true", "false", "yes", "no")
    pairs = zip(words, [*words[1:], ""], strict=False)
    return [f"{word}=true" if word in flags and after.lower() not in spoken else word for word, after in pairs]


def _with_lists(words: list[str], parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    """Let `--methods kd dist` stand for `--methods=["kd", "dist"]`, for arguments that are lists of plain values.

    One word is a list of one only where the argument must be a list: `--devices 2` means two devices, not the third.
    """
    lists = {
        f"--{name}" for name, one in parameters.items() if str(one.annotation).startswith(("list[str]", "list[int]"))
    }
    plain = {f"--{name}" for name, one in parameters.items() if {"int", "str"} & set(str(one.annotation).split(" | "))}
    joined: list[str] = []
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        values = []
        while word in lists and position < len(words) and not words[position].startswith(("-", "[")):
            values.append(words[position])
            position += 1
        if len(values) == 1 and word in plain:
            joined.append(f"{word}={values[0]}")
        else:
            joined.append(f"{word}={json.dumps(values)}" if values else word)
    return joined
