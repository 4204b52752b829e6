"""In-context sparse attention, against a dense derivation with the weight of every token for every token."""

import copy
import math
import warnings
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from rounding import EXACT, units_of
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_mask, flex_attention

from diffkd.models import load_backbone, load_model, sparse_attention
from diffkd.models.sparse_attention import InContextSparseAttention
from diffkd.models.sparse_attention import _attention as attend
from diffkd.models.sparse_transformers import SparseSelfAttention, sparse

DEFAULTS = {
    "context_ratio": 0.125,
    "sharp_ratio": 0.5,
    "sharpness_ratio": 0.0625,
    "exact_ratio": 0.0625,
    "shortcut": 1.0,
}
EVERYTHING = {"sharp_ratio": 1.0, "context_ratio": 1.0, "shortcut": 0.0}


def share(ratio: float, count: int) -> int:
    """So many of `count`: rounded down in exact arithmetic for the decimal fractions used here, at least one."""
    return 0 if ratio == 0 else max(1, round(ratio * 10000) * count // 10000)


def best(scores: Any, count: int) -> list[int]:
    """The places of the largest, of equal ones the earlier."""
    scores = [float(score.detach()) for score in scores]
    return sorted(range(len(scores)), key=lambda place: (-scores[place], place))[:count]


def dense(q: Tensor, k: Tensor, v: Tensor, block: int, prefix: int = 0, context: int = 0, **options: float) -> Tensor:
    """One image and head (S, d): a weight for each pair of tokens, written down query by query, and the shortcut."""
    ratios = DEFAULTS | options
    length, scale = len(q), q.shape[1] ** -0.5
    target = range(prefix, length - context)
    blocks = [list(target[i : i + block]) for i in range(0, len(target), block)]
    n_target = len(blocks)
    blocks += [list(range(i, min(i + block, length))) for i in range(length - context, length, block)]
    n = len(blocks)
    qc, kc, vc = (torch.stack([x[tokens].mean(0) for tokens in blocks]) for x in (q, k, v))
    p = (scale * qc @ kc.T).softmax(1)
    saliency = p[:n_target, n_target:].sum(0)
    kept = [*range(n_target)]
    kept += [n_target + j for j in best(saliency, share(ratios["context_ratio"], n - n_target))]
    sharpness = [
        p[i, :n_target].sort(descending=True).values[: max(1, share(ratios["sharpness_ratio"], n_target))].sum()
        for i in range(n)
    ]
    sharp = set(best(sharpness, share(ratios["sharp_ratio"], n)))
    everything = [*range(prefix), *(token for j in kept for token in blocks[j])]
    block_of = {token: i for i, tokens in enumerate(blocks) for token in tokens}
    weights = torch.zeros(length, length, dtype=q.dtype)
    for token in range(length):
        i = block_of.get(token)
        if i is None or i in sharp:
            exact = everything
        else:
            order = best(p[i, kept], share(ratios["exact_ratio"], len(kept)))
            exact = [*range(prefix), *(token for place in order for token in blocks[kept[place]])]
            for j in kept:
                if not set(blocks[j]) & set(exact):
                    weights[token, blocks[j]] = (scale * q[token] @ kc[j]).exp()  # |block| of them, of the mean value
        for other in exact:
            weights[token, other] = (scale * q[token] @ k[other]).exp()
    out = weights / weights.sum(1, keepdim=True) @ v
    for i, tokens in enumerate(blocks):
        out[tokens] += ratios["shortcut"] * (p[i] @ vc)
    return out


def dense_of_all(q: Tensor, k: Tensor, v: Tensor, block: int, **options: Any) -> Tensor:
    heads = [
        torch.stack([dense(q[b, h], k[b, h], v[b, h], block, **options) for h in range(q.shape[1])])
        for b in range(len(q))
    ]
    return torch.stack(heads)


def sequence(length: int, width: int = 5, value_width: int | None = None, seed: int = 0, factor: float = 2.0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    widths = (width, width, value_width or width)
    q, k, v = (torch.randn(2, 2, length, w, dtype=torch.float64, generator=generator) for w in widths)
    # Blocks that differ from each other, so that what is chosen matters.
    drift = torch.linspace(-3, 3, length, dtype=torch.float64)[:, None].cos()
    return factor * q, factor * (k + drift), v + drift


CASES: dict[str, dict[str, Any]] = {
    "paper's ratios": {"length": 128, "block": 4},
    "last block short": {"length": 37, "block": 4},
    "prefix": {"length": 41, "block": 4, "prefix": 5},
    "prefix and short": {"length": 42, "block": 8, "prefix": 3, "exact_ratio": 0.25},
    "context": {"length": 80, "block": 4, "context": 40, "context_ratio": 0.3, "exact_ratio": 0.2},
    "context, both short, prefix": {"length": 71, "block": 4, "prefix": 2, "context": 31, "context_ratio": 0.9},
    "all context": {"length": 53, "block": 4, "context": 22, "context_ratio": 1.0},
    "no context kept": {"length": 53, "block": 4, "context": 22, "context_ratio": 0.0},
    "short target before context": {"length": 12, "block": 4, "context": 9, "context_ratio": 0.5},
    "none sharp": {"length": 40, "block": 4, "prefix": 1, "sharp_ratio": 0.0},
    "none sharp, no prefix": {"length": 40, "block": 4, "sharp_ratio": 0.0, "exact_ratio": 0.3},
    "none exact": {"length": 43, "block": 4, "exact_ratio": 0.0},
    "wide sharpness": {"length": 64, "block": 4, "sharpness_ratio": 0.5, "exact_ratio": 0.25},
    "everything exact": {"length": 43, "block": 4, "context": 11, "exact_ratio": 1.0},
    "everything sharp": {"length": 43, "block": 4, "prefix": 1, "context": 13, "sharp_ratio": 1.0},
    "no shortcut": {"length": 64, "block": 8, "shortcut": 0.0},
    "half a shortcut": {"length": 64, "block": 8, "shortcut": 0.5},
    "blocks of one": {"length": 12, "block": 1},
    "two blocks": {"length": 8, "block": 4},
    "values of another width": {"length": 40, "block": 4, "value_width": 3},
    "heads of width 1": {"length": 40, "block": 4, "width": 1},
    "heads of width 80": {"length": 24, "block": 4, "width": 80, "factor": 0.5},
}


def options_of(case: dict[str, Any]) -> tuple[Any, int, dict[str, int], dict[str, float]]:
    case = dict(case)
    block = case.pop("block")
    tokens = {"prefix": case.pop("prefix", 0), "context": case.pop("context", 0)}
    inputs = {name: case.pop(name) for name in ("length", "width", "value_width", "factor") if name in case}
    return sequence(**inputs), block, tokens, case


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_dense_derivation(case: dict[str, Any]) -> None:
    qkv, block, tokens, options = options_of(case)
    attention = InContextSparseAttention(block=block, **options)
    out = attention(*qkv, prefix_tokens=tokens["prefix"], context_tokens=tokens["context"])
    torch.testing.assert_close(out, dense_of_all(*qkv, block, **tokens, **options), **EXACT)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_block_masks_give_the_same(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the unfused FlexAttention, for its kernels want a GPU; they read the lists of blocks instead of the mask."""
    masks = []

    def unfused(*arguments: Any, **options: Any) -> Tensor:
        masks.append((arguments[4], arguments[0].shape[2], arguments[1].shape[2]))
        return flex_attention(*arguments, **options)

    monkeypatch.setattr(sparse_attention, "_compiled_flex_attention", lambda: unfused)
    monkeypatch.setattr(sparse_attention.Sparsity, "_flexible", lambda self, *_: self.flex)
    qkv, block, tokens, options = options_of(case)
    tokens = {f"{name}_tokens": count for name, count in tokens.items()}
    plain, by_masks = (InContextSparseAttention(block=block, flex=flex, **options) for flex in (False, True))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        out = by_masks(*qkv, **tokens)
    torch.testing.assert_close(out, plain(*qkv, **tokens), **EXACT)
    for mask, queries, keys in masks:
        full = create_mask(mask.mask_mod, 1, 4, queries, keys, "cpu")
        blocks = full.unflatten(3, (-1, block)).unflatten(2, (-1, block)).float().mean((3, 5))
        assert torch.equal(mask.to_dense() > 0, blocks > 0)  # the lists name the blocks that the mask opens; and
        listed = torch.arange(keys // block) < mask.full_kv_num_blocks[..., None]
        # those listed as full are: there the kernels do not look at the mask.
        assert bool((blocks.gather(3, mask.full_kv_indices.long())[listed] == 1).all())
    assert masks or 1.0 in (options.get("exact_ratio"), options.get("sharp_ratio"))


def test_without_gradients_the_same_little_by_little(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv = sequence(61)
    attention = InContextSparseAttention(block=4, exact_ratio=0.2)
    tokens = {"prefix_tokens": 1, "context_tokens": 17}
    whole = attention(*(x.clone().requires_grad_() for x in qkv), **tokens)
    monkeypatch.setitem(sparse_attention._GATHERED, "cpu", 6000)  # of several query blocks, and not all
    calls = []
    monkeypatch.setattr(sparse_attention, "_attention", lambda *given: calls.append(1) or attend(*given))
    torch.testing.assert_close(attention(*qkv, **tokens), whole, **EXACT)
    assert 4 < len(calls) < 20


@pytest.mark.parametrize("options", [{"sharp_ratio": 1.0}, {"exact_ratio": 1.0}], ids=["all sharp", "all exact"])
def test_is_full_attention_where_everything_is_exact(options: dict[str, float]) -> None:
    qkv = sequence(75)
    attention = InContextSparseAttention(block=8, context_ratio=1.0, shortcut=0.0, **options)
    torch.testing.assert_close(
        attention(*qkv, prefix_tokens=3, context_tokens=20), F.scaled_dot_product_attention(*qkv), **EXACT
    )


@pytest.mark.parametrize("length", [64, 61])
def test_is_exact_where_the_keys_of_each_block_are_equal(length: int) -> None:
    q, k, v = sequence(2 + length)
    for begin in range(2, 2 + length, 8):
        k[:, :, begin : begin + 8] = k[:, :, begin : begin + 1].clone()
    attention = InContextSparseAttention(block=8, sharp_ratio=0.0, exact_ratio=0.0, shortcut=0.0)
    torch.testing.assert_close(attention(q, k, v, prefix_tokens=2), F.scaled_dot_product_attention(q, k, v), **EXACT)


def test_of_equal_blocks_the_earlier_is_chosen() -> None:
    q, k, v = sequence(40)
    for x in (q, k):  # each block's mean is exactly zero, and P the same everywhere
        x[:, :, 1::2] = -x[:, :, ::2]
    options = {"exact_ratio": 0.3, "context_ratio": 0.4}
    out = InContextSparseAttention(block=4, **options)(q, k, v, context_tokens=20)
    torch.testing.assert_close(out, dense_of_all(q, k, v, 4, context=20, **options), **EXACT)


@pytest.mark.parametrize(
    ("length", "tokens", "options"),
    [
        (14, {}, {"exact_ratio": 0.25}),
        (19, {"prefix_tokens": 2, "context_tokens": 7}, {"context_ratio": 0.5, "exact_ratio": 0.25}),
        (13, {"prefix_tokens": 1}, {"sharp_ratio": 1.0}),
    ],
    ids=["short", "prefix and context", "all sharp"],
)
def test_gradients(length: int, tokens: dict[str, int], options: dict[str, float]) -> None:
    attention = InContextSparseAttention(block=4, **options)
    qkv = [x[:1, :, :, :3].clone().requires_grad_() for x in sequence(length, 3, factor=0.7)]
    assert torch.autograd.gradcheck(lambda *qkv: attention(*qkv, **tokens), qkv)


def test_gradients_of_the_dense_derivation() -> None:
    ours, theirs = ([x.clone().requires_grad_() for x in sequence(45)] for _ in range(2))
    wanted = torch.randn(2, 2, 45, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    options = {"exact_ratio": 0.2, "context_ratio": 0.5}
    InContextSparseAttention(block=4, **options)(*ours, prefix_tokens=1, context_tokens=14).backward(wanted)
    dense_of_all(*theirs, 4, prefix=1, context=14, **options).backward(wanted)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, **EXACT)


def test_half_precision_makes_the_same_choices() -> None:
    qkv = [x.bfloat16() for x in sequence(101, 8, factor=1.0)]
    attention = InContextSparseAttention(block=8, exact_ratio=0.25)
    out = attention(*qkv, prefix_tokens=5)
    assert out.dtype == torch.bfloat16
    exact = attention(*(x.double() for x in qkv), prefix_tokens=5)
    # Products, weights and sums of some tens of values, each rounded to bfloat16; outputs are below 4.
    assert (out.double() - exact).abs().max() < 4 * units_of(torch.bfloat16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(attention(*(x.float() for x in qkv), prefix_tokens=5), out, rtol=0, atol=0)


def test_compiled() -> None:
    attention = InContextSparseAttention(block=4, exact_ratio=0.25)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=False)
    ours, theirs = ([x.clone().requires_grad_() for x in sequence(47)] for _ in range(2))
    tokens = {"prefix_tokens": 2, "context_tokens": 13}
    out, eager = compiled(*ours, **tokens), attention(*theirs, **tokens)
    torch.testing.assert_close(out, eager, **EXACT)
    out.square().sum().backward()
    eager.square().sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, **EXACT)


def test_exported_for_any_number_of_images(tmp_path: Any) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    layer = sparse(timm.layers.AttentionRope(8, num_heads=2), block=4, exact_ratio=0.3, context_tokens=11).eval()
    x = torch.randn(2, 38, 8, generator=torch.Generator().manual_seed(0))
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    batch = torch.cat([x, -x, x[:1]])
    torch.testing.assert_close(program.module()(batch), layer(batch))
    torch.onnx.export(program, dynamo=True).save(tmp_path / "layer.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "layer.onnx")
    (out,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), layer(batch), rtol=1e-4, atol=1e-5)


def test_dropout_keeps_the_mean() -> None:
    q, k, v = (x.float() for x in sequence(64, factor=0.3))
    attention = InContextSparseAttention(block=8)
    torch.manual_seed(0)
    mean = torch.stack([attention(q, k, v, dropout=0.2) for _ in range(400)]).mean(0)
    drawn, plain = attention(q, k, v, dropout=0.2), attention(q, k, v)
    assert not torch.allclose(drawn, plain, atol=1e-3)
    assert (mean - plain).abs().max() < 0.1 * plain.abs().max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 0}, "block is 0: give the number of tokens in a block, such as 64, at least 1"),
        ({"block": 2.5}, "block is 2.5: give"),
        ({"sharp_ratio": 1.5}, r"sharp_ratio 1.5 is no share of the blocks: give a number in \[0, 1\], such as 0.5"),
        ({"exact_ratio": -0.1}, r"exact_ratio -0.1 is no share .*such as 0.0625"),
        ({"context_ratio": 2}, "context_ratio 2 is no share .*such as 0.125"),
        ({"sharpness_ratio": math.nan}, "sharpness_ratio is nan: give a number, such as 0.0625"),
        ({"shortcut": math.inf}, "shortcut is inf: give a number, such as 1.0"),
        ({"shortcut": True}, "shortcut is True: give a number"),
        ({"exact_ratio": "much"}, "exact_ratio is 'much': give a number"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    for make in (InContextSparseAttention, lambda **given: sparse(nn.Linear(1, 1), **given)):
        with pytest.raises(ValueError, match=message) as error:
            make(**options)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("length", "tokens", "message"),
    [
        (127, {}, "127 tokens are fewer than two blocks of 64, .*larger images or a smaller block, such as 15"),
        (130, {"prefix_tokens": 3}, "127 tokens are fewer than two blocks"),
        (9, {"prefix_tokens": 12}, "fewer than two blocks of 64.*or a smaller block$"),
        (130, {"context_tokens": 130}, "context_tokens 130 leaves no target among the 130 tokens"),
        (130, {"context_tokens": -1}, "context_tokens is -1: give"),
        (130, {"prefix_tokens": 0.5}, "prefix_tokens is 0.5: give"),
    ],
)
def test_sequences_that_cannot_be_cut(length: int, tokens: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        InContextSparseAttention()(*sequence(length), **tokens)
    assert "\n" not in str(error.value)


def test_sequences_that_differ() -> None:
    q, k, v = sequence(128)
    with pytest.raises(ValueError, match=r"shapes \(2, 2, 128, 5\), \(2, 2, 127, 5\), .* are not of one sequence"):
        InContextSparseAttention()(q, k[:, :, 1:], v)
    assert InContextSparseAttention()(q, k, v).shape == q.shape  # two blocks are enough


SMALL = {"depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 3}
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "class token": ("vit_tiny_patch16_224", {"img_size": 64}, 1),
    "distilled": ("deit_tiny_distilled_patch16_224", {"img_size": 64}, 2),
    "registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 56}, 5),
    "dinov3": ("vit_small_patch16_dinov3", {"img_size": 64}, 5),
    "dinov3, biases": ("vit_small_patch16_dinov3_qkvb", {"img_size": 64}, 5),
    "eva02": ("eva02_tiny_patch14_224", {"img_size": 56, "qkv_fused": True}, 1),
    "eva02, separate": ("eva02_tiny_patch14_224", {"img_size": 56, "qkv_fused": False}, 1),
    "eva02, normalised": ("eva02_base_patch14_224", {"img_size": 56}, 1),
    "rotary, learnt": ("vit_small_patch16_rope_mixed_224", {"img_size": 64}, 1),
    "grouped": (
        "eva02_tiny_patch14_224",
        {"img_size": 56, "attn_type": "rope", "qkv_fused": False, "num_kv_heads": 1},
        1,
    ),
    "no prefix": ("vit_base_patch16_siglip_224", {"img_size": 64}, 0),
    "naflex": ("naflexvit_base_patch16_gap", {}, 4),
}


def vit(name: str, options: dict[str, Any], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = timm.create_model(name, **SMALL, **options).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # those that start at zero would hide what is left out
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(("name", "options", "prefix"), MODELS.values(), ids=MODELS)
def test_models_of_timm(name: str, options: dict[str, Any], prefix: int) -> None:
    """With everything exact a model returns what it did, its weights load strictly, and its prefix is known."""
    full = vit(name, options)
    size = options.get("img_size", 64)
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    same = sparse(vit(name, options, seed=1), block=3, **EVERYTHING)
    assert list(same.state_dict()) == list(full.state_dict())
    same.load_state_dict(full.state_dict())
    torch.testing.assert_close(same(images), full(images), **EXACT)
    found = [part for part in same.modules() if isinstance(part, SparseSelfAttention)]
    assert len(found) == 2
    assert {part.prefix_tokens for part in found} == {prefix}
    other = sparse(copy.deepcopy(full), block=3).train()
    out = other(images)
    assert not torch.allclose(out, full(images), rtol=1e-3)
    out.square().sum().backward()
    assert {name for name, value in other.named_parameters() if ".attn." in name and value.grad is None} == set()


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (timm.layers.Attention, {"qkv_bias": True, "qk_norm": True, "scale_norm": True, "gated": True}),
        (timm.layers.Attention, {"attn_head_dim": 5, "dim_out": 7, "proj_bias": False}),
        (timm.layers.AttentionRope, {"qk_norm": True, "scale_norm": True, "gated": True, "rotate_half": True}),
        (timm.layers.AttentionRope, {"qkv_fused": False, "num_kv_heads": 2, "attn_head_dim": 6}),
        (timm.models.eva.EvaAttention, {"qkv_bias_separate": True, "qk_norm": True, "gated": True}),
        (timm.models.eva.EvaAttention, {"qkv_bias": False, "scale_norm": False, "rotate_half": True}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "-".join(value),
)
def test_every_option_of_a_layer(kind: type[nn.Module], options: dict[str, Any], prefix: int) -> None:
    torch.manual_seed(0)
    rotary = kind is not timm.layers.Attention
    counted = {"num_prefix_tokens": prefix} if rotary else {}
    layer = kind(16, num_heads=4, norm_layer=nn.LayerNorm, **counted, **options).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 20 + prefix, 16, dtype=torch.float64)
    width = options.get("attn_head_dim", 4)
    rope = {"rope": torch.randn(20, 2 * width, dtype=torch.float64)} if rotary else {}
    wanted = layer(x, **rope)
    replaced = sparse(layer, block=4, prefix_tokens=prefix, **EVERYTHING)
    torch.testing.assert_close(replaced(x, **rope), wanted, **EXACT)
    assert not torch.allclose(sparse(replaced, block=4)(x, **rope), wanted, rtol=1e-3)


def test_a_mask_is_refused() -> None:
    layer = sparse(timm.layers.Attention(16, num_heads=2), block=4, prefix_tokens=0)
    for given in ({"attn_mask": torch.zeros(20, 20)}, {"is_causal": True}):
        with pytest.raises(ValueError, match="takes no mask: give images that fill the sequence"):
            layer(torch.randn(1, 20, 16), **given)


class Pieces(nn.Module):
    """A network of the user's own, made of timm's layers, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = timm.models.vision_transformer.Block(16, 2)
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.again(self.first(x))
        return out


def test_networks_of_ones_own() -> None:
    with pytest.raises(ValueError, match=r"nothing says how many .* tokens 'first.attn' of Pieces sees .*0 for none"):
        sparse(Pieces(), block=4)
    model = sparse(Pieces(), block=4, prefix_tokens=0)
    assert isinstance(model.first.attn, SparseSelfAttention)
    assert model.again.attn is model.first.attn
    assert model(torch.randn(1, 20, 16)).shape == (1, 20, 16)
    assert sparse(model, block=8).first.attn.options.block == 8


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "test_resnet",
            "ResNet has no attention that could be made sparse: give a vision transformer of timm, such as",
        ),
        ("swin_tiny_patch4_window7_224", r"attention of SwinTransformer \(WindowAttention\) is not that of timm's"),
        ("vit_base_patch32_224", "49 tokens are fewer than two blocks of 64.*larger images or a smaller block"),
    ],
)
def test_models_that_cannot_be_sparse(name: str, message: str) -> None:
    model = timm.create_model(name)
    layers = list(model.modules())
    with pytest.raises(ValueError, match=message) as error:
        sparse(model)
    assert "\n" not in str(error.value)
    assert list(model.modules()) == layers


