"""Students of the Hugging Face Hub by name, `hub:USER/NAME` or `hub:USER/NAME@REVISION`: their files, fetched once."""

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from diffkd.models.extras import require

WEIGHTS, CARD = "student.safetensors", "student.json"
"""Names of a student's weights and card in its repository, as in the folder of a run."""

# The files of other libraries, of which one is taken: whole, and never code.
_OTHERS = ("model.safetensors", "pytorch_model.bin")
_NAME = re.compile(r"hub:(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


def is_hub(name: object) -> bool:
    """Return whether a name is one of the Hub; `hub:function` without a slash is a function of a module `hub`.

    >>> is_hub("hub:alice/resnet18-cats"), is_hub("hub:alice/resnet18-cats@v2"), is_hub("hub:small")
    (True, True, False)
    """
    return _NAME.fullmatch(str(name)) is not None


def endpoint() -> str | None:
    """Return the address of another Hub than the public one, which the environment variable HF_ENDPOINT names."""
    return os.environ.get("HF_ENDPOINT") or None


def fetch_student(name: str) -> Path:
    """Fetch a student's weights, and its card if there is one, into the library's cache.

    What is in the cache already is not fetched again, and serves without a network.

    Args:
        name: "hub:USER/NAME" or "hub:USER/NAME@REVISION", a branch, tag or commit.

    Returns:
        The file of the weights, with the card beside it. Of a repository of another library its `model.safetensors`.

    Raises:
        ValueError: if the name is no such name.
        FileNotFoundError: if the repository is missing or private, has no such revision, or holds no weights.
        OSError: if the network does not allow it, and the cache has no copy.
        ModuleNotFoundError: if huggingface_hub is not installed.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        raise ValueError(f"{name!r} is no name of the Hub: write hub:USER/NAME, or hub:USER/NAME@REVISION")
    hub: Any = require("huggingface_hub", "hub", f"{name}")
    errors: Any = require("huggingface_hub.errors", "hub", f"{name}")
    place = {"repo_id": found["repository"], "revision": found["revision"], "endpoint": endpoint()}
    try:
        for file in (WEIGHTS, *_OTHERS):
            try:
                weights = Path(hub.hf_hub_download(filename=file, **place))
            except errors.LocalEntryNotFoundError:
                raise
            except errors.EntryNotFoundError:
                continue
            if file == WEIGHTS:
                with suppress(errors.EntryNotFoundError):  # weights without a card are used like those of a file
                    hub.hf_hub_download(filename=CARD, **place)
            return weights
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{name}: there is no such repository, or it is private and you are not logged in: correct the name, or "
            "log in with `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{name}: the repository has no revision {found['revision']!r}: give a branch, tag or commit of it"
        ) from error
    except OSError as error:
        reason = " ".join(str(error).split()).partition(". ")[0][:160] or type(error).__name__
        raise OSError(
            f"{name} could not be fetched ({reason}): try again where there is a network, or give the student's file"
        ) from error
    raise FileNotFoundError(
        f"{name} holds none of {', '.join((WEIGHTS, *_OTHERS))}: give a repository that `diffkd push` wrote, or the "
        "weights' own library, such as --teacher timm/NAME --teacher_pretrained true"
    )
