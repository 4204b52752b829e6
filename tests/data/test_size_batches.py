from hypothesis import given
from hypothesis import strategies as st

from diffkd.data.sampler import EpochSampler, SizeBatches


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=30), st.integers(1, 5))
def test_batches_keep_the_order_and_hold_one_size(sizes, batch_size):
    batches = SizeBatches(EpochSampler(len(sizes)), sizes, batch_size)
    found = list(batches)
    assert [index for batch in found for _, index in batch] == list(range(len(sizes)))
    assert len(found) == len(batches)
    for batch, following in zip(found, [*found[1:], None], strict=True):
        kinds = {sizes[index] for _, index in batch}
        assert len(kinds) == 1
        assert 1 <= len(batch) <= batch_size
        if following and len(batch) < batch_size:  # no batch is cut short without need
            assert sizes[following[0][1]] not in kinds


def test_the_first_differing_size_ends_a_batch():
    batches = SizeBatches(EpochSampler(5), [(1, 2), (1, 2), (2, 1), (1, 2), (1, 2)], 8)
    assert [[index for _, index in batch] for batch in batches] == [[0, 1], [2], [3, 4]]
