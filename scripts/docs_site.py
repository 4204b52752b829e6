"""The documentation site, for mkdocs: which files of the repository it shows, and how docstrings read there.

A hook of mkdocs (:func:`on_files`, :func:`on_page_markdown`, :func:`on_post_page`) and an extension of griffe
(:class:`Docstrings`), both named in mkdocs.yml. All pages keep their place in the repository, so that the same links
work in a checkout and on the site.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

SHOWN = (
    "*.md",
    "docs/**/*",
    "results/*.md",
    "results/*/*[!d]",
    "benchmarks/*.md",
    "benchmarks/results/*",
    "examples/*.*",
)
_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s:#]+)(?:#[^)\s]*)?\)")
_ROLE = re.compile(r":(?:class|func|meth|attr|mod):`~?([\w.]+)`")
_DOCTEST = re.compile(r"(?:^(?P<indent> *)>>> .*\n?(?:^(?P=indent)\S.*\n?)*)+", re.MULTILINE)
# What a browser fetches by itself: no page may name another host there.
_FETCHED = re.compile(
    r"""<(?:script|img|iframe|source|video)[^>]*\ssrc=["']?(?:https?:)?//[^\s"'>]*"""
    r"""|<link(?=[^>]*rel=["']?(?:stylesheet|preconnect|preload|icon))[^>]*href=["']?(?:https?:)?//[^\s"'>]*"""
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Take the pages, pictures and examples at their places in the repository."""
    root = Path(config.config_file_path).parent
    shown = sorted({path for pattern in SHOWN for path in root.glob(pattern) if path.is_file()})
    kept = [one for one in files if one.src_dir != config.docs_dir]
    mine = [File.generated(config, path.relative_to(root).as_posix(), abs_src_path=str(path)) for path in shown]
    return Files([*kept, *mine])


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leave the text alone of links to files that are in the repository but not on the site."""
    root, folder = Path(config.config_file_path).parent, posixpath.dirname(page.file.src_uri)

    def kept(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, link[2]))
        missing = files.get_file_from_path(target) is None and (root / target).exists()
        return link[1] if missing else link[0]

    return _LINK.sub(kept, markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Check that reading the page asks no other host for anything.

    Raises:
        PluginError: if it would.
    """
    if found := _FETCHED.search(output):
        raise PluginError(f"{page.file.src_uri} would fetch from elsewhere: {found[0]}")
    return output


class Docstrings(griffe.Extension):
    """Show the docstrings' references as links, and their examples as code."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            text = _ROLE.sub(_reference, obj.docstring.value)
            obj.docstring.value = _DOCTEST.sub(_fenced, text)


def _reference(role: re.Match[str]) -> str:
    name = role[1] if "." in role[1] else f"diffkd.{role[1]}"
    return f'<autoref identifier="{name}" optional><code>{role[1].rpartition(".")[2]}</code></autoref>'


def _fenced(example: re.Match[str]) -> str:
    indent = example["indent"]
    return f"{indent}```pycon\n{example[0].rstrip()}\n{indent}```\n"
