"""In-context sparse attention, and vision transformers of timm that attend by it with the parameters that they have.

Shao et al., LIVEditor-14B: Lightning Unified Video Editing via In-Context Sparse Attention (ICML 2026,
arXiv 2605.04569). Tokens are grouped into blocks, and the attention between the means of the blocks decides what is
computed token by token. What is computed, for each image and each head by itself:

0. The sequence is [prefix | target | context]. Prefix tokens (class, registers) are in no block: everything attends to
   them exactly, and they attend exactly to everything that is kept. Target and context are cut into blocks of their
   own, so that none holds both; the last block of each may be short. There are n blocks, n_t of them of the target.
1. Compression: Qc, Kc, Vc (n, d) are the means over the blocks' tokens, P = softmax(Qc Kc^T / sqrt(d)) (n, n); a short
   block counts in P like any other.
2. Context selection: the context blocks with the largest sums of P over the target's query blocks are kept. What
   follows sees the keys and values of prefix, target and kept context alone.
3. Routing: the sharpness of a query block is the sum of its largest entries of P over the target's blocks. The
   sharpest query blocks, of target and context together, attend to all that is kept: full attention.
4. 0-th-order Taylor attention of the others: each attends token by token to the prefix and to the kept blocks with the
   largest entries in its row of P. Every other kept block j stands in as its mean: weight |block j| exp(q . Kc_j /
   sqrt(d)), value Vc_j. All of them share one softmax denominator, which is the query token's own.
5. Shortcut: the compressed attention's output P Vc, times a weight, is added to each token of its block.

A ratio of so many blocks is rounded down, and gives at least one block unless it is 0. Of equal blocks the earlier one
is chosen. The choices have no gradient; everything computed with them has.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from diffkd.models.extras import nearest, require

# Bytes of keys and values that are gathered at once where no gradient is wanted, by the type of the device.
_GATHERED = {"cpu": 2**20, "cuda": 2**28}
_MEND = "give a vision transformer of timm, such as timm/vit_small_patch16_224"


@dataclass(frozen=True)
class _Parts:
    """Where prefix, target and context lie in a sequence, and how the last two are cut into blocks."""

    prefix: int
    target: int
    context: int
    block: int

    @property
    def of_target(self) -> int:
        """Number of blocks of the target."""
        return -(-self.target // self.block)

    @property
    def count(self) -> int:
        """Number of blocks."""
        return self.of_target - (-self.context // self.block)

    def sizes(self, like: Tensor) -> Tensor:
        """Return the number of tokens in each block (n), in at least float32."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        sizes = torch.full((self.count,), self.block, device=like.device, dtype=dtype)
        for tokens, last in ((self.target, self.of_target - 1), (self.context, self.count - 1)):
            if tokens % self.block:
                sizes[last] = tokens % self.block
        return sizes

    def blocks(self, x: Tensor) -> Tensor:
        """Return a sequence (G, S, d) without its prefix as (G, n, b, d), short blocks filled with zeros."""
        end = self.prefix + self.target
        parts = [x[:, self.prefix : end], x[:, end:]]
        padded = [
            F.pad(part, (0, 0, 0, -part.shape[1] % self.block)) if part.shape[1] % self.block else part
            for part in parts
            if part.shape[1]
        ]
        whole = torch.cat(padded, 1) if len(padded) > 1 else padded[0]
        return whole.reshape(x.shape[0], self.count, self.block, x.shape[-1])

    def tokens(self, blocks: Tensor) -> Tensor:
        """Return blocks (G, n, b, d) as target and context (G, S - prefix, d)."""
        flat = blocks.flatten(1, 2)
        if not self.context:
            return flat[:, : self.target]
        begin = self.of_target * self.block
        return torch.cat([flat[:, : self.target], flat[:, begin : begin + self.context]], 1)


