"""The benchmark of segmenters in its smallest setting."""

import json

from benchmarks import segmentation


def test_every_method_is_measured(tmp_path, capsys):
    methods = ["alone", "cwd", "diffkd"]
    words = ["--methods", *methods, "--rounds", "1", "--device", "cpu", "--out", str(tmp_path)]
    measured = segmentation.main(words)["short"]["steps"]
    written = json.loads((tmp_path / "segmentation.json").read_text(encoding="utf-8"))
    assert written["cases"]["short"]["steps"] == measured
    assert list(measured) == methods
    assert measured["diffkd"]["peak_bytes"] > measured["cwd"]["peak_bytes"] > measured["alone"]["peak_bytes"] > 0
    assert measured["diffkd"]["over_alone"]["n"] == measured["diffkd"]["over_cwd"]["n"] == 1
    assert "over alone" in capsys.readouterr().out
