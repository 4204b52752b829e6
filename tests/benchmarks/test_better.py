import itertools
import json

import numpy as np
import pytest
from benchmarks.better import FACTORS, design, main, main_effects
from scipy import stats
from tiny_recipe import TRUST, write_recipe


@pytest.mark.parametrize(("factors", "runs"), [(2, 4), (3, 4), (7, 16), (7, 8), (7, 128)])
def test_any_two_factors_are_orthogonal(factors, runs):
    rows = design(factors, runs)
    assert len(rows) == len(set(rows)) == runs
    for a, b in itertools.combinations(range(factors), 2):
        for pair in itertools.product((False, True), repeat=2):
            assert sum((row[a], row[b]) == pair for row in rows) == runs // 4


@pytest.mark.parametrize(("factors", "runs"), [(3, 6), (4, 4), (2, 1)])
def test_designs_that_do_not_fit_are_refused(factors, runs):
    with pytest.raises(ValueError, match="give a power of two"):
        design(factors, runs)


def test_main_effects_are_recovered():
    scores = {
        (row, seed): 1.0 + 0.3 * row[0] - 0.1 * row[2] + 0.01 * seed * row[1] for row in design(3, 8) for seed in (0, 1)
    }
    scores[(True, True, True), 2] = 100.0  # a seed that is not complete
    effects = main_effects(scores, "abc")
    assert [one.name for one in effects] == ["a", "b", "c"]
    assert [one.mean for one in effects] == pytest.approx([0.3, 0.005, -0.1])


def test_their_errors_are_those_of_a_regression():
    rows, seeds = design(4, 8), range(3)
    rng = np.random.default_rng(0)
    scores = {(row, seed): 0.2 * row[0] + 0.1 * seed + rng.normal() for row in rows for seed in seeds}
    # One column a setting and one a seed but the first; the contrast of the option's halves of the settings.
    columns = np.array([[row == one for one in rows] + [seed == one for one in seeds[1:]] for row, seed in scores])
    values = np.array(list(scores.values()))
    found, squares, *_ = np.linalg.lstsq(columns.astype(float), values, rcond=None)
    variance = squares[0] / (len(values) - columns.shape[1])
    for index, effect in enumerate(main_effects(scores, "abcd")):
        contrast = np.array([(1 if row[index] else -1) / 4 for row in rows] + [0, 0])
        error = np.sqrt(contrast @ np.linalg.inv(columns.T.astype(float) @ columns) @ contrast * variance)
        assert (effect.mean, effect.error) == pytest.approx((contrast @ found, error))
        assert effect.p == pytest.approx(2 * stats.t.sf(abs(effect.mean / error), len(values) - columns.shape[1]))


def test_one_seed_has_effects_without_errors():
    (effect,) = main_effects({((False,), 0): 1.0, ((True,), 0): 1.5}, "a")
    assert (effect.mean, effect.error, effect.p) == (0.5, None, None)
    with pytest.raises(ValueError, match="no seed has a run of each of the 2"):
        main_effects({((False,), 0): 1.0, ((True,), 1): 1.5}, "a")


def test_it_goes_on_where_it_was(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.better.START_METHOD", "forkserver")
    recipe = write_recipe(tmp_path, epochs=1)
    words = [f"--recipe={recipe}", f"--out={tmp_path}/out", "--factors", "one_step", "balance", "--runs=4", "--seeds=1"]
    main([*words, "--", "--accelerator=cpu", TRUST])
    first = capsys.readouterr().out
    lines = (tmp_path / "out" / "runs.jsonl").read_text().splitlines()
    assert len({json.dumps(json.loads(line)["levels"]) for line in lines}) == 4
    assert "| balance  | " in first
    main([*words, "--", "--accelerator=cpu", TRUST])
    assert (tmp_path / "out" / "runs.jsonl").read_text().splitlines() == lines
    assert set(FACTORS) > {"one_step", "balance"}
