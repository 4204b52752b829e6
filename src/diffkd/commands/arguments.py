"""Command line options generated from the arguments of typed functions; recipes and other config files."""

import ast
import inspect
import json
import re
from argparse import SUPPRESS
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import make_dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from diffkd.commands.usage_errors import check_unused_options, explain
from diffkd.files.values import read_yaml, read_yaml_file
from diffkd.recipes.trust import Gate, Trust, UsageError, given_value, named_code, take_trust

# Words that make the parser discard the values of an earlier method or optimiser.
_RESET = {"method": "null", "optimizer": "torch.optim.Optimizer"}


def reset_replaced_classes(words: list[str], optimizer: Any) -> list[str]:
    """Reset a method's or optimiser's values where the command line selects one of another class.

    Otherwise the parser keeps values of arguments with the same name: AT would get the weight of KD, and AdamW the
    learning rate of SGD. With the same class, values that are not given again are kept.

    Args:
        words: command line arguments, which may include config files.
        optimizer: the default optimiser, `{"class_path": ...}`.

    Returns:
        The words with resets inserted.
    """
    classes = {"method": _classes(None), "optimizer": _classes(optimizer)}
    result = []
    for word, after in zip(words, [*words[1:], ""], strict=False):
        for option, value in _values(word, after):
            given = _classes(value)
            if given and classes[option] and given != classes[option]:
                result.append(f"--{option}={_RESET[option]}")
            classes[option] = classes[option] if given is None else given
        result.append(word)
    return result


def _values(word: str, after: str) -> Iterator[tuple[str, Any]]:
    """Yield the methods and optimisers set by a word, directly or in a config file."""
    option, equals, value = word.partition("=")
    text = value if equals else after
    if option == "--config" and Path(text).is_file():
        values = read_yaml_file(Path(text))
        yield from ((name, value) for name, value in values.items() if name in _RESET)
    elif option[2:] in _RESET:
        with suppress(ValueError):  # reported by the parser
            yield option[2:], read_yaml(text)


def _classes(value: Any) -> tuple[str, ...] | None:
    """Return the classes of one or several methods, or of an optimiser; () for none, None if the value has no class."""
    if isinstance(value, list):
        found = [_classes(one) for one in value]
        return tuple(name for one in found for name in one or ())
    if isinstance(value, Mapping):
        value = value.get("class_path", "")
    if value is None:
        return ()
    return (str(value).rpartition(".")[2],) if value else None


def fit_with(words: list[str], use: Callable[..., Any] | None = None) -> Any:
    """Call :func:`~diffkd.training.fit.fit` with command line arguments: [RECIPE] [OPTIONS].

    Args:
        words: of the command line.
        use: function to call instead of `fit`, with the same arguments.

    Raises:
        UsageError: if the words are not valid options.
        FileNotFoundError: if there is no such recipe.
    """
    words = _with_recipe(words)
    if not {"-h", "--help"}.isdisjoint(words):
        return call(_options_of_fit(data=str), words, "fit", configurable=True)
    _check_early(words)
    return call(fit_arguments(), words, "fit", configurable=True, use=use or _fit)


def values_of_fit(words: list[str]) -> dict[str, Any]:
    """Return the values that :func:`fit_with` would record as the run's config, without building anything.

    Args:
        words: of the command line.

    Raises:
        UsageError: if the words are not valid options.
        FileNotFoundError: if there is no such recipe.
    """
    words = _with_recipe(words)
    _check_early(words)
    options = fit_arguments()
    parser = _parser(options, "fit", skip=set(), configurable=True)
    return _recorded(parser, _parsed(parser, options, words))


def _fit(**arguments: Any) -> Any:
    from diffkd.training.fit import fit

    return fit(**arguments)


def fit_arguments() -> type:
    """Return the options of `fit` including the data, whose type needs the slow import of Lightning."""
    from lightning.pytorch import LightningDataModule

    import diffkd.data  # noqa: F401  (so that its modules can be named without the package)

    return _options_of_fit(LightningDataModule)


