"""What was put in comes out, nothing half-written counts, and what is of something else is refused."""

import json
import os
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffkd.files.config import differences
from diffkd.teacher.cache import TeacherCache

SHAPES = {"layer4": (3, 2, 2), "output": (5,)}


def cache(folder, **options):
    return TeacherCache(folder, **({"identity": {"teacher": "a"}, "shapes": SHAPES, "samples": 7} | options))


def features(count, scale=1.0):
    return {name: scale * torch.randn(count, *shape) for name, shape in SHAPES.items()}


def test_what_was_put_in_comes_out(tmp_path):
    for storage in ("float16", "float32"):
        kept = cache(tmp_path / storage, storage=storage, views=2)
        first, second = features(3), features(2)
        kept.write(torch.tensor([4, 0, 6]), first, view=1)
        kept.write(torch.tensor([0, 1]), second, view=0)
        kept.commit()
        again = cache(tmp_path / storage, storage=storage, views=2)
        assert again.known(torch.arange(7), 1).tolist() == [True, False, False, False, True, False, True]
        assert again.known(torch.arange(7), 0).tolist() == [True, True] + [False] * 5
        read = again.read(torch.tensor([6, 4]), 1)
        for name, values in read.items():
            assert values.dtype == torch.float32
            dtype = getattr(torch, storage)
            assert torch.equal(values, first[name][[2, 0]].to(dtype).float())
        assert torch.equal(again.read(torch.tensor([0]), 0)["output"], second["output"][:1].to(dtype).float())


@given(st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=4, unique=True), max_size=6), st.integers(0, 6))
def test_only_what_was_committed_is_valid(tmp_path_factory, batches, committed):
    folder = tmp_path_factory.mktemp("cache") / "it"
    kept = cache(folder)
    for number, batch in enumerate(batches):
        if number == committed:
            kept.commit()
        kept.write(torch.tensor(batch), features(len(batch)))
    expected = {index for batch in batches[:committed] for index in batch} if committed < len(batches) else set()
    assert set(cache(folder).known(torch.arange(7)).nonzero().flatten().tolist()) == expected
    shutil.rmtree(folder)


def test_what_is_missing_is_no_feature(tmp_path):
    kept = cache(tmp_path / "it")
    with pytest.raises(KeyError, match="1 of these samples are not in"):
        kept.read(torch.tensor([3]))
    for wrong in (torch.tensor([7]), torch.tensor([-1])):
        with pytest.raises(ValueError, match="not all in 0 to 6"):
            kept.known(wrong)
    with pytest.raises(ValueError, match="no view 1"):
        kept.known(torch.tensor([0]), view=1)


def test_several_processes_and_runs_add_up(tmp_path):
    first, second = cache(tmp_path / "it"), cache(tmp_path / "it", rank=1, create=False)
    rival = cache(tmp_path / "it")
    given_ = features(3)
    first.write(torch.tensor([0]), {name: value[:1] for name, value in given_.items()})
    second.write(torch.tensor([1]), {name: value[1:2] for name, value in given_.items()})
    rival.write(torch.tensor([2]), {name: value[2:] for name, value in given_.items()})
    for one in (first, second, rival):
        one.commit()
    first.refresh()
    assert first.known(torch.arange(7)).sum() == 3
    assert torch.equal(first.read(torch.arange(3))["output"], given_["output"].half().float())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"identity": {"teacher": "b"}}, "teacher is 'a' there, 'b' here"),
        ({"identity": {"teacher": "a", "data": {"root": "x"}}}, "data is None there"),
        ({"samples": 8}, "samples is 7 there, 8 here"),
        ({"views": 2}, "views is 1 there, 2 here"),
        ({"storage": "float32"}, "storage is 'float16' there, 'float32' here"),
        ({"shapes": {"layer4": (3, 4, 4)}}, r"layer 'layer4' is \[3, 2, 2\] there, \[3, 4, 4\] here"),
        ({"shapes": {"layer3": (3, 2, 2)}}, "layer 'layer3' is not there, only layer4, output"),
    ],
)
def test_caches_of_something_else_are_refused(tmp_path, options, message):
    cache(tmp_path / "it").commit()
    with pytest.raises(ValueError, match=message):
        cache(tmp_path / "it", **options)


