"""Composition of scenes from packaged garment images, with pixel-exact boxes and masks.

Each scene is a pure function of (seed, split, index, options). Objects are images of the packaged subset of
Fashion-MNIST: training images for training scenes, test images for evaluation scenes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from diffkd.data.classification.fashion_mnist import CLASSES, read_fashion_part
from diffkd.data.seeding import mix_seed

_CELLS = 6  # colours along each side of the smooth colour field
_SHAPES = 10  # largest number of rectangles and ellipses


def cluttered_background(size: tuple[int, int], random: np.random.Generator) -> NDArray[np.float32]:
    """Draw a background.

    Args:
        size: (H, W) in pixels.
        random: source of all draws.

    Returns:
        (H, W, 3) float32 in [0, 255].
    """
    height, width = size
    middle, spread = random.uniform(60, 190, 3), random.uniform(10, 50)
    cells = np.clip(middle + spread * random.standard_normal((_CELLS, _CELLS, 3)), 0, 255).astype(np.uint8)
    field = Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)
    canvas = np.array(field, dtype=np.float32)  # (H, W, 3)
    for _ in range(random.integers(_SHAPES + 1)):
        _draw_shape(canvas, random)
    return canvas


def _draw_shape(canvas: NDArray[np.float32], random: np.random.Generator) -> None:
    """Blend one rectangle or ellipse of a single colour into the canvas."""
    height, width, _ = canvas.shape
    extent = np.exp(random.uniform(np.log(0.03), np.log(0.5), 2)) * (height, width)
    centre = random.random(2) * (height, width)
    top, left = np.maximum(centre - extent / 2, 0).astype(int)
    bottom, right = np.minimum(centre + extent / 2 + 1, (height, width)).astype(int)
    color, opacity, rounded = random.uniform(0, 255, 3), random.uniform(0.3, 1.0), random.random() < 0.5
    region = canvas[top:bottom, left:right]
    if rounded:
        rows = (np.arange(top, bottom) - centre[0]) / (extent[0] / 2 + 0.5)
        columns = (np.arange(left, right) - centre[1]) / (extent[1] / 2 + 0.5)
        inside = rows[:, None] ** 2 + columns[None, :] ** 2 <= 1
        opacity = opacity * inside[:, :, None]
    region += (opacity * (color - region)).astype(np.float32)


Split = Literal["train", "val"]
_SPLITS: tuple[Split, ...] = ("train", "val")
_THRESHOLD = 30  # smallest grey value of a garment pixel in Fashion-MNIST
_STRETCH = 1.25  # largest change of an object's aspect ratio


@dataclass(frozen=True)
class SceneOptions:
    """Options of the generated scenes.

    Args:
        size: (H, W) in pixels.
        classes: garment classes, as names or numbers (0 to 9) of Fashion-MNIST; the first gets label 1. None uses all
            ten.
        min_objects: smallest number of objects drawn, before hidden ones are removed.
        max_objects: largest number of objects drawn.
        min_scale: smallest side of an object's square, as a fraction of the scene's shorter side; sizes are
            log-uniform.
        max_scale: largest side, likewise.
        min_visible: smallest visible share of an object's pixels; an object below it is removed from the scene.
        noise: largest pixel noise, in units of [0, 1].

    Raises:
        ValueError: if a value is out of its range, or there is no such class.
    """

    size: tuple[int, int] = (192, 192)
    classes: tuple[str | int, ...] | None = None
    min_objects: int = 1
    max_objects: int = 6
    min_scale: float = 0.1
    max_scale: float = 0.9
    min_visible: float = 0.4
    noise: float = 0.04

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", tuple(self.size))  # YAML gives lists
        if self.classes is not None:
            object.__setattr__(self, "classes", tuple(self.classes))
        if len(self.size) != 2 or not all(isinstance(side, int) and side > 0 for side in self.size):
            raise ValueError(f"scene size {self.size} is no (height, width) of 1 pixel or more.")
        if not 0 <= self.min_objects <= self.max_objects:
            raise ValueError(
                f"min_objects={self.min_objects} and max_objects={self.max_objects}: "
                "give 0 <= min_objects <= max_objects."
            )
        if not 0 < self.min_scale <= self.max_scale <= 1:
            raise ValueError(
                f"min_scale={self.min_scale} and max_scale={self.max_scale}: give 0 < min_scale <= max_scale <= 1."
            )
        if not (0 < self.min_visible <= 1 and 0 <= self.noise <= 1):
            raise ValueError(f"min_visible={self.min_visible} must be in (0, 1], noise={self.noise} in [0, 1].")
        self.class_indices()

    def class_indices(self) -> tuple[int, ...]:
        """Return the chosen classes as numbers of Fashion-MNIST, in the order of their labels."""
        if self.classes is None:
            return tuple(range(len(CLASSES)))
        chosen = tuple(_class_index(one) for one in self.classes)
        if not chosen or len(set(chosen)) != len(chosen):
            raise ValueError(f"classes {self.classes}: give at least one, and each of them once.")
        return chosen

    def class_names(self) -> tuple[str, ...]:
        """Return the names of the chosen classes; the first is that of label 1."""
        return tuple(CLASSES[index] for index in self.class_indices())


class Scene(NamedTuple):
    """An image and its annotations; objects are in painting order, the last in front.

    Args:
        image: (3, H, W) uint8.
        boxes: (n, 4) float32 left, top, right, bottom around the visible pixels; right and bottom are exclusive:
            right - left is the width in pixels.
        labels: (n,) int64 from 1.
        instances: (n, H, W) bool, the visible pixels of each object; they do not overlap.
        class_mask: (H, W) uint8, the label of the object at each pixel, 0 where there is none.
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    instances: Tensor
    class_mask: Tensor


