"""The benchmark of reading images in its smallest setting."""

import json

import pytest
from benchmarks import input as reading


def test_both_loaders_are_measured(tmp_path, capsys):
    record = reading.main(["--images", "4", "--rounds", "1", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "input.json").read_text(encoding="utf-8")) == record
    ours, theirs = (record["images_per_second"][name]["median"] for name in ("diffkd", "torchvision"))
    assert record["time_over_torchvision"]["median"] == pytest.approx(theirs / ours)
    assert "time of diffkd over torchvision" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--images", "--rounds"])
def test_nothing_to_measure_is_refused(option, tmp_path, capsys):
    with pytest.raises(SystemExit):
        reading.main([option, "0", "--out", str(tmp_path)])
    assert f"argument {option}: 0 is too few: it must be at least 1" in capsys.readouterr().err


def test_both_read_every_training_image(tmp_path):
    reading.make_folder(tmp_path, 5)
    for loader in (reading.ours(tmp_path, 0), reading.plain(tmp_path, 0)):
        assert [batch[0].shape for batch in loader] == [(5, 3, 224, 224)]
