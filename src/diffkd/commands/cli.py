"""The command line: `diffkd COMMAND`; each command is a typed function whose arguments are its options."""

import io
import json
import os
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from diffkd.commands.arguments import call, fit_with
from diffkd.recipes.trust import UsageError

_HELP = """usage: diffkd COMMAND [OPTIONS]

Knowledge distillation for vision models, with DiffKD at its heart.

commands:
{commands}

`diffkd COMMAND --help` lists the options of a command.
--traceback, or DIFFKD_TRACEBACK=1, shows where an error came from.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments after `diffkd`; None: `sys.argv[1:]`.

    Returns:
        0 on success, 1 if the command failed, 2 for a usage error, 128 plus the signal's number if it was interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    _print_anything()
    wants_traceback = "--traceback" in words or os.environ.get("DIFFKD_TRACEBACK") == "1"
    # A shell does not expand the ~ of --out=~/runs, so a folder named ~ would be created.
    words = [re.sub(r"^(--[\w.]+=)?~(?=/)", _expand_home, word) for word in words if word != "--traceback"]
    commands = _commands()
    if not words or words[0] in ("-h", "--help"):
        width = max(map(len, commands))
        lines = (
            textwrap.fill(
                f"  {name:{width}}  {(run.__doc__ or '').splitlines()[0]}",
                width=80,
                subsequent_indent=" " * (width + 4),
                break_on_hyphens=False,
            )
            for name, run in commands.items()
        )
        print(_HELP.format(commands="\n".join(lines)), end="")  # noqa: T201
        return 0 if words else 2
    if words[0] == "--version":
        from diffkd import __version__

        print(__version__)  # noqa: T201
        return 0
    if words[0] not in commands:
        return _fail(f"there is no command {words[0]!r}; there are {', '.join(commands)}", 2)
    if missing := [name for name in ("lightning", "jsonargparse", "torchmetrics", "rich") if find_spec(name) is None]:
        return _fail(f"`diffkd {words[0]}` needs {', '.join(missing)}: pip install 'diffkd[train]'", 1)
    try:
        with _plain_warnings():
            commands[words[0]](words[1:])
    except UsageError as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:  # the reader closed the pipe, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError, ArithmeticError, ImportError, RuntimeError) as error:
        if wants_traceback:
            raise
        return _fail(_reason(error), 1)
    except Exception as error:
        if (signum := getattr(error, "signum", None)) is not None:
            return _fail(str(error), 128 + signum)
        if wants_traceback or not type(error).__module__.startswith("lightning."):
            raise  # a bug in this package: show the whole traceback
        return _fail(str(error), 1)
    return 0


def _print_anything() -> None:
    """Print characters that the output's encoding lacks as escapes, such as names of classes on a Windows console."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _expand_home(found: re.Match[str]) -> str:
    return f"{found[1] or ''}{Path.home()}"


def _commands() -> dict[str, Callable[[list[str]], None]]:
    return {
        "demo": _demo,
        "fit": _fit,
        "test": _test,
        "predict": _predict,
        "profile": _profile,
        "layers": _layers,
        "inspect": _inspect,
        "export": _export,
        "push": _push,
        "compare": _compare,
        "tune": _tune,
        "plot": _plot,
        "report": _report,
        "recipes": _recipes,
    }


def _demo(words: list[str]) -> None:
    """Distil a small student with several methods, in minutes, on data of the package."""
    from diffkd.commands.demos import demo

    call(demo, words, "demo")


def _fit(words: list[str]) -> None:
    """Train a student, alone or with a teacher: diffkd fit [RECIPE] --out FOLDER [OPTIONS]."""
    fit_with(words, use=partial(_fit_and_report, words))


def _fit_and_report(words: list[str], **arguments: Any) -> Any:
    """Train, and write the page of the finished run."""
    from diffkd.commands.report import write_report_of
    from diffkd.recipes.trust import named_code, take_trust
    from diffkd.tasks.distributed import is_first_process
    from diffkd.training.fit import fit

    result = fit(**arguments)
    if is_first_process(arguments["devices"], arguments["num_nodes"]):
        tell = partial(print, file=sys.stderr) if arguments["progress"] else str
        trust = [*take_trust(words)[1], *named_code(words)]
        write_report_of(Path(arguments["out"]).expanduser(), trust=list(dict.fromkeys(trust)), tell=tell)
    return result


def _compare(words: list[str]) -> None:
    """Train a recipe with several methods and seeds: diffkd compare RECIPE --out FOLDER [OPTIONS] [-- FIT_OPTIONS]."""
    from diffkd.commands.compare import compare

    split = words.index("--") if "--" in words else len(words)
    fixed = {"options": words[split + 1 :]}
    call(compare, words[:split], "compare", fixed=fixed, positional="recipe")


def _tune(words: list[str]) -> None:
    """Search the values of a method on held-out training data: diffkd tune RECIPE --out FOLDER [-- FIT_OPTIONS]."""
    from diffkd.commands.tune import tune

    split = words.index("--") if "--" in words else len(words)
    call(tune, words[:split], "tune", fixed={"options": words[split + 1 :]}, positional="recipe")


