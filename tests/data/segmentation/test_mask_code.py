import numpy as np
import pytest
from PIL import Image

from diffkd.data.segmentation.masks import MaskCode


def stored(folder, values):
    path = folder / "mask.png"
    Image.fromarray(np.array(values)).save(path)
    return path


def ids(*rows):
    return np.array(rows, dtype=np.uint8)


def test_ids_and_the_ignored_one_pass(tmp_path):
    read = MaskCode(3).read(stored(tmp_path, ids([0, 1], [2, 255])))
    assert read.dtype == np.uint8
    assert read.tolist() == [[0, 1], [2, 255]]


def test_an_id_out_of_range_is_named_with_file_and_place(tmp_path):
    path = stored(tmp_path, ids([0, 1], [3, 3]))
    with pytest.raises(ValueError, match=rf"{path} holds id 3 at row 1, column 0 \(2 such pixels\).*3 classes"):
        MaskCode(3).read(path)
    with pytest.raises(ValueError, match="holds id 255"):
        MaskCode(3, ignore_index=11).read(stored(tmp_path, ids([255])))


def test_many_classes_need_sixteen_bits(tmp_path):
    path = stored(tmp_path, np.array([[0, 999, 65535]], dtype=np.uint16))
    read = MaskCode(1000, 65535).read(path)
    assert read.tolist() == [[0, 999, 65535]]
    with pytest.raises(ValueError, match="holds id 999"):
        MaskCode(999, 65535).read(path)


def test_other_ids_are_mapped_and_the_rest_ignored(tmp_path):
    path = stored(tmp_path, ids([7, 8, 0, 255]))
    assert MaskCode(2, -100, id_map={7: 1, 8: 0}).read(path).tolist() == [[1, 0, -100, -100]]
    with pytest.raises(ValueError, match="holds id 0 at row 0, column 2"):
        MaskCode(2, id_map={7: 1, 8: 0, 255: 255}, unmapped="error").read(path)


def test_colours_stand_for_classes(tmp_path):
    colors = [(0, (0, 0, 0)), (1, (255, 0, 1)), (1, (0, 9, 0)), (255, (9, 9, 9))]
    path = stored(tmp_path, np.array([[[255, 0, 1], [0, 0, 0], [0, 9, 0], [9, 9, 9]]], dtype=np.uint8))
    assert MaskCode(2, colors=colors).read(path).tolist() == [[1, 0, 1, 255]]


def test_unknown_colours_are_an_error_or_ignored(tmp_path):
    path = stored(tmp_path, np.array([[[1, 2, 3], [0, 0, 0], [255, 255, 255]]], dtype=np.uint8))
    colors = [(0, (0, 0, 0))]
    with pytest.raises(ValueError, match=rf"{path} holds colour \(1, 2, 3\) at row 0, column 0 \(2 such pixels\)"):
        MaskCode(1, colors=colors).read(path)
    assert MaskCode(1, colors=colors, unknown_colors="ignore").read(path).tolist() == [[255, 0, 255]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes=0"),
        ({"ignore_index": 1 << 40}, "no integer of 32 bits"),
        ({"id_map": {1: 2}}, "id_map: 1 becomes 2, which is out of range for 2 classes"),
        ({"id_map": {-1: 0}}, "id_map: -1 is no id that a PNG holds"),
        ({"id_map": {70000: 0}}, "id_map: 70000"),
        ({"colors": [(0, (1, 1, 1)), (1, (1, 1, 1))]}, r"\(1, 1, 1\) stands for two classes"),
        ({"colors": [(0, (1, 1, 1))], "id_map": {}}, "give one of them"),
        ({"unknown_colors": "skip"}, "unknown_colors='skip'"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MaskCode(**({"num_classes": 2} | options))
