"""For every preset of classification: the loss that a recipe amounts to is that of the published one.

The effective loss, of layers, resizing, weights and schedule, on networks of fixed weights in float64, is compared with
a derivation of its own from the papers and their authors' code, a few lines each. What a paper says of its layers is
written in terms of the network's modules, not of what pairing finds.
"""

import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from diffkd import Distiller
from diffkd.commands.arguments import fit_with
from diffkd.commands.compare import find_method
from diffkd.files.config import unwrap_factory
from diffkd.methods.crd import other_class_samples
from diffkd.methods.ofd import margin_of
from diffkd.models import load_model
from diffkd.recipes import recipe_names

CLASSES, BATCH = 5, 4
COVERED: set[str] = set()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def setting(preset):
    """Return what `diffkd fit` would be called with for a preset."""
    return fit_with(["demo", f"--config={find_method(preset)}", "--out=unused"], use=lambda **given: given)


def shaken(net):
    """Return the net in float64 with BatchNorms that do something."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.5)
            nn.init.normal_(module.running_mean, std=0.1)
    return net.double().eval()


def effective(preset, student, teacher, *, epoch=0.0, size=16, **options):
    """Return the factor of the labels, the weighted sum of all distillation losses, and the distiller."""
    given = setting(preset)
    images = torch.randn(BATCH, 3, size, size, dtype=torch.float64)
    labels = torch.tensor([0, 3, 3, 1])
    pairs = given["pairs"]
    method = given["method"]
    if pairs == "auto":
        pairs_or_auto, methods = (
            "auto",
            [unwrap_factory(one) for one in (method if isinstance(method, list) else [method])],
        )
    else:
        pairs_or_auto = [type(pair)(**{**vars(pair), "method": unwrap_factory(pair.method)}) for pair in pairs]
        methods = []
    distiller = Distiller(
        student, teacher, pairs_or_auto, example=images, **({"method": methods} if methods else {}), **options
    ).double()
    # The student in evaluation mode too, so that its layers can be run by hand; the methods train.
    distiller.train()
    distiller.student.eval()
    indices = torch.tensor([2, 0, 5, 7])
    state = {name: value.clone() for name, value in distiller.methods.state_dict().items()}
    torch.manual_seed(1)
    losses = distiller(images, labels=labels, indices=indices)[1]
    total = given["method_weight"] * given["method_ramp"](epoch) * torch.stack(list(losses.values())).sum()
    distiller.methods.load_state_dict(state)
    COVERED.add(f"methods/{preset}")
    return given["task_weight"], total, distiller, images, labels, indices


def maps(net, images):
    """Return the maps of a CifarResNet before and after the last ReLU of each stage, and its logits."""
    x = net.relu(net.bn1(net.conv1(images)))
    before, after = [], []
    for stage in (net.layer1, net.layer2, net.layer3):
        for block in stage:
            branch = block.bn2(block.conv2(block.relu1(block.bn1(block.conv1(x)))))
            pre = branch + block.downsample(x)
            x = pre.relu()
        before.append(pre)
        after.append(x)
    return before, after, net.fc(x.mean(dim=(2, 3)))


def resnets():
    return [shaken(load_model(f"cifar/{name}", num_classes=CLASSES)) for name in ("resnet8", "resnet14")]


def check(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert found.abs() > 0


def both(distiller, images):
    return maps(distiller.student, images), maps(distiller.teacher, images)


def kl(s, t, tau):
    p = F.softmax(t / tau, 1)
    return tau**2 * (p * (p.log() - F.log_softmax(s / tau, 1))).sum(1)


def z_scores(x):
    centred = x - x.mean(1, keepdim=True)
    return centred / ((centred**2).sum(1, keepdim=True) / (x.shape[1] - 1)).sqrt().add(1e-7)


@pytest.mark.parametrize(
    ("preset", "labels", "weight", "tau", "prepare"),
    [
        ("kd", 0.1, 0.9, 4, lambda x: x),
        ("imagenet/kd", 0.5, 0.5, 1, lambda x: x),
        ("kd-standardized", 0.1, 9, 2, z_scores),
    ],
)
def test_kd(preset, labels, weight, tau, prepare):
    task, found, distiller, images, *_ = effective(preset, *resnets())
    (*_, s), (*_, t) = both(distiller, images)
    assert task == labels
    check(found, weight * kl(prepare(s), prepare(t), tau).mean())


@pytest.mark.parametrize(
    ("preset", "beta", "tau", "weight", "warmup", "prepare"),
    [
        ("dkd", 8, 4, 1, 20, lambda x: x),
        ("cifar100/resnet56-resnet20/dkd", 2, 4, 1, 20, lambda x: x),
        ("cifar100/wrn_40_2-wrn_40_1/dkd", 6, 4, 1, 20, lambda x: x),
        ("imagenet/dkd", 0.5, 1, 1, 1, lambda x: x),
        ("imagenet/resnet50-mobilenetv1/dkd", 2, 1, 1, 1, lambda x: x),
        ("dkd-standardized", 8, 2, 9, 20, z_scores),
        ("cifar100/resnet56-resnet20/dkd-standardized", 2, 2, 9, 20, z_scores),
        ("cifar100/wrn_40_2-wrn_40_1/dkd-standardized", 6, 2, 9, 20, z_scores),
    ],
)
@pytest.mark.parametrize("epoch", [0.0, 0.7, 6.3, 100.0])
def test_dkd(preset, beta, tau, weight, warmup, prepare, epoch):
    task, found, distiller, images, labels, _ = effective(preset, *resnets(), epoch=epoch)
    (*_, s), (*_, t) = both(distiller, images)
    rows = torch.arange(BATCH)
    p, q = F.softmax(prepare(s) / tau, 1), F.softmax(prepare(t) / tau, 1)
    ours, theirs = p[rows, labels], q[rows, labels]
    target = theirs * (theirs / ours).log() + (1 - theirs) * ((1 - theirs) / (1 - ours)).log()
    rest = torch.ones_like(p).scatter(1, labels[:, None], 0)
    p_rest, q_rest = (x * rest / (x * rest).sum(1, keepdim=True) for x in (p, q))
    others = (q_rest * (q_rest / p_rest).log()).nansum(1)
    assert task == 1
    # mdistiller counts epochs from 1, and keeps the factor for the whole of an epoch.
    factor = weight * min(1, (math.floor(epoch) + 1) / warmup)
    check(found, factor * tau**2 * (target + beta * others).mean())


@pytest.mark.parametrize(("preset", "beta", "tau", "weight"), [("dist", 2, 4, 1), ("imagenet/dist", 1, 1, 2)])
def test_dist(preset, beta, tau, weight):
    task, found, distiller, images, *_ = effective(preset, *resnets())
    (*_, s), (*_, t) = both(distiller, images)

    def apart(a, b):
        a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
        return 1 - ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)).mean()

    p, q = F.softmax(s / tau, 1), F.softmax(t / tau, 1)
    assert task == 1
    check(found, weight * tau**2 * beta * (apart(p, q) + apart(p.T, q.T)))


def test_fitnet():
    """The row "MSE" of the DiffKD paper: last map, 1x1 convolution, weight 1."""
    _, found, distiller, images, *_ = effective("fitnet", *resnets())
    (_, ours, _), (_, theirs, _) = both(distiller, images)
    projection = distiller.methods[0].student_projection
    check(found, ((F.conv2d(ours[2], projection.weight, projection.bias) - theirs[2]) ** 2).mean())


def test_cosine():
    """AM-RADIO's feature loss: 1 - cosine at every position of the last map, weight 1."""
    _, found, distiller, images, *_ = effective("cosine", *resnets())
    (_, ours, _), (_, theirs, _) = both(distiller, images)
    projection = distiller.methods[0].student_projection
    z = F.conv2d(ours[2], projection.weight, projection.bias)
    check(found, (1 - (z * theirs[2]).sum(1) / (z.norm(dim=1) * theirs[2].norm(dim=1))).mean())


