"""`diffkd predict`: run a student on images, and write what it finds."""

import shlex
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from diffkd.data.images import OnBadImage, check_on_bad_image
from diffkd.export.student_file import Which
from diffkd.inference.predictor import Predictor, find_images, predict_files, unreadable
from diffkd.inference.results import Format, PredictionFiles
from diffkd.inference.students import load_student


def predict(
    student: str,
    images: list[str],
    out: Path,
    *,
    format: Format = "json",
    pictures: bool = False,
    pseudo_labels: bool = False,
    threshold: float | None = None,
    batch_size: int | None = None,
    crop_ratio: float | None = None,
    model: str | None = None,
    which: Which = "last",
    on_bad_image: OnBadImage = "skip",
    accelerator: str = "auto",
    progress: bool = True,
    trust: list[str] | None = None,
) -> Path:
    """Predict for image files, and write a table, masks, pictures or pseudo-labels. Neither labels nor data are needed.

    Images of any size are prepared as evaluation images were in the training. A prediction is written as it is made,
    the table also if the command is interrupted.

    Args:
        student: folder of a run, file of weights with its card, or an exported .onnx or .pt2. Load a .pt2, which is a
            program, only if you trust it.
        images: files, folders, which are searched at any depth, or patterns such as "shots/*.jpg".
        out: new folder for the predictions.
        format: json or csv, of the table; for detection, JSON is a COCO file with a score for each box.
        pictures: also draw every prediction into a picture.
        pseudo_labels: also write images and predictions as a training set that `diffkd fit` reads; not where an image
            may have several classes.
        threshold: smallest score of boxes, and of classes where an image may have several, everywhere; in pseudo-labels
            also of images and pixels. None: 0.3 for boxes, 0.5 for several classes, no limit for images and pixels.
        batch_size: images in a batch; None: 64 for classification, 4 for the other tasks.
        crop_ratio: for classification, share of the shorter side that the centre crop keeps; None: as in training.
        model: name of the model, if the card names none, or names your own code.
        which: for a run, the student of the last or of the best epoch.
        on_bad_image: skip leaves files out that cannot be read, and names them at the end; error stops at the first.
        accelerator: cpu, gpu, mps, or auto.
        progress: show a progress bar and a summary.
        trust: files and modules of your own whose code the card may name; may be repeated.

    Returns:
        The file of the table, `predictions.json` or `.csv` in `out`; masks are in `masks`, pictures in `pictures`,
        pseudo-labels in `pseudo_labels`.

    Raises:
        FileNotFoundError: if there is no such student or no image.
        FileExistsError: if `out` is not empty.
        ValueError: if the student has no card, an option is out of range, or no image can be read.
    """
    check_on_bad_image(on_bad_image)
    files = find_images(images)
    device = torch_device(accelerator)
    loaded = load_student(student, which=which, model=model, trust=trust or (), device=device)
    predictor = Predictor(loaded, device=device, crop_ratio=crop_ratio)
    problems: list[str] = []
    on_bad = problems.append if on_bad_image == "skip" else None
    predictions = predict_files(predictor, files, batch_size=batch_size, on_bad=on_bad)
    written = PredictionFiles(
        out.expanduser(),
        predictor.task,
        predictor.classes,
        kind=format,
        pictures=pictures,
        pseudo_labels=pseudo_labels,
        threshold=threshold,
        multi_label=predictor.multi_label,
    )
    console = Console(stderr=True, quiet=not progress)
    try:
        for prediction in track(
            predictions, "predicting", len(files), console=console, transient=True, disable=not console.is_terminal
        ):
            written.add(prediction)
    finally:
        table = written.close()
    if problems:
        console.print(unreadable(problems), style="bold red", markup=False, soft_wrap=True)
    if not written.images:
        raise ValueError(f"none of {len(files)} images could be read; the first: {problems[0]}")
    found = ", ".join(f"{name} {count}" for name, count in written.counts.most_common(8)) or "nothing"
    console.print(f"{len(written.images)} images: {found}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"table   {table}", highlight=False, markup=False, soft_wrap=True)
    if written.labels is not None:
        console.print(
            f"{written.labels.kept} images with pseudo-labels: diffkd fit ... {shlex.join(written.labels.options())}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    return table


def torch_device(accelerator: str) -> torch.device:
    """Return the device of an accelerator by Lightning's names: cpu, gpu, cuda, mps, or auto.

    Raises:
        ValueError: if it is unknown, or there is none.
    """
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator == "cpu" or (accelerator == "auto" and found is None):
        return torch.device("cpu")
    if found is not None and accelerator in ("auto", "gpu", found.type):
        return found
    known = ("cpu", "gpu", "cuda", "mps", "auto")
    if accelerator in known:
        raise ValueError(f"accelerator {accelerator} is not there: give cpu or auto")
    raise ValueError(f"accelerator {accelerator!r} is unknown: give one of {', '.join(known)}")
