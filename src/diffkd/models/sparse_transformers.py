"""Vision transformers of timm that attend by in-context sparse attention, with the parameters that they have."""

import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from diffkd.models.extras import nearest, require
from diffkd.models.sparse_attention import Sparsity, check_count, check_length

_MEND = "give a vision transformer of timm, such as timm/vit_small_patch16_224"


class SparseSelfAttention(nn.Module):
    """The attention of a vision transformer of timm, with in-context sparse attention between its projections.

    It takes over the layers, parameters and buffers of the attention that it replaces, under their names.

    Args:
        source: `Attention`, `AttentionRope` or `EvaAttention` of timm, or one of this class.
        options: of the sparse attention.
        prefix_tokens: class and register tokens at the beginning of the sequence.
        context_tokens: tokens at its end that are context.
    """

    def __init__(self, source: nn.Module, options: Sparsity, prefix_tokens: int, context_tokens: int) -> None:
        super().__init__()
        for name, layer in source._modules.items():
            self.register_module(name, layer)
        for name, parameter in source._parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in source._buffers.items():
            self.register_buffer(name, buffer, persistent=name not in source._non_persistent_buffers_set)
        self.train(source.training)
        of: Any = source
        self.num_heads: int = of.num_heads
        self.num_kv_heads: int = getattr(of, "num_kv_heads", of.num_heads)
        self.rotated_from: int = getattr(of, "num_prefix_tokens", getattr(of, "rotated_from", 0))
        self.rotate_half: bool = getattr(of, "rotate_half", False)
        self.prefix_tokens, self.context_tokens = prefix_tokens, context_tokens
        self.options = options
        self._rotate = require("timm.layers", "train", "sparse attention in a model of timm").apply_rot_embed_cat

    def forward(
        self, x: Tensor, *, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Return the attention's output for tokens.

        Args:
            x: (B, S, C).
            rope: rotary positions of the tokens after the prefix, as timm passes them.
            attn_mask: must be None.
            is_causal: must be False.

        Raises:
            ValueError: if there is a mask, or the sequence is shorter than two blocks.
        """
        if attn_mask is not None or is_causal:
            raise ValueError(
                "sparse attention takes no mask: give images that fill the sequence, or keep the full attention"
            )
        of: Any = self
        gate = None if getattr(of, "gate", None) is None else of.gate(x).sigmoid()
        if getattr(of, "qkv", None) is not None:
            projected = of.qkv(x)
            if getattr(of, "q_bias", None) is not None:
                projected = projected + torch.cat([of.q_bias, of.k_bias, of.v_bias])
            queries, keys, values = projected.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            queries = of.q_proj(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            keys, values = (
                layer(x).unflatten(2, (self.num_kv_heads, -1)).transpose(1, 2) for layer in (of.k_proj, of.v_proj)
            )
        queries, keys = self._rotated(of.q_norm(queries), rope, values), self._rotated(of.k_norm(keys), rope, values)
        if (groups := self.num_heads // self.num_kv_heads) > 1:
            keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
        dropout = of.attn_drop.p if self.training else 0.0
        out = self.options.attend(queries, keys, values, self.prefix_tokens, self.context_tokens, dropout, None)
        out = of.norm(out.transpose(1, 2).flatten(2)) if hasattr(of, "norm") else out.transpose(1, 2).flatten(2)
        out = of.proj(out if gate is None else out * gate)
        dropped: Tensor = of.proj_drop(out)
        return dropped

    def _rotated(self, x: Tensor, rope: Tensor | None, like: Tensor) -> Tensor:
        if rope is None:
            return x
        first, rest = x[:, :, : self.rotated_from], x[:, :, self.rotated_from :]
        return torch.cat([first, self._rotate(rest, rope, half=self.rotate_half)], 2).type_as(like)

    def extra_repr(self) -> str:
        """Return the options."""
        shown = {"prefix_tokens": self.prefix_tokens, "context_tokens": self.context_tokens}
        shown |= {field.name: getattr(self.options, field.name) for field in fields(self.options)}
        return ", ".join(f"{name}={value}" for name, value in shown.items())


def sparse(
    model: nn.Module,
    *,
    block: int = 64,
    context_ratio: float = 0.125,
    sharp_ratio: float = 0.5,
    sharpness_ratio: float = 0.0625,
    exact_ratio: float = 0.0625,
    shortcut: float = 1.0,
    flex: bool = False,
    prefix_tokens: int | None = None,
    context_tokens: int = 0,
) -> nn.Module:
    """Give a vision transformer of timm sparse attention, in place; its parameters keep their names and values.

    Every self-attention of the classes `Attention`, `AttentionRope` and `EvaAttention` is replaced: those of ViT, DeiT,
    DINOv2 and DINOv3, EVA-02, CLIP, SigLIP and others, with registers and rotary positions, in a model of timm or in
    one of your own that is made of these layers. A model that is sparse already gets other options.

    Args:
        model: changed in place. Its full-attention weights load strictly, before or after.
        block: as the following, of :class:`InContextSparseAttention`.
        context_ratio, sharp_ratio, sharpness_ratio, exact_ratio, shortcut, flex: likewise.
        prefix_tokens: class and register tokens at the beginning of the sequence; None: the `num_prefix_tokens` of the
            part of the model that holds the layer, or of the layer.
        context_tokens: tokens at its end that are context.

    Returns:
        The model.

    Raises:
        ValueError: if there is no such attention, its number of prefix tokens is unknown, an option is out of range, or
            the model's images have fewer patches than two blocks. The model is unchanged then.

    >>> import timm
    >>> vit = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    >>> full = vit.state_dict()
    >>> sparse(vit, block=16, shortcut=0.0).load_state_dict(full)
    <All keys matched successfully>
    """
    options = Sparsity(block, context_ratio, sharp_ratio, sharpness_ratio, exact_ratio, shortcut, flex)
    if prefix_tokens is not None:
        check_count("prefix_tokens", prefix_tokens, 0, "the number of class and register tokens")
    check_count("context_tokens", context_tokens, 0, "the number of tokens at the end that are context")
    kinds = _kinds()
    parts = dict(model.named_modules(remove_duplicate=False))
    found = {name: part for name, part in parts.items() if type(part) in kinds}
    if not found:
        raise ValueError(_without_attention(model, parts.values()))
    for name in found:
        _check_patches(name, parts, options.block)
    prefixes = {name: _prefix_of(name, parts) if prefix_tokens is None else prefix_tokens for name in found}
    made: dict[nn.Module, SparseSelfAttention] = {}
    for name, part in found.items():
        if part not in made:
            made[part] = SparseSelfAttention(part, options, prefixes[name], context_tokens)
        if not name:
            return made[part]
        model.set_submodule(name, made[part])
    return model


def sparse_options(text: str, name: str) -> dict[str, Any]:
    """Return the options of :func:`sparse` that the name of a model gives, such as "block=32,shortcut=0".

    Args:
        text: options with commas between them; "" for none.
        name: the whole name, for messages.

    Raises:
        ValueError: if an option is unknown, given twice, or its value is no number.
    """
    known: dict[str, Any] = {field.name: float for field in fields(Sparsity)}
    known |= {"block": int, "flex": _truth, "prefix_tokens": int, "context_tokens": int}
    options: dict[str, Any] = {}
    for one in filter(None, text.split(",")):
        option, equals, value = one.partition("=")
        if option not in known:
            raise ValueError(
                f"model '{name}' has no option '{option}' for its attention; {nearest(option, known)}. Write it as "
                "isa,block=32,shortcut=0/timm/NAME"
            )
        if option in options:
            raise ValueError(f"model '{name}' gives {option} twice: leave one out")
        try:
            options[option] = known[option](value)
        except ValueError:
            wanted = {int: "a whole number", _truth: "0 or 1"}.get(known[option], "a number")
            raise ValueError(f"model '{name}' gives {option} as '{equals and value}': give {wanted}") from None
    return options


def _truth(text: str) -> bool:
    return bool(("0", "1").index(text))


def _kinds() -> tuple[type, ...]:
    """Return the classes of attention that can be replaced."""
    layers = require("timm.layers", "train", "sparse attention in a model of timm")
    eva = require("timm.models.eva", "train", "sparse attention in a model of timm")
    return (layers.Attention, layers.AttentionRope, eva.EvaAttention, SparseSelfAttention)


def _without_attention(model: nn.Module, parts: Any) -> str:
    others = sorted({kind for part in parts if re.search("Attention|Attn", kind := type(part).__name__)})
    if others:
        return (
            f"the attention of {type(model).__name__} ({', '.join(others)}) is not that of timm's vision transformers "
            f"and cannot be made sparse: {_MEND}"
        )
    return f"{type(model).__name__} has no attention that could be made sparse: {_MEND}"


def _holders(name: str, parts: dict[str, nn.Module]) -> Iterator[nn.Module]:
    """Yield the modules that hold a layer, the innermost first, the whole model last."""
    while name:
        name = name.rpartition(".")[0]
        yield parts[name]


def _prefix_of(name: str, parts: dict[str, nn.Module]) -> int:
    part = parts[name]
    if isinstance(part, SparseSelfAttention):
        return part.prefix_tokens
    for holder in (*_holders(name, parts), part):
        count = getattr(holder, "num_prefix_tokens", None)
        if isinstance(count, int):
            return count
    raise ValueError(
        f"nothing says how many class and register tokens '{name}' of {type(parts['']).__name__} sees before the "
        "patches: give prefix_tokens, 0 for none"
    )


def _check_patches(name: str, parts: dict[str, nn.Module], block: int) -> None:
    """Refuse a model whose images, all of one size, have fewer patches than two blocks."""
    for holder in _holders(name, parts):
        patches: Any = getattr(holder, "patch_embed", None)
        count = getattr(patches, "num_patches", None)
        if isinstance(count, int) and getattr(patches, "strict_img_size", False):
            check_length(count, block)
