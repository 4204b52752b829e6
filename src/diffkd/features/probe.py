"""The probe: one forward of each model with the example, which determines shapes and layouts of the paired layers."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from diffkd.features.activations import PRE
from diffkd.features.ambiguous_layouts import prefix_tokens
from diffkd.features.forward import batch_of, evaluation_mode, input_size_of, on_device_of
from diffkd.features.layers import Layer
from diffkd.features.layout import Layout, select_tensor
from diffkd.features.reader import Reader, SideName, reader_for
from diffkd.features.recorder import Call, Recorder, Recording, split_selector


def probe(
    side: SideName, recorder: Recorder, model: nn.Module, example: Any, layers: Sequence[Layer]
) -> Callable[..., Reader]:
    """Record the example once, and return a function that builds the reader of given layers."""
    output, outputs, _ = _record(recorder, model, example)
    return partial(
        reader_for,
        side,
        outputs=outputs,
        logits=select_tensor(output, split_selector(layers[-1].name)[1]) if layers[-1].scores else None,
        input_size=input_size_of(example),
        batch=batch_of(example),
        scores={layer.name for layer in layers if layer.scores},
        prefixes=prefix_tokens(model),
        layouts=_layouts(layers),
    )


def _layouts(layers: Sequence[Layer]) -> dict[str, Layout]:
    """Return the known layouts of layers and of the elements of their outputs, by name."""
    found = [(layer.name, layer.layout) for layer in layers]
    found += [(f"{layer.name}{PRE}", layer.layout) for layer in layers if layer.before is not None]
    for layer in layers:
        found += [(name, one) for (name, _), one in zip(layer.elements, layer.element_layouts, strict=True)]
    return {name: layout for name, layout in found if layout is not None}


def watch(model: nn.Module, watched: Sequence[str], example: Any) -> dict[str, Call]:
    """Return the calls of the watched layers for the example."""
    if not watched:
        return {}
    recorder = Recorder((), watched)
    recorder.attach(model)
    try:
        return _record(recorder, model, example).calls
    finally:
        recorder.detach()


def _record(recorder: Recorder, model: nn.Module, example: Any) -> Recording:
    with evaluation_mode(model), torch.no_grad():
        return recorder.record(model, on_device_of(model, example))
