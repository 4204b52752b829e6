"""Knowledge distillation for vision models, with DiffKD (*Knowledge Diffusion for Distillation*, NeurIPS 2023).

Nothing is imported before it is used, so that `diffkd --help` need not wait for PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffkd.distill.distiller import Distiller
    from diffkd.distill.matching import Pair, match_layers
    from diffkd.distill.observation import Observation
    from diffkd.distill.ramp import Ramp
    from diffkd.features.layers import Layer, list_layers
    from diffkd.features.layout import Layout
    from diffkd.features.shape import FeatureShape
    from diffkd.files.weights import load_weights, read_weights, save_student
    from diffkd.methods import (
        AT,
        CIRKD,
        CRD,
        CWD,
        DIST,
        DKD,
        FGD,
        FMKT,
        KD,
        MGD,
        NORM,
        OFAKD,
        OFD,
        PKD,
        PKT,
        RKD,
        SP,
        SRRL,
        VID,
        WTTM,
        BoxKD,
        DiffKD,
        DiffKDOutput,
        FitNet,
        Hint,
        MasKD,
        MethodFactory,
        ReviewKD,
    )
    from diffkd.methods.shared import Shared
    from diffkd.teacher.options import TeacherOptions
    from diffkd.teacher.view import TeacherInput

__version__ = "0.1.0"

_SUBPACKAGES = ("data", "methods", "models", "official")
_HOMES = {
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
    "diffkd.files.weights": (
        "load_weights",
        "read_weights",
        "save_student",
    ),
    "diffkd.methods": (
        "AT",
        "CIRKD",
        "CRD",
        "CWD",
        "DIST",
        "DKD",
        "FGD",
        "KD",
        "MGD",
        "OFD",
        "PKT",
        "RKD",
        "SP",
        "SRRL",
        "VID",
        "BoxKD",
        "DiffKD",
        "DiffKDOutput",
        "FitNet",
        "MasKD",
        "FMKT",
        "Hint",
        "NORM",
        "OFAKD",
        "PKD",
        "WTTM",
        "MethodFactory",
        "ReviewKD",
    ),
    "diffkd.methods.shared": ("Shared",),
    "diffkd.teacher.options": ("TeacherOptions",),
    "diffkd.teacher.view": ("TeacherInput",),
}


__all__ = [
    "AT",
    "CIRKD",
    "CRD",
    "CWD",
    "DIST",
    "DKD",
    "FGD",
    "FMKT",
    "KD",
    "MGD",
    "NORM",
    "OFAKD",
    "OFD",
    "PKD",
    "PKT",
    "RKD",
    "SP",
    "SRRL",
    "VID",
    "WTTM",
    "BoxKD",
    "DiffKD",
    "DiffKDOutput",
    "Distiller",
    "FeatureShape",
    "FitNet",
    "Hint",
    "Layer",
    "Layout",
    "MasKD",
    "MethodFactory",
    "Observation",
    "Pair",
    "Ramp",
    "ReviewKD",
    "Shared",
    "TeacherInput",
    "TeacherOptions",
    "list_layers",
    "load_weights",
    "match_layers",
    "read_weights",
    "save_student",
]


def __getattr__(name: str) -> object:
    """Import a public name where it is asked for (PEP 562)."""
    if name in _SUBPACKAGES:
        return import_module(f"{__name__}.{name}")
    for module, names in _HOMES.items():
        if name in names:
            found: object = getattr(import_module(module), name)
            globals()[name] = found
            return found
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    """Return the public names, imported or not."""
    return sorted({*globals(), *__all__, *_SUBPACKAGES})