def _options_of_fit(data: type) -> type:
    """Return a class with all arguments of `fit`.

    Args:
        data: type of the data.
    """
    from diffkd.training.options import FitOptions

    described = """Train a student; with a teacher and a method, distil the teacher into it.

    Args:
        data: where images and labels come from, a class of diffkd.data; --data.help CLASS lists its options.
    """
    return make_dataclass(
        "Fit", [("data", data)], bases=(FitOptions,), namespace={"__doc__": described}, kw_only=True, frozen=True
    )


def _check_early(words: Sequence[str]) -> None:
    """Raise UsageError before slow imports if a config file cannot be read or an option of `fit` is unknown."""
    for word, after in zip(words, [*words[1:], ""], strict=False):
        if word == "--config" or word.startswith("--config="):
            _check_file(Path(after if word == "--config" else word.removeprefix("--config=")))
    # Parsed from source, not imported: the types of the options need PyTorch.
    source = files("diffkd").joinpath("training", "options.py").read_text(encoding="utf-8")
    (options,) = (one for one in ast.parse(source).body if isinstance(one, ast.ClassDef) and one.name == "FitOptions")
    fields = (one.target for one in options.body if isinstance(one, ast.AnnAssign))
    known = {one.id for one in fields if isinstance(one, ast.Name)} | {"data", "config", "trust", "print_config"}
    for word in words:
        name = re.match(r"--(\w+)", word)
        if name is not None and name[1] not in known:
            raise UsageError(explain(f"unrecognized arguments: {word}", [f"--{one}" for one in sorted(known)], "fit"))
    if not words:
        raise UsageError("required, but not given: --student, --data, --out; or give a recipe, and --out")


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
    """Generate options from a function's arguments, parse `words`, and call the function.

    Args:
        function: a typed function; its docstring provides the help texts.
        words: of the command line.
        command: name of the command, for messages.
        skip: arguments that are not options.
        fixed: values of arguments that are not options.
        positional: the argument that receives the first word, unless the word is an option.
        configurable: accept any number of `--config FILE`, later ones overriding earlier ones, and pass the resolved
            values to the function as `config`.
        use: function to call with the arguments instead of `function`.

    Returns:
        The function's result; None after `--help`.

    Raises:
        UsageError: if the words are not valid options.
    """
    if positional is not None and words and not words[0].startswith("-"):
        words = [f"--{positional}={words[0]}", *words[1:]]
    parser = _parser(function, command, skip={*(skip or ()), *(fixed or ())}, configurable=configurable)
    if {"-h", "--help"} & set(words):
        # The parser lists all known subclasses of Module, several pages.
        text = re.sub(r",\s+known\s+subclasses:[^)]*\)", ")", parser.format_help())
        text = re.sub(r"( CONFIG)\s+Path to a configuration file\.", r"\1  a file of these", text)
        print(re.sub(r"\s+\(type:\s+Optional\[Any\],\s+default:\s+null\)", "", text), end="")  # noqa: T201
        return None
    values = _parsed(parser, function, words)
    arguments = parser.instantiate(values).as_dict()
    arguments.pop("config", None)
    if configurable:
        arguments["config"] = _recorded(parser, values)
    return (use or function)(**arguments, **(fixed or {}))


def _with_recipe(words: list[str]) -> list[str]:
    """Replace `RECIPE` by `--config=FILE`; with `--resume` and a run's `config.yaml`, set `--out` to its folder."""
    from diffkd.recipes import find_recipe

    if not words or words[0].startswith("-"):
        return words
    recipe = find_recipe(words[0])
    out = []
    if not {"--resume", "--resume=true"}.isdisjoint(words):
        from diffkd.files.run_folder import RunFolder

        run = RunFolder(recipe.parent)
        if recipe == run.config and (run.checkpoint.is_file() or run.result.is_file()):
            out = [f"--out={run.path}"]
    # Before the other words, so that an --out among them takes precedence.
    return [f"--config={recipe}", *out, *words[1:]]