def test_the_hint_of_the_benchmarks():
    """RepDistiller: hint layer 2, which is the second stage; conv + BatchNorm + ReLU; weight 100."""
    _, found, distiller, images, *_ = effective("cifar100/fitnet", *resnets())
    (_, ours, _), (_, theirs, _) = both(distiller, images)
    convolution, norm, _ = distiller.methods[0].regression
    assert convolution.kernel_size == (1, 1)
    z = F.conv2d(ours[1], convolution.weight, convolution.bias)
    z = F.batch_norm(z, None, None, norm.weight, norm.bias, True)
    check(found, 100 * ((z.relu() - theirs[1]) ** 2).mean())


def test_at():
    _, found, distiller, images, *_ = effective("at", *resnets())
    (_, ours, _), (_, theirs, _) = both(distiller, images)

    def q(x):
        x = (x**2).mean(1).flatten(1)
        return x / x.norm(dim=1, keepdim=True)

    check(found, 1000 * sum(((q(a) - q(b)) ** 2).mean() for a, b in zip(ours, theirs, strict=True)))


def test_sp():
    _, found, distiller, images, *_ = effective("sp", *resnets())
    (_, ours, _), (_, theirs, _) = both(distiller, images)

    def g(x):
        x = x.flatten(1) @ x.flatten(1).T
        return x / x.norm(dim=1, keepdim=True)

    check(found, 3000 * ((g(ours[2]) - g(theirs[2])) ** 2).sum() / BATCH**2)