def test_images_of_any_size_are_held_against_the_blocks_when_they_come() -> None:
    model = sparse(timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, depth=1, num_classes=3))
    assert model(torch.randn(1, 3, 224, 224)).shape == (1, 3)
    with pytest.raises(ValueError, match="49 tokens are fewer than two blocks of 64"):
        model(torch.randn(1, 3, 112, 112))


def test_by_name(tmp_path: Any) -> None:
    model = load_model("isa,block=16,shortcut=0,exact_ratio=0.25/timm/test_vit", num_classes=4, in_channels=1).eval()
    assert model(torch.randn(2, 1, 160, 160)).shape == (2, 4)
    layer = model.blocks[0].attn
    assert (layer.options.block, layer.options.exact_ratio, layer.options.sharp_ratio) == (16, 0.25, 0.5)
    assert layer.options.shortcut == 0
    full = load_model("timm/test_vit", num_classes=4, in_channels=1)
    torch.save(full.state_dict(), tmp_path / "full.pth")
    filled = load_model("isa,block=16/timm/test_vit", num_classes=4, in_channels=1, weights=tmp_path / "full.pth")
    assert all(torch.equal(value, full.state_dict()[name]) for name, value in filled.state_dict().items())
    backbone = load_backbone("isa,block=16/timm/test_vit", weights=tmp_path / "full.pth", in_channels=1)
    assert backbone(torch.randn(1, 1, 160, 160)).shape == (1, 64)
    paper = load_model("isa/timm/vit_tiny_patch16_224").blocks[0].attn.options
    assert (paper.block, paper.shortcut, DEFAULTS.items() <= vars(paper).items()) == (64, 1.0, True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("isa/timm/resnet18", "ResNet has no attention that could be made sparse"),
        ("isa/timm/vit_base_patch32_224", "model 'isa/.*32_224': 49 tokens are fewer than two blocks .*, such as 6"),
        ("isa/timm/vit_small", "model 'timm/vit_small' is unknown to timm"),
        ("isa/cifar/resnet20", "'isa/cifar/resnet20' .*transformers of timm.*isa/timm/NAME.*diffkd.models.sparse"),
        ("isa,blok=3/timm/test_vit", "has no option 'blok' for its attention; nearest: 'block'"),
        ("isa,block=3,block=4/timm/test_vit", "gives block twice: leave one out"),
        ("isa,block=3.5/timm/test_vit", "gives block as '3.5': give a whole number"),
        ("isa,shortcut/timm/test_vit", "gives shortcut as '': give a number"),
        ("isa,sharp_ratio=2/timm/test_vit", r"sharp_ratio 2.0 is no share of the blocks: give a number in \[0, 1\]"),
    ],
)
def test_names_that_do_not_work(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_model(name)
    assert "\n" not in str(error.value)
