"""In-context sparse attention: what is computed, and what of it token by token.

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
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

# Bytes of keys and values that are gathered at once where no gradient is wanted, by the type of the device.
_GATHERED = {"cpu": 2**20, "cuda": 2**28}


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


class _Sequence(NamedTuple):
    """Queries, keys and values, their blocks, and the means over these; G is images times heads.

    Args:
        parts: where prefix, target and context lie.
        tokens: (G, S, d) each.
        blocks: (G, n, b, d) each.
        means: (G, n, d) each, in at least float32.
        sizes: (n), the number of tokens in each block.
        held: (n, b), the places of the blocks that hold a token.
        dropout: of the weights of a softmax.
        scale: of the products of queries and keys.
    """

    parts: _Parts
    tokens: tuple[Tensor, Tensor, Tensor]
    blocks: tuple[Tensor, Tensor, Tensor]
    means: tuple[Tensor, Tensor, Tensor]
    sizes: Tensor
    held: Tensor
    dropout: float
    scale: float

    @classmethod
    def of(cls, given: tuple[Tensor, Tensor, Tensor], parts: _Parts, dropout: float, scale: float) -> "_Sequence":
        """Cut queries, keys and values (B, heads, S, d) into blocks."""
        q, k, v = (x.flatten(0, 1) for x in given)
        sizes = parts.sizes(q)
        held = torch.arange(parts.block, device=q.device) < sizes[:, None]
        blocks = (parts.blocks(q), parts.blocks(k), parts.blocks(v))
        q_mean, k_mean, v_mean = (x.sum(2, dtype=sizes.dtype) / sizes[:, None] for x in blocks)
        return cls(parts, (q, k, v), blocks, (q_mean, k_mean, v_mean), sizes, held, dropout, scale)


class _Kept(NamedTuple):
    """What the context selection keeps.

    Args:
        columns: (G, m), the kept blocks, those of the target first.
        keys: (G, S', d), of prefix, target and kept context.
        values: (G, S', d), likewise.
        mask: (G, 1, S'), which of them are tokens; None: all.
    """

    columns: Tensor
    keys: Tensor
    values: Tensor
    mask: Tensor | None

    def attended(self, x: _Sequence, queries: Tensor) -> Tensor:
        """Return the full attention of queries to all that is kept."""
        return _attention(queries, self.keys, self.values, self.mask, x.dropout, x.scale)


class _Routes(NamedTuple):
    """How the query blocks attend.

    Args:
        order: (G, n), the query blocks, the sharpest first.
        sharp: how many of them attend in full; the other l are diffuse.
        places: (G, l, e), of the blocks that a diffuse one attends to token by token, among the kept ones.
        near: (G, l, e), the numbers of these blocks.
    """

    order: Tensor
    sharp: int
    places: Tensor
    near: Tensor

    @property
    def diffuse(self) -> Tensor:
        """The diffuse query blocks (G, l)."""
        return self.order[:, self.sharp :]


@dataclass(frozen=True)
class Sparsity:
    """The options of the attention, checked; see :class:`InContextSparseAttention`."""

    block: int = 64
    context_ratio: float = 0.125
    sharp_ratio: float = 0.5
    sharpness_ratio: float = 0.0625
    exact_ratio: float = 0.0625
    shortcut: float = 1.0
    flex: bool = False

    def __post_init__(self) -> None:
        check_count("block", self.block, 1, "the number of tokens in a block, such as 64")
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
        check_count("prefix_tokens", prefix, 0, "the number of class and register tokens")
        check_count("context_tokens", context, 0, "the number of tokens at the end that are context")
        tokens = query.shape[2] - prefix
        check_length(tokens, self.block)
        if context >= tokens:
            raise ValueError(
                f"context_tokens {context} leaves no target among the {tokens} tokens after the prefix: give fewer"
            )
        return _Parts(prefix, tokens - context, context, self.block)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, parts: _Parts, dropout: float, scale: float) -> Tensor:
        batch, prefix = query.shape[0], parts.prefix
        x = _Sequence.of((query, key, value), parts, dropout, scale)
        q_mean, k_mean, v_mean = x.means
        logits = scale * (q_mean @ k_mean.transpose(1, 2))  # (G, n, n)
        compressed = logits.softmax(-1)
        kept = self._select(x, compressed.detach())
        exact = _count(self.exact_ratio, kept.columns.shape[1])
        sharp = parts.count if exact == kept.columns.shape[1] else _count(self.sharp_ratio, parts.count)
        if sharp == parts.count:
            out = kept.attended(x, x.tokens[0])
            first, out = out[:, :prefix], out[:, prefix:]
        else:
            routes = self._route(x, kept, logits.detach(), compressed.detach(), sharp, exact)
            way = _by_block_masks if self._flexible(x.tokens[0], dropout) else _by_gathering
            first, out = way(x, kept, routes)
        if self.shortcut:
            summary = self.shortcut * (compressed @ v_mean).to(out.dtype)
            out = out + parts.tokens(summary[:, :, None].expand(-1, -1, self.block, -1))
        if prefix:
            out = torch.cat([first, out], 1)
        return out.reshape(batch, -1, *out.shape[1:])

    def _select(self, x: _Sequence, scores: Tensor) -> _Kept:
        """Return what the context selection keeps, by the compressed attention (G, n, n)."""
        parts, (q, k, v) = x.parts, x.tokens
        n, n_target = parts.count, parts.of_target
        columns = torch.arange(n, device=q.device).expand(q.shape[0], n)
        count = _count(self.context_ratio, n - n_target)
        if count == n - n_target:
            return _Kept(columns, k, v, None)
        best = n_target + _largest(scores[:, :n_target, n_target:].sum(1))[:, :count]
        begin = parts.prefix + parts.target
        keys, values = (
            torch.cat([one[:, :begin], _take(blocks, best).flatten(1, 2)], 1)
            for one, blocks in zip((k, v), x.blocks[1:], strict=True)
        )
        mask = None
        if parts.context % self.block:  # the short block may be among those kept
            there = x.held[best].flatten(1)
            mask = torch.cat([there.new_ones(q.shape[0], begin), there], 1)[:, None]
        return _Kept(torch.cat([columns[:, :n_target], best], 1), keys, values, mask)

    def _route(self, x: _Sequence, kept: _Kept, logits: Tensor, scores: Tensor, sharp: int, exact: int) -> _Routes:
        """Return which query blocks attend in full, and which blocks the others attend to token by token."""
        n_target = x.parts.of_target
        largest = max(1, _count(self.sharpness_ratio, n_target))
        order = _largest(scores[:, :, :n_target].topk(largest, -1).values.sum(-1))
        diffuse = order[:, sharp:]
        seen = kept.columns[:, None].expand(-1, diffuse.shape[1], -1)
        places = _largest(_take(logits, diffuse).gather(-1, seen))[..., :exact]
        return _Routes(order, sharp, places, seen.gather(-1, places))

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
        self._options = Sparsity(block, context_ratio, sharp_ratio, sharpness_ratio, exact_ratio, shortcut, flex)

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


def check_length(tokens: int, block: int) -> None:
    """Raise ValueError if a sequence without its prefix is shorter than two blocks."""
    if tokens < 2 * block:
        raise ValueError(
            f"{tokens} tokens are fewer than two blocks of {block}, and leave nothing to be sparse: give larger images "
            f"or a smaller block{f', such as {tokens // 8}' if tokens >= 16 else ''}"
        )


def check_count(name: str, value: Any, least: int, what: str) -> None:
    """Raise ValueError unless an option is a whole number of at least so many."""
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


def _by_gathering(x: _Sequence, kept: _Kept, routes: _Routes) -> tuple[Tensor, Tensor]:
    """Return the outputs of the prefix (G, prefix, d) and of the other tokens (G, S - prefix, d).

    The keys and values of each diffuse query block are gathered: the tokens of its exact blocks, the prefix, and the
    means of all kept blocks, of which a mask hides those of the exact ones: (G, l, e b + prefix + m, d).
    """
    parts, (q, k, v), (q_blocks, k_blocks, v_blocks) = x.parts, x.tokens, x.blocks
    prefix, n, block, sharp, near = parts.prefix, parts.count, parts.block, routes.sharp, routes.near
    diffuse, exact = routes.diffuse, near.shape[2]

    sharpest = _take(q_blocks, routes.order[:, :sharp]).flatten(1, 2)
    out = kept.attended(x, torch.cat([q[:, :prefix], sharpest], 1) if prefix else sharpest)
    first, out = out[:, :prefix], out[:, prefix:].reshape(q.shape[0], sharp, block, v.shape[-1])

    hidden = q.new_zeros(n, block).masked_fill(~x.held, -math.inf)[near].flatten(2)  # (G, l, e b)
    weights = x.sizes.log().to(q.dtype)[kept.columns][:, None].expand(-1, n - sharp, -1)
    weights = weights.scatter(-1, routes.places, -math.inf)  # (G, l, m)
    mask = torch.cat([hidden, q.new_zeros(*diffuse.shape, prefix), weights], -1)[:, :, None]
    shared_k, shared_v = (  # (G, prefix + m, d)
        torch.cat([one[:, :prefix], _take(means, kept.columns).to(one.dtype)], 1)
        for one, means in zip((k, v), x.means[1:], strict=True)
    )
    diffuse_q = _take(q_blocks, diffuse)

    def attend(of: slice, some: slice) -> Tensor:
        chosen = near[of, some]

        def around(in_blocks: Tensor, shared: Tensor) -> Tensor:
            tokens = _take(in_blocks[of], chosen.flatten(1))
            tokens = tokens.reshape(*chosen.shape[:2], exact * block, shared.shape[-1])
            return torch.cat([tokens, shared[of, None].expand(-1, chosen.shape[1], -1, -1)], 2)

        near_k, near_v = around(k_blocks, shared_k), around(v_blocks, shared_v)
        return _attention(diffuse_q[of, some], near_k, near_v, mask[of, some], x.dropout, x.scale)

    size = mask.shape[-1] * (q.shape[-1] + v.shape[-1]) * q.element_size()  # bytes for a query block
    at_once = max(1, _GATHERED.get(q.device.type, _GATHERED["cuda"]) // size)
    if torch.compiler.is_compiling() or _needs_gradient(q, k, v) or at_once >= n - sharp:
        rest = attend(slice(None), slice(None))
    else:  # little by little, so that what is gathered stays in the cache, and takes little memory
        rest = v.new_empty(*diffuse.shape, block, v.shape[-1])
        for one in range(q.shape[0]):
            for begin in range(0, n - sharp, at_once):
                of, some = slice(one, one + 1), slice(begin, begin + at_once)
                rest[of, some] = attend(of, some)
    return first, parts.tokens(_take(torch.cat([out, rest], 1), routes.order.argsort(-1)))


def _by_block_masks(x: _Sequence, kept: _Kept, routes: _Routes) -> tuple[Tensor, Tensor]:
    """Return the outputs of the prefix (G, prefix, d) and of the other tokens (G, S - prefix, d) by FlexAttention.

    The keys are [prefix | tokens by blocks | means], each filled up to whole blocks; a query block sees the blocks that
    its row of the block mask names, and nothing is gathered.
    """
    parts, held, q = x.parts, x.held, x.tokens[0]
    n, block = parts.count, parts.block

    # What each query block sees: blocks token by token, and the means of blocks (both G, n, n).
    kept_blocks = q.new_zeros(q.shape[0], n, dtype=torch.bool).scatter(1, kept.columns, True)
    exact = kept_blocks[:, None].expand(-1, n, -1)
    of_diffuse = torch.zeros_like(exact[:, routes.sharp :]).scatter(2, routes.near, True)
    rows = routes.diffuse[..., None].expand(-1, -1, n)
    exact = exact.scatter(1, rows, of_diffuse)
    by_mean = torch.zeros_like(exact).scatter(1, rows, kept_blocks[:, None] & ~of_diffuse)
    bias = x.sizes.log().to(q.dtype).masked_fill(~by_mean, -math.inf)  # of the products with means

    ahead, behind = -(-parts.prefix // block), -(-n // block)  # blocks of the prefix, and of the means
    means_at = (ahead + n) * block

    def filled(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, -x.shape[1] % block))

    query, key, value = (
        torch.cat([filled(one[:, : parts.prefix]), blocks.flatten(1, 2)], 1)
        for one, blocks in zip(x.tokens, x.blocks, strict=True)
    )
    key, value = (
        torch.cat([one, filled(mean.to(one.dtype))], 1)[None]
        for one, mean in zip((key, value), x.means[1:], strict=True)
    )
    is_key = torch.cat(
        [
            torch.arange(ahead * block, device=held.device) < parts.prefix,
            held.flatten(),
            torch.arange(behind * block, device=held.device) < n,
        ]
    )
    blocks_seen = F.pad(torch.cat([kept_blocks[:, None].expand(-1, ahead, -1), exact], 1), (ahead, 0), value=True)
    means_seen = F.pad(by_mean.any(2), (ahead, 0))[..., None].expand(-1, -1, behind)
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
    out = attend(query[None], key, value, add_bias, mask, x.scale, kernel_options=options)[0]
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
