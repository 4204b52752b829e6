"""Knowledge distillation for vision models, with DiffKD (*Knowledge Diffusion for Distillation*, NeurIPS 2023).

Nothing is imported before it is used, so that `diffkd --help` need not wait for PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffkd.distill.balance import Balance as Balance
    from diffkd.distill.distiller import Distiller as Distiller
    from diffkd.distill.matching import Pair as Pair
    from diffkd.distill.matching import match_layers as match_layers
    from diffkd.distill.observation import Observation as Observation
    from diffkd.distill.ramp import Ramp as Ramp
    from diffkd.features.layers import Layer as Layer
    from diffkd.features.layers import list_layers as list_layers
    from diffkd.features.layout import Layout as Layout
    from diffkd.features.shape import FeatureShape as FeatureShape
    from diffkd.files.fitting import load_weights as load_weights
    from diffkd.files.weights import read_weights as read_weights
    from diffkd.files.weights import save_student as save_student
    from diffkd.methods import *  # noqa: F403
    from diffkd.methods.shared import Shared as Shared
    from diffkd.teacher.options import TeacherOptions as TeacherOptions
    from diffkd.teacher.view import TeacherInput as TeacherInput

__version__ = "0.1.0"

_SUBPACKAGES = ("data", "methods", "models", "official")
_HOMES = {
    "diffkd.distill.balance": ("Balance",),
    "diffkd.distill.distiller": ("Distiller",),
    "diffkd.distill.matching": (
        "Pair",
        "match_layers",
    ),
    "diffkd.distill.observation": ("Observation",),
    "diffkd.distill.ramp": ("Ramp",),
    "diffkd.features.layers": (
        "Layer",
        "list_layers",
    ),
    "diffkd.features.layout": ("Layout",),
    "diffkd.features.shape": ("FeatureShape",),
    "diffkd.files.fitting": ("load_weights",),
    "diffkd.files.weights": (
        "read_weights",
        "save_student",
    ),
    "diffkd.methods.shared": ("Shared",),
    "diffkd.teacher.options": ("TeacherOptions",),
    "diffkd.teacher.view": ("TeacherInput",),
}


def __getattr__(name: str) -> object:
    """Import a public name where it is asked for (PEP 562); all that `diffkd.methods` offers is among them."""
    if name == "__all__":
        return sorted([*(one for names in _HOMES.values() for one in names), *_methods()])
    if name in _SUBPACKAGES:
        return import_module(f"{__name__}.{name}")
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None and not name.startswith("_") and name in _methods():
        home = "diffkd.methods"
    if home is None:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    found: object = getattr(import_module(home), name)
    globals()[name] = found
    return found


def _methods() -> list[str]:
    from diffkd.methods import __all__ as names

    return names


def __dir__() -> list[str]:
    """Return the public names, imported or not."""
    return sorted({*globals(), *__getattr__("__all__"), *_SUBPACKAGES})  # type: ignore[misc]
