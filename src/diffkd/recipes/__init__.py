"""Recipes: YAML files with the values of published trainings, for `diffkd fit`."""

from functools import cache
from importlib.resources import files
from pathlib import Path

_FOLDER = Path(str(files("diffkd"))) / "recipes"


def recipe_names() -> list[str]:
    """Return the names of the recipes in the package, such as "cifar100/resnet56-resnet20", sorted."""
    return list(_names())


@cache
def _names() -> tuple[str, ...]:
    return tuple(sorted(path.relative_to(_FOLDER).with_suffix("").as_posix() for path in _FOLDER.rglob("*.yaml")))


def find_recipe(name: str) -> Path:
    """Return the file of a recipe.

    Args:
        name: path of a file, or the name of a recipe in the package.

    Raises:
        FileNotFoundError: if it is neither.
    """
    if Path(name).is_file():
        return Path(name)
    if name in recipe_names():
        return _FOLDER / f"{name}.yaml"
    import difflib

    near = difflib.get_close_matches(name, recipe_names(), n=2) or recipe_names()[:2]
    raise FileNotFoundError(
        f"there is no file and no recipe {name!r}; nearest: {', '.join(near)}. `diffkd recipes` lists all."
    )


def recipes() -> None:
    """Print the names of the recipes in the package, each with the first line of its file."""
    names = recipe_names()
    width = max(map(len, names))
    for name in names:
        first = find_recipe(name).read_text(encoding="utf-8").splitlines()[0]
        print(f"{name:{width}}  {first.lstrip('# ')}")  # noqa: T201
