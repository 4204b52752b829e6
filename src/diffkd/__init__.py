"""Knowledge distillation for vision models, with DiffKD (*Knowledge Diffusion for Distillation*, NeurIPS 2023)."""

from diffkd.distiller import Distiller
from diffkd.layers import Layer, list_layers
from diffkd.layout import Layout
from diffkd.matching import Pair, match_layers
from diffkd.methods import (
    AT,
    CIRKD,
    CRD,
    CWD,
    DIST,
    DKD,
    FGD,
    KD,
    MGD,
    OFD,
    PKT,
    RKD,
    SP,
    SRRL,
    VID,
    BoxKD,
    DiffKD,
    DiffKDOutput,
    FitNet,
    MasKD,
    MethodFactory,
    ReviewKD,
)
from diffkd.methods.shared import Shared
from diffkd.observation import Observation
from diffkd.ramp import Ramp
from diffkd.shape import FeatureShape
from diffkd.teacher_input import TeacherInput
from diffkd.teacher_options import TeacherOptions
from diffkd.weights import load_weights, read_weights, save_student

__version__ = "0.1.0"

__all__ = [
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
    "Distiller",
    "FeatureShape",
    "FitNet",
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