def _test(words: list[str]) -> None:
    """Measure a trained student: diffkd test RUN_OR_FILE [OPTIONS]."""
    import diffkd.data  # noqa: F401
    from diffkd.commands.evaluate import classes_of, evaluate
    from diffkd.data.image_data import allow_missing_training_images

    with allow_missing_training_images(classes_of(words[0]) if words else ()):
        call(evaluate, _with_data_of_card(words), "test", positional="student")


def _with_data_of_card(words: list[str]) -> list[str]:
    """Apply `--data.NAME VALUE` without `--data` to the data named in the student's card."""
    from diffkd.commands.evaluate import described_data, evaluate
    from diffkd.export.student_file import card_file, find_student, read_card
    from diffkd.recipes.trust import Gate, Trust, take_trust

    changes = [position for position, word in enumerate(words) if re.match(r"--data\.(?!help\b)", word)]
    named = any(re.match(r"--data(=|$)", word) for word in words)
    if named or not changes or words[0].startswith("-"):
        return words
    student = find_student(words[0], "best" if {"best", "--which=best"} & set(words) else "last")
    trust = take_trust(words)[1]
    kind, arguments = described_data(read_card(student), trust)
    home = "diffkd.data" if kind.__module__.startswith("diffkd.data.") else kind.__module__
    described = {"class_path": f"{home}.{kind.__name__}", "init_args": arguments}
    # Checked here, since values on the command line are not checked.
    Gate(evaluate, Trust(trust)).check({"data": described}, str(card_file(student)))
    return [*words[: changes[0]], f"--data={json.dumps(described)}", *words[changes[0] :]]


def _predict(words: list[str]) -> None:
    """Run a student on images: diffkd predict STUDENT IMAGES --out FOLDER [OPTIONS]."""
    from diffkd.commands.predict import predict

    count = next((index for index, word in enumerate(words) if word.startswith("-")), len(words))
    if count > 1:
        words = [words[0], f"--images={json.dumps(words[1:count])}", *words[count:]]
    call(predict, words, "predict", positional="student")


def _profile(words: list[str]) -> None:
    """Measure what a student costs: diffkd profile STUDENT [--teacher TEACHER] [OPTIONS]."""
    from diffkd.commands.profile import profile

    call(profile, words, "profile", positional="student")


def _layers(words: list[str]) -> None:
    """List the layers of a model, and with --teacher the pairs of two: diffkd layers MODEL [OPTIONS]."""
    from diffkd.commands.layers import layers

    call(layers, words, "layers", positional="model")


def _inspect(words: list[str]) -> None:
    """Show what a file of weights, a run or an annotation file holds: diffkd inspect FILE [OPTIONS]."""
    from diffkd.commands.inspect_file import inspect

    call(inspect, words, "inspect", positional="file")


def _export(words: list[str]) -> None:
    """Save the plain student of a run or checkpoint: diffkd export RUN_OR_CHECKPOINT --out FILE."""
    from diffkd.commands.export import export

    call(export, words, "export", positional="source")


def _push(words: list[str]) -> None:
    """Send a student to the Hugging Face Hub: diffkd push RUN_OR_FILE USER/NAME [OPTIONS]."""
    from diffkd.commands.push import push

    if len(words) > 1 and not words[1].startswith("-"):
        words = [words[0], f"--repository={words[1]}", *words[2:]]
    call(push, words, "push", positional="student")


def _plot(words: list[str]) -> None:
    """Draw the course of a run, and what student, denoiser and teacher see: diffkd plot RUN [OPTIONS]."""
    from diffkd.commands.plot import plot

    call(plot, words, "plot", positional="run")


def _report(words: list[str]) -> None:
    """Write one page about a run or a comparison: diffkd report RUN_OR_COMPARISON [OPTIONS]."""
    from diffkd.commands.report import report

    call(report, words, "report", positional="source")


def _recipes(words: list[str]) -> None:
    """List the recipes that come with the package, for diffkd fit."""
    from diffkd.recipes import recipes

    call(recipes, words, "recipes")


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Print this package's warnings without their source line."""
    usual, package = warnings.formatwarning, Path(__file__).parents[1]

    def plain(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if package in Path(filename).parents:
            return f"diffkd: warning: {_printable(str(message))}\n"
        return usual(message, category, filename, lineno, line)

    warnings.formatwarning = plain
    try:
        with warnings.catch_warnings():
            # What Pillow finds wrong in a file that it reads nonetheless; where it cannot, there is an error.
            warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
            yield
    finally:
        warnings.formatwarning = usual


def _reason(error: Exception) -> str:
    """Return the message of an error; for one of a data loader worker, without the worker's traceback."""
    text = str(error)
    if caught := re.match(r"Caught (\w+) in DataLoader worker process", text):
        text = re.split(rf"^(?:[\w.]+\.)?{caught[1]}: ", text, flags=re.MULTILINE)[-1]
    return text or type(error).__name__


def _fail(message: str, code: int) -> int:
    # A name in a file from elsewhere may be as long as the file.
    words = (word if len(word) <= 512 else f"{word[:240]}...{word[-240:]}" for word in message.split())
    print(f"diffkd: {_printable(' '.join(words))}", file=sys.stderr)  # noqa: T201
    return code


def _printable(text: str) -> str:
    """Replace control characters, which names in files from elsewhere may hold for the terminal, except line ends.

    >>> _printable("a\x1b[31mb")
    'a?[31mb'
    """
    return "".join(one if one.isprintable() or one == "\n" else "?" for one in text)


if __name__ == "__main__":
    sys.exit(main())