def test_vid():
    _, found, distiller, images, *_ = effective("vid", *resnets())
    (_, ours, _), (_, theirs, _) = both(distiller, images)
    total = 0.0
    for method, x, t in zip(distiller.methods, ours, theirs, strict=True):
        first, second, third = (method.regression[i].weight for i in (0, 2, 4))
        mean = F.conv2d(F.conv2d(F.conv2d(x, first).relu(), second).relu(), third)
        variance = F.softplus(method.alpha)[:, None, None] + 1e-5
        total = total + (0.5 * ((t - mean) ** 2 / variance + variance.log())).mean()
    assert (F.softplus(method.alpha) + 1e-5).tolist() == pytest.approx([5.0] * 64, rel=1e-6)
    check(found, total)


def test_rkd():
    _, found, distiller, images, *_ = effective("rkd", *resnets())
    (_, ours, _), (_, theirs, _) = both(distiller, images)

    def relations(x):
        x = x.mean(dim=(2, 3))
        gaps = x[None] - x[:, None]
        distances = gaps.norm(dim=2)
        unit = gaps / distances.masked_fill(distances == 0, 1)[:, :, None]
        return distances / distances[distances > 0].mean(), torch.einsum("bij,bkj->bik", unit, unit)

    (d1, a1), (d2, a2) = relations(ours[2]), relations(theirs[2])
    check(found, 25 * F.smooth_l1_loss(d1, d2) + 50 * F.smooth_l1_loss(a1, a2))


def test_pkt():
    _, found, distiller, images, *_ = effective("pkt", *resnets())
    (_, ours, _), (_, theirs, _) = both(distiller, images)

    def p(x):
        x = F.normalize(x.mean(dim=(2, 3)), dim=1)
        x = (x @ x.T + 1) / 2
        return x / x.sum(1, keepdim=True)

    s, t = p(ours[2]), p(theirs[2])
    check(found, 30000 * (t * ((t + 1e-7) / (s + 1e-7)).log()).mean())


def test_crd():
    _, found, distiller, images, labels, indices = effective("crd", *resnets())
    (_, ours, _), (_, theirs, _) = both(distiller, images)
    method = distiller.methods[0]
    n, negatives = 50_000, 16_384
    classes = torch.full((n,), -1).index_copy(0, indices, labels)
    drawn = other_class_samples(classes, labels, negatives, torch.tensor(0), spare=method.spare)
    assert all(len(set(row.tolist())) == negatives for row in drawn)
    total = 0.0
    for projection, feature, memory in (
        (method.student_projection, ours[2], method.teacher_memory),
        (method.teacher_projection, theirs[2], method.student_memory),
    ):
        e = F.normalize(projection(feature.mean(dim=(2, 3))), dim=1)
        scores = ((e[:, None] * memory[torch.cat([indices[:, None], drawn], 1)]).sum(2) / 0.07).exp()
        p = scores / (scores.mean() * n).detach()
        noise = negatives / n
        total = total - (p[:, 0] / (p[:, 0] + noise + 1e-7)).log().sum() / BATCH
        total = total - (noise / (p[:, 1:] + noise + 1e-7)).log().sum() / BATCH
    check(found, 0.8 * total)


