"""The benchmark of detectors in its smallest setting."""

import json

from benchmarks import detection


def test_every_method_is_measured(tmp_path, capsys):
    methods = ["alone", "diffkd", "diffkd-shared"]
    words = ["--methods", *methods, "--rounds", "1", "--device", "cpu", "--out", str(tmp_path)]
    measured = detection.main(words)["short"]
    assert json.loads((tmp_path / "detection-short.json").read_text(encoding="utf-8"))["methods"] == measured
    assert list(measured) == methods
    assert measured["alone"]["method_parameters"] == 0
    assert measured["diffkd"]["method_parameters"] == 5 * measured["diffkd-shared"]["method_parameters"] > 0
    assert measured["diffkd"]["peak_bytes"] > measured["alone"]["peak_bytes"] > 0
    assert measured["diffkd"]["over"]["alone"]["n"] == 1
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]) == 4 + 1
