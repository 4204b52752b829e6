"""Which two models can be student and teacher."""

from torch import Tensor, nn

from diffkd.calling import evaluation_mode
from diffkd.weights import unwrap


def check_models(student: nn.Module, teacher: nn.Module) -> None:
    """Raise ValueError if the models share what is trained, have weights without values, or are programs."""
    _check_modes("student", student)
    _check_modes("teacher", teacher)
    # By memory, not by object: a state dict loaded with assign=True shares it between two parameters.
    trained = {_memory(parameter) for parameter in student.parameters() if parameter.requires_grad}
    if unwrap(student) is unwrap(teacher) or any(_memory(parameter) in trained for parameter in teacher.parameters()):
        raise ValueError(
            "student and teacher share parameters: training the student would change the teacher; "
            "copy.deepcopy one of them"
        )
    _check_values("student", student)
    _check_values("teacher", teacher)


def _memory(parameter: Tensor) -> int:
    """Where a parameter's values lie, or which object it is, if that cannot be told."""
    try:
        return parameter.data_ptr() or id(parameter)
    except (RuntimeError, ValueError):  # it is lazy, sparse, or wraps other tensors
        return id(parameter)


def _check_modes(side: str, model: object) -> None:
    """Raise ValueError if a model is what torch.export makes: it has no layers, and cannot be put into evaluation."""
    try:
        if isinstance(model, nn.Module):
            with evaluation_mode(model):
                return
    except NotImplementedError:
        pass
    raise ValueError(
        f"the {side} is of type {type(model).__name__}, and no nn.Module with layers and modes of its own: give the "
        "model itself, or, of a program of torch.export, what torch.export.unflatten(program) makes of it"
    )


def _check_values(side: str, model: nn.Module) -> None:
    """Raise ValueError, naming the first, if weights of a model have no values: they are on the device "meta"."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(
                f"{name!r} of the {side} {type(unwrap(model)).__name__} has no values, on the device 'meta': call "
                "model.to_empty(device='cpu') and load its weights first"
            )