@dataclass(frozen=True)
class _Sparsity:
    """The options of the attention, checked; see :class:`InContextSparseAttention`."""

    block: int = 64
    context_ratio: float = 0.125
    sharp_ratio: float = 0.5
    sharpness_ratio: float = 0.0625
    exact_ratio: float = 0.0625
    shortcut: float = 1.0
    flex: bool = False

    def __post_init__(self) -> None:
        _check_count("block", self.block, 1, "the number of tokens in a block, such as 64")
        if not isinstance(self.flex, bool):
            raise ValueError(f"flex is {self.flex!r}: give true or false")
        for field in fields(self)[1:-1]:
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"{field.name} is {value!r}: give a number, such as {field.default}")
            if field.name != "shortcut" and not 0 <= value <= 1:
                raise ValueError(
                    f"{field.name} {value} is no share of the blocks: give a number in [0, 1], such as {field.default}"
                )

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, prefix: int, context: int, dropout: float, scale: float | None
    ) -> Tensor:
        """Return the attention's output; see :meth:`InContextSparseAttention.forward`."""
        parts = self._parts(query, key, value, prefix, context)
        scale = query.shape[3] ** -0.5 if scale is None else scale
        device = query.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            query, key, value = (x if x.dtype == torch.float64 else x.to(dtype) for x in (query, key, value))
            with torch.autocast(device, enabled=False):  # the means are compared in float32
                return self._attend(query, key, value, parts, dropout, scale)
        return self._attend(query, key, value, parts, dropout, scale)

    def _parts(self, query: Tensor, key: Tensor, value: Tensor, prefix: int, context: int) -> _Parts:
        if query.ndim != 4 or query.shape != key.shape or key.shape[:3] != value.shape[:3]:
            shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
            raise ValueError(
                f"query, key and value of shapes {shapes} are not of one sequence: give (B, heads, S, d) each, and "
                "repeat the keys and values of grouped queries"
            )
        _check_count("prefix_tokens", prefix, 0, "the number of class and register tokens")
        _check_count("context_tokens", context, 0, "the number of tokens at the end that are context")
        tokens = query.shape[2] - prefix
        _check_length(tokens, self.block)
        if context >= tokens:
            raise ValueError(
                f"context_tokens {context} leaves no target among the {tokens} tokens after the prefix: give fewer"
            )
        return _Parts(prefix, tokens - context, context, self.block)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, parts: _Parts, dropout: float, scale: float) -> Tensor:
        batch, prefix, n, n_target = query.shape[0], parts.prefix, parts.count, parts.of_target
        q, k, v = (x.flatten(0, 1) for x in (query, key, value))  # (G, S, d): G images times heads
        sizes = parts.sizes(q)  # (n)
        held = torch.arange(self.block, device=q.device) < sizes[:, None]  # (n, b): the places that hold a token
        q_blocks, k_blocks, v_blocks = (parts.blocks(x) for x in (q, k, v))  # (G, n, b, d)
        q_mean, k_mean, v_mean = (x.sum(2, dtype=sizes.dtype) / sizes[:, None] for x in (q_blocks, k_blocks, v_blocks))
        logits = scale * (q_mean @ k_mean.transpose(1, 2))  # (G, n, n)
        compressed = logits.softmax(-1)
        scores = compressed.detach()

        # Context selection. What is kept: `columns` (G, m) of the blocks; keys and values in `kept_k`, `kept_v`.
        columns = torch.arange(n, device=q.device).expand(q.shape[0], n)
        kept_k, kept_v, kept_mask = k, v, None
        kept = _count(self.context_ratio, n - n_target)
        if kept < n - n_target:
            best = _largest(scores[:, :n_target, n_target:].sum(1))[:, :kept]
            columns = torch.cat([columns[:, :n_target], n_target + best], 1)
            begin = prefix + parts.target
            kept_k, kept_v = (
                torch.cat([x[:, :begin], _take(blocks, columns[:, n_target:]).flatten(1, 2)], 1)
                for x, blocks in ((k, k_blocks), (v, v_blocks))
            )
            if parts.context % self.block:  # the short block may be among those kept
                there = held[columns[:, n_target:]].flatten(1)
                kept_mask = torch.cat([there.new_ones(q.shape[0], begin), there], 1)[:, None]  # (G, 1, S')

        def full(queries: Tensor) -> Tensor:
            return _attention(queries, kept_k, kept_v, kept_mask, dropout, scale)

        m = columns.shape[1]
        exact = _count(self.exact_ratio, m)
        sharp = n if exact == m else _count(self.sharp_ratio, n)
        if sharp == n:
            out = full(q)
            first, out = out[:, :prefix], out[:, prefix:]
        else:
            largest = max(1, _count(self.sharpness_ratio, n_target))
            order = _largest(scores[:, :, :n_target].topk(largest, -1).values.sum(-1))  # (G, n): the sharpest first
            diffuse = order[:, sharp:]  # (G, l)
            seen = columns[:, None].expand(-1, n - sharp, -1)
            best = _largest(_take(logits.detach(), diffuse).gather(-1, seen))[
                ..., :exact
            ]  # (G, l, e), places in `seen`
            near = seen.gather(-1, best)  # the exact blocks of each diffuse query block

            def by_gathering() -> tuple[Tensor, Tensor]:
                sharpest = _take(q_blocks, order[:, :sharp]).flatten(1, 2)
                out = full(torch.cat([q[:, :prefix], sharpest], 1) if prefix else sharpest)
                first, out = out[:, :prefix], out[:, prefix:].reshape(q.shape[0], sharp, self.block, v.shape[-1])

                # The others, by blocks of queries (G, l, b, d), and for each the keys (G, l, e b + prefix + m, d):
                # tokens of the exact blocks, the prefix, means of all kept blocks; the mask hides those of exact ones.
                hidden = q.new_zeros(n, self.block).masked_fill(~held, -math.inf)[near].flatten(2)  # (G, l, e b)
                weights = sizes.log().to(q.dtype)[columns][:, None].expand(-1, n - sharp, -1)
                weights = weights.scatter(-1, best, -math.inf)  # (G, l, m)
                mask = torch.cat([hidden, q.new_zeros(*diffuse.shape, prefix), weights], -1)[:, :, None]
                shared_k, shared_v = (  # (G, prefix + m, d)
                    torch.cat([x[:, :prefix], _take(means, columns).to(x.dtype)], 1)
                    for x, means in ((k, k_mean), (v, v_mean))
                )
                diffuse_q = _take(q_blocks, diffuse)

                def attend(of: slice, some: slice) -> Tensor:
                    chosen = near[of, some]

                    def around(in_blocks: Tensor, shared: Tensor) -> Tensor:
                        tokens = _take(in_blocks[of], chosen.flatten(1))
                        tokens = tokens.reshape(*chosen.shape[:2], exact * self.block, shared.shape[-1])
                        return torch.cat([tokens, shared[of, None].expand(-1, chosen.shape[1], -1, -1)], 2)

                    near_k, near_v = around(k_blocks, shared_k), around(v_blocks, shared_v)
                    return _attention(diffuse_q[of, some], near_k, near_v, mask[of, some], dropout, scale)

                size = mask.shape[-1] * (q.shape[-1] + v.shape[-1]) * q.element_size()  # bytes for a query block
                at_once = max(1, _GATHERED.get(q.device.type, _GATHERED["cuda"]) // size)
                if torch.compiler.is_compiling() or _needs_gradient(q, k, v) or at_once >= n - sharp:
                    rest = attend(slice(None), slice(None))
                else:  # little by little, so that what is gathered stays in the cache, and takes little memory
                    rest = v.new_empty(*diffuse.shape, self.block, v.shape[-1])
                    for one in range(q.shape[0]):
                        for begin in range(0, n - sharp, at_once):
                            of, some = slice(one, one + 1), slice(begin, begin + at_once)
                            rest[of, some] = attend(of, some)
                return first, parts.tokens(_take(torch.cat([out, rest], 1), order.argsort(-1)))

            def by_block_masks() -> tuple[Tensor, Tensor]:
                kept_blocks = q.new_zeros(q.shape[0], n, dtype=torch.bool).scatter(1, columns, True)
                exact_blocks = kept_blocks[:, None].expand(-1, n, -1)  # (G, n, n): which each query block sees
                of_diffuse = torch.zeros_like(exact_blocks[:, sharp:]).scatter(2, near, True)
                rows = diffuse[..., None].expand(-1, -1, n)
                exact_blocks = exact_blocks.scatter(1, rows, of_diffuse)
                by_mean = torch.zeros_like(exact_blocks).scatter(1, rows, kept_blocks[:, None] & ~of_diffuse)
                bias = sizes.log().to(q.dtype).masked_fill(~by_mean, -math.inf)
                return _by_block_masks(
                    parts,
                    held,
                    [(x[:, :prefix], blocks) for x, blocks in ((q, q_blocks), (k, k_blocks), (v, v_blocks))],
                    (k_mean.to(k.dtype), v_mean.to(v.dtype)),
                    kept_blocks,
                    exact_blocks,
                    bias,
                    scale,
                )

            first, out = by_block_masks() if self._flexible(q, dropout) else by_gathering()
        if self.shortcut:
            summary = self.shortcut * (compressed @ v_mean).to(out.dtype)
            out = out + parts.tokens(summary[:, :, None].expand(-1, -1, self.block, -1))
        if prefix:
            out = torch.cat([first, out], 1)
        return out.reshape(batch, -1, *out.shape[1:])

    def _flexible(self, q: Tensor, dropout: float) -> bool:
        """Return whether FlexAttention is wanted, and its kernels can do it: not on a CPU, nor with dropout."""
        tiles = self.block >= 16 and not self.block & (self.block - 1)
        return self.flex and q.is_cuda and tiles and not dropout and not torch.compiler.is_exporting()


class InContextSparseAttention(nn.Module):
    """Self-attention that computes token by token only what matters: in-context sparse attention (arXiv 2605.04569).

    The module's text in :mod:`diffkd.models.sparse_attention` says step by step what is computed. It has no parameters.
    With `sharp_ratio=1` or `exact_ratio=1`, `shortcut=0` and all context kept it is
    :func:`~torch.nn.functional.scaled_dot_product_attention`. Where the keys of each block are equal, the approximation
    is exact too.

    Args:
        block: tokens in a block.
        context_ratio: share of the context's blocks that are kept, at least one.
        sharp_ratio: share of the query blocks that attend in full.
        sharpness_ratio: share of the target's blocks whose attention makes a query block's sharpness, at least one.
        exact_ratio: share of the kept key blocks to which the other query blocks attend token by token.
        shortcut: weight of the attention between the blocks' means, which is added to each block; 0 for none.
        flex: compute it by FlexAttention's block masks, in one kernel that gathers nothing, where it can: on a GPU,
            without dropout, in blocks of a power of two from 16 on. The numbers are the same up to rounding.

    Raises:
        ValueError: if the block is no positive integer, a ratio is not in [0, 1], or a value is not finite.

    >>> attention = InContextSparseAttention(block=4, shortcut=0.0)
    >>> attention(*torch.randn(3, 2, 6, 35, 8), prefix_tokens=1).shape
    torch.Size([2, 6, 35, 8])
    """

    def __init__(
        self,
        *,
        block: int = 64,
        context_ratio: float = 0.125,
        sharp_ratio: float = 0.5,
        sharpness_ratio: float = 0.0625,
        exact_ratio: float = 0.0625,
        shortcut: float = 1.0,
        flex: bool = False,
    ) -> None:
        super().__init__()
        self._options = _Sparsity(block, context_ratio, sharp_ratio, sharpness_ratio, exact_ratio, shortcut, flex)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        prefix_tokens: int = 0,
        context_tokens: int = 0,
        dropout: float = 0.0,
        scale: float | None = None,
    ) -> Tensor:
        """Attend within one sequence: [prefix | target | context].

        Args:
            query: (B, heads, S, d), of any width d.
            key: (B, heads, S, d).
            value: (B, heads, S, dv).
            prefix_tokens: class and register tokens at the beginning, which are in no block.
            context_tokens: tokens at the end that are context: a second view, another image.
            dropout: probability with which each weight of a softmax is dropped.
            scale: of the products of queries and keys; None for 1 / sqrt(d).

        Returns:
            (B, heads, S, dv), of all tokens, in their order. Gradients pass to all three.

        Raises:
            ValueError: if the shapes differ, or target and context are shorter than two blocks.
        """
        return self._options.attend(query, key, value, prefix_tokens, context_tokens, dropout, scale)

    def extra_repr(self) -> str:
        """Return the options."""
        return ", ".join(f"{field.name}={getattr(self._options, field.name)}" for field in fields(self._options))


