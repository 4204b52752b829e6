"""Image files and their boxes, checked: what the readers of all formats return."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from diffkd.data.boxes import Annotations, ImageBoxes, measurable
from diffkd.data.decode import read_rgb


class ReadBox(NamedTuple):
    """Hold a box as a file states it.

    Args:
        corners: left, top, right, bottom in pixels.
        label: from 1.
        name: what to call it in messages.
        area: pixels of the object; None takes those of the box.
        crowd: whether it is left out of training.
    """

    corners: tuple[float, float, float, float]
    label: int
    name: str | int
    area: float | None = None
    crowd: bool = False


class ReadImage(NamedTuple):
    """Hold an image as a file states it.

    Args:
        path: the image file.
        size: (H, W) in pixels.
        image_id: any int64.
        boxes: its boxes.
    """

    path: str
    size: tuple[int, int]
    image_id: int
    boxes: list[ReadBox]


@dataclass(frozen=True)
class AnnotatedFiles:
    """Hold the N images of a split.

    Args:
        source: the file or folder they are of, for messages.
        paths: N image files.
        sizes: (N, 2) int64, height and width as the annotations state them.
        annotations: the boxes, cut at the border of their image.
        classes: the names of labels 1 to K.
        category_ids: the number each has in the format.
        dropped: one message for each box that has no extent inside its image.
        cut: how many of the others reach more than a pixel out of their image.
        first_cut: a message for the first of them.
    """

    source: str
    paths: tuple[str, ...]
    sizes: Tensor
    annotations: Annotations
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    dropped: tuple[str, ...]
    cut: int
    first_cut: str

    def select(self, indices: list[int]) -> "AnnotatedFiles":
        """Return some of the images, in the given order."""
        return replace(
            self,
            paths=tuple(self.paths[index] for index in indices),
            sizes=self.sizes[indices],
            annotations=self.annotations.select(indices),
        )

    def read(self, index: int) -> Tensor:
        """Return an image, (3, H, W) uint8.

        Raises:
            ValueError: if the file is broken, or is not of the size that the annotations are for; names it.
        """
        image = read_rgb(self.paths[index])
        height, width = self.sizes[index].tolist()
        if image.size != (width, height):
            raise ValueError(
                f"image {self.paths[index]} is {image.width}x{image.height} pixels, but its annotations are for "
                f"{width}x{height}: write the size and boxes of the upright image, or scale it."
            )
        pixels: Tensor = pil_to_tensor(image)
        return pixels


def flag(value: object, name: str, where: str) -> bool:
    """Return what a file says by 0 or 1, true or false, as a number or a text; empty: no.

    Raises:
        ValueError: if it is anything else.
    """
    known = {"": False, "0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
    text = str("" if value is None else value).strip().lower()
    if text not in known:
        raise ValueError(f"{where} has {name} {value!r}; write 0 or 1.")
    return known[text]


def annotated_files(
    source: str, images: Sequence[ReadImage], classes: Sequence[str], category_ids: Sequence[int]
) -> AnnotatedFiles:
    """Check and gather what a reader has read.

    Boxes are cut at the border of their image, and dropped if nothing measurable is left or a coordinate is not finite.

    Args:
        source: the file or folder, for messages.
        images: what it holds.
        classes: the names of labels 1 to K.
        category_ids: the number each has in the format.

    Raises:
        ValueError: if there are no images.
    """
    if not images:
        raise ValueError(f"{source}: no images; give at least one.")
    listed = [box for image in images for box in image.boxes]
    counts = torch.tensor([len(image.boxes) for image in images])
    sizes = torch.tensor([image.size for image in images], dtype=torch.int64)
    stated = torch.from_numpy(np.array([box.corners for box in listed], dtype=np.float64).reshape(-1, 4))
    limits = sizes.flip(1).repeat(1, 2).repeat_interleave(counts, dim=0)  # width, height, width, height of each box
    boxes = stated.clamp(min=0).minimum(limits.to(torch.float64)).to(torch.float32)
    kept = measurable(boxes) & stated.isfinite().all(dim=1)
    area = torch.tensor([_area(box.area) for box in listed], dtype=torch.float32)
    area = torch.where(area > 0, area, (boxes[:, 2:] - boxes[:, :2]).prod(dim=1))
    every = ImageBoxes(
        boxes,
        torch.tensor([box.label for box in listed], dtype=torch.int64),
        area,
        torch.tensor([int(box.crowd) for box in listed], dtype=torch.int64),
    )
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), kept.cumsum(0)])
    starts = ends[torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])]
    owners = torch.arange(len(images)).repeat_interleave(counts)

    def told(index: int, what: str) -> str:
        box, image = listed[index], images[int(owners[index])]
        corners, size = list(box.corners), f"{image.size[1]}x{image.size[0]}"
        return f"{source}: box {box.name} of {image.path}: {corners} (left, top, right, bottom) {what} its {size} image"

    beyond = (kept & ((stated - boxes).abs() > 1).any(dim=1)).nonzero()[:, 0].tolist()
    ids = torch.tensor([image.image_id for image in images], dtype=torch.int64)
    return AnnotatedFiles(
        source,
        tuple(image.path for image in images),
        sizes,
        Annotations(ids, starts, every.keep(kept)),
        tuple(classes),
        tuple(category_ids),
        tuple(told(index, "has no extent inside") for index in (~kept).nonzero()[:, 0].tolist()),
        len(beyond),
        told(beyond[0], "reaches out of") if beyond else "",
    )


def _area(stated: float | None) -> float:
    """Return a stated area, or 0 if it says nothing."""
    return stated if stated is not None and 0 < stated < 1e30 else 0.0
