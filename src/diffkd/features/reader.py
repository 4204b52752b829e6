"""Readers: convert the recorded outputs of one side of a pair to features of a known shape."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from torch import Tensor

from diffkd.features.layout import Layout, fitting_layouts, infer_layout
from diffkd.features.shape import FeatureShape, Resizing, Role

SideName = Literal["student", "teacher"]


@dataclass(frozen=True)
class Reader:
    """Reads the layers of one side of a pair.

    Attributes:
        names: the layers.
        layouts: the layout of each layer's output.
        shapes: shape of each feature as :meth:`read` returns it, at the size at which the pair is compared; methods are
            built from these.
        own: shape of each of the model's outputs, before resizing or averaging.
        several: whether the method takes a list, even of one feature.
        pools: whether maps are averaged to vectors, since the other side has no positions.
    """

    names: tuple[str, ...]
    layouts: tuple[Layout, ...]
    shapes: tuple[FeatureShape, ...]
    own: tuple[FeatureShape, ...]
    several: bool = False
    pools: bool = False

    def read(self, outputs: Mapping[str, Tensor]) -> Tensor | list[Tensor]:
        """Return the feature, (B, C, H, W) or (B, C), or a list of them if there are several."""
        features = [layout.read(outputs[name]) for name, layout in zip(self.names, self.layouts, strict=True)]
        if self.pools:
            features = [feature.flatten(2).mean(2) if feature.ndim == 4 else feature for feature in features]
        return features if self.several else features[0]

    def __str__(self) -> str:
        return ", ".join(
            f"{shape} {layout}" if layout.kind in ("nhwc", "tokens", "sequence") else str(shape)
            for shape, layout in zip(self.own, self.layouts, strict=True)
        )


def reader_for(
    side: SideName,
    names: Sequence[str],
    outputs: Mapping[str, Tensor],
    logits: Tensor | None,
    input_size: tuple[int, int] | None,
    *,
    scores: Collection[str] = (),
    several: bool = False,
    layout: Layout | None = None,
    prefixes: Collection[int] = (),
    layouts: Mapping[str, Layout] = MappingProxyType({}),
    batch: int | None = None,
) -> Reader:
    """Build the reader of some layers; layouts are inferred unless given.

    Args:
        side: for messages.
        names: the layers.
        outputs: output of each layer for the example.
        logits: the model's output, to detect the layer that computes it.
        input_size: (H, W) of the example.
        scores: names of further layers that return the model's scores, such as a class map before up-sampling.
        several: whether the method takes a list.
        layout: the user's layout, if given.
        prefixes: the numbers of prefix tokens that the model declares.
        layouts: layouts of layers from the probe.
        batch: number of images in the example.

    Raises:
        ValueError: if the shape of an output is not understood, or it holds no real numbers.
    """
    read, shapes = [], []
    for name in names:
        tensor = outputs[name]
        if not tensor.is_floating_point():
            raise ValueError(
                f"the {side}'s layer '{name}' returns {tensor.dtype}, and features are real numbers: take a layer "
                "before or after it"
            )
        found = layout or layouts.get(name) or infer_layout(tensor.shape, input_size, prefixes, batch=batch)
        if found is None:
            fits = [
                f"Layout{one.kind, one.prefix, one.grid}"
                for one in fitting_layouts(tensor.shape, input_size, prefixes, batch=batch)
            ]
            why = f"may be read as {' or '.join(fits)} for" if fits else "is no map, tokens or vector of"
            raise ValueError(
                f"the {side}'s layer '{name}' returns {tuple(tensor.shape)}, which {why} an "
                f"input of {input_size}; give the pair {side}_layout=Layout(kind, prefix, grid), or take another layer"
            )
        size = found.size(tensor.shape)
        is_logits = logits is not None and tensor.shape == logits.shape and tensor.data_ptr() == logits.data_ptr()
        role: Role = "logits" if is_logits or name in scores else "feature"
        shapes.append(FeatureShape(found.channels(tensor.shape), size, role))
        read.append(found)
    return Reader(tuple(names), tuple(read), tuple(shapes), tuple(shapes), several)


def agree(student: Reader, teacher: Reader, resizes: Resizing = "student") -> tuple[Reader, Reader]:
    """Convert both sides of a pair to maps, or to vectors if either is one, at the size according to `resizes`.

    Logits of a single position (B, K, 1, 1), from classifiers without flattening, are vectors too.
    """
    if student.several or teacher.several:
        return student, teacher
    ours, theirs = student.shapes[0], teacher.shapes[0]
    single = all(one.role == "logits" and one.size == (1, 1) for one in (ours, theirs))
    if ours.is_map and theirs.is_map and not single:
        size = compared_size(ours.size, theirs.size, resizes)
        if size is None:
            return student, teacher
        return replace(student, shapes=(replace(ours, size=size),)), replace(
            teacher, shapes=(replace(theirs, size=size),)
        )
    return _pooled(student), _pooled(teacher)


def compared_size(student: tuple[int, ...], teacher: tuple[int, ...], resizes: Resizing) -> tuple[int, ...] | None:
    """Return the (H, W) at which two maps are compared, None if each keeps its own."""
    if resizes == "student":
        return teacher
    return min(student, teacher, key=lambda size: size[0] * size[1]) if resizes == "larger" else None


def _pooled(reader: Reader) -> Reader:
    if not reader.shapes[0].is_map:
        return reader
    return replace(reader, shapes=tuple(replace(shape, size=()) for shape in reader.shapes), pools=True)