def test_ofd():
    """Before the ReLU on both sides, margins of the teacher's last BatchNorm in each stage, weights 1/4, 1/2, 1."""
    _, found, distiller, images, *_ = effective("ofd", *resnets())
    (ours, _, _), (theirs, _, _) = both(distiller, images)
    total = 0.0
    for depth, (connector, s, t) in enumerate(zip(distiller.methods[0].connectors, ours, theirs, strict=True)):
        convolution, norm = connector
        s = F.batch_norm(F.conv2d(s, convolution.weight), None, None, norm.weight, norm.bias, True)
        margin = margin_of(distiller.teacher.get_submodule(f"layer{depth + 1}.1.bn2"))[:, None, None]
        t = torch.maximum(t, margin)
        counts = (s > t) | (t > 0)
        total = total + ((s - t) ** 2 * counts).sum() / BATCH / 2 ** (2 - depth)
    # The margins pass through float32 when the method is built.
    torch.testing.assert_close(found, 1e-3 * total, rtol=1e-6, atol=0)


def review(method, ours, theirs):
    """Knowledge review over levels from shallow to deep, the last one pooled."""
    total, deeper = 0.0, None
    for fusion, s, t in list(zip(method.fusions, ours, theirs, strict=True))[::-1]:
        x = F.batch_norm(F.conv2d(s, fusion.narrow[0].weight), None, None, training=True)
        if deeper is not None:
            deeper = F.interpolate(deeper, x.shape[2:], mode="nearest")
            share = torch.sigmoid(F.conv2d(torch.cat([x, deeper], 1), *fusion.attention[0].parameters()))
            x = x * share[:, :1] + deeper * share[:, 1:]
        deeper = x = F.interpolate(x, t.shape[2:], mode="nearest")
        out = F.batch_norm(F.conv2d(x, fusion.widen[0].weight, padding=1), None, None, training=True)
        loss, weight, weights = ((out - t) ** 2).mean(), 1.0, 1.0
        for grid in (4, 2, 1):
            if grid < t.shape[2]:
                weight /= 2
                weights += weight
                loss = loss + weight * ((F.adaptive_avg_pool2d(out, grid) - F.adaptive_avg_pool2d(t, grid)) ** 2).mean()
        total = total + loss / weights
    return total


@pytest.mark.parametrize(
    ("preset", "weight", "warmup"),
    [
        ("reviewkd", 5, 20),
        ("imagenet/reviewkd", 1, 1),
        ("cifar100/resnet56-resnet20/reviewkd", 0.6, 20),
        ("cifar100/resnet32x4-shufflenetv2/reviewkd", 8, 20),
    ],
)
def test_reviewkd(preset, weight, warmup):
    """The student after, the teacher before the ReLU, and the average after it, as the authors have it."""
    _, found, distiller, images, *_ = effective(preset, *resnets(), epoch=2.5)
    (_, ours, _), (theirs, last, _) = both(distiller, images)
    pooled = [x.mean(dim=(2, 3), keepdim=True) for x in (ours[2], last[2])]
    method = distiller.methods[0]
    assert method.fusions[0].narrow[0].out_channels == 64
    check(found, min(1, 3 / warmup) * weight * review(method, [*ours, pooled[0]], [*theirs, pooled[1]]))


def test_reviewkd_on_imagenet():
    """mdistiller: four stages of both before the ReLU and the pooled level, without the stem; weight 1."""
    nets = [shaken(torchvision.models.resnet.ResNet(torchvision.models.resnet.BasicBlock, n, CLASSES))
            for n in ([1, 1, 1, 1], [2, 1, 1, 1])]  # fmt: skip
    _, found, distiller, images, *_ = effective("imagenet/resnet34-resnet18/reviewkd", *nets, size=64)
    levels = []
    for net in (distiller.student, distiller.teacher):
        x, maps_ = net.maxpool(net.relu(net.bn1(net.conv1(images)))), []
        for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
            for block in stage:
                branch = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu()))
                pre = branch + (x if block.downsample is None else block.downsample(x))
                x = pre.relu()
            maps_.append(pre)
        levels.append([*maps_, x.mean(dim=(2, 3), keepdim=True)])
    assert distiller.methods[0].fusions[0].narrow[0].out_channels == 512
    check(found, review(distiller.methods[0], *levels))


