"""Which two models can be student and teacher."""

from torch import nn

from diffkd.weights import unwrap


def check_models(student: nn.Module, teacher: nn.Module) -> None:
    """Raise ValueError if the models share what is trained, or have weights without values."""
    trained = {id(parameter) for parameter in student.parameters() if parameter.requires_grad}
    if unwrap(student) is unwrap(teacher) or any(id(parameter) in trained for parameter in teacher.parameters()):
        raise ValueError(
            "student and teacher share parameters: training the student would change the teacher; "
            "copy.deepcopy one of them"
        )
    _check_values("student", student)
    _check_values("teacher", teacher)


def _check_values(side: str, model: nn.Module) -> None:
    """Raise ValueError, naming the first, if weights of a model have no values: they are on the device "meta"."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(
                f"{name!r} of the {side} {type(unwrap(model)).__name__} has no values, on the device 'meta': call "
                "model.to_empty(device='cpu') and load its weights first"
            )
