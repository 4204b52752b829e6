"""Pictures of predictions at the size of the image: class and score, boxes, or coloured class maps."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from diffkd.data.segmentation.palette import palette

_SMALLEST = 160  # pixels of a picture's shorter side; smaller images are enlarged, so that text can be read
_OPACITY = 0.6
_TEXT = 12  # pixels
_COLORS = (
    (31, 119, 180),
    (255, 127, 14),
    (44, 160, 44),
    (214, 39, 40),
    (148, 103, 189),
    (140, 86, 75),
    (227, 119, 194),
    (127, 127, 127),
    (188, 189, 34),
    (23, 190, 207),
)


def draw_prediction(
    image: Image.Image, found: Mapping[str, Tensor], classes: Sequence[str], *, caption: str | None = None
) -> Image.Image:
    """Draw what was predicted for an image, or its ground truth.

    Args:
        image: in RGB.
        found: "boxes" (n, 4) in pixels and "labels" (n,) from 1, with or without "scores"; or "ids" (H, W); or
            "scores" (K,), of which the best class is written below the image.
        classes: names of the K classes.
        caption: a line below the image; None: for class scores the best class and its score.

    Returns:
        The picture; images with a side below 160 pixels are enlarged by a whole factor.
    """
    factor = max(1, -(-_SMALLEST // min(image.size)))
    large = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    pixels = pil_to_tensor(large)
    legend: dict[str, tuple[int, int, int]] = {}
    if "boxes" in found:
        pixels = _with_boxes(pixels, found, classes, factor)
    elif "ids" in found:
        ids = found["ids"].long().repeat_interleave(factor, 0).repeat_interleave(factor, 1)
        pixels, legend = _with_classes(pixels, ids, classes)
    elif caption is None and "scores" in found:
        score, best = found["scores"].max(dim=-1)
        caption = f"{classes[int(best)]} {float(score):.2f}"
    picture: Image.Image = to_pil_image(pixels)
    return _with_text(picture, caption, legend)


def classes_found(scores: Tensor, classes: Sequence[str], threshold: float) -> str:
    """Return the classes of an image that may have several, those with at least a score, as a line for its caption."""
    best = [label for label in scores.argsort(descending=True).tolist() if float(scores[label]) >= threshold]
    return ", ".join(f"{classes[label]} {float(scores[label]):.2f}" for label in best) or "no class"


def _with_boxes(pixels: Tensor, found: Mapping[str, Tensor], classes: Sequence[str], factor: int) -> Tensor:
    boxes = found["boxes"].float() * factor
    shown = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(dim=1)
    labels = found["labels"][shown].tolist()
    if not labels:
        return pixels
    names = [classes[label - 1] if 0 < label <= len(classes) else str(label) for label in labels]
    if "scores" in found:
        scores = found["scores"][shown].tolist()
        names = [f"{name} {score:.2f}" for name, score in zip(names, scores, strict=True)]
    colors = [_COLORS[(label - 1) % len(_COLORS)] for label in labels]
    width = max(2, min(pixels.shape[1:]) // 200)
    drawn: Tensor = draw_bounding_boxes(
        pixels, boxes[shown], [_line(name) for name in names], colors, width=width, fill_labels=True
    )
    return drawn


def _with_classes(
    pixels: Tensor, ids: Tensor, classes: Sequence[str]
) -> tuple[Tensor, dict[str, tuple[int, int, int]]]:
    """Return grey pixels with the colours of class ids, and the colours of the classes that occur."""
    present = [label for label in np.unique(ids.numpy()).tolist() if 0 <= label < len(classes)]
    if not present:
        return pixels, {}
    grey = pixels.float().mean(dim=0, keepdim=True).expand(3, -1, -1).to(torch.uint8)
    colors = [(int(red), int(green), int(blue)) for red, green, blue in palette(len(classes))[present]]
    masks = torch.stack([ids == label for label in present])
    drawn: Tensor = draw_segmentation_masks(grey, masks, alpha=_OPACITY, colors=colors)
    return drawn, {classes[label]: color for label, color in zip(present, colors, strict=True)}


def _with_text(picture: Image.Image, caption: str | None, legend: Mapping[str, tuple[int, int, int]]) -> Image.Image:
    """Return the picture with a line of text below it, and names with their colours."""
    font = ImageFont.load_default(_TEXT)
    entries = ([] if caption is None else [(_line(caption), None)]) + [
        (_line(name), color) for name, color in legend.items()
    ]
    places, left, top = [], _TEXT, picture.height + 2
    for text, color in entries:
        room = picture.width - _TEXT - (0 if color is None else 2 * _TEXT)
        while text and font.getlength(text) > room:
            text = text[:-1]
        wide = int(font.getlength(text)) + (0 if color is None else 2 * _TEXT)
        if left + wide > picture.width and left > _TEXT:
            left, top = _TEXT, top + _TEXT + 4
        places.append((left, top, text, color))
        left += wide
    if not places:
        return picture
    whole = Image.new("RGB", (picture.width, top + _TEXT + 6), "white")
    whole.paste(picture)
    draw = ImageDraw.Draw(whole)
    for left, top, text, color in places:
        if color is not None:
            draw.rectangle((left, top + 2, left + _TEXT - 4, top + _TEXT - 2), fill=color, outline="black")
        draw.text((left + (0 if color is None else _TEXT), top), text, fill="black", font=font)
    return whole


def _line(text: str) -> str:
    """Return text without what is no printable character, such as line breaks, which the font cannot draw."""
    return "".join(one if one.isprintable() else "?" for one in text)


def to_image(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """Return a normalised image (C, H, W) as a picture in RGB.

    Args:
        image: the image; of other channels than 1 or 3, the mean is shown.
        mean: per channel, of its normalisation, in units of [0, 1].
        std: likewise.
    """
    pixels = image.detach().float().cpu()
    pixels = pixels * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    if float(pixels.min()) < -0.05 or float(pixels.max()) > 1.05:  # images of floats with a range of their own
        pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min()).clamp(min=1e-8)
    if len(pixels) not in (1, 3):
        pixels = pixels.mean(dim=0, keepdim=True)
    picture: Image.Image = to_pil_image(pixels.clamp(0, 1).expand(3, -1, -1))
    return picture


def side_by_side(pictures: Sequence[Image.Image], *, down: bool = False) -> Image.Image:
    """Return pictures in a row, or with `down` in a column."""
    widths, heights = [one.width for one in pictures], [one.height for one in pictures]
    size = (max(widths), sum(heights)) if down else (sum(widths), max(heights))
    whole = Image.new("RGB", size, "white")
    place = 0
    for one in pictures:
        whole.paste(one, (0, place) if down else (place, 0))
        place += one.height if down else one.width
    return whole
