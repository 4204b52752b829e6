import json
import math
import statistics
import struct
from typing import Any

import pytest

from diffkd.reports.tables import as_json, as_latex, as_markdown, cells, difference, summarize


def result(last: float, best: float, seconds: float = 10.0, memory: float = 500.0) -> dict[str, Any]:
    return {
        "last": {"top1": last, "seconds": seconds},
        "best": {"top1": best},
        "parameters": 1000,
        "method_parameters": 20,
        "peak_memory": memory,
    }


RESULTS = {
    "alone": {0: result(0.70, 0.71), 1: result(0.72, 0.72), 2: result(0.71, 0.73)},
    "kd": {0: result(0.73, 0.73), 1: result(0.74, 0.75), 2: result(0.75, 0.75)},
    "diffkd": {0: result(0.74, 0.75), 2: result(0.76, 0.77, seconds=30, memory=900)},
}


def test_mean_spread_best_and_cost() -> None:
    rows = {row.method: row for row in summarize(RESULTS, "top1")}
    assert rows["alone"].last == pytest.approx(71.0)
    assert rows["alone"].last_std == pytest.approx(statistics.stdev([70, 72, 71]))
    assert rows["kd"].best == pytest.approx(statistics.mean([73, 75, 75]))
    assert rows["diffkd"].seeds == (0, 2)
    assert (rows["diffkd"].seconds, rows["diffkd"].peak_memory) == (20, 900)


def test_differences_pair_the_seeds_that_both_have() -> None:
    rows = {row.method: row for row in summarize(RESULTS, "top1")}
    assert rows["diffkd"].against["kd"].mean == pytest.approx(((74 - 73) + (76 - 75)) / 2)
    assert rows["diffkd"].against["alone"].mean == pytest.approx(((74 - 70) + (76 - 71)) / 2)
    assert "kd" not in rows["kd"].against


def test_p_value_is_students_paired_t_test() -> None:
    ours, theirs = {0: 3.0, 1: 5.0, 2: 4.5}, {0: 1.0, 1: 4.0, 2: 2.0}
    deltas = [2.0, 1.0, 2.5]
    t = statistics.mean(deltas) / (statistics.stdev(deltas) / math.sqrt(3))
    # The distribution function of Student's t with 2 degrees of freedom has a closed form.
    expected = 2 * (0.5 - t / (2 * math.sqrt(2 + t * t)))
    assert difference(ours, theirs).p == pytest.approx(expected)


def test_equal_differences_have_no_p_value_whatever_their_rounding() -> None:
    """A spread of zero says nothing about chance; as float32 shares they differ in the last place."""
    ours, theirs = ({0: 0.7123, 1: 0.7210}, {0: 0.7011, 1: 0.7098})
    for rounded in (float, lambda share: struct.unpack("f", struct.pack("f", share))[0]):
        in_percent = [{seed: 100 * rounded(share) for seed, share in shares.items()} for shares in (ours, theirs)]
        found = difference(*in_percent)
        assert found.mean == pytest.approx(1.12, abs=1e-4)
        assert found.p is None
    # One image of a million is more than that.
    assert difference({0: 71.0001, 1: 72.0}, {0: 70.0, 1: 71.0}).p is not None


def test_one_seed_has_neither_spread_nor_p() -> None:
    rows = summarize({"alone": {0: result(0.5, 0.5)}, "kd": {0: result(0.6, 0.6)}}, "top1")
    assert rows[1].last_std is None
    assert rows[1].against["alone"].p is None
    assert "±" not in as_markdown(rows)


def test_all_formats_hold_every_method_and_number() -> None:
    rows = summarize(RESULTS, "top1")
    head, *body = cells(rows)
    assert all(len(line) == len(head) for line in body)
    markdown, latex = as_markdown(rows), as_latex(rows)
    assert markdown.count("\n") == 2 + len(rows)
    assert "71.00 ± 1.00" in markdown
    assert r"71.00 $\pm$ 1.00" in latex
    assert json.loads(json.dumps(as_json(rows)))[2]["against"]["kd"]["mean"] == pytest.approx(1.0)


def test_methods_without_a_finished_run_are_left_out() -> None:
    assert [row.method for row in summarize({"alone": RESULTS["alone"], "kd": {}}, "top1")] == ["alone"]
