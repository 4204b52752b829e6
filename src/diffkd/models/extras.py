"""Errors for unknown names (with the nearest ones), missing libraries (with their extra) and failed downloads."""

import difflib
import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType


def require(module: str, extra: str, reason: str) -> ModuleType:
    """Import and return a module of an optional library.

    Args:
        module: name to import, such as "torchvision.models".
        extra: the extra of this package that installs it.
        reason: what needs it, as the error's first words.

    Raises:
        ModuleNotFoundError: if the library is not installed, naming the command that installs it.
    """
    library = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != library:
            raise
        raise ModuleNotFoundError(
            f"{reason} needs {library}, which is not installed: pip install 'diffkd[{extra}]'", name=library
        ) from None


@contextmanager
def fetched(name: str, what: str) -> Iterator[None]:
    """In this context, turn errors of fetching published weights into a message with the file and an alternative.

    Args:
        name: of the model, as the user gave it.
        what: the file, by its address or its name on the Hub.

    Raises:
        OSError: if the network, the server or the disk does not allow it.
    """
    try:
        yield
    except OSError as error:  # base class of the errors of urllib, requests and huggingface_hub
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise OSError(
            f"the published weights of model '{name}' could not be fetched from {what} ({reason}): fetch that file "
            "where there is a network, and give it as --student_weights or --teacher_weights FILE instead"
        ) from error


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return "nearest: 'a', 'b'", the known names most like `name`, for use in an error message.

    Args:
        name: the name that was not found.
        known: the names that exist.
        count: maximum number of names.

    Returns:
        The text; "nothing is close to it" if no known name is.
    """
    close = difflib.get_close_matches(name, sorted(known), n=count)
    return "nearest: " + ", ".join(f"'{match}'" for match in close) if close else "nothing is close to it"
