import pytest
import torch

from diffkd.methods.cirkd import ClassQueue


def contents(queue):
    rows = queue.entries[:-1, 0].reshape(queue.classes, queue.size)
    return [row[: min(count, queue.size)].tolist() for row, count in zip(rows, queue.count.tolist(), strict=True)]


def test_the_oldest_entries_are_overwritten():
    queue = ClassQueue(2, 3, 1)
    queue.push(torch.tensor([[[1.0], [2.0]], [[10.0], [20.0]]]), torch.tensor([[True, True], [False, True]]))
    assert contents(queue) == [[1, 2], [20]]
    queue.push(torch.tensor([[[3.0], [4.0]], [[30.0], [40.0]]]), torch.tensor([[True, True], [False, False]]))
    assert contents(queue) == [[4, 2, 3], [20]]
    assert queue.count.tolist() == [4, 1]
    assert queue.entries[-1] == 0


def test_like_a_list_for_each_class():
    queue, lists = ClassQueue(3, 5, 2), [[], [], []]
    for _ in range(20):
        candidates, valid = torch.randn(3, 4, 2), torch.rand(3, 4) > 0.4
        queue.push(candidates, valid)
        for c in range(3):
            lists[c] = [*lists[c], *candidates[c][valid[c]].tolist()][-5:]
    for c in range(3):
        kept = queue.entries[5 * c : 5 * c + 5]
        assert sorted(kept.tolist()) == sorted(lists[c])


def test_draws_come_from_what_is_stored():
    queue = ClassQueue(3, 10, 1)
    candidates = torch.arange(1.0, 7).reshape(3, 2, 1)
    queue.push(candidates, torch.tensor([[True, True], [False, False], [True, False]]))
    entries, exists = queue.draw(200, torch.tensor(4))
    assert exists.reshape(3, 200).all(dim=1).tolist() == [True, False, True]
    assert exists.sum() == 400
    drawn = entries.reshape(3, 200)
    assert set(drawn[0].tolist()) == {1, 2}
    assert set(drawn[2].tolist()) == {5}
    assert drawn[0].mean().item() == pytest.approx(1.5, abs=0.2)


def test_errors():
    with pytest.raises(ValueError, match="at least 1 class and 1 entry, got 0 and 3"):
        ClassQueue(0, 3, 1)
    with pytest.raises(ValueError, match=r"may bring 4 entries of a class, more than the memory of 3"):
        ClassQueue(1, 3, 1).push(torch.zeros(1, 4, 1), torch.ones(1, 4, dtype=torch.bool))
