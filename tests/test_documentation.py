"""The commands in the documentation are ones that the command line understands: verbs, options, recipes and methods."""

import dataclasses
import inspect
import re
import shlex
from pathlib import Path

import pytest

from diffkd.commands import cli
from diffkd.commands.compare import find_method
from diffkd.recipes import recipe_names
from diffkd.training.options import FitOptions

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *ROOT.glob("results/*.md"),
]
ALWAYS = {"help", "trust", "traceback"}


def commands(page):
    """Return the commands in the indented blocks of a page, each a list of words without environment and comment."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.findall(r"^ {4}(?:pip install uv && )?(?:[A-Z]+=\S+ )?(?:uv run )?diffkd ([a-z].*)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in found]


ALL = [(page.relative_to(ROOT).as_posix(), words) for page in PAGES for words in commands(page)]


@pytest.fixture
def taken(monkeypatch):
    """Return the names of the options that a command takes."""

    def options(verb):
        seen = []
        monkeypatch.setattr(cli, "call", lambda function, *rest, **others: seen.append(function))
        monkeypatch.setattr(cli, "fit_with", lambda words, **others: seen.append(FitOptions))
        cli._commands()[verb](["--help"])
        if seen[0] is FitOptions:
            return {field.name for field in dataclasses.fields(FitOptions)} | {"data", "config", "print_config"}
        return set(inspect.signature(seen[0]).parameters)

    return options


@pytest.mark.parametrize(("page", "words"), ALL, ids=[f"{page}-{' '.join(words)[:60]}" for page, words in ALL])
def test_a_command_of_the_documentation_is_understood(page, words, taken):
    verb, split = words[0], words.index("--") if "--" in words else len(words)
    for own, some in ((taken(verb), words[1:split]), (taken("fit"), words[split + 1 :])):
        given = {re.split(r"[.=]", word.removeprefix("--"))[0] for word in some if word.startswith("--")}
        assert given <= own | ALWAYS, f"{page}: diffkd {verb} has no {given - own}"
    if verb in ("fit", "compare", "tune"):
        recipe = words[1]
        plain = re.fullmatch(r"[a-z0-9_]+(/[\w-]+)*", recipe) and not recipe.startswith(("runs/", "results/"))
        assert not plain or recipe in recipe_names(), recipe
    if verb == "compare" and "--methods" in words:
        first = words.index("--methods") + 1
        last = next((i for i, word in enumerate(words[first:], first) if word.startswith("-")), len(words))
        known = words[1] if words[1] in recipe_names() else None
        for method in words[first:last]:
            assert (ROOT / method).is_file() or find_method(method, known).is_file()


def test_there_are_commands():
    assert len(ALL) > 60
    assert {words[0] for _, words in ALL} >= {"demo", "fit", "test", "compare", "tune", "plot", "export", "layers"}
