"""Rows of numbers, one per epoch."""

import pytest

from diffkd.files.history import History, read_csv


def history(*accuracies):
    record = History("top1")
    for epoch, top1 in enumerate(accuracies, 1):
        record.add({"epoch": epoch, "top1": top1})
    return record


def test_last_and_best_are_two_things():
    record = history(0.2, 0.6, 0.6, 0.5)
    assert record.last == {"epoch": 4, "top1": 0.5}
    assert record.best == {"epoch": 2, "top1": 0.6}  # the earlier of equals


def test_nothing_yet():
    assert History("top1").last is None
    assert History("top1").best is None


def test_csv_there_and_back(tmp_path):
    record = history(0.25, 1 / 3)
    record.rows[1]["gamma/layer4"] = 0.1
    record.write_csv(tmp_path / "metrics.csv")
    assert (tmp_path / "metrics.csv").read_text().splitlines()[0] == "epoch,top1,gamma/layer4"
    assert read_csv(tmp_path / "metrics.csv") == record.rows


def test_state_is_a_copy():
    record, other = history(0.5), History("top1")
    other.load_state_dict(record.state_dict())
    record.rows[0]["top1"] = 0.0
    assert other.last == {"epoch": 1, "top1": 0.5}


def test_an_unwritable_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        history(0.5).write_csv(tmp_path / "file" / "metrics.csv")


@pytest.mark.parametrize("content", [b"epoch,top1\n1,good", b"epoch,top1\n1,0.5,3,4", b"\xff\xfe"])
def test_a_damaged_table_names_its_file(tmp_path, content):
    (tmp_path / "metrics.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"metrics\.csv is no table of numbers"):
        read_csv(tmp_path / "metrics.csv")
