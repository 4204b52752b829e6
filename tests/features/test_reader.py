import pytest
import torch

from diffkd import FeatureShape, Layout
from diffkd.features.reader import agree, reader_for

SIZE = (32, 32)


def reader(shape, **options):
    return reader_for("student", ["a"], {"a": torch.randn(shape)}, None, SIZE, **options)


@pytest.mark.parametrize(
    ("shape", "read", "text"),
    [
        ((2, 5, 4, 4), (2, 5, 4, 4), "5x4x4"),
        ((2, 4, 4, 9), (2, 9, 4, 4), "9x4x4 nhwc"),
        ((2, 17, 9), (2, 9, 4, 4), "9x4x4 tokens+1"),
        ((2, 10), (2, 10), "10"),
    ],
)
def test_every_layout_is_brought_to_channels_first(shape, read, text):
    one = reader(shape)
    feature = one.read({"a": torch.randn(shape)})
    assert feature.shape == read
    assert one.shapes == (FeatureShape(read[1], read[2:]),)
    assert str(one) == text


def test_the_users_word_on_the_layout_counts():
    assert reader((2, 4, 4, 4)).read({"a": torch.zeros(2, 4, 4, 4)}).shape == (2, 4, 4, 4)
    assert reader((2, 4, 4, 4), layout=Layout("nhwc")).layouts[0].kind == "nhwc"
    asked = reader((2, 20, 9), layout=Layout("tokens", 2, (3, 6)))
    assert asked.read({"a": torch.randn(2, 20, 9)}).shape == (2, 9, 3, 6)


def test_lists_for_methods_that_take_several():
    outputs = {"a": torch.randn(2, 5, 4, 4), "b": torch.randn(2, 8, 8, 6)}
    two = reader_for("student", ["a", "b"], outputs, None, SIZE, several=True)
    assert [tuple(x.shape) for x in two.read(outputs)] == [(2, 5, 4, 4), (2, 6, 8, 8)]
    one = reader((2, 5, 4, 4), several=True)
    assert isinstance(one.read({"a": torch.randn(2, 5, 4, 4)}), list)
    assert agree(one, two) == (one, two)


def test_the_layer_that_makes_the_output_is_known():
    logits = torch.randn(2, 10)
    outputs = {"fc": logits, "hidden": torch.randn(2, 10)}
    assert reader_for("student", ["fc"], outputs, logits, SIZE).shapes[0].role == "logits"
    assert reader_for("student", ["hidden"], outputs, logits, SIZE).shapes[0].role == "feature"


def test_shapes_that_are_not_understood_ask_for_a_layout():
    with pytest.raises(ValueError, match=r"student's layer 'a' returns \(2, 3, 4, 5, 6\).*student_layout=Layout"):
        reader((2, 3, 4, 5, 6))
    both = r"Layout\('tokens', 1, \(5, 4\)\) or Layout\('tokens', 5, \(4, 4\)\)"
    with pytest.raises(ValueError, match=rf"'a' returns \(2, 21, 9\), which may be read as {both} .*student_layout=L"):
        reader_for("student", ["a"], {"a": torch.randn(2, 21, 9)}, None, (120, 100))


def test_what_is_no_real_numbers_is_refused():
    with pytest.raises(ValueError, match=r"student's layer 'a' returns torch.complex64, and features are real numbers"):
        reader_for("student", ["a"], {"a": torch.zeros(2, 4, 8, 8, dtype=torch.complex64)}, None, SIZE)


def test_maps_agree_on_the_teachers_size():
    ours, theirs = agree(reader((2, 5, 4, 4)), reader((2, 65, 9)))
    assert ours.shapes[0] == FeatureShape(5, (8, 8))
    assert theirs.shapes[0] == FeatureShape(9, (8, 8))
    assert not ours.pools


@pytest.mark.parametrize("vector_first", [True, False])
def test_a_map_is_averaged_beside_a_vector(vector_first):
    map_side, vector_side = reader((2, 5, 4, 4)), reader((2, 9))
    if vector_first:
        vector_side, map_side = agree(vector_side, map_side)
    else:
        map_side, vector_side = agree(map_side, vector_side)
    assert map_side.shapes == (FeatureShape(5),)
    assert not vector_side.pools
    x = torch.randn(2, 5, 4, 4)
    torch.testing.assert_close(map_side.read({"a": x}), x.mean(dim=(2, 3)))


def test_logits_of_a_single_position_are_vectors():
    logits = torch.randn(2, 10, 1, 1)
    outputs = {"output": logits, "pool": torch.randn(2, 10, 1, 1)}
    one = reader_for("student", ["output"], outputs, logits, SIZE)
    ours, theirs = agree(one, one)
    assert ours.shapes == theirs.shapes == (FeatureShape(10, (), "logits"),)
    assert ours.read(outputs).shape == (2, 10)
    pooled = reader_for("student", ["pool"], outputs, logits, SIZE)
    assert agree(pooled, pooled)[0].shapes[0].is_map
