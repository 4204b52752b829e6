"""How many class, distillation and register tokens a model puts before its grid of tokens, as far as it says so."""

import re

from torch import nn

from diffkd.weights import unwrap

# As timm, torchvision, transformers and the models' own repositories call the parameters.
_TOKENS = re.compile(
    r"((cls|class|dist|distill|distillation|reg|register|storage)_?tokens?|class_embedding)(_?\d+)?", re.ASCII
)


def prefix_tokens(model: nn.Module) -> frozenset[int]:
    """Return the numbers of prefix tokens of which the model speaks.

    Any of its modules may: by an attribute `num_prefix_tokens`, as in timm, or by parameters of its own that are called
    such tokens ("cls_token", "register_tokens"), of which those of one module are added up. Those that differ by a
    number at the end ("cls_token1", "cls_token2") belong to grids of their own.

    Returns:
        The numbers, empty if the model says nothing. Not every layer has these tokens: they may come late or be absent.
    """
    found: set[int] = set()
    for module in unwrap(model).modules():
        told = getattr(module, "num_prefix_tokens", None)
        if isinstance(told, int):
            found.add(told)
            continue
        counts: dict[str, int] = {}
        for name, parameter in module.named_parameters(recurse=False):
            if match := _TOKENS.fullmatch(name):
                counts[match[1]] = parameter.shape[-2] if parameter.ndim > 1 else 1
        if counts:
            found.add(sum(counts.values()))
    return frozenset(found)
