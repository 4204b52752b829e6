import itertools
import json

import pytest
from benchmarks.better import FACTORS, design, main, main_effects
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
    rows = main_effects(scores, "abc")
    assert [name for name, *_ in rows] == ["a", "b", "c"]
    assert [effect for _, effect, _ in rows] == pytest.approx([0.3, 0.005, -0.1])
    assert [error for *_, error in rows] == pytest.approx([0.0, 0.005, 0.0])


def test_it_goes_on_where_it_was(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.better.START_METHOD", "forkserver")
    recipe = write_recipe(tmp_path, epochs=1)
    words = [f"--recipe={recipe}", f"--out={tmp_path}/out", "--factors", "one_step", "balance", "--runs=4", "--seeds=1"]
    main([*words, "--", "--accelerator=cpu", TRUST])
    first = capsys.readouterr().out
    lines = (tmp_path / "out" / "runs.jsonl").read_text().splitlines()
    assert len({json.dumps(json.loads(line)["levels"]) for line in lines}) == 4
    assert "| balance |" in first
    main([*words, "--", "--accelerator=cpu", TRUST])
    assert (tmp_path / "out" / "runs.jsonl").read_text().splitlines() == lines
    assert set(FACTORS) > {"one_step", "balance"}
