import numpy as np
import pytest
import torch
import torch.multiprocessing
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier
from torch import distributed, nn

from diffkd.data.loaders import BANK, HELD_OUT, QUERIES
from diffkd.tasks.representation import (
    L2,
    RIDGE,
    Representation,
    knn_classify,
    linear_cka,
    linear_classify,
    mapped_cosine,
)


def labelled(count, channels, classes=4, noise=1.5):
    labels = torch.arange(count) % classes
    return torch.randn(classes, channels, generator=torch.Generator().manual_seed(1))[labels] + noise * torch.randn(
        count, channels
    ), labels


@pytest.mark.parametrize("neighbours", [1, 20])
def test_neighbours_vote_as_in_scikit_learn(neighbours):
    (bank, labels), (queries, _) = labelled(200, 6), labelled(70, 6)
    other = KNeighborsClassifier(neighbours, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    expected = other.fit(bank, labels).predict(queries)
    assert knn_classify(bank, labels, queries, neighbours).tolist() == expected.tolist()


def test_neighbours_are_found_in_parts_alike(monkeypatch):
    (bank, labels), (queries, _) = labelled(50, 6), labelled(33, 6)
    whole = knn_classify(bank, labels, queries)
    monkeypatch.setattr("diffkd.tasks.representation._MOST_SIMILARITIES", 250)
    assert torch.equal(knn_classify(bank, labels, queries), whole)


def test_fewer_images_than_neighbours_all_vote():
    bank, labels = torch.eye(3), torch.tensor([0, 1, 1])
    assert knn_classify(bank, labels, torch.tensor([[1.0, 0.1, 0.0]])).tolist() == [0]


def test_the_linear_probe_is_a_logistic_regression():
    (bank, labels), (queries, _) = labelled(120, 5), labelled(60, 5)
    bank, queries = (
        bank * torch.tensor([1.0, 10.0, 0.1, 1.0, 1.0]) + 3,
        queries * torch.tensor([1.0, 10.0, 0.1, 1, 1]) + 3,
    )
    mean, deviation = bank.mean(dim=0), bank.std(dim=0, correction=0)
    other = LogisticRegression(C=1 / (len(bank) * L2), tol=1e-8, max_iter=2000)
    other.fit(((bank - mean) / deviation).double(), labels)
    expected = other.predict(((queries - mean) / deviation).double())
    assert linear_classify(bank, labels, queries).tolist() == expected.tolist()


def test_a_constant_channel_does_no_harm():
    bank, labels = labelled(40, 3)
    bank[:, 1] = 7.0
    assert (linear_classify(bank, labels, bank) == labels).float().mean() > 0.4


def test_linear_cka_is_the_cosine_of_centred_grams():
    x, y = torch.randn(20, 5, dtype=torch.float64), torch.randn(20, 30, dtype=torch.float64)
    centre = torch.eye(20, dtype=torch.float64) - 1 / 20
    grams = [centre @ one @ one.T @ centre for one in (x, y)]
    expected = (grams[0] * grams[1]).sum() / (grams[0].norm() * grams[1].norm())
    torch.testing.assert_close(linear_cka(x, y), float(expected))
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    torch.testing.assert_close(linear_cka(x, 3 * x @ rotation + 7), 1.0)


@pytest.mark.parametrize("channels", [4, 40])
def test_the_mapped_cosine_leaves_each_image_out(channels):
    x = torch.randn(15, channels, dtype=torch.float64)
    y = x[:, :3] @ torch.randn(3, 6, dtype=torch.float64) + torch.randn(15, 6, dtype=torch.float64) + 50
    alpha = RIDGE * 15 * x.var(dim=0, correction=0).mean().item()
    likenesses = []
    for one in range(15):
        rest = [index for index in range(15) if index != one]
        predicted = Ridge(alpha).fit(x[rest], y[rest]).predict(x[[one]])
        angle = torch.cosine_similarity(torch.from_numpy(predicted)[0] - y.mean(0), y[one] - y.mean(0), dim=0)
        likenesses.append(float(angle))
    torch.testing.assert_close(mapped_cosine(x, y), float(np.mean(likenesses)))


def test_the_same_embedding_agrees():
    x = torch.randn(200, 4)
    assert mapped_cosine(x, x @ torch.randn(4, 4) + 1) > 0.999


def batches():
    generator = torch.Generator().manual_seed(3)
    every = []
    for kind, count in ((HELD_OUT, 11), (BANK, 40), (QUERIES, 21)):
        labels = torch.full((count,), -1) if kind == HELD_OUT else torch.arange(count) % 3
        images = torch.randn(count, 2, 4, 4, generator=generator) + labels.clamp_min(0)[:, None, None, None]
        indices = torch.arange(count)
        every += [
            (images[start : start + 10], labels[start : start + 10], indices[start : start + 10], kind)
            for start in range(0, count, 10)
        ]
    return every


def models():
    torch.manual_seed(0)
    return [
        nn.Sequential(nn.Conv2d(2, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
        for width in (4, 6)
    ]


def measure(some):
    student, teacher = models()
    with torch.no_grad():
        meter = Representation(True, [teacher]).meter(torch.device("cpu"), last=True)
        for batch in some:
            meter.update(student, batch)
        row = meter.compute()
    assert set(row) == set(Representation(True, [teacher]).metrics)
    return row


def work(process, folder):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=process, world_size=2)
    # As an evaluation sampler spreads the images, and another number of batches on each rank.
    own = [tuple(one[process::2] if torch.is_tensor(one) else one for one in batch) for batch in batches()]
    torch.save(measure([batch for batch in own if len(batch[0])]), f"{folder}/{process}.pt")
    distributed.destroy_process_group()


def test_two_processes_measure_what_one_does(tmp_path):
    torch.multiprocessing.start_processes(work, (str(tmp_path),), nprocs=2, start_method="forkserver")
    whole = measure(batches())
    assert list(whole) == ["knn", "linear", "cka", "cosine", "teacher_knn", "teacher_linear"]
    for process in range(2):
        found = torch.load(tmp_path / f"{process}.pt")
        # The convolution of another batch size rounds otherwise: some eps, which the k-NN of distinct images outlives.
        assert found == pytest.approx(whole, abs=1e-4)


def test_several_teachers_are_measured_each():
    student, teacher = models()
    task = Representation(False, [teacher, student])
    with torch.no_grad():
        meter = task.meter(torch.device("cpu"))
        for batch in batches():
            meter.update(student, batch)
        row = meter.compute()
    assert task.headlines == ("cka", "cosine")
    assert row["cka/1"] == pytest.approx(1.0)
    assert row["cka"] == pytest.approx((row["cka/0"] + 1) / 2)
    assert "knn" not in row
