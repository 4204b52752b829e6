"""The task: what the loss is made of, what is measured, and when it stops."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from rounding import EXACT
from short_trainings import arrays
from tiny_models import large, small
from torch import nn

from diffkd import KD, DiffKD, Distiller
from diffkd.data.classification.augmentation import mix
from diffkd.data.seeding import mix_seed
from diffkd.tasks.classification import Classification, logits_of
from diffkd.training.callbacks import silence_lightning
from diffkd.training.lightning_module import Training
from diffkd.training.optimization import Schedule

SGD = partial(torch.optim.SGD, lr=0.1)


def make(model, kind=Training, **options):
    own = {name: options.pop(name) for name in ("label_smoothing", "mixup", "cutmix") if name in options}
    task = Classification(options.pop("num_classes", 6), **own)
    defaults = {"optimizer": SGD, "schedule": Schedule("constant"), "epochs": 2}
    return kind(model, task, **(defaults | options))


def trainer(**options):
    defaults = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    defaults |= {"enable_model_summary": False, "use_distributed_sampler": False, "num_sanity_val_steps": 0}
    return Trainer(**(defaults | {"max_epochs": 2} | options))


def fit(task, data, **options):
    with silence_lightning():
        run = trainer(**options)
        run.fit(task, datamodule=data)
    return run


def distilled(method=DiffKD):
    return Distiller(small(6, 3), large(6, 3), example=torch.randn(2, 3, 8, 8), method=method)


class Capture(Training):
    """Keeps what each step was given and returned."""

    def training_step(self, batch, batch_idx):
        before = copy.deepcopy(self.student.state_dict())
        random = torch.get_rng_state()
        loss = super().training_step(batch, batch_idx)
        self.steps = [*getattr(self, "steps", []), (batch, before, random, loss.detach())]
        return loss


def test_the_loss_is_the_weighted_sum(image_files):
    torch.manual_seed(0)
    model = distilled(KD).double()
    task = make(model, Capture, epochs=1, task_weight=0.3, method_weight=0.7, label_smoothing=0.2)
    fit(task, arrays(image_files), max_epochs=1, precision="64-true")
    (images, labels, _), before, random, loss = task.steps[3]
    student = small(6, 3).double()
    student.load_state_dict(before)
    torch.set_rng_state(random)
    logits = student(images)
    taught = model.teacher(images)
    kd = F.kl_div((logits / 4).log_softmax(1), (taught / 4).softmax(1), reduction="batchmean") * 16
    expected = 0.3 * F.cross_entropy(logits, labels, label_smoothing=0.2) + 0.7 * kd
    torch.testing.assert_close(loss, expected.detach(), **EXACT)


def test_mixed_images_have_mixed_labels(image_files):
    task = make(small(6, 3), Capture, epochs=1, mixup=1.0, cutmix=1.0, seed=5)
    fit(task, arrays(image_files), max_epochs=1)
    for step, ((images, labels, _), before, random, loss) in enumerate(task.steps):
        student = small(6, 3)
        student.load_state_dict(before)
        torch.set_rng_state(random)
        mixed, targets = mix(images, labels, 6, mixup=1.0, cutmix=1.0, seed=mix_seed(5, step, 0, 1))
        assert not torch.equal(mixed, images)
        torch.testing.assert_close(loss, F.cross_entropy(student(mixed), targets).detach(), rtol=1e-5, atol=1e-6)


def test_accuracy_is_exact(image_files):
    """Batches of 10 and a last one of 6: means of batch means would be wrong."""
    task, data = make(small(6, 3)), arrays(image_files)
    fit(task, data, precision="64-true")
    images, labels = (torch.cat(parts) for parts in list(zip(*data.val_dataloader(), strict=True))[:2])
    with torch.no_grad():
        logits = task.student.eval()(images.double())
    row = task.history.last
    assert row["top1"] == pytest.approx((logits.argmax(1) == labels).double().mean().item(), abs=1e-7)
    top5 = (logits.topk(5).indices == labels[:, None]).any(1).double().mean().item()
    assert row["top5"] == pytest.approx(top5, abs=1e-7)
    assert row["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


def test_top5_of_few_classes_is_not_measured():
    device = torch.device("cpu")
    assert "top5" not in Classification(5).meter(device).metrics
    assert "top5" in Classification(6).meter(device).metrics
    for task in (Classification(5), Classification(6)):
        assert set(task.meter(device).metrics) == set(task.metrics)


def test_the_average_is_measured_beside_the_student(image_files):
    task, data = make(small(6, 3), ema=0.9), arrays(image_files)
    fit(task, data)
    images, labels = (torch.cat(parts) for parts in list(zip(*data.val_dataloader(), strict=True))[:2])
    with torch.no_grad():
        averaged, current = (model.eval()(images).argmax(1) for model in (task.result, task.student))
    assert task.result is not task.student
    assert task.history.last["top1"] == pytest.approx((averaged == labels).float().mean().item())
    assert task.history.last["top1_unaveraged"] == pytest.approx((current == labels).float().mean().item())
    assert task.ema.updates == 12


def test_rows_hold_losses_by_term_and_gamma(image_files):
    task = make(distilled(partial(DiffKD, ae_channels=5)))
    fit(task, arrays(image_files))
    row = task.history.last
    for pair in ("0", "output"):
        for term in ("kd", "diffusion", "reconstruction"):
            assert row[f"train/{pair}/{term}"] > 0
        assert 0 < row[f"gamma/{pair}"] < 1
    assert [entry["epoch"] for entry in task.history.rows] == [1, 2]
    assert row["step"] == 12


def test_the_learning_rate_follows_the_schedule(image_files):
    task = make(small(6, 3), schedule=Schedule("step", milestones=[1.5], factor=0.1))
    fit(task, arrays(image_files))
    assert [row["lr"] for row in task.history.rows] == pytest.approx([0.1, 0.01])


def test_nothing_reaches_the_teacher_and_methods_learn(image_files):
    model = distilled()
    teacher = copy.deepcopy(model.teacher.state_dict())
    methods = copy.deepcopy(model.methods.state_dict())
    fit(make(model), arrays(image_files))
    assert all(torch.equal(value, teacher[name]) for name, value in model.teacher.state_dict().items())
    same = [name for name, value in model.methods.named_parameters() if torch.equal(value, methods[name])]
    # Biases before a BatchNorm have no gradient, and an adapter of one channel may be dead.
    assert [name for name in same if not name.endswith("bias") and "noise_adapter.feat" not in name] == []


def test_divergence_stops_with_names(image_files):
    task = make(distilled(), optimizer=partial(torch.optim.SGD, lr=1e20))
    with pytest.raises(FloatingPointError, match=r"was not finite at step \d+; the images were finite"):
        fit(task, arrays(image_files))


def test_bad_images_stop_with_names(image_files):
    class Spoilt(type(arrays(image_files))):
        def train_dataloader(self):
            loader = super().train_dataloader()
            loader.images = loader.images.float()
            loader.images[3] = float("nan")
            return loader

    with pytest.raises(FloatingPointError, match="the images of that batch held NaN"):
        fit(make(small(6, 3)), Spoilt(image_files["train"], image_files["test"], batch_size=10))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision(image_files, precision):
    task = make(distilled(), ema=0.9)
    fit(task, arrays(image_files), precision=precision)
    assert task.history.last["epoch"] == 2
    assert {p.dtype for p in task.ema.model.parameters()} == {torch.float32}


def test_what_is_not_logits_is_refused():
    assert logits_of((torch.ones(2, 3), None)).shape == (2, 3)
    with pytest.raises(TypeError, match=r"\(2, 3, 4, 4\)"):
        logits_of(torch.ones(2, 3, 4, 4))
    with pytest.raises(TypeError, match="no tensor"):
        logits_of(None)


@pytest.mark.parametrize("values", [{"epochs": 0}, {"log_every": 0}, {"label_smoothing": 1.0}, {"ema": 2.0}])
def test_nonsense_is_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        make(nn.Linear(2, 6), **values)
