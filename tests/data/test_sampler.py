import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffkd.data.sampler import EpochSampler, drops_last


def shards(size, world, *, shuffle, epoch=0):
    samplers = [EpochSampler(size, seed=3, shuffle=shuffle, rank=rank, world_size=world) for rank in range(world)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    return [sampler.order().tolist() for sampler in samplers]


@given(st.integers(1, 5), st.integers(0, 40), st.integers(0, 3))
def test_training_shards_are_equal_and_disjoint(world, extra, epoch):
    size = world + extra
    parts = shards(size, world, shuffle=True, epoch=epoch)
    assert {len(part) for part in parts} == {size // world}
    together = [index for part in parts for index in part]
    assert len(set(together)) == len(together) == size // world * world
    assert set(together) <= set(range(size))


@given(st.integers(1, 5), st.integers(1, 40))
def test_evaluation_shards_hold_every_sample_once(world, size):
    parts = shards(size, world, shuffle=False)
    assert sorted(index for part in parts for index in part) == list(range(size))


def test_batches_of_the_ranks_together_are_the_batch_of_one_process():
    whole = shards(24, 1, shuffle=True)[0]
    parts = shards(24, 3, shuffle=True)
    assert set(whole[:12]) == {index for part in parts for index in part[:4]}


def test_order_depends_on_seed_and_epoch_only():
    sampler = EpochSampler(50, seed=1, shuffle=True)
    state = torch.get_rng_state()
    first = sampler.order()
    sampler.set_epoch(1)
    second = sampler.order()
    sampler.set_epoch(0)
    assert torch.equal(sampler.order(), first)
    assert not torch.equal(first, second)
    assert not torch.equal(EpochSampler(50, seed=2, shuffle=True).order(), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_items_carry_the_epoch():
    sampler = EpochSampler(3, shuffle=True)
    sampler.set_epoch(7)
    assert list(sampler) == [(7, index) for index in sampler.order().tolist()]


def test_start_skips_in_the_first_iterated_epoch_only():
    sampler = EpochSampler(10, shuffle=True, start=4)
    sampler.set_epoch(5)
    order = sampler.order().tolist()
    assert len(sampler) == 10
    for _ in range(2):  # Lightning may ask for an iterator twice
        assert [index for _, index in sampler] == order[4:]
    sampler.set_epoch(6)
    assert len(list(sampler)) == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 5, "rank": 2, "world_size": 2}, "rank 2"),
        ({"size": 5, "start": -1}, "-1"),
        ({"size": 0}, "0 samples"),
        ({"size": 3, "shuffle": True, "world_size": 4}, "3 samples are too few for 4"),
    ],
)
def test_bad_numbers_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        EpochSampler(**arguments)


def test_a_last_batch_of_one_is_dropped_in_training_only():
    assert drops_last(9, 4, train=True)
    assert not drops_last(9, 4, train=False)
    assert not drops_last(10, 4, train=True)
    assert not drops_last(3, 1, train=True)
    assert drops_last(10, 4, train=True, drop_last=True)
    assert not drops_last(9, 4, train=True, drop_last=False)


def test_a_last_batch_of_two_is_dropped_in_training_where_it_is_a_small_part():
    assert drops_last(66, 64, train=True)
    assert drops_last(10, 8, train=True)
    assert not drops_last(10, 8, train=False)
    assert not drops_last(67, 64, train=True)
    assert not drops_last(9, 7, train=True)
    assert not drops_last(2, 8, train=True)
    assert not drops_last(66, 64, train=True, drop_last=False)


def test_no_batch_at_all_is_an_error():
    with pytest.raises(ValueError, match="fill no batch of 4"):
        drops_last(1, 4, train=True)
    with pytest.raises(ValueError, match="batch_size 0"):
        drops_last(1, 0, train=False)
