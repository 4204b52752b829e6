"""Image files and their boxes, as the readers of all formats return them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from diffkd.data.images import WHITE, read_orientation, read_rgb

# In pixels. Narrower boxes could round to zero width when a detector scales the image down, which raises an error.
SMALLEST = 0.01


class ImageBoxes(NamedTuple):
    """The boxes of one image.

    Args:
        boxes: (n, 4) float32 left, top, right, bottom in pixels.
        labels: (n,) int64 from 1.
        area: (n,) float32, pixels of the object, or of its box if the annotation states no area.
        iscrowd: (n,) int64, 1 for a crowd region or an object that is not counted.
    """

    boxes: Tensor
    labels: Tensor
    area: Tensor
    iscrowd: Tensor

    def keep(self, chosen: Tensor) -> "ImageBoxes":
        """Return the boxes selected by a (n,) bool mask."""
        return ImageBoxes(*(part[chosen] for part in self))


@dataclass(frozen=True)
class Annotations:
    """The boxes of N images, in few large tensors so that worker processes share them.

    Args:
        image_ids: (N,) int64.
        starts: (N + 1,) int64; the boxes of image i are those from starts[i] to starts[i + 1].
        boxes: the boxes of all images, concatenated.
    """

    image_ids: Tensor
    starts: Tensor
    boxes: ImageBoxes

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.image_ids)

    def of(self, index: int) -> ImageBoxes:
        """Return the boxes of one image."""
        start, end = self.starts[index : index + 2].tolist()
        return ImageBoxes(*(part[start:end] for part in self.boxes))

    def without_crowds(self) -> "Annotations":
        """Return the annotations without crowd boxes, for training."""
        kept = self.boxes.iscrowd == 0
        counts = torch.cat([torch.zeros(1, dtype=torch.int64), kept.cumsum(0)])
        return Annotations(self.image_ids, counts[self.starts], self.boxes.keep(kept))

    def select(self, indices: list[int]) -> "Annotations":
        """Return the annotations of some images, in the given order."""
        return gather(self.image_ids[indices].tolist(), (self.of(index) for index in indices))


def gather(image_ids: Iterable[int], images: Iterable[ImageBoxes]) -> Annotations:
    """Concatenate the boxes of images, in order."""
    listed = list(images)
    starts = torch.tensor([0, *(len(one.labels) for one in listed)]).cumsum(0)
    parts = [torch.cat(part) for part in zip(no_boxes(), *listed, strict=True)]
    return Annotations(torch.tensor(list(image_ids), dtype=torch.int64), starts, ImageBoxes(*parts))


def no_boxes() -> ImageBoxes:
    """Return an `ImageBoxes` with no boxes."""
    integers = torch.zeros(0, dtype=torch.int64)
    return ImageBoxes(torch.zeros(0, 4), integers, torch.zeros(0), integers)


def measurable(boxes: Tensor) -> Tensor:
    """Return which boxes have a positive extent, (n,) bool; False for boxes with NaN.

    Args:
        boxes: (n, 4) left, top, right, bottom in pixels.
    """
    return ((boxes[:, 2:] - boxes[:, :2]) >= SMALLEST).all(dim=1) & boxes.isfinite().all(dim=1)


class ReadBox(NamedTuple):
    """A box as stated in a file.

    Args:
        corners: left, top, right, bottom in pixels.
        label: from 1.
        name: its name in messages.
        area: pixels of the object; None uses the area of the box.
        crowd: whether it is left out of training.
    """

    corners: tuple[float, float, float, float]
    label: int
    name: str | int
    area: float | None = None
    crowd: bool = False


class ReadImage(NamedTuple):
    """An image as stated in a file.

    Args:
        path: the image file.
        size: (H, W) in pixels.
        image_id: any int64.
        boxes: its boxes.
        problem: why its annotations cannot be used; "" if they are valid.
    """

    path: str
    size: tuple[int, int]
    image_id: int
    boxes: list[ReadBox]
    problem: str = ""


@dataclass(frozen=True)
class AnnotatedFiles:
    """The N images of a split.

    Args:
        source: the annotation file or folder, for messages.
        paths: N image files.
        sizes: (N, 2) int64, height and width as the annotations state them.
        annotations: the boxes, clipped to their image.
        classes: the names of labels 1 to K.
        category_ids: the id of each class in the file format.
        dropped: one message for each box left out: malformed, or without extent inside its image.
        cut: number of kept boxes that reached more than a pixel out of their image.
        first_cut: a message for the first of them.
        problems: why the annotations of an image cannot be used, by its path.
        white: the value of 16-bit images that becomes 255.
        keypoints: YOLO only: whether lines of more than five numbers are boxes with key points; None if no line is that
            long.
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
    problems: Mapping[str, str] = field(default_factory=dict)
    white: int = WHITE
    keypoints: bool | None = None

    def select(self, indices: list[int]) -> "AnnotatedFiles":
        """Return some of the images, in the given order."""
        return replace(
            self,
            paths=tuple(self.paths[index] for index in indices),
            sizes=self.sizes[indices],
            annotations=self.annotations.select(indices),
        )

    def _as_stored(self, index: int) -> str:
        turn = read_orientation(self.paths[index])
        if turn.orientation == 1 or tuple(self.sizes[index].tolist()) != turn.header.stored:
            return ""
        return "; or set boxes_as_stored=true, since this is its size before its EXIF turns it"

    def read(self, index: int) -> Tensor:
        """Return an image, (3, H, W) uint8.

        Raises:
            ValueError: if the file or its annotations are broken, or the annotations state another size; the message
                names the file.
        """
        if problem := self.problems.get(self.paths[index]):
            raise ValueError(problem)
        image = read_rgb(self.paths[index], self.white)
        height, width = self.sizes[index].tolist()
        if image.size != (width, height):
            raise ValueError(
                f"image {self.paths[index]} is {image.width}x{image.height} pixels, but its annotations are for "
                f"{width}x{height}: write the size and boxes of the upright image, or scale it{self._as_stored(index)}."
            )
        pixels: Tensor = pil_to_tensor(image)
        return pixels


