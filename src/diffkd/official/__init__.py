"""Interoperation with the authors' published code: its constructor arguments, parameter names and checkpoints."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffkd.diffusion.distances import Distance, kl_divergence
from diffkd.diffusion.modules import Denoiser
from diffkd.methods.diffkd import DiffKD

_OURS_TO_THEIRS = {
    "student_projection": "trans",
    "denoiser": "model",
    "output_projection": "proj",
    "autoencoder": "ae",
    "noise_adapter": "noise_adapter",
}
_THEIRS_TO_OURS = {theirs: ours for ours, theirs in _OURS_TO_THEIRS.items()}
_DEFAULTS: dict[str, Any] = {
    "kernel_size": 3,
    "inference_steps": 5,
    "num_train_timesteps": 1000,
    "use_ae": False,
    "ae_channels": None,
}
# A layer's name may contain any of the first words ("backbone.model.layer4"), so the second is checked too.
_MODULE_ENTRY = re.compile(
    r"_diff\.(.+)\.((?:trans|model\.(?:pred|time_embedding)|proj\.\d|ae\.(?:en|de)coder|noise_adapter\.(?:feat|pred))\..+)"
)


def from_official(
    config: Mapping[str, Any], state_dict: Mapping[str, Tensor] | None = None, *, distance: Distance | None = None
) -> DiffKD:
    """Build a :class:`~diffkd.DiffKD` from the authors' arguments and parameters.

    Args:
        config: the authors' argument names: `student_channels`, `teacher_channels`, and optionally `kernel_size` (3 for
            maps, 1 for vectors), `inference_steps`, `num_train_timesteps`, `use_ae`, `ae_channels` (None: half of the
            teacher's).
        state_dict: parameters and buffers under the authors' names; None: newly initialised.
        distance: d of Eq. 7, None for the mean squared error. The authors' code uses the KL divergence for logits.

    Returns:
        A DiffKD of the "code" variant, in float32 or the dtype of the state's parameters.

    Raises:
        ValueError: if an argument is unknown, missing or unsupported, or the parameters do not fit exactly.
    """
    unknown = sorted(set(config) - set(_DEFAULTS) - {"student_channels", "teacher_channels"})
    missing = sorted({"student_channels", "teacher_channels"} - set(config))
    if unknown or missing:
        raise ValueError(f"DiffKD config: unknown {unknown}, missing {missing}; known: {sorted(_DEFAULTS)}")
    options = _DEFAULTS | dict(config)
    if options["kernel_size"] not in (1, 3):
        raise ValueError(f"kernel_size must be 3 (maps) or 1 (vectors), got {options['kernel_size']}")
    ae_channels = options["ae_channels"] or options["teacher_channels"] // 2
    model = DiffKD(
        options["student_channels"],
        options["teacher_channels"],
        kind="map" if options["kernel_size"] == 3 else "vector",
        ae_channels=ae_channels if options["use_ae"] else None,
        inference_steps=options["inference_steps"],
        num_train_timesteps=options["num_train_timesteps"],
        distance=distance,
    )
    if state_dict is not None:
        load_official_state(model, state_dict)
    return model


def load_official_state(model: DiffKD, state_dict: Mapping[str, Tensor]) -> None:
    """Load parameters and buffers under the authors' names into `model`, all of them or none.

    Raises:
        ValueError: if names are missing, unknown or shapes do not fit; the message lists them.
    """
    own = model.state_dict()
    theirs = {our_name(name): value for name, value in state_dict.items()}
    counters = {name for name in own if name.endswith("num_batches_tracked")}  # absent from old checkpoints
    problems = [f"missing {their_name(name)}" for name in own if name not in theirs and name not in counters]
    problems += [f"unknown {their_name(name)}" for name in theirs if name not in own]
    problems += [
        f"{their_name(name)} is {tuple(value.shape)}, expected {tuple(own[name].shape)}"
        for name, value in theirs.items()
        if name in own and value.shape not in (own[name].shape, _their_shape(model, name, own[name]).shape)
    ]
    if problems:
        raise ValueError(f"these parameters are not of this DiffKD: {'; '.join(problems[:8])}; check its config")
    floating = [value for value in theirs.values() if value.is_floating_point()]
    if floating:
        model.to(floating[0].dtype)
    # For vectors the authors use 1x1 convolutions on 1x1 maps, this package linear layers: (out, in, 1, 1) becomes
    # (out, in).
    reshaped = {name: value.reshape(own[name].shape) for name, value in theirs.items()}
    model.load_state_dict({name: reshaped.get(name, own[name]) for name in own})


def to_official_state(model: DiffKD) -> dict[str, Tensor]:
    """Return parameters and buffers of `model` under the authors' names and in their shapes, detached.

    Raises:
        ValueError: if its denoiser is not the authors'.
    """
    if not isinstance(model.denoiser, Denoiser):
        raise ValueError(f"the authors' code has no place for the denoiser {type(model.denoiser).__name__}")
    return {their_name(name): _their_shape(model, name, value) for name, value in model.state_dict().items()}


def our_name(name: str) -> str:
    """Return our name of the authors' parameter `name`, such as "denoiser.pred.2.weight" for "model.pred.2.weight"."""
    head, _, rest = name.partition(".")
    return f"{_THEIRS_TO_OURS.get(head, head)}.{rest}"


def their_name(name: str) -> str:
    """Return the authors' name of our parameter `name`."""
    head, _, rest = name.partition(".")
    return f"{_OURS_TO_THEIRS.get(head, head)}.{rest}"


def split_checkpoint(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, DiffKD]]:
    """Split a student's state dict of the authors' code into the plain student and its DiffKD modules.

    The authors' code stores the modules in the student as `_diff.<layer>`. Their configuration is inferred from shapes;
    the number of inference steps is not stored, so 5, the code's default, is assumed. As in that code, modules of
    vectors, which are its logits, compare by the KL divergence, and those of maps by the mean squared error.

    Args:
        state_dict: as saved by the authors' training, with or without the "module." prefix of DistributedDataParallel.

    Returns:
        `(student, modules)`: the student's own entries, and a DiffKD by teacher layer name. Without such modules all
        entries are returned unchanged as the student's.

    Raises:
        ValueError: if the entries of a module are incomplete or do not belong to a DiffKD module.
    """
    plain = {re.sub(r"^(module\.)+", "", name): value for name, value in state_dict.items()}
    if not any(name.startswith("_diff.") for name in plain):
        return dict(state_dict), {}
    student = {name: value for name, value in plain.items() if not name.startswith(("_diff.", "_align."))}
    layers: dict[str, dict[str, Tensor]] = {}
    for name, value in plain.items():
        if match := _MODULE_ENTRY.fullmatch(name):
            layers.setdefault(match[1], {})[match[2]] = value
        elif name.startswith("_diff."):
            raise ValueError(f"the checkpoint's entry {name!r} is not of a DiffKD module of the authors' code")
    return student, {layer: _module_from_state(layer, state) for layer, state in layers.items()}


def _module_from_state(layer: str, state: Mapping[str, Tensor]) -> DiffKD:
    try:
        latent, student_channels = state["trans.weight"].shape[:2]
        is_map = "model.pred.0.block.0.weight" in state
        use_ae = "ae.encoder.0.weight" in state
        config = {
            "student_channels": student_channels,
            "teacher_channels": state["ae.encoder.0.weight"].shape[1] if use_ae else latent,
            "kernel_size": 3 if is_map else 1,
            "use_ae": use_ae,
            "ae_channels": latent,
        }
    except KeyError as missing:
        raise ValueError(f"the checkpoint's DiffKD module of layer {layer!r} lacks {missing}: is it whole?") from None
    return from_official(config, state, distance=None if is_map else kl_divergence)


def _their_shape(model: DiffKD, name: str, value: Tensor) -> Tensor:
    is_linear = not model.is_map and value.ndim == 2 and name.split(".")[-1] == "weight"
    if is_linear and name not in ("denoiser.time_embedding.weight", "noise_adapter.pred.weight"):
        return value[..., None, None]
    return value
