"""One colour per class, for pictures of segmentation."""

from typing import Literal

import numpy as np
import numpy.typing as npt

# Of the Cityscapes data set (Cordts et al., 2016), in the order of its 19 train ids.
_CITYSCAPES = (
    (128, 64, 128),
    (244, 35, 232),
    (70, 70, 70),
    (102, 102, 156),
    (190, 153, 153),
    (153, 153, 153),
    (250, 170, 30),
    (220, 220, 0),
    (107, 142, 35),
    (152, 251, 152),
    (70, 130, 180),
    (220, 20, 60),
    (255, 0, 0),
    (0, 0, 142),
    (0, 0, 70),
    (0, 60, 100),
    (0, 80, 100),
    (0, 0, 230),
    (119, 11, 32),
)


def palette(num_classes: int, name: Literal["voc", "cityscapes"] = "voc") -> npt.NDArray[np.uint8]:
    """Return a distinct colour for every class.

    Args:
        num_classes: K, at most 2^24, or 19 for "cityscapes".
        name: "voc" is the colour map of PASCAL VOC, which spreads the bits of a class id over the three channels, from
            their highest bit down: 0 is black, 1 dark red, 2 dark green. "cityscapes" is that data set's own.

    Returns:
        (K, 3) red, green, blue.

    Raises:
        ValueError: if there are fewer colours than classes.

    >>> palette(4).tolist()
    [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
    """
    most = {"voc": 1 << 24, "cityscapes": len(_CITYSCAPES)}
    if name not in most:
        raise ValueError(f"no palette {name!r}: give one of {', '.join(most)}.")
    if not 0 <= num_classes <= most[name]:
        raise ValueError(f"{num_classes} classes, but the palette {name!r} has 0 to {most[name]} colours.")
    if name == "cityscapes":
        return np.array(_CITYSCAPES[:num_classes], dtype=np.uint8).reshape(-1, 3)
    ids = np.arange(num_classes)
    colours = np.zeros((num_classes, 3), dtype=np.uint8)
    for level in range(8):
        for channel in range(3):
            colours[:, channel] |= ((ids >> (3 * level + channel) & 1) << (7 - level)).astype(np.uint8)
    return colours