def to_upright(image: ReadImage) -> ReadImage:
    """Convert size and boxes of an image from the stored orientation to the upright one.

    If the stated size is not the stored one, nothing is changed. Raises ValueError if the file's header cannot be read.
    """
    turn = read_orientation(image.path)
    (height, width), orientation = image.size, turn.orientation
    if orientation not in _UPRIGHT_CORNERS or image.size != turn.header.stored:
        return image
    boxes = [box._replace(corners=_UPRIGHT_CORNERS[orientation](*box.corners, width, height)) for box in image.boxes]
    return image._replace(size=turn.header.size, boxes=boxes)


# By orientation: (left, top, right, bottom, width, height) of the stored image to the corners in the upright image.
_UPRIGHT_CORNERS: dict[int, Callable[[float, float, float, float, int, int], tuple[float, float, float, float]]] = {
    2: lambda left, top, right, bottom, w, h: (w - right, top, w - left, bottom),
    3: lambda left, top, right, bottom, w, h: (w - right, h - bottom, w - left, h - top),
    4: lambda left, top, right, bottom, w, h: (left, h - bottom, right, h - top),
    5: lambda left, top, right, bottom, w, h: (top, left, bottom, right),
    6: lambda left, top, right, bottom, w, h: (h - bottom, left, h - top, right),
    7: lambda left, top, right, bottom, w, h: (h - bottom, w - right, h - top, w - left),
    8: lambda left, top, right, bottom, w, h: (top, w - right, bottom, w - left),
}


def flag(value: object, name: str, where: str) -> bool:
    """Parse a flag: 0 or 1, true or false, as number or text; empty means False.

    Raises:
        ValueError: for any other value.
    """
    known = {"": False, "0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
    text = str("" if value is None else value).strip().lower()
    if text not in known:
        raise ValueError(f"{where} has {name} {value!r}; write 0 or 1.")
    return known[text]


def annotated_files(
    source: str,
    images: Sequence[ReadImage],
    classes: Sequence[str],
    category_ids: Sequence[int],
    malformed: Sequence[str] = (),
) -> AnnotatedFiles:
    """Check the images and boxes of a reader and gather them.

    Boxes are clipped to their image, and dropped if no extent is left or a coordinate is not finite.

    Args:
        source: the file or folder, for messages.
        images: its images.
        classes: the names of labels 1 to K.
        category_ids: the id of each class in the file format.
        malformed: one message for each box that the reader left out.

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
        (*malformed, *(told(index, "has no extent inside") for index in (~kept).nonzero()[:, 0].tolist())),
        len(beyond),
        told(beyond[0], "reaches out of") if beyond else "",
        {image.path: image.problem for image in images if image.problem},
    )


def _area(stated: float | None) -> float:
    """Return a stated area, or 0 if it is missing or not usable."""
    return stated if stated is not None and 0 < stated < 1e30 else 0.0