def test_reviewkd_from_resnet50_to_mobilenetv1():
    pair = setting("imagenet/resnet50-mobilenetv1/reviewkd")["pairs"][0]
    assert pair.student_names == ("blocks.1@pre", "blocks.2@pre", "blocks.3@pre", "blocks.4@pre", "bn2")
    assert pair.teacher_names == ("layer1@pre", "layer2@pre", "layer3@pre", "layer4@pre", "layer4")
    assert unwrap_factory(pair.method).keywords["hidden_channels"] == 256
    assert unwrap_factory(pair.method).keywords["weight"] == 8
    COVERED.add("methods/imagenet/resnet50-mobilenetv1/reviewkd")


def test_srrl():
    _, found, distiller, images, *_ = effective("srrl", *resnets())
    (_, ours, _), (_, theirs, logits) = both(distiller, images)
    convolution, norm, _ = distiller.methods[0].connector
    connected = F.batch_norm(F.conv2d(ours[2], convolution.weight), None, None, norm.weight, norm.bias, True).relu()
    connected = connected.mean(dim=(2, 3))
    feature = ((connected - theirs[2].mean(dim=(2, 3))) ** 2).mean()
    check(found, feature + ((distiller.teacher.fc(connected) - logits) ** 2).mean())


def test_wttm():
    _, found, distiller, images, *_ = effective("wttm", *resnets())
    (*_, s), (*_, t) = both(distiller, images)
    power = F.softmax(t, 1) ** 0.2
    u = power.sum(1)
    p = power / u[:, None]
    check(found, 4 * (u * (p * (p.log() - F.log_softmax(s, 1))).sum(1)).mean())


def test_norm():
    task, found, distiller, images, *_ = effective("norm", *resnets())
    (_, ours, _), (_, theirs, _) = both(distiller, images)
    weight = distiller.methods[0].expansion.weight
    segments = [((F.conv2d(ours[2], weight[64 * i : 64 * (i + 1)]) - theirs[2]) ** 2).mean() for i in range(8)]
    assert task == 0.1
    check(found, sum(segments) / 8)


def test_ofakd():
    _, found, distiller, images, labels, _ = effective("ofakd", *resnets())
    (_, ours, s), (*_, t) = both(distiller, images)
    hard = F.one_hot(labels, CLASSES)
    total = 0.0
    for scores in (*(leave(x) for leave, x in zip(distiller.methods[0].exits, ours, strict=True)), s):
        total = total - (((F.softmax(t, 1) + hard) ** 1.0 - hard) * F.log_softmax(scores, 1)).sum(1).mean()
    assert [len(leave) for leave in distiller.methods[0].exits] == [5, 4, 3]
    check(found, total)


def test_fmkt():
    _, found, distiller, images, labels, _ = effective("fmkt", *resnets())
    (_, ours, s), (*_, t) = both(distiller, images)
    method = distiller.methods[0]
    z, scores, total = ours[2], [], 0.0

    def apart(a, b):
        def pearson(a, b):
            a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
            return 1 - ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)).mean()

        a, b = F.softmax(a, 1), F.softmax(b, 1)
        return 2 * pearson(a, b) + 2 * pearson(a.T, b.T)

    for i in range(8, 0, -1):
        frequencies = 10_000 ** (-torch.arange(32, dtype=torch.float32) / 32)
        angles = (i / 8) * frequencies
        embedding = method.time(torch.cat([angles.cos(), angles.sin()]).double())
        v = method.velocity(z + embedding[:, None, None])
        z = z - v / 8
        scores.append(method.head((ours[2] - v).mean(dim=(2, 3))))
        total = total + (apart(scores[-1], t) + F.cross_entropy(scores[-1], labels)) / 8
    total = total + apart(s, torch.stack(scores).mean(0))
    # Angles are of float32 on both sides, made by another formula: off by less than 1e-6 each.
    torch.testing.assert_close(found, total, rtol=1e-5, atol=0)


def test_every_preset_of_classification_is_covered(request):
    if len(request.session.items) < 20:
        pytest.skip("only the whole file covers all presets")
    elsewhere = {"methods/alone", "methods/diffkd", "methods/diffkd-dist"}  # held by the tests of DiffKD
    # Those of representations are no paper's, but for their method; held by test_representation_presets.py.
    dense = ("methods/detection/", "methods/segmentation/", "methods/coco/", "methods/representation/")
    presets = {name for name in recipe_names() if name.startswith("methods/") and not name.startswith(dense)}
    elsewhere |= {name for name in presets if "-direct" in name}  # which no paper has; held by test_direct_presets.py
    assert presets - elsewhere == COVERED
