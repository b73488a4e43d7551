"""The documents list all that is public, and quote the figures that were measured."""

import importlib.util
import inspect
import json
import pkgutil
import re
from pathlib import Path

import pytest

import lrjax

from .test_names import PUBLIC


ROOT = Path(lrjax.__file__).parents[1]
DOCS = ROOT / "docs"
ROOMS = [m.name for m in pkgutil.iter_modules(lrjax.__path__) if not m.name.startswith("_")]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages():
    return load(DOCS / "_generate.py").pages()


@pytest.fixture(scope="module")
def tables():
    return load(ROOT / "benchmarks" / "_tables.py")


@pytest.fixture(scope="module")
def benchmarks(tables):
    return tables.page()


@pytest.mark.parametrize("room", ROOMS)
def test_every_public_name_is_listed(room, pages):
    text = "\n".join(page for name, page in pages.items() if name.startswith("rooms/"))
    listed = set(re.findall(r"^\.\. (?:autofunction|autoclass)::\s+(\S+)", text, re.M))
    documented = [eval(path, {"lrjax": lrjax}) for path in listed]
    for name, value in vars(importlib.import_module(f"lrjax.{room}")).items():
        ours = getattr(value, "__module__", "").startswith("lrjax")
        if ours and not name.startswith("_") and not inspect.ismodule(value):
            assert any(value is other for other in documented), f"lrjax.{room}.{name}"


def test_every_recipe_and_its_source_is_in_the_table_of_methods(pages):
    rows = pages["_methods.md"].splitlines()[2:]
    recipes = {n for n, f in vars(lrjax.recipes).items() if inspect.isfunction(f)}
    assert {re.match(r"\| `(\w+)`", row)[1] for row in rows} == recipes
    for row in rows:
        *_, what, source, _ = re.split(r"(?<!\\)\|", row)
        assert what.strip(), row
        assert source.strip(), row


def test_every_notebook_is_shown(pages):
    for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"):
        assert pages[f"notebooks/{path.name}"] == path.read_text()
        assert path.name in pages["_notebooks.md"]


def test_the_tasks_name_what_exists():
    for name in re.findall(r"`([\w.]+)`", (DOCS / "tasks.md").read_text()):
        value = lrjax
        for part in name.split("."):
            assert hasattr(value, part), name
            value = getattr(value, part)


def test_the_figures_page_is_that_of_the_results(benchmarks, tables):
    assert tables.PAGE.read_text() == benchmarks, "run: python benchmarks/run.py --table"


def test_quoted_figures_are_those_of_the_results(tables):
    for path in tables.quoting():
        text = path.read_text()
        assert text == tables.refreshed(text), (
            f"{path.name}: python benchmarks/run.py --table"
        )
    assert len(tables.QUOTE.findall((ROOT / "README.md").read_text())) >= 6


def test_a_quoted_figure_that_no_benchmark_claims_is_refused(tables):
    with pytest.raises(KeyError, match="has no claim 'nothing'"):
        tables.refreshed("<!-- gram_cost: nothing -->1<!-- / -->")


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_missed_bound_is_shown_and_explained(path, benchmarks, tables):
    missed = [b["claim"] for b in json.loads(path.read_text())["bounds"] if not b["ok"]]
    section = benchmarks.split(f"## {path.stem}\n")[1].split("\n## ")[0]
    assert section.count("**missed**") == len(missed)
    assert not missed or f"`{path.stem}`" in tables.MISSES.read_text()


# A paper: authors, "title" (year), and where it can be found.
PAPER = re.compile(
    r'(?P<authors>\w[\w.\-’]*\.? [^";:]*?), "(?P<title>[^"]+)"(?:, chapter \d+)? '
    r"\((?P<year>\d{4})\), (?P<where>arXiv[ :](?:\d{4}\.\d{4,5}|[a-z-]+/\d{7})|[A-Za-z])"
)
# What comes from code, not from a paper.
FROM_CODE = {"OrthogonalStart", "TokenRows", "on_mesh", "orthogonal_init"}


def reference(value) -> str:
    """The Reference section of a docstring in one line, without code."""
    section = re.search(
        r"^Reference:\n((?:    .*\n?|\n)+)", inspect.getdoc(value) or "", re.M
    )
    return re.sub(r"``.*?``", "", " ".join(section[1].split())) if section else ""


def unnamed_papers(text: str) -> list[str]:
    """What a reference says of papers without their authors, title, year and place."""
    papers = list(PAPER.finditer(text))
    rest = PAPER.sub("", text)
    nicknames = [m["title"] for m in papers if len(re.findall(r"\w+", m["title"])) < 3]
    return nicknames + re.findall(
        r'\d{4}\.\d{4,5}|"[^"]+" \(|(?<!repository) \(\d{4}\)', rest
    )


def test_references_name_the_paper():
    named = {name: reference(value) for name, value in PUBLIC.items()}
    named = {name: text for name, text in named.items() if text}
    assert len(named) > 200
    short = {name: bad for name, text in named.items() if (bad := unnamed_papers(text))}
    assert not short, f'say: authors, "title" (year), arXiv number or venue: {short}'
    nothing = {
        name.split(".")[-1] for name, text in named.items() if not PAPER.search(text)
    }
    assert nothing == FROM_CODE


@pytest.mark.parametrize(
    "text",
    [
        'A. Author, "Nick" (2020), arXiv 2001.00001.',
        "A. Author (2020), arXiv 2001.00001.",
        '"A title of a paper" (2020), arXiv 2001.00001.',
        'A. Author, "A title of a paper", arXiv 2001.00001.',
        'A. Author, "A title of a paper" (2020).',
    ],
)
def test_a_reference_that_leaves_something_out_is_found(text):
    assert unnamed_papers(text)