def _parser(function: Callable[..., Any], command: str, *, skip: set[str | int], configurable: bool) -> Any:
    """Return a parser whose options are the arguments of a function."""
    from jsonargparse import ArgumentParser

    parameters = inspect.signature(function).parameters
    # No abbreviations such as --conf, which other checks of the words would miss.
    parser = ArgumentParser(prog=f"diffkd {command}", exit_on_error=False, allow_abbrev=False)
    if configurable:
        parser.usage = f"diffkd {command} [RECIPE] [OPTIONS]"  # there are too many options to list them twice
        parser.add_argument("--config", action="config", help="recipe: a file of values for these options")
        trust = "a file or module of your own whose code recipes may name; may be repeated"
        parser.add_argument("--trust", default=SUPPRESS, metavar="FILE_OR_MODULE", help=trust)
    # Untyped arguments, as of custom methods, accept any plain value.
    if isinstance(function, type):
        parser.add_class_arguments(function, skip=skip, fail_untyped=False)
    else:
        parser.add_function_arguments(function, skip=skip, fail_untyped=False)
    if "seed" in parameters and "data" in parameters:
        parser.link_arguments("seed", "data.init_args.seed")
    if "optimizer" in parameters:
        from diffkd.files.config import describe

        parser.set_defaults({"optimizer": describe(parameters["optimizer"].default)})
    return parser


def _parsed(parser: Any, function: Callable[..., Any], words: list[str]) -> Any:
    from jsonargparse import ArgumentError

    parameters = inspect.signature(function).parameters
    words, names = take_trust(words)
    words = _with_all_teachers(words)
    resume = not {"--resume", "--resume=true"}.isdisjoint(words)
    gate = Gate(function, Trust([*names, *named_code(words)]), resume=resume)
    gate.check_words(words)
    if names and "trust" in parameters:
        words = [*words, f"--trust={json.dumps(names)}"]
    if "optimizer" in parameters:
        words = reset_replaced_classes(words, parser.get_default("optimizer"))
    flags = {f"--{name}" for name, parameter in parameters.items() if parameter.annotation is bool}
    bare = {word for word, after in zip(words, [*words[1:], "--"], strict=False) if _is_bare_flag(word, after)}
    try:
        values = parser.parse_args(_with_lists(_with_values(words, flags | bare), parameters))
    except ArgumentError as error:
        options = [option for action in parser._actions for option in action.option_strings]
        message = explain(str(error), options, parser.prog.removeprefix("diffkd "))
        raise UsageError(name_pair(message, given_value(words, "pairs"), partial(_faulty_pairs, parser))) from error
    for name, value in list(values.items()):  # no shell has seen the values of files
        if isinstance(value, str) and value.startswith("~/"):
            values[name] = str(Path(value).expanduser())
    for option in sorted(bare):
        if not _is_on(values, option.removeprefix("--").split(".")):
            raise UsageError(f"{option}: give its value after it; only what is true or false can stand alone")
    if "optimizer" in parameters:
        gate.check_models({name: values.get(name) for name in ("student", "teacher")})
        check_unused_options(words, values)
    return values


def _faulty_pairs(parser: Any, words: list[str]) -> bool:
    from jsonargparse import ArgumentError

    try:
        parser.parse_args(words)
    except ArgumentError as error:
        return 'Parser key "pairs"' in str(error)
    return False


def _check_file(file: Path) -> None:
    """Raise UsageError with the file's name, which the parser omits, if an existing file is not a mapping."""
    try:
        values = read_yaml_file(file) if file.is_file() else {}
    except ValueError as error:
        raise UsageError(str(error)) from error
    if not isinstance(values, dict):
        raise UsageError(
            f"{file} holds no values by name, such as `epochs: 3`: give a recipe, or the config.yaml of a run"
        )


def _is_bare_flag(word: str, after: str) -> bool:
    """Return whether a word is a nested option, such as `--data.verify`, without a value after it."""
    option = re.fullmatch(r"--\w+\.[\w.]+", word)
    return option is not None and not word.endswith(".help") and after.startswith("--")