class SparseSelfAttention(nn.Module):
    """The attention of a vision transformer of timm, with in-context sparse attention between its projections.

    It takes over the layers, parameters and buffers of the attention that it replaces, under their names.

    Args:
        source: `Attention`, `AttentionRope` or `EvaAttention` of timm, or one of this class.
        options: of the sparse attention.
        prefix_tokens: class and register tokens at the beginning of the sequence.
        context_tokens: tokens at its end that are context.
    """

    def __init__(self, source: nn.Module, options: _Sparsity, prefix_tokens: int, context_tokens: int) -> None:
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
    options = _Sparsity(block, context_ratio, sharp_ratio, sharpness_ratio, exact_ratio, shortcut, flex)
    if prefix_tokens is not None:
        _check_count("prefix_tokens", prefix_tokens, 0, "the number of class and register tokens")
    _check_count("context_tokens", context_tokens, 0, "the number of tokens at the end that are context")
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
    known: dict[str, Any] = {field.name: float for field in fields(_Sparsity)}
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
            _check_length(count, block)


def _check_length(tokens: int, block: int) -> None:
    if tokens < 2 * block:
        raise ValueError(
            f"{tokens} tokens are fewer than two blocks of {block}, and leave nothing to be sparse: give larger images "
            f"or a smaller block{f', such as {tokens // 8}' if tokens >= 16 else ''}"
        )


