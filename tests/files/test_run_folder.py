"""When a folder may be used for a run."""

import json

import pytest

from diffkd.files.run_folder import RunFolder, changed_values, to_yaml_values

CONFIG = {"student": "cifar/resnet20", "epochs": 3, "optimizer": {"class_path": "SGD", "init_args": {"lr": 0.1}}}


@pytest.fixture
def run(tmp_path):
    """A run that has got as far as a checkpoint."""
    folder = RunFolder(tmp_path / "run")
    folder.start(CONFIG)
    folder.checkpoint.parent.mkdir()
    folder.checkpoint.write_bytes(b"")
    return folder


def test_a_new_folder_may_be_used(tmp_path):
    assert RunFolder(tmp_path / "new").check(CONFIG, resume=False) is None
    assert RunFolder(tmp_path).check(CONFIG, resume=False) is None
    assert not (tmp_path / "new").exists()  # looking changes nothing


def test_a_run_is_not_overwritten(run):
    with pytest.raises(FileExistsError, match="--resume"):
        run.check(CONFIG, resume=False)


def test_a_run_is_resumed_with_the_same_values_only(run):
    assert run.check(CONFIG, resume=True) is None
    changed = {**CONFIG, "epochs": 4, "optimizer": {"class_path": "SGD", "init_args": {"lr": 0.2}}}
    with pytest.raises(
        ValueError, match=r"epochs is 3 there, 4 here; optimizer\.lr is 0\.1 there, 0\.2 here.*--student_weights"
    ):
        run.check(changed, resume=True)


def test_what_does_not_change_the_training_may_differ(run):
    assert run.check({**CONFIG, "devices": 2, "log_every": 7, "out": "elsewhere", "resume": True}, resume=True) is None


def test_how_the_data_are_read_may_differ():
    def config(name="diffkd.data.ImageFolder", **options):
        return {"data": {"class_path": name, "init_args": {"root": "a", "batch_size": 8, **options}}}

    read = {"num_workers": 2, "verify": True, "cache": "memory", "val_batch_size": 1}
    assert changed_values(config(num_workers=8), config(**read)) == []
    assert changed_values(config(**read), config()) == []
    assert changed_values({"data": {"class_path": "diffkd.data.FashionSubset"}}, config()) != []
    bare = {"data": {"class_path": "diffkd.data.FashionSubset", "init_args": {}}}
    assert changed_values({"data": {"class_path": "diffkd.data.FashionSubset"}}, bare) == []
    assert changed_values(config(), config(root="b")) == ["data.root is 'a' there, 'b' here"]
    assert changed_values(config(), config(batch_size=4)) == ["data.batch_size is 8 there, 4 here"]
    own = config("mine.Data", num_workers=8), config("mine.Data", num_workers=2)
    assert changed_values(*own) == ["data.num_workers is 8 there, 2 here"]


def test_a_finished_run_returns_its_result(run):
    row = {"epoch": 1, "top1": 0.5}
    result = {"score": "top1", "last": row, "best": row}
    run.finish(result)
    assert run.check(CONFIG, resume=True) == result
    assert json.loads(run.result.read_text()) == result


def test_somebodys_files_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    for resume in (False, True):
        with pytest.raises(FileExistsError, match="holds no run"):
            RunFolder(tmp_path).check(CONFIG, resume=resume)


def test_a_run_that_never_saved_anything_is_no_obstacle(tmp_path):
    folder = RunFolder(tmp_path)
    folder.start(CONFIG)
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "events").write_text("")
    assert folder.check({**CONFIG, "epochs": 5}, resume=False) is None


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file"):
        RunFolder(tmp_path / "file").check(CONFIG, resume=False)


def test_differences_by_value_not_by_type():
    assert changed_values({"milestones": [1, 2]}, {"milestones": (1, 2)}) == []
    assert changed_values({}, {"ema": None}) == []
    assert changed_values({"data": {"init_args": {"root": "a"}}}, {"data": {"init_args": {"root": "b"}}}) == [
        "data.root is 'a' there, 'b' here"
    ]
    assert changed_values({"method": "KD"}, {}) == ["method is 'KD' there, None here"]


def test_plain_values_survive_yaml(tmp_path):
    assert to_yaml_values({"a": (1, tmp_path), 2: None}) == {"a": [1, str(tmp_path)], "2": None}


def test_a_switch_that_an_older_run_does_not_know_is_off_there():
    old = {"pairs": [{"student": "a", "ramp": {"warmup": 1.0}}], "epochs": 3}
    new = {"pairs": [{"student": "a", "ramp": {"warmup": 1.0, "by_epoch": False}}], "epochs": 3, "inherit": False}
    assert changed_values(old, new) == []
    new["pairs"][0]["ramp"]["by_epoch"] = True
    assert "by_epoch" in changed_values(old, new)[0]


def test_an_option_that_came_later_had_its_default():
    def run(**options):
        return {"pairs": [{"student": "x", "method": {"class_path": "diffkd.FitNet", "init_args": options}}]}

    old = run(weight=2.0)
    assert changed_values(old, run(weight=2.0, standardize=False)) == []
    assert changed_values(old, run(weight=2.0, standardize=True)) != []
    assert changed_values(old, run(weight=1.0, standardize=False)) != []
    method = {"method": run(weight=2.0)["pairs"][0]["method"]}
    later = {"method": {"class_path": "diffkd.FitNet", "init_args": {"weight": 2.0, "standardize": True}}}
    assert changed_values(method, later) == ["method.standardize is None there, True here"]
    assert changed_values(
        {"data": {"class_path": "no.Such", "init_args": {}}}, {"data": {"class_path": "no.Such"}}
    ) == ["data.init_args is {} there, None here"]


def test_files_that_were_half_written_when_a_run_was_killed_are_no_obstacle_and_go(tmp_path):
    folder = RunFolder(tmp_path)
    partial = [tmp_path / ".config.yaml.abcd1234.partial", tmp_path / "checkpoints" / ".last.ckpt.abcd1234.partial"]
    folder.checkpoint.parent.mkdir()
    for path in partial:
        path.write_text("")
    assert folder.check(CONFIG, resume=False) is None
    folder.start(CONFIG)
    assert not any(path.exists() for path in partial)


NAN = '{"score": "top1", "last": {"epoch": NaN, "top1": 0.5}, "best": {"epoch": 1, "top1": 0.5}}'


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"score": "top1", "last": {}, "best": {}}', '{"score": 1}', '{"score": []}', NAN],
)
def test_a_damaged_result_is_named(run, content):
    run.result.write_text(content)
    with pytest.raises(ValueError, match=r"result\.json is no"):
        run.check(CONFIG, resume=True)


@pytest.mark.parametrize("content", ["[", "- 1", "a: &a [*a, *a"])
def test_a_damaged_config_is_named(run, content):
    run.config.write_text(content)
    with pytest.raises(ValueError, match=r"config\.yaml"):
        run.check(CONFIG, resume=True)