class Garments(NamedTuple):
    """The source images of objects: for each label from 1, (N, 28, 28) uint8 images."""

    split: Split
    images: tuple[NDArray[np.uint8], ...]


def read_garments(split: Split, options: SceneOptions) -> Garments:
    """Read the source images for the objects of a split."""
    if split not in _SPLITS:
        raise ValueError(f"split {split!r} is none of {', '.join(map(repr, _SPLITS))}.")
    images, labels = read_fashion_part("train" if split == "train" else "test")
    return Garments(split, tuple(images[labels == index, 0].numpy() for index in options.class_indices()))


def make_scenes(seed: int, split: Split, count: int, options: SceneOptions) -> Iterator[Scene]:
    """Yield the first `count` scenes of a split, one after the other.

    Raises:
        ValueError: if `count` is below 1 or there is no such split.
    """
    if count < 1:
        raise ValueError(f"{count} {split} scenes are no data set: give 1 or more.")
    garments = read_garments(split, options)
    return (make_scene(seed, index, garments, options) for index in range(count))


def make_scene(seed: int, index: int, garments: Garments, options: SceneOptions) -> Scene:
    """Make one scene.

    Args:
        seed: seed of the data set.
        index: number of the scene in its split.
        garments: the result of `read_garments` for the split and the same options.
        options: the options of the scene.
    """
    random = np.random.default_rng(mix_seed(seed, _SPLITS.index(garments.split), index))
    canvas = cluttered_background(options.size, random)
    covered = np.zeros(options.size, dtype=bool)
    class_mask = np.zeros(options.size, dtype=np.uint8)
    labels, boxes, instances = [], [], []
    for _ in range(random.integers(options.min_objects, options.max_objects + 1)):
        # From front to back, so that hidden objects are known before painting.
        label = int(random.integers(len(garments.images)))
        grey = garments.images[label][random.integers(len(garments.images[label]))]
        grey, top, left = _place(grey, options, random)
        tint = random.uniform(0.35, 1.0, 3)
        window = (slice(top, top + grey.shape[0]), slice(left, left + grey.shape[1]))
        whole = grey >= _THRESHOLD
        seen = whole & ~covered[window]
        if not seen.any() or seen.sum() < options.min_visible * whole.sum():
            continue
        covered[window] |= whole
        canvas[window][seen] = (75 + 0.7 * grey[seen, None]) * tint
        class_mask[window][seen] = label + 1
        instance = np.zeros(options.size, dtype=bool)
        instance[window] = seen
        rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
        labels.append(label + 1)
        boxes.append((left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1))
        instances.append(instance)
    grain = np.frombuffer(random.bytes(canvas.size), dtype=np.uint8).reshape(canvas.shape)
    canvas += (grain.astype(np.float32) - 127.5) * (2 * options.noise)
    image = np.clip(canvas + 0.5, 0, 255).astype(np.uint8)
    return Scene(
        torch.from_numpy(image).permute(2, 0, 1).contiguous(),
        torch.tensor(np.array(boxes[::-1], dtype=np.float32).reshape(-1, 4)),
        torch.tensor(labels[::-1], dtype=torch.int64),
        torch.from_numpy(np.array(instances[::-1], dtype=bool).reshape(-1, *options.size)),
        torch.from_numpy(class_mask),
    )


def _place(
    grey: NDArray[np.uint8], options: SceneOptions, random: np.random.Generator
) -> tuple[NDArray[np.uint8], int, int]:
    """Return the randomly scaled, stretched and mirrored image, and its top and left, fully inside the scene."""
    height, width = options.size
    side = min(options.size) * np.exp(random.uniform(np.log(options.min_scale), np.log(options.max_scale)))
    stretch = np.sqrt(_STRETCH ** random.uniform(-1, 1))
    rows = min(height, max(1, round(side * stretch)))
    columns = min(width, max(1, round(side / stretch)))
    scaled = np.asarray(Image.fromarray(grey).resize((columns, rows), Image.Resampling.BILINEAR))
    top, left = random.integers(height - rows + 1), random.integers(width - columns + 1)
    return scaled[:, ::-1] if random.random() < 0.5 else scaled, int(top), int(left)


def _class_index(one: str | int) -> int:
    if isinstance(one, int) and not isinstance(one, bool) and 0 <= one < len(CLASSES):
        return one
    if isinstance(one, str) and one in CLASSES:
        return CLASSES.index(one)
    near = get_close_matches(str(one), CLASSES, n=1)
    hint = f"; nearest: {near[0]!r}" if near else ""
    raise ValueError(f"class {one!r} is not in Fashion-MNIST{hint}; there are 0 to 9 for {', '.join(CLASSES)}.")