def _check_count(name: str, value: Any, least: int, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)) or value < least:
        raise ValueError(f"{name} is {value!r}: give {what}, at least {least}")


def _count(ratio: float, blocks: int) -> int:
    """Return a share of so many blocks, rounded down, but at least one unless the ratio is 0."""
    return min(blocks, max(1, math.floor(ratio * blocks + 1e-9))) if ratio else 0


def _largest(x: Tensor) -> Tensor:
    """Return the places of the last dimension's entries, the largest first, of equal ones the earlier first."""
    if torch.compiler.is_exporting():  # ONNX lacks the stable sort, and has TopK, which takes the earlier one too
        return torch.sort(x, dim=-1, descending=True).indices
    return torch.sort(x, stable=True, dim=-1, descending=True).indices


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Return rows (G, k, ...) of (G, n, ...), by their numbers (G, k) in each of G."""
    start = torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
    rows = x.flatten(0, 1).index_select(0, (index + start).flatten())
    return rows.reshape(x.shape[0], index.shape[1], *x.shape[2:])


def _by_block_masks(
    parts: _Parts,
    held: Tensor,
    sequences: list[tuple[Tensor, Tensor]],
    means: tuple[Tensor, Tensor],
    kept: Tensor,
    exact: Tensor,
    bias: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the outputs of the prefix (G, prefix, d) and of the other tokens (G, S - prefix, d) by FlexAttention.

    The keys are [prefix | tokens by blocks | means], each filled up to whole blocks; a query block sees the blocks that
    its row of the block mask names, and nothing is gathered.

    Args:
        parts: of the sequence.
        held: (n, b), the places of the blocks that hold a token.
        sequences: queries, keys and values, each as prefix (G, prefix, d) and blocks (G, n, b, d).
        means: of the keys and values over the blocks (G, n, d).
        kept: (G, n), the blocks that the prefix sees.
        exact: (G, n, n), the blocks that each query block sees token by token.
        bias: (G, n, n), what is added to the product with a block's mean: -inf where that is not seen.
        scale: of the products.
    """
    n, block = parts.count, parts.block
    ahead, behind = -(-parts.prefix // block), -(-n // block)  # blocks of the prefix, and of the means
    means_at = (ahead + n) * block

    def filled(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, -x.shape[1] % block))

    query, key, value = (torch.cat([filled(first), blocks.flatten(1, 2)], 1) for first, blocks in sequences)
    key, value = (torch.cat([x, filled(mean)], 1)[None] for x, mean in zip((key, value), means, strict=True))
    is_key = torch.cat(
        [
            torch.arange(ahead * block, device=held.device) < parts.prefix,
            held.flatten(),
            torch.arange(behind * block, device=held.device) < n,
        ]
    )
    blocks_seen = F.pad(torch.cat([kept[:, None].expand(-1, ahead, -1), exact], 1), (ahead, 0), value=True)
    by_mean = (bias > -math.inf).any(2)  # (G, n): the diffuse query blocks
    means_seen = F.pad(by_mean, (ahead, 0))[..., None].expand(-1, -1, behind)
    seen = torch.cat([blocks_seen, means_seen], 2)[None]  # (1, G, ahead + n, ahead + n + behind)
    whole = is_key.view(-1, block).all(1) & (torch.arange(ahead + n + behind, device=held.device) < ahead + n)

    def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
        first = torch.sort(chosen.int(), dim=-1, descending=True, stable=True).indices
        return chosen.sum(-1, dtype=torch.int32), first.int().contiguous()

    def add_bias(score: Tensor, _: Tensor, group: Tensor, q: Tensor, k: Tensor) -> Tensor:
        of, mean = (q // block - ahead).clamp(min=0), (k - means_at).clamp(0, n - 1)
        return torch.where(k < means_at, score, score + bias[group, of, mean])

    mask = BlockMask.from_kv_blocks(
        *listed(seen & ~whole),
        *listed(seen & whole),
        BLOCK_SIZE=block,
        mask_mod=lambda _, group, q, k: is_key[k] & seen[0, group, q // block, k // block],
        seq_lengths=(query.shape[1], key.shape[2]),
    )
    tile = min(block, 64)
    options = {f"fwd_BLOCK_{name}": tile for name in "MN"} | {
        f"bwd_BLOCK_{name}": tile for name in ("M1", "N1", "M2", "N2")
    }
    attend: Any = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()
    out = attend(query[None], key, value, add_bias, mask, scale, kernel_options=options)[0]
    return out[:, : parts.prefix], parts.tokens(out[:, ahead * block :].unflatten(1, (n, block)))


@functools.cache
def _compiled_flex_attention() -> Callable[..., Any]:
    """Return FlexAttention as a kernel of its own: it is made for the first call, which takes a minute."""
    return torch.compile(flex_attention, dynamic=False)


def _needs_gradient(*inputs: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, scale: float) -> Tensor:
    """Return the attention of (G, S, d) or of (G, l, S, d)."""
    if q.ndim == 4:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, scale=scale)
    mask = None if mask is None else mask[None]
    return F.scaled_dot_product_attention(q[None], k[None], v[None], mask, dropout_p=dropout, scale=scale)[0]
