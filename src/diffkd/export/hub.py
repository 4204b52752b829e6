"""A student as a repository of the Hugging Face Hub: its files, the text of its model card, and sending them."""

import html
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from diffkd.export.plain_student import facts_of_card
from diffkd.export.student_file import read_card
from diffkd.files.weights import write_text
from diffkd.models.extras import require
from diffkd.models.hub import CARD, WEIGHTS, endpoint
from diffkd.recipes.trust import code_of_model

_PIPELINES = {
    "classification": "image-classification",
    "detection": "object-detection",
    "segmentation": "image-segmentation",
}
_LOADERS = {"segmentation": "load_segmenter", "detection": "load_detector", "representation": "load_backbone"}
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_SHOWN_CLASSES = 30


def write_repository(student: Path, folder: Path, repository: str, license: str | None = None) -> list[Path]:
    """Write the files of a student's repository: weights, card, and the README.md that the Hub shows.

    Paths of this machine are taken out of the card.

    Args:
        student: file of the weights, with the card beside it.
        folder: folder to write into.
        repository: "USER/NAME".
        license: of the weights, such as "apache-2.0"; None says nothing.

    Returns:
        The files.

    Raises:
        ValueError: if there is no card, or `repository` is no name.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise ValueError(f"{repository!r} is no name of a repository: write USER/NAME, such as alice/resnet18-cats")
    card = read_card(student)
    if not isinstance(card.get("model"), str):
        raise ValueError(f"{student} has no card that says which model it is: push the run, or a student's file of one")
    public = _without_paths(card)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(student, folder / WEIGHTS)
    write_text(folder / CARD, json.dumps(public, indent=2, sort_keys=True) + "\n")
    write_text(folder / "README.md", model_card(public, repository, license))
    return [folder / name for name in (WEIGHTS, CARD, "README.md")]


def send(folder: Path, repository: str, *, private: bool = False, message: str | None = None) -> str:
    """Create a repository of the Hub, if it is not there, and send the files of a folder in one commit.

    Args:
        folder: with the files.
        repository: "USER/NAME".
        private: create it as a private one.
        message: of the commit.

    Returns:
        Its address.

    Raises:
        PermissionError: if nobody is logged in, or not as somebody who may write there.
        OSError: if the Hub cannot be reached.
        ModuleNotFoundError: if huggingface_hub is not installed.
    """
    hub: Any = require("huggingface_hub", "hub", "`diffkd push`")
    errors: Any = require("huggingface_hub.errors", "hub", "`diffkd push`")
    api = hub.HfApi(endpoint=endpoint())
    try:
        address = str(api.create_repo(repository, private=private, exist_ok=True))
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message or "Add the student of diffkd")
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise PermissionError(
                f"the Hub does not let you write {repository}: log in with `hf auth login`, by a token that may write, "
                "and give a USER or organisation that you belong to"
            ) from error
        raise OSError(_unreachable(repository, error)) from error
    except (OSError, errors.HTTPError) as error:  # of httpx, on which the library stands
        raise OSError(_unreachable(repository, error)) from error
    return address


def _unreachable(repository: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:160] or type(error).__name__
    return (
        f"{repository} could not be sent ({reason}): try again, or write its files with --folder and send them "
        "from elsewhere"
    )


def model_card(card: Mapping[str, Any], repository: str, license: str | None = None) -> str:
    """Return the README.md of a student's repository, in Markdown with the Hub's header.

    Args:
        card: the student's card, whose texts are shown as text, never as markup.
        repository: "USER/NAME".
        license: of the weights; None says nothing.
    """
    hub: Any = require("huggingface_hub", "hub", "a model card")
    task, name = card.get("task", "classification"), card["model"]
    header = hub.ModelCardData(
        library_name="diffkd",
        license=license,
        pipeline_tag=_PIPELINES.get(task),
        tags=["knowledge-distillation", *(["diffkd"] if card.get("teacher") else [])],
    )
    learned = f", distilled from `{_text(card['teacher'])}`" if card.get("teacher") else ""
    lines = [
        f"---\n{header.to_yaml()}\n---\n",
        f"# {repository.partition('/')[2]}\n",
        f"`{_text(name)}` for {task}{learned}, trained with diffkd. The weights in `{WEIGHTS}` are the plain model's, "
        "under its own names.\n",
    ]
    if metrics := card.get("metrics"):
        lines += [f"## Metrics\n\nMeasured on the evaluation images of the training, {_text(card.get('which'))}:\n"]
        lines += [_table(("metric", "value"), ((key, _number(value)) for key, value in metrics.items()))]
    lines += [f"## Input\n\n{_input(card)}\n", f"## Loading\n\n{_loading(card, repository)}"]
    if card.get("method"):
        recipe = {key: card.get(key) for key in ("teacher", "method", "precision", "seed", "averaged", "data")}
        lines += [f"## Recipe\n\n```json\n{json.dumps(recipe, indent=2).replace('`', ' ')}\n```\n"]
    return "\n".join(lines)


def _input(card: Mapping[str, Any]) -> str:
    size = " x ".join(str(side) for side in card.get("image_size", ()))
    classes = [_text(name) for name in card.get("classes", ())]
    rest = f", and {len(classes) - _SHOWN_CLASSES} more" if len(classes) > _SHOWN_CLASSES else ""
    pixels = f"{card.get('in_channels')} channels, {size} pixels"
    if card.get("task") != "detection":
        scale = "floats of the training data's own range" if card.get("scaled") is False else "scaled to [0, 1]"
        pixels += f", {scale}, normalised by mean {card.get('mean')} and standard deviation {card.get('std')}"
    return f"Images of {pixels}. {len(classes)} classes: {', '.join(classes[:_SHOWN_CLASSES])}{rest}."


def _loading(card: Mapping[str, Any], repository: str) -> str:
    """Return how the student is loaded, with this package and without."""
    name = card["model"]
    own = code_of_model(name)
    given = repr(name) if own is None else repr(f"{own}:{name.rpartition(':')[2]}")
    commands = (f"diffkd test hub:{repository} --data.root DATA", f"diffkd fit ... --teacher hub:{repository}")
    text = "\n".join(("```console", *commands, "```\n\n"))
    if own is not None:
        text += f"The code of the network, `{_text(own)}`, is not here.\n\n"
    load = _LOADERS.get(task := str(card.get("task")), "load_model")
    options = "".join(f", {key}={value!r}" for key, value in _options(card, task).items())
    text += (
        "```python\n"
        f"from diffkd.models import {load}\nfrom huggingface_hub import hf_hub_download\n\n"
        f'weights = hf_hub_download("{repository}", "{WEIGHTS}")\n'
        f"model = {load}({given}{options}, weights=weights).eval()\n```\n"
    )
    if (built := _without_diffkd(card, task)) is not None:
        text += (
            "\nWithout diffkd:\n\n```python\n"
            f"{built[0]}\nfrom huggingface_hub import hf_hub_download\nfrom safetensors.torch import load_file\n\n"
            f"model = {built[1]}\n"
            f'model.load_state_dict(load_file(hf_hub_download("{repository}", "{WEIGHTS}")))\n```\n'
        )
    elif own is None:
        text += (
            f"\nWithout diffkd: `diffkd export hub:{repository} --out student.onnx` makes a program that needs "
            "onnxruntime alone.\n"
        )
    return text


def _options(card: Mapping[str, Any], task: str) -> dict[str, Any]:
    """Return the arguments of the function that loads a student for its task, as :func:`load_saved` gives them."""
    classes, channels = {"num_classes": card.get("num_classes")}, {"in_channels": card.get("in_channels")}
    if task == "representation":
        return channels
    if task == "detection":
        facts = facts_of_card(card, CARD)
        return classes | {"min_size": facts.min_size, "max_size": facts.max_size} | dict(card.get("detection") or {})
    if task == "segmentation" and (card.get("segmentation") or {}).get("auxiliary"):
        return classes | channels | {"auxiliary": True}
    return classes | channels


def _without_diffkd(card: Mapping[str, Any], task: str) -> tuple[str, str] | None:
    """Return the import and the expression that build a model by its own library; None where that takes more."""
    classes, channels = card.get("num_classes"), card.get("in_channels")
    source, _, rest = card["model"].partition("/")
    plain = rest.partition(".")[0]
    if source == "timm":
        classes = 0 if task == "representation" else classes
        return "import timm", f'timm.create_model("{plain}", num_classes={classes}, in_chans={channels})'
    if source == "torchvision" and channels == 3 and task not in ("detection", "representation"):
        options = f", aux_loss={bool(_options(card, task).get('auxiliary'))}, weights_backbone=None"
        options = options if task == "segmentation" else ""
        return "import torchvision", f'torchvision.models.get_model("{plain}", num_classes={classes}{options})'
    if source == "smp":
        architecture, _, encoder = rest.partition("/")
        encoder = f"tu-{encoder.removeprefix('timm/')}" if encoder.startswith("timm/") else encoder
        return (
            "import segmentation_models_pytorch as smp",
            f'smp.create_model("{architecture}", "{encoder}", encoder_weights=None, in_channels={channels}, '
            f"classes={classes})",
        )
    return None


def _without_paths(value: Any) -> Any:
    """Return values without the entries that are paths of this machine; of own code the file's name is left."""
    if isinstance(value, Mapping):
        return {key: _without_paths(one) for key, one in value.items() if not _is_path(one)}
    if isinstance(value, (list, tuple)):
        return [_without_paths(one) for one in value if not _is_path(one)]
    if isinstance(value, str) and ".py:" in value:
        return re.split(r"[/\\]", value)[-1]
    return value


def _is_path(value: Any) -> bool:
    if not isinstance(value, str) or ".py:" in value:
        return False
    return value.startswith("~") or PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute()


def _table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    titles = list(titles)
    lines = [titles, ["---"] * len(titles), *([_text(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _text(value: Any) -> str:
    """Return a text of a card, such as the name of a class, as text of a page: no markup, one line."""
    return re.sub(r"([|`*_\[\]\\])", r"\\\1", html.escape(" ".join(str(value).split()), quote=False))
