"""For every preset of detection and segmentation: its values, levels and schedule are the published ones."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffkd import Distiller
from diffkd.commands.arguments import fit_with
from diffkd.commands.compare import find_method
from diffkd.files.config import unwrap_factory
from diffkd.models import load_detector, load_segmenter
from diffkd.recipes import recipe_names
from diffkd.training.models import inherit_neck_and_head

# (FGD: temperature, alpha, beta, gamma, lambda of the authors' configs; MGD: weight, share of the positions dropped)
FGD = {
    "one": (0.5, 1e-3, 5e-4, 5e-4, 5e-6),
    "free": (0.8, 1.6e-3, 8e-4, 8e-4, 8e-6),
    "two": (0.5, 5e-5, 2.5e-5, 5e-5, 5e-7),
}
MGD = {"one": (2e-5, 0.65), "two": (5e-7, 0.45)}
FOUR = ["backbone[0]", "backbone[1]", "backbone[2]", "backbone[3]"]
FASTER, FCOS = "coco/fasterrcnn_resnet101-fasterrcnn_resnet50", "coco/fcos_resnet101-fcos_resnet50"
RETINA = ("coco/retinanet_resnet101-retinanet_resnet50", "coco/retinanet_resnext101-retinanet_resnet50")
SHARES = ("temperature", "foreground_weight", "background_weight", "attention_weight", "relation_weight")


def setting(preset, recipe="demo"):
    return fit_with([recipe, f"--config={find_method(preset)}", "--out=unused"], use=lambda **given: given)


def values(preset):
    """Return the method's class, all its options, the student's levels ("auto": all) and what else the preset sets."""
    given = setting(preset)
    method = unwrap_factory(given["method"])
    kind = getattr(method, "func", method)
    defaults = {**(kind.__init__.__kwdefaults__ or {}), **getattr(method, "keywords", {})}
    pairs = given["pairs"] if given["pairs"] == "auto" else [pair.student for pair in given["pairs"]]
    return kind.__name__, defaults, pairs, given


@pytest.mark.parametrize(
    ("preset", "kind", "levels", "inherits"),
    [
        ("detection/fgd", "one", "auto", False),
        ("detection/fgd-anchor_free", "free", "auto", False),
        ("detection/fgd-two_stage", "two", FOUR, False),
        (f"{FASTER}/fgd", "two", FOUR, True),
        (f"{FCOS}/fgd", "free", "auto", True),
        *((f"{retina}/fgd", "one", "auto", True) for retina in RETINA),
    ],
)
def test_fgd(preset, kind, levels, inherits):
    name, options, found, given = values(preset)
    assert (name, tuple(options[share] for share in SHARES), found) == ("FGD", FGD[kind], levels)
    assert (given["inherit_neck_and_head"], given["gradient_clip"]) == (inherits, 35.0 if inherits else None)


@pytest.mark.parametrize(
    ("preset", "kind", "levels", "inherits"),
    [
        ("detection/mgd", "one", "auto", False),
        ("detection/mgd-two_stage", "two", FOUR, False),
        (f"{FASTER}/mgd", "two", FOUR, True),
        (f"{FCOS}/mgd", "one", "auto", True),
        *((f"{retina}/mgd", "one", "auto", True) for retina in RETINA),
    ],
)
def test_mgd(preset, kind, levels, inherits):
    name, options, found, given = values(preset)
    assert (name, (options["weight"], options["ratio"]), found) == ("MGD", MGD[kind], levels)
    assert (given["inherit_neck_and_head"], given["gradient_clip"]) == (inherits, 35.0 if inherits else None)


def test_pkd():
    for preset, last, weight in (("detection/pkd", "backbone[p6]", 10.0), (f"{FASTER}/pkd", "backbone[3]", 6.0)):
        name, options, levels, _ = values(preset)
        assert (name, options["weight"], levels) == ("PKD", weight, [*FOUR[:3], last])


def test_pkd_is_one_minus_the_correlation():
    from diffkd import PKD, FeatureShape

    torch.manual_seed(0)
    s, t = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    loss = PKD(FeatureShape(4, (5, 6)), FeatureShape(4, (5, 6)))(s, t)["kd"]
    rows = [x.movedim(1, 0).flatten(1) for x in (s, t)]
    r = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(*rows, strict=True)])
    count = rows[0].shape[1]
    # The standard deviation is a sample's, and has 1e-6 added.
    torch.testing.assert_close(loss, 6 * ((1 - r) * (count - 1) / count).mean(), rtol=1e-5, atol=0)


def test_a_detector_inherits_all_but_the_backbone():
    def build(backbone, fpn_channels=64):
        return load_detector(f"fcos/timm/{backbone}", num_classes=3, fpn_channels=fpn_channels, norm="batch")

    student, teacher = build("test_resnet"), build("test_resnet")
    body = {name: value.clone() for name, value in student.state_dict().items() if name.startswith("backbone.body.")}
    inherit_neck_and_head(student, teacher)
    theirs = teacher.state_dict()
    for name, value in student.state_dict().items():
        assert torch.equal(value, body[name] if name in body else theirs[name])
    assert any(not torch.equal(value, theirs[name]) for name, value in body.items())
    with pytest.raises(ValueError, match=r"cannot inherit the teacher's neck and head, which differ in 'backbone\.fpn"):
        inherit_neck_and_head(build("test_resnet", fpn_channels=96), teacher)
    with pytest.raises(ValueError, match="cannot inherit"):
        inherit_neck_and_head(nn.Linear(2, 2), nn.Linear(2, 2))


def test_a_backbone_of_other_widths_keeps_its_lateral_convolutions():
    student, teacher = (
        load_detector(f"fcos/timm/{backbone}", num_classes=3, fpn_channels=64, norm="batch")
        for backbone in ("test_efficientnet", "test_resnet")
    )
    own = ("backbone.body.", "backbone.fpn.inner_blocks.")
    before = {name: value.clone() for name, value in student.state_dict().items()}
    inherit_neck_and_head(student, teacher)
    theirs = teacher.state_dict()
    for name, value in student.state_dict().items():
        assert torch.equal(value, before[name] if name.startswith(own) else theirs[name]), name
    assert not torch.equal(
        before["backbone.fpn.layer_blocks.0.0.weight"], theirs["backbone.fpn.layer_blocks.0.0.weight"]
    )


def test_a_segmenter_inherits_decoder_and_head():
    def build(architecture, encoder, num_classes=3):
        return load_segmenter(f"smp/{architecture}/timm/{encoder}", num_classes=num_classes)

    student, teacher = build("deeplabv3plus", "test_efficientnet"), build("deeplabv3plus", "test_resnet")
    before = {name: value.clone() for name, value in student.state_dict().items()}
    inherit_neck_and_head(student, teacher)
    theirs = teacher.state_dict()
    own = {name for name in before if name.startswith("encoder.") or before[name].shape != theirs[name].shape}
    # The first convolutions of the five branches of the pooling, and that of the fine map.
    assert sorted({name.split(".")[1] for name in own if name.startswith("decoder.")}) == ["aspp", "block1"]
    for name, value in student.state_dict().items():
        assert torch.equal(value, before[name] if name in own else theirs[name]), name
    assert not torch.equal(before["segmentation_head.0.weight"], theirs["segmentation_head.0.weight"])
    for other in (build("linknet", "test_resnet"), build("deeplabv3plus", "test_resnet", num_classes=4)):
        with pytest.raises(ValueError, match="cannot inherit the teacher's neck and head, which differ in '"):
            inherit_neck_and_head(other, teacher)


class Segmenter(nn.Module):
    """Scores every position, then resizes the scores."""

    def __init__(self, channels):
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, channels, 3, 4, 1), nn.ReLU(), nn.Conv2d(channels, channels, 3, 1, 1))
        self.segmentation_head = nn.Sequential(nn.Conv2d(channels, 5, 1))

    def forward(self, x):
        return F.interpolate(self.segmentation_head(self.trunk(x)), x.shape[2:], mode="bilinear")


def segmenters(preset):
    torch.manual_seed(0)
    nets = Segmenter(4).double(), Segmenter(6).double().eval()
    images, labels = torch.randn(2, 3, 16, 24, dtype=torch.float64), torch.randint(0, 5, (2, 16, 24))
    given = setting(preset)
    if given["pairs"] == "auto":
        how = {"method": [unwrap_factory(one) for one in [given["method"]]]}
        pairs = "auto"
    else:
        how = {}
        pairs = [type(pair)(**{**vars(pair), "method": unwrap_factory(pair.method)}) for pair in given["pairs"]]
    distiller = Distiller(*nets, pairs, example=images, **how).double()
    losses = distiller(images, labels=labels)[1]
    trunks = [net.trunk(images) for net in nets]
    return losses, distiller, trunks, [net.segmentation_head(x) for net, x in zip(nets, trunks, strict=True)], labels


def one(losses):
    (loss,) = losses.values()
    return loss


def test_kd_and_dist_on_class_maps():
    losses, _, _, (s, t), _ = segmenters("segmentation/kd")
    p, q = t.softmax(1), s.log_softmax(1)
    torch.testing.assert_close(one(losses), (p * (p.log() - q)).sum(1).mean(), rtol=1e-9, atol=0)
    losses, _, _, (s, t), _ = segmenters("segmentation/dist")
    rows = [x.softmax(1).movedim(1, -1).reshape(-1, 5) for x in (s, t)]

    def apart(a, b):
        a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
        return 1 - ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)).mean()

    torch.testing.assert_close(one(losses), apart(*rows) + apart(*(x.T for x in rows)), rtol=1e-9, atol=0)


def test_cwd_on_class_maps():
    losses, _, _, (s, t), _ = segmenters("segmentation/cwd")
    p, q = (t / 4).flatten(2).softmax(2), (s / 4).flatten(2).log_softmax(2)
    # tau^2 over batch and channels: 3 * 16 / (2 * 5).
    torch.testing.assert_close(one(losses), 3 * 16 * (p * (p.log() - q)).sum() / 10, rtol=1e-9, atol=0)


def test_fitnet_on_the_last_feature():
    losses, distiller, (s, t), _, _ = segmenters("segmentation/fitnet")
    projection = distiller.methods[0].student_projection
    expected = 10 * ((F.conv2d(s, projection.weight, projection.bias) - t) ** 2).mean()
    torch.testing.assert_close(one(losses), expected, rtol=1e-9, atol=0)


def test_maskd_on_class_maps():
    """Half of the squared error under each mask, after 10,000 steps of the tokens, which learn from the task."""
    losses, distiller, _, (s, t), labels = segmenters("segmentation/maskd")
    method = distiller.methods[0]
    assert (method.token_steps, len(method.tokens), one({k: v for k, v in losses.items() if k.endswith("kd")})) == (
        10_000, 8, 0
    )  # fmt: skip
    masks = torch.einsum("nc,bchw->bnhw", method.tokens, t).sigmoid()
    method.step.fill_(10_000)
    found = method(s, t, labels=labels)
    error = ((s - t) ** 2).mean(1)
    under = (masks**2 * error[:, None]).sum(dim=(2, 3)) / masks.sum(dim=(2, 3))
    torch.testing.assert_close(found["kd"], 0.5 * under.mean(), rtol=1e-9, atol=0)
    flat = masks.flatten(2)
    inner = flat @ flat.mT
    own = inner.diagonal(dim1=1, dim2=2)
    coefficients = 2 * inner / (own[:, :, None] + own[:, None])
    overlap = (coefficients.sum() - 2 * 8) / (2 * 8 * 7)
    scores = F.interpolate(t * masks.mean(1, keepdim=True) * 8, labels.shape[1:], mode="bilinear", align_corners=True)
    torch.testing.assert_close(found["tokens"], F.cross_entropy(scores, labels) + overlap, rtol=1e-9, atol=0)


def test_maskds_tokens_are_trained_in_a_run_of_their_own_at_the_published_rate():
    given = setting("segmentation/maskd-tokens")
    optimizer = given["optimizer"].keywords
    assert (optimizer["lr"], optimizer["weight_decay"], given["max_steps"], given["task_weight"]) == (
        0.1,
        1e-3,
        10_000,
        0,
    )
    losses, distiller, *_ = segmenters("segmentation/maskd-tokens")
    assert {name.rpartition("/")[2]: float(loss.detach()) > 0 for name, loss in losses.items()} == {
        "kd": False,
        "tokens": True,
    }
    assert distiller.methods[0].token_steps == 0


def test_dist_on_both_heads_of_torchvisions_models():
    preset = setting("segmentation/dist-auxiliary")
    assert preset["segmentation"].auxiliary
    assert {pair.student: pair.weight for pair in preset["pairs"]} == {"classifier.4": 1.0, "aux_classifier.4": 0.4}
    torch.manual_seed(0)
    student, teacher = (
        load_segmenter("torchvision/fcn_resnet50", num_classes=5, auxiliary=True).eval() for _ in range(2)
    )
    images = torch.randn(2, 3, 64, 64)
    pairs = [type(pair)(**{**vars(pair), "method": unwrap_factory(pair.method)}) for pair in preset["pairs"]]
    distiller = Distiller(student, teacher, pairs, example=images).eval()
    with torch.no_grad():
        ours, losses = distiller(images)
        theirs = teacher(images)
    # The heads' maps are an eighth of the size; both are resized alike afterwards, so their own maps are compared.
    assert set(losses) == {"classifier.4/kd", "aux_classifier.4/kd"}
    assert set(ours) == set(theirs) == {"out", "aux"}
    seen = distiller.observe(images)
    for name, factor in (("classifier.4", 1.0), ("aux_classifier.4", 0.4)):
        s, t = (
            x.double().permute(0, 2, 3, 1).reshape(-1, 5).softmax(1) for x in (seen[name].student, seen[name].teacher)
        )
        expected = factor * (1 - correlation(s, t).mean() + 1 - correlation(s.T, t.T).mean())
        torch.testing.assert_close(losses[f"{name}/kd"].double(), expected, rtol=1e-4, atol=0)


def correlation(a, b):
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


def test_cirkd_stands_beside_kd():
    kinds = [getattr(method, "func", method) for method in map(unwrap_factory, setting("segmentation/cirkd")["method"])]
    assert [kind.__name__ for kind in kinds] == ["KD", "CIRKD"]


def test_every_preset_of_coco_belongs_to_a_recipe():
    names = recipe_names()
    for name in names:
        if name.startswith(("methods/coco/", "methods/cifar100/", "methods/imagenet/")) and name.count("/") == 3:
            assert name.removeprefix("methods/").rpartition("/")[0] in names


def test_a_plain_name_means_the_recipes_pair_then_its_data_then_its_task():
    def found(method, recipe):
        return find_method(method, recipe).as_posix().partition("/methods/")[2].removesuffix(".yaml")

    assert found("dkd", "cifar100/resnet56-resnet20") == "cifar100/resnet56-resnet20/dkd"
    assert found("fitnet", "cifar100/resnet56-resnet20") == "cifar100/fitnet"
    assert found("dkd", "cifar100/resnet32x4-resnet8x4") == "dkd"
    assert found("dist", "imagenet/resnet34-resnet18") == "imagenet/dist"
    assert found("fgd", FASTER) == f"{FASTER}/fgd"
    assert found("pkd", FCOS) == "detection/pkd"
    assert found("fitnet", "scenes/segmentation") == "segmentation/fitnet"
    assert found("fitnet", "demo") == "fitnet"
    assert found("imagenet/kd", "cifar100/resnet56-resnet20") == "imagenet/kd"
