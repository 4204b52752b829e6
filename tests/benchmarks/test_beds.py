import pytest
from benchmarks.beds import key_of, known_runs, refresh, scores


def a_run(method, seed, score, *, share=0.0, options=(), values=""):
    return {
        "bed": "demo",
        "method": method,
        "values": values,
        "seed": seed,
        "share": share,
        "options": list(options),
        "score": score,
        "metric": "top1",
    }


RUNS = [
    *(a_run("alone", seed, 0.50 + 0.01 * seed) for seed in range(3)),
    *(a_run("kd", seed, 0.52 + 0.02 * seed) for seed in range(3)),
    a_run("kd", 0, 0.70, options=["--epochs=28"]),
    a_run("kd", 0, 0.40, share=0.2),
]


def test_runs_with_other_options_or_on_other_data_are_kept_apart():
    assert scores(RUNS, "demo", 0.0)["kd"] == pytest.approx({0: 52.0, 1: 54.0, 2: 56.0})
    assert scores(RUNS, "demo", 0.0, ["--epochs=28"]) == {"kd": pytest.approx({0: 70.0})}
    assert scores(RUNS, "demo", 0.2) == {"kd": pytest.approx({0: 40.0})}
    assert len({key_of(run) for run in RUNS}) == len(RUNS)


def test_a_preset_that_changed_begins_anew():
    changed = [*RUNS, a_run("kd", 1, 0.60, values="weight: 2")]
    assert scores(changed, "demo", 0.0)["kd"] == pytest.approx({1: 60.0})


def test_tables_are_written_below_their_comments_and_nowhere_else():
    comments = ["<!-- table demo -->", "<!-- table demo 0.2 -->", "<!-- table demo epochs=28 -->"]
    page = f"# Title\n{comments[0]}\n\n| old |\n| --- |\nText.\n\n{comments[1]}\n{comments[2]}\n"
    new = refresh(page, RUNS)
    first, second, third = new.split("<!-- table demo")[1:]
    assert "kd | 3 | 54.00 ± 2.00 | +3.00 (0.035) | - | - |" in " ".join(first.split())
    assert first.endswith("Text.\n\n")
    assert "old" not in new
    assert "40.00" in second
    assert "70.00" in third
    assert refresh(new, RUNS) == new
    with pytest.raises(ValueError, match="there is no run for <!-- table camvid -->"):
        refresh("<!-- table camvid -->\n", RUNS)


def test_a_line_that_was_broken_off_is_left_out(tmp_path):
    file = tmp_path / "runs.jsonl"
    file.write_text('{"seed": 0}\n{"seed": 1}\n{"see')
    assert known_runs(file) == [{"seed": 0}, {"seed": 1}]
    assert known_runs(tmp_path / "missing.jsonl") == []
