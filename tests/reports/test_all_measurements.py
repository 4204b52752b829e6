import json

from diffkd.reports.tables import summarize_all, write_all_measurements

RESULTS = {
    "alone": {
        1: {"last": {"epoch": 2, "step": 8, "ap": 0.2, "ap_small": 0.1, "train/task": 3.0, "lr": 0.1, "seconds": 4.0}},
        0: {"last": {"epoch": 2, "step": 8, "ap": 0.4, "train/task": 3.0, "gamma/0": 0.9, "lr": 0.1, "seconds": 4.0}},
    },
    "kd": {0: {"last": {"epoch": 2, "ap": 0.5, "loss": 1.25}}},
    "none": {},
}


def test_means_and_spreads_of_what_was_measured():
    summary = summarize_all(RESULTS)
    assert set(summary["alone"]) == {"ap", "ap_small"}
    assert summary["alone"]["ap"]["n"] == 2
    assert abs(summary["alone"]["ap"]["mean"] - 0.3) < 1e-12
    assert abs(summary["alone"]["ap"]["std"] - 0.02**0.5) < 1e-12
    assert summary["alone"]["ap_small"] == {"mean": 0.1, "std": None, "n": 1}
    assert summary["none"] == {}


def test_the_table_shows_percent_and_gaps(tmp_path):
    write_all_measurements(tmp_path, RESULTS)
    lines = (tmp_path / "measurements.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "| method | ap | ap_small | loss |"
    assert lines[2:] == [
        "| alone | 30.00 ± 14.14 | 10.00 | - |",
        "| kd | 50.00 | - | 1.2500 |",
        "| none | - | - | - |",
    ]
    assert json.loads((tmp_path / "measurements.json").read_text()) == summarize_all(RESULTS)
