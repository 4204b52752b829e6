"""Any model by name: networks for small images, timm, torchvision, transformers, or a function of the user's own."""

from functools import partial
from importlib.util import find_spec
from pathlib import Path

from torch import nn

from diffkd.models.cifar import build_cifar, cifar_names
from diffkd.models.extras import nearest
from diffkd.models.from_function import build_from_function
from diffkd.models.from_timm import build_timm, timm_names
from diffkd.models.from_torchvision import build_torchvision, torchvision_names
from diffkd.models.from_transformers import build_transformers
from diffkd.models.sparse_transformers import sparse, sparse_options
from diffkd.models.weights import fill

_FORMS = (
    "cifar/NAME, timm/NAME, torchvision/NAME, hf/NAME_OR_FOLDER, isa/timm/NAME, package.module:function or "
    "path/to/file.py:function"
)


def load_model(
    name: str,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    weights: str | Path | None = None,
    pretrained: bool = False,
    weights_key: str | None = None,
    new_head: bool = False,
) -> nn.Module:
    """Build a model by name and fill it with weights.

    Args:
        name: "cifar/resnet20", "timm/NAME", "torchvision/NAME" (both also as NAME.TAG, which chooses the pretrained
            weights), "hf/NAME_OR_FOLDER", "package.module:function" or "path/to/file.py:function". The last two run
            the user's own code. "isa/timm/NAME" is a vision transformer with sparse attention
            (:func:`~diffkd.models.sparse`), with options as "isa,block=32,shortcut=0/timm/NAME".
        num_classes: length of the output; None for the model's own. Functions get it if they take it.
        in_channels: channels of the images; None for the model's own. Functions get it if they take it.
        weights: local file to load strictly (:func:`~diffkd.load_weights`); None for random or pretrained weights.
        pretrained: load the published weights, which may be fetched from the network.
        weights_key: prefix of the weights' names, if the file holds several sets that fit.
        new_head: initialise layers that depend on `num_classes` randomly if the file has none or others.

    Returns:
        The model, in training mode unless the user's own code chose otherwise. Models of transformers return an object
        with `logits`, all other classifiers of the libraries the logits (B, num_classes) themselves.

    Raises:
        ValueError: if the name is unknown, the model cannot be built as asked, or the weights do not fit.
        FileNotFoundError: if the file of weights or code does not exist.
        ModuleNotFoundError: if an extra of this package must be installed first.
        TypeError: if the user's function returns no model.

    Warns:
        UserWarning: if a layer of a pretrained model, or with `new_head` one of a file, starts from random weights,
            since its number of classes differs.

    >>> load_model("cifar/resnet20", num_classes=10).fc.out_features
    10
    """
    for argument, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if value is not None and value < 1:
            raise ValueError(f"{argument} {value} leaves model '{name}' nothing to work on: it must be at least 1")
    if weights is not None and pretrained:
        raise ValueError(
            f"model '{name}' cannot start from both {weights} and the published weights: give weights or pretrained"
        )
    if weights is not None and not Path(weights).is_file():
        raise FileNotFoundError(f"there is no file {weights} with weights for model '{name}': correct the path")
    model = build(name, num_classes, in_channels, pretrained)
    if weights is not None:
        wider = None
        if new_head and num_classes is not None:
            wider = partial(build, name, num_classes + 1, in_channels, False)
        fill(model, weights, key=weights_key, wider=wider)
    return model


def model_names(prefix: str) -> list[str]:
    """List the names that begin with `prefix` and that `load_model` takes.

    Args:
        prefix: a source or the beginning of a name: "cifar", "timm", "torchvision", "timm/resnet".

    Returns:
        Whole names, sorted, without tags of pretrained weights.

    Raises:
        ValueError: if the source is unknown or cannot be listed.
        ModuleNotFoundError: if the library is not installed.

    >>> model_names("cifar/wrn_40")
    ['cifar/wrn_40_1', 'cifar/wrn_40_2']
    """
    source, _, beginning = prefix.partition("/")
    match source:
        case "cifar":
            names = cifar_names()
        case "timm":
            names = timm_names()
        case "torchvision":
            names = torchvision_names()
        case _:
            raise ValueError(f"models of '{source}' cannot be listed, those of cifar, timm and torchvision can")
    return sorted(f"{source}/{name}" for name in names if name.startswith(beginning))


def build(name: str, num_classes: int | None, in_channels: int | None, pretrained: bool) -> nn.Module:
    """Build a model by name, without loading a file; arguments as for :func:`load_model`."""
    source, _, rest = name.partition("/")
    # A path may begin with a folder named like a source, and timm's own sources have a colon.
    kind, _, options = source.partition(",")
    if ".py:" in name or (":" in name and kind not in ("timm", "hf", "isa")):
        return build_from_function(name, num_classes, in_channels, pretrained)
    if kind == "isa":
        return _build_sparse(name, rest, options, num_classes, in_channels, pretrained)
    match source:
        case "cifar":
            return build_cifar(rest, num_classes, in_channels, pretrained)
        case "timm":
            return build_timm(rest, num_classes, in_channels, pretrained)
        case "torchvision":
            return build_torchvision(rest, num_classes, in_channels, pretrained)
        case "hf":
            return build_transformers(rest, num_classes, in_channels, pretrained)
    if source in ("smp", "fasterrcnn", "retinanet", "fcos"):
        kind, task = ("segmenter", "segmentation") if source == "smp" else ("detector", "detection")
        raise ValueError(
            f"model '{name}' is a {kind}, and a classifier is wanted here: give data for it (to `diffkd layers` --task "
            f"{task}), or another name"
        )
    # A name without a source may exist in several.
    sources = [library for library in ("cifar", "timm", "torchvision") if library == "cifar" or find_spec(library)]
    whole = [f"{library}/{name.lower()}" for library in sources]
    if same := [one for one in whole if one in model_names(one)]:
        raise ValueError(f"model '{name}' has no known source; write {' or '.join(same)}")
    known = [f"{prefix}/{rest}" for prefix in ("cifar", "timm", "torchvision", "hf")] + model_names("cifar")
    raise ValueError(f"model '{name}' has no known source; {nearest(name, known)}. Write {_FORMS}.")


def _build_sparse(
    name: str, rest: str, options: str, num_classes: int | None, in_channels: int | None, pretrained: bool
) -> nn.Module:
    source, _, inner = rest.partition("/")
    if source != "timm":
        raise ValueError(
            f"model '{name}' cannot be given sparse attention by its name, which is for vision transformers of timm: "
            "write isa/timm/NAME, or call diffkd.models.sparse in a function of your own"
        )
    chosen = sparse_options(options, name)
    model = build_timm(inner, num_classes, in_channels, pretrained)
    try:
        return sparse(model, **chosen)
    except ValueError as error:
        raise ValueError(f"model '{name}': {error}") from None