def test_fewer_layers_may_read_but_not_add(tmp_path):
    kept = cache(tmp_path / "it")
    given_ = features(2)
    kept.write(torch.arange(2), given_)
    kept.commit()
    part = cache(tmp_path / "it", shapes={"output": (5,)})
    assert torch.equal(part.read(torch.arange(2))["output"], given_["output"].half().float())
    part.write(torch.tensor([3]), features(1))
    part.commit()
    assert not cache(tmp_path / "it").known(torch.tensor([3])).any()


def test_features_that_do_not_fit(tmp_path):
    kept = cache(tmp_path / "it")
    with pytest.raises(ValueError, match=r"reaches .*float32"):
        kept.write(torch.arange(2), {name: value.abs() + 1 for name, value in features(2, 1e6).items()})
    for wrong in ({"layer4": torch.zeros(2, 3, 2, 3)}, {"layer4": torch.zeros(3, 3, 2, 2)}):
        with pytest.raises(ValueError, match="only be kept if all samples have one size"):
            kept.write(torch.arange(2), wrong)
    assert not kept.known(torch.arange(7)).any()


def test_a_full_disk_is_an_error_before_anything_is_lost(tmp_path, monkeypatch):
    with pytest.raises(OSError, match=r"takes [\d,.]+ GiB, .* GiB are free"):
        cache(tmp_path / "it", samples=10**15)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fail, raising=False)
    with pytest.raises(OSError, match="No space left"):
        cache(tmp_path / "it")
    assert list(tmp_path.iterdir()) == []


def test_failed_marks_leave_the_earlier_ones(tmp_path, monkeypatch):
    kept = cache(tmp_path / "it")
    kept.write(torch.tensor([0]), features(1))
    kept.commit()
    kept.write(torch.tensor([1]), features(1))

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space left"):
            kept.commit()
    assert cache(tmp_path / "it").known(torch.arange(2)).tolist() == [True, False]


def test_folders_that_are_no_cache(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds something else"):
        cache(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no teacher cache"):
        cache(tmp_path / "none", create=False)
    (tmp_path / "empty").mkdir()
    assert cache(tmp_path / "empty").size == 2 * 7 * (12 + 5)


def test_damage_is_found(tmp_path):
    kept = cache(tmp_path / "it")
    kept.write(torch.arange(7), features(7))
    kept.commit()
    marks = tmp_path / "it" / "valid-0.bin"
    whole = marks.read_bytes()
    marks.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="6 bytes instead of 7"):
        cache(tmp_path / "it")
    marks.write_bytes(whole)
    path = tmp_path / "it" / "layer-0.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match="was cut"):
        cache(tmp_path / "it")
    (tmp_path / "it" / "cache.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ValueError, match="another version"):
        cache(tmp_path / "it")


@pytest.mark.parametrize("options", [{"samples": 0}, {"views": 0}, {"shapes": {}}, {"storage": "int8"}])
def test_values_out_of_range(tmp_path, options):
    with pytest.raises(ValueError, match="got"):
        cache(tmp_path / "it", **options)


def test_differences_name_the_path():
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3, "d": 4}}) == [
        "a.c is 2 there, 3 here",
        "a.d is None there, 4 here",
    ]


def test_what_a_killed_process_was_creating_goes_after_an_hour(tmp_path):
    """Its space is allocated, and may be all that the next one needs."""
    old, new, other = (tmp_path / name for name in (".it.abcd1234", ".it.efgh5678", ".its.abcd1234"))
    for folder in (old, new, other):
        folder.mkdir()
        (folder / "layer-0.bin").write_bytes(bytes(100))
    for folder in (old, other):
        os.utime(folder, (0, 0))
    cache(tmp_path / "it")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".it.efgh5678", ".its.abcd1234", "it"]


@pytest.mark.parametrize("content", ["{", "[]", '{"layers": 3}', "[" * 100_000])
def test_a_damaged_description_is_named(tmp_path, content):
    cache(tmp_path / "it")
    (tmp_path / "it" / "cache.json").write_text(content)
    with pytest.raises(ValueError, match=r"cache\.json .*; delete .*it"):
        cache(tmp_path / "it")
