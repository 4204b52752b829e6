"""Pairs of image and mask found in folders, with all checks that do not need decoding."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from lightning.pytorch.utilities import rank_zero_warn

from diffkd.data.folders import format_names, image_files, leads_outside
from diffkd.data.segmentation.masks import image_header, mask_header

_LISTED = 10  # problems listed in an error


class Pairs(NamedTuple):
    """The images and masks of one split.

    Args:
        images: N files.
        masks: N files.
        sizes: N pairs (height, width) in pixels of the upright image.
    """

    images: list[str]
    masks: list[str]
    sizes: list[tuple[int, int]]

    def select(self, indices: list[int]) -> "Pairs":
        """Return some of the pairs, in the given order."""
        return Pairs(
            [self.images[index] for index in indices],
            [self.masks[index] for index in indices],
            [self.sizes[index] for index in indices],
        )


def scan_pairs(
    root: Path,
    images: str,
    masks: str,
    *,
    image_suffix: str = "",
    mask_suffix: str = "",
    colors: bool = False,
    skip_bad: bool = False,
) -> Pairs:
    """Pair the files of two folders by relative path without suffix and extension, and check each pair.

    Files are found at any depth; hidden files and files without the suffix are ignored.

    Args:
        root: the data folder, which no link may leave.
        images: folder of the images, below `root`.
        masks: folder of the masks, below `root`.
        image_suffix: suffix of image names, with or without the extension.
        mask_suffix: suffix of mask names, likewise.
        colors: whether masks store colours instead of class ids.
        skip_bad: as for `check_pairs`; unpaired files are left out with a warning.

    Returns:
        The pairs, in the order of their names.

    Raises:
        FileNotFoundError: if a folder is missing.
        ValueError: if there are no images, an image or mask has no partner, two files have the same name, a link leaves
            the root, or a pair fails `check_pairs`; the message names the files and the fix.
    """
    found = _by_key(root, images, image_suffix, "image")
    wanted = _by_key(root, masks, mask_suffix, "mask")
    lonely = [
        f"image {path} has no mask {root / masks / key}{mask_suffix}{'' if '.' in mask_suffix else '.png'}"
        for key, path in found.items()
        if key not in wanted
    ]
    lonely += [f"mask {path} has no image" for key, path in wanted.items() if key not in found]
    alone = f"{root}: {len(lonely)} file(s) of {images} and {masks} are without the other part of their pair"
    mend = "add it or remove them, or set image_suffix and mask_suffix to what the names end in"
    both = [(path, wanted[key]) for key, path in found.items() if key in wanted]
    if lonely and skip_bad and both:
        listed = "\n  ".join(lonely[:_LISTED])
        rank_zero_warn(f"{alone} and are left out:\n  {listed}")
    else:
        refuse(lonely, f"{alone}; {mend}")
    return check_pairs(root, both, colors=colors, skip_bad=skip_bad)


def check_pairs(
    root: Path, pairs: Iterable[tuple[str | Path, str | Path]], *, colors: bool = False, skip_bad: bool = False
) -> Pairs:
    """Read the headers of all files, and return the pairs with their sizes.

    Args:
        root: the folder of the data.
        pairs: image and mask files.
        colors: whether masks store colours instead of class ids.
        skip_bad: keep pairs that cannot be used, with size 0, for the later check to leave out.

    Returns:
        The pairs, in the order given.

    Raises:
        ValueError: if an image cannot be read, a mask is not a PNG or not of the expected kind, or the sizes of a pair
            differ; the message lists up to ten files, and each shared reason once.
    """
    good = Pairs([], [], [])
    alike: dict[str, tuple[str, list[str]]] = {}  # by reason: the first message, and all files
    for image, mask in pairs:
        try:
            size = _checked(image, mask, colors)
        except ValueError as error:
            size = (0, 0)
            message = str(error)
            _, files = alike.setdefault(message.replace(str(image), "").replace(str(mask), ""), (message, []))
            files.append(str(mask if message.startswith("mask") else image))
        good.images.append(str(image))
        good.masks.append(str(mask))
        good.sizes.append(size)
    if skip_bad:
        return good
    listed = [
        f"{message} Likewise {format_names(files[1:])}." if files[1:] else message for message, files in alike.values()
    ]
    count = sum(len(files) for _, files in alike.values())
    refuse(listed, f"{root}: {count} pair(s) of image and mask cannot be used")
    return good


def refuse(problems: list[str], headline: str) -> None:
    """Raise ValueError if there are problems, with the headline and the first ten problems."""
    if problems:
        more = f"\n  and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise ValueError(f"{headline}:" + "".join(f"\n  {problem}" for problem in problems[:_LISTED]) + more)


def _checked(image: str | Path, mask: str | Path, colors: bool) -> tuple[int, int]:
    seen, masked = image_header(image), mask_header(mask, colours=colors)
    if seen.size == masked.size:
        return seen.size
    message = f"image {image} is {_sized(seen.size)} pixels but its mask {mask} is {_sized(masked.size)}"
    if seen.stored == masked.size:
        raise ValueError(
            f"{message}: the image is turned upright by its EXIF orientation; turn the mask likewise, or take the "
            "orientation out of the image."
        )
    raise ValueError(f"{message}; give both the same size.")


def _sized(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"


def _by_key(root: Path, name: str, suffix: str, kind: str) -> dict[str, str]:
    folder = root / name
    if not folder.is_dir():
        beside = sorted(path.name for path in folder.parent.iterdir()) if folder.parent.is_dir() else []
        seen = f"; {folder.parent} holds {', '.join(map(repr, beside[:10]))}" if beside else ""
        raise FileNotFoundError(f"{folder}: no such folder of {kind}s{seen}; give the folders of images and masks.")
    real = root.resolve()
    if leads_outside(folder, real, named=name):
        raise ValueError(f"{folder}: leads to {folder.resolve()}, outside of {root}; copy the files into the folder.")
    found: dict[str, str] = {}
    for path in image_files(folder, real):
        file = Path(path)
        key = file.relative_to(folder).as_posix()
        key = key if "." in suffix else key.removesuffix(file.suffix)
        if not key.endswith(suffix):
            continue
        key = key.removesuffix(suffix)
        if key in found:
            raise ValueError(
                f"{found[key]} and {path} are both the {kind} {key!r}; remove one, or set {kind}_suffix to "
                f"{suffix + file.suffix!r} to take that kind only."
            )
        found[key] = path
    if not found:
        ending = f" whose name ends in {suffix!r}" if suffix else ""
        raise ValueError(f"{folder}: no {kind}{ending}; add {kind}s, or set {kind}_suffix to what their names end in.")
    return found
