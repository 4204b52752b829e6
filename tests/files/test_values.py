"""Files of values that are damaged, or that a few lines make huge."""

import itertools

import pytest

from diffkd.files.values import TooLargeError, read_json_file, read_yaml, read_yaml_file

LETTERS = "abcdefghij"
ALIASES = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "\n".join(
    f"{b}: &{b} [{','.join(['*' + a] * 9)}]" for a, b in itertools.pairwise(LETTERS)
)


def test_what_stands_for_too_many_values_is_refused_before_anybody_walks_through_it(tmp_path):
    with pytest.raises(TooLargeError, match="aliases stand for more than 100,000"):
        read_yaml(ALIASES)
    (tmp_path / "recipe.yaml").write_text(ALIASES)
    with pytest.raises(TooLargeError, match=r"recipe\.yaml cannot be read as YAML"):
        read_yaml_file(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "a: [",
        "a: !evil 1",
        "a: !!python/name:os.system",
        "a: 9999-99-99",
        "\0",
        "a: b\n c: d: e",
        "[" * 5000,
        "{a: " * 5000,
    ],
)
def test_no_yaml_is_a_value_error(text):
    with pytest.raises(ValueError, match=r".") as error:
        read_yaml(text)
    assert type(error.value) is ValueError
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["epochs: 3\nlr: 1\nepochs: 4", "a: {b: 1, b: 2}", "- {1: a, 1: b}"])
def test_a_key_that_is_there_twice_is_refused(text):
    """Of which the last would be taken without a word."""
    with pytest.raises(ValueError, match=r"it holds '(epochs|b|1)' twice, the second time in line \d"):
        read_yaml(text)


def test_usual_values_are_read_with_their_aliases_and_merges():
    base = "base: &base {lr: 0.1, steps: [1, 2]}\nmine: {<<: *base, lr: 0.2}\nsame: *base"
    assert read_yaml(base) == {
        "base": {"lr": 0.1, "steps": [1, 2]},
        "mine": {"lr": 0.2, "steps": [1, 2]},
        "same": {"lr": 0.1, "steps": [1, 2]},
    }
    nested = "base: &base {lr: 1}\ndeep: {mine: &mine {<<: *base, lr: 2}}\nlast: {<<: *mine}"
    assert read_yaml(nested)["last"] == read_yaml(nested)["deep"]["mine"] == {"lr": 2}
    assert read_yaml("a: &a [*a]")["a"]  # a list that holds itself counts once
    assert len(read_yaml(f"names: [{','.join(map(str, range(30_000)))}]")["names"]) == 30_000


@pytest.mark.parametrize("content", [b"[" * 1_000_000, b'{"a":' * 1_000_000, b"{", b"\xff", b""])
def test_damaged_json_names_the_file(tmp_path, content):
    path = tmp_path / "result.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"result\.json is no JSON") as error:
        read_json_file(path)
    assert type(error.value) in (ValueError, TooLargeError)
