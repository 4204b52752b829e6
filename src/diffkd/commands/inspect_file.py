"""`diffkd inspect`: show the content of a file of weights, a run or an annotation file, and how it would be read."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from torch import Tensor

from diffkd.data.folders import is_file, is_folder
from diffkd.export.student_file import find_weights, read_card
from diffkd.files.fitting import fit_contents
from diffkd.files.history import read_csv
from diffkd.files.run_folder import RunFolder
from diffkd.files.values import read_json_file, read_yaml_file
from diffkd.files.weights import Contents, choose_key, is_averaged, read_contents, without_wrappers
from diffkd.models.hub import is_hub
from diffkd.models.weights import library_names
from diffkd.tasks.data_facts import TaskName

_ANNOTATIONS = (".json", ".xml", ".yaml", ".yml")
_SHOWN = 8


def inspect(
    file: str,
    *,
    model: str | None = None,
    task: TaskName = "classification",
    num_classes: int | None = None,
    in_channels: int = 3,
    key: str | None = None,
) -> None:
    """Print the content of a file of weights, a run folder or an annotation file, and how it would be read.

    No code in the file is run, and the file is not changed.

    Args:
        file: weights of any trainer or library, a run folder, hub:USER/NAME, COCO JSON, VOC XML, or YOLO's data.yaml.
        model: for weights, name of the model to load them into, as for fit; reports what would be loaded.
        task: task of that model.
        num_classes: number of classes of that model; None: the model's default.
        in_channels: input channels of that model.
        key: for a file with several sets of weights, the prefix of those to use.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or of an unknown format.
    """
    path = find_weights(file) if is_hub(file) else Path(file)
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path} to inspect: correct the path")
    if path.is_dir() and RunFolder(path).config.is_file():
        lines = _run(RunFolder(path))
    elif path.is_dir() and (path / "data.yaml").is_file():
        lines = _yolo(path / "data.yaml")
    elif path.suffix.lower() in _ANNOTATIONS and not path.name.endswith(".index.json"):
        readers = {".json": _json, ".xml": _voc}
        lines = readers.get(path.suffix.lower(), _yolo)(path)
    else:
        lines = _weights(path, model, task, num_classes, in_channels, key)
    for line in lines:
        print("".join(one if one.isprintable() else "?" for one in line))  # noqa: T201


def _weights(
    given: Path, model: str | None, task: TaskName, num_classes: int | None, in_channels: int, key: str | None
) -> Iterator[str]:
    path = find_weights(given)
    contents = read_contents(path)
    values = sum(tensor.numel() for tensor in contents.tensors.values())
    kinds = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in contents.tensors.values())
    yield (
        f"{path}: weights, {len(contents.tensors)} tensors, {values:,} values ({_counts(kinds)}), "
        f"{path.stat().st_size / 2**20:.1f} MiB"
    )
    for one in contents.keys:
        inside = contents.under(one)
        note = ", an average" if is_averaged(one) else ""
        yield f"  {repr(one) if one else 'the file itself'}: {len(inside)} tensors{note}, {_names(inside)}"
    if contents.skipped:
        yield f"  not read: {_listed(contents.skipped)}"
    card = read_card(path)
    if card:
        facts = ("task", "model", "num_classes", "in_channels", "image_size", "mean", "std", "which", "epoch")
        yield "  card: " + ", ".join(f"{name} {card[name]}" for name in facts if card.get(name) is not None)
    if model is None:
        yield f"  {_taken(path, contents, key)}; with --model NAME it is said how they fit that model"
        return
    yield f"  {_fitted(path, contents, model, task, num_classes, in_channels, key)}"


def _taken(path: Path, contents: Contents, key: str | None) -> str:
    if not contents.keys:
        return "no state dict is in it"
    try:
        chosen = choose_key(path, contents.keys, key)
    except ValueError as error:
        return f"which are taken depends on the model: {str(error).removeprefix(f'{path} ')}"
    where = f"those under {chosen!r}" if chosen else "all"
    return f"taken would be {where}, and of them what the model has, whatever their names begin with"


def _fitted(
    path: Path,
    contents: Contents,
    model: str,
    task: TaskName,
    num_classes: int | None,
    in_channels: int,
    key: str | None,
) -> str:
    from diffkd.commands.layers import facts_of_size
    from diffkd.tasks.task_of_data import load

    facts = facts_of_size(task, num_classes, in_channels, None)
    built = load(model, facts, num_classes=num_classes, in_channels=in_channels)
    fit = fit_contents(built, path, contents, key, library_names)
    parts = [f"into {model}: {len(fit.filled)} of {len(built.state_dict())} entries"]
    if fit.key:
        parts.append(f"under {fit.key!r}")
    if fit.others:
        parts.append(f"not {_listed(fit.others)}")
    parts.extend(fit.notes)
    for what, names in (("missing", fit.missing), ("of another shape", list(fit.shapes)), ("left", fit.unexpected)):
        if names:
            parts.append(f"{what}: {_listed(names)}")
    return "; ".join(parts)


def _names(tensors: Mapping[str, Tensor]) -> str:
    """Return the first and the last name with their shapes."""
    plain = list(without_wrappers(dict(tensors)).items())
    ends = plain[:1] + plain[1:][-1:]
    return " ... ".join(f"{name} {'x'.join(map(str, value.shape)) or 'number'}" for name, value in ends)


def _run(run: RunFolder) -> Iterator[str]:
    config = run.read_config()
    state = (
        "finished" if run.result.is_file() else "interrupted" if run.checkpoint.is_file() else "without a checkpoint"
    )
    yield f"{run.path}: a run, {state}"
    for name in ("student", "teacher", "teacher_weights", "method", "data", "epochs", "seed"):
        if config.get(name) is not None:
            yield f"  {name}: {_short(config[name])}"
    if run.metrics.is_file():
        rows = read_csv(run.metrics)
        yield f"  {len(rows)} epochs measured"
    if run.result.is_file():
        result = run.read_result()
        score = result["score"]
        for which in ("last", "best"):
            yield f"  {which} epoch ({int(result[which]['epoch'])}): {score} {100 * result[which][score]:.2f} %"
    for file in (run.student, run.best, run.checkpoint):
        if file.is_file():
            yield f"  {file.name}: {file.stat().st_size / 2**20:.1f} MiB"
    yield f"  go on with: diffkd test {run.path}, diffkd export {run.path}, or --teacher_weights {run.path}"


def _json(path: Path) -> Iterator[str]:
    content = read_json_file(path)
    if isinstance(content, dict) and {"model", "num_classes"} <= content.keys():
        yield f"{path}: the card of a student; its weights are {path.with_suffix('.safetensors').name}"
        return
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in ("images", "categories")):
        raise ValueError(f"{path} is no annotation file of COCO: it needs the lists images, annotations and categories")
    entries = {key: _mappings(content.get(key)) for key in ("images", "annotations", "categories")}
    boxes = [one for one in entries["annotations"] if one.get("bbox")]
    crowds = sum(bool(one.get("iscrowd")) for one in entries["annotations"])
    yield (
        f"{path}: COCO, {len(entries['images'])} images, {len(entries['annotations'])} annotations, {len(boxes)} with "
        f"a box, {crowds} crowds"
    )
    names = {str(one.get("id")): str(one.get("name")) for one in entries["categories"]}
    counts = Counter(names.get(str(one.get("category_id")), "unknown") for one in entries["annotations"])
    yield f"  {len(names)} classes in the order of their ids: {_listed(names.values())}"
    yield f"  annotations by class: {_counts(counts)}"
    annotated = {str(one.get("image_id")) for one in entries["annotations"]}
    empty = sum(str(one.get("id")) not in annotated for one in entries["images"])
    if empty:
        yield f"  {empty} images have no annotation"
    yield f"  read by --data diffkd.data.CocoDetection --data.root {path.parent} --data.train {path.name}"


def _mappings(values: Any) -> list[dict[str, Any]]:
    return [one for one in values if isinstance(one, dict)] if isinstance(values, list) else []


def _voc(path: Path) -> Iterator[str]:
    from diffkd.data.detection.voc import parse_xml  # with Lightning, which takes seconds to import

    try:
        root = parse_xml(path.read_bytes())
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise ValueError(f"{path} is no XML that is read here ({error}): fetch it again") from error
    objects = root.findall("object")
    if root.tag != "annotation":
        raise ValueError(f"{path} is no annotation of VOC: its root is <{root.tag[:40]}>, not <annotation>")
    size = "x".join((root.findtext(f"size/{side}") or "?").strip() for side in ("width", "height"))
    yield f"{path}: VOC, image {(root.findtext('filename') or '?').strip()}, {size} pixels, {len(objects)} objects"
    for one in objects[:_SHOWN]:
        sides = ((one.findtext(f"bndbox/{side}") or "?").strip() for side in ("xmin", "ymin", "xmax", "ymax"))
        flags = [flag for flag in ("difficult", "truncated") if (one.findtext(flag) or "0").strip() == "1"]
        yield f"  {', '.join([(one.findtext('name') or '?').strip(), ' '.join(sides), *flags])}"
    if len(objects) > _SHOWN:
        yield f"  and {len(objects) - _SHOWN} more"
    yield f"  read by --data diffkd.data.VocDetection --data.root {path.parent.parent}"


def _yolo(path: Path) -> Iterator[str]:
    content = read_yaml_file(path)
    if not isinstance(content, dict) or "names" not in content:
        raise ValueError(f"{path} is no data.yaml of YOLO, which has names: give that, or the folder of a run")
    names = content["names"]
    listed = [str(name) for name in (names.values() if isinstance(names, dict) else names or ())]
    yield f"{path}: YOLO, {len(listed)} classes: {_listed(listed)}"
    top = path.parent / str(content.get("path") or ".")
    for split in ("train", "val", "test"):
        if content.get(split) is None:
            continue
        place = top / str(content[split])
        if is_folder(place):
            labels = Path(*["labels" if part == "images" else part for part in place.parts])
            images = sum(one.suffix.lower() in (".jpg", ".jpeg", ".png", ".bmp", ".webp") for one in place.iterdir())
            texts = sum(one.suffix == ".txt" for one in labels.iterdir()) if labels.is_dir() else 0
            yield f"  {split}: {place}, {images} images, {texts} label files"
        else:
            yield f"  {split}: {content[split]}" + ("" if is_file(place) else ", which is not there")
    if content.get("kpt_shape") is not None:
        yield f"  keypoints {content['kpt_shape']}, of which only the boxes are read"
    yield f"  read by --data diffkd.data.YoloDetection --data.root {path.parent}"


def _short(value: Any) -> str:
    if isinstance(value, Mapping) and "class_path" in value:
        return str(value["class_path"])
    text = str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _counts(counts: Counter[str]) -> str:
    shown = ", ".join(f"{name} {count}" for name, count in counts.most_common(_SHOWN))
    return shown if len(counts) <= _SHOWN else f"{shown} and {len(counts) - _SHOWN} more"


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    shown = ", ".join(name[:80] for name in names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
