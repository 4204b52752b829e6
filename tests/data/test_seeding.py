from hypothesis import given
from hypothesis import strategies as st

from diffkd.data.seeding import mix_seed

INTEGERS = st.integers(0, 2**40)


@given(st.lists(INTEGERS, max_size=5))
def test_seed_fits_a_generator(numbers):
    assert 0 <= mix_seed(*numbers) < 2**63


@given(INTEGERS, INTEGERS)
def test_position_and_count_matter(first, second):
    assert mix_seed(first) != mix_seed(first, 0)
    assert (mix_seed(first, second) == mix_seed(second, first)) == (first == second)


def test_no_collision_among_neighbours_even_in_the_low_32_bits():
    seeds = {
        mix_seed(seed, epoch, batch) & 0xFFFFFFFF for seed in range(3) for epoch in range(20) for batch in range(20)
    }
    assert len(seeds) == 3 * 20 * 20


def test_the_mix_never_changes():
    # Runs made by an older version resume in a newer one only while this holds.
    assert mix_seed(0) == 0xE220A8397B1DCDAF >> 1  # the first number of splitmix64 from state 0
    assert mix_seed(1, 2, 3) == 7510213797696614745