def _is_on(values: Any, keys: list[str]) -> bool:
    """Return whether the value at nested keys is true, also inside `init_args` and lists."""
    if isinstance(values, list):
        return any(_is_on(one, keys) for one in values)
    if not keys:
        return values is True
    inner = values.get(keys[0], values.get("init_args")) if hasattr(values, "get") else None
    if inner is None:
        return False
    return _is_on(inner, keys[1:] if keys[0] in values else keys)


def _recorded(parser: Any, values: Any) -> dict[str, Any]:
    """Return parsed values as plain numbers, strings, lists and mappings."""
    import yaml

    dumped = yaml.safe_load(parser.dump(values, skip_validation=True))
    first = {name: dumped[name] for name in ("student", "data") if name in dumped}
    return first | {name: value for name, value in dumped.items() if name != "config"}


def _with_values(words: list[str], flags: set[str]) -> list[str]:
    """Replace `--resume` by `--resume=true`, for all flags."""
    spoken = ("true", "false", "yes", "no")
    pairs = zip(words, [*words[1:], ""], strict=False)
    return [f"{word}=true" if word in flags and after.lower() not in spoken else word for word, after in pairs]


def _with_all_teachers(words: list[str]) -> list[str]:
    """Replace `--teacher A --teacher B` by `--teacher=["A", "B"]`; `--teacher null` takes back those before it."""
    found: list[str] = []
    kept: list[str] = []
    rest = iter(words)
    for word in rest:
        if re.match(r"--teacher(=|$)", word):
            _, equals, value = word.partition("=")
            found.append(value if equals else next(rest, ""))
        else:
            kept.append(word)
    if len(found) < 2:
        return words
    if "null" in found:
        found = found[len(found) - found[::-1].index("null") :] or ["null"]
        if len(found) == 1:
            return [*kept, f"--teacher={found[0]}"]
    values = [json.loads(one) if one.startswith(("[", "{")) else one for one in found]
    return [*kept, f"--teacher={json.dumps(values)}"]


def _with_lists(words: list[str], parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    """Replace `--methods kd dist` by `--methods=["kd", "dist"]`, for arguments that are lists of plain values.

    A single word becomes a list only if the argument must be a list: `--devices 2` means two devices, not device 2.
    """
    lists = {
        f"--{name}"
        for name, one in parameters.items()
        if str(one.annotation).startswith(("list[str]", "list[int]", "list[typing.L"))
    } | ({"--logger", "--callbacks"} & {f"--{name}" for name in parameters})
    plain = {f"--{name}" for name, one in parameters.items() if {"int", "str"} & set(str(one.annotation).split(" | "))}
    plain |= {"--logger", "--callbacks"}
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


def name_pair(message: str, pairs: Any, complains: Callable[[list[str]], bool]) -> str:
    """Return a message about `--pairs` with the number of the pair, the class of its method, and a fix.

    Args:
        message: the message, beginning with the option, such as "--pairs.method.scale: 'x' is not a number".
        pairs: all pairs, as given.
        complains: function that returns whether the parser rejects the pairs in some words of a command line.
    """
    if not message.startswith("--pairs.") or not isinstance(pairs, Sequence) or isinstance(pairs, str):
        return message
    for number, pair in enumerate(pairs):
        if complains([f"--pairs={json.dumps([pair], default=str)}"]):
            option, colon, reason = message.partition(": ")
            method = pair.get("method") if isinstance(pair, Mapping) else None
            path = method.get("class_path") if isinstance(method, Mapping) else method
            inside = option.startswith("--pairs.method.") and isinstance(path, str)
            whose = f" of {path}" if inside else ""
            mend = "" if ";" in reason else f"; give what {path if inside else 'a Pair'} takes there"
            return f"--pairs[{number}]{option.removeprefix('--pairs')}{whose}{colon}{reason}{mend}"
    return message
