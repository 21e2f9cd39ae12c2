"""README and docs/: figures are those of the results, public names have entries and examples, code and links work."""

import doctest
import functools
import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from names import HOMES, PEFT

import torch_subspace as ts

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "bench"))
import overview  # noqa: E402
import readme  # noqa: E402

GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*GUIDES, *sorted((ROOT / ".github").rglob("*.md"))]
PUBLIC = [f"{home}.{name}" for home, names in HOMES.items() for name in names]


def relative(path):
    return str(path.relative_to(ROOT))


# ------------------------------------------------------------------------------------------------------ figures


@pytest.mark.parametrize("path", readme.PAGES)
def test_tables_are_those_of_the_results(path):
    assert readme.page(path) == (ROOT / path).read_text(), f"run {relative(Path(readme.__file__))}"


def test_the_long_table_has_every_op():
    measured = {path.stem for path in (ROOT / "tests/bench/results").glob("*.json")} - {
        "class_parallel", "growth", "overhead", "scaling", "threads"}
    assert set(readme.SHOWN) == {name for name in measured if not name.endswith("_cuda")}


def test_picture_is_that_of_the_results():
    from PIL import Image

    with Image.open(ROOT / "docs/overview.png") as picture:
        assert json.loads(picture.text["Description"]) == overview.facts(), "run tests/bench/overview.py"


@pytest.mark.parametrize("path", GUIDES, ids=relative)
def test_no_figure_is_written_by_hand(path):
    prose = re.sub(r"<!-- (\w+) -->.*<!-- /\1 -->|```.*?```|`[^`]*`", "", path.read_text(), flags=re.S)
    found = re.findall(r"\d[\d.,]* ?(?:%|ms\b|µs\b|[MG]i?B\b|[GT]B/s|[GT]FLOP)", prose)
    assert not found, "measured figures stand between markers, where tests/bench/readme.py writes them"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def test_citation_is_of_this_version():
    assert f"\nversion: {ts.__version__}\n" in (ROOT / "CITATION.cff").read_text()


# ------------------------------------------------------------------------------------------------ names and examples


def entries():
    """All names with an entry in the reference."""
    found = []
    for page in (ROOT / "docs/api").glob("*.rst"):
        text = page.read_text()
        module = re.search(r"^\.\. currentmodule:: (\S+)$", text, flags=re.M)[1]
        names = re.findall(r"^\.\. auto(?:class|function):: (\S+)$", text, flags=re.M)
        found += [name if name.startswith("torch_subspace.") else f"{module}.{name}" for name in names]
    return found


def test_reference_lists_what_is_public():
    found = entries()
    assert len(found) == len(set(found))
    assert not set(found) - set(PUBLIC), "no public names"


@pytest.mark.parametrize("name", PUBLIC)
def test_name_has_an_entry(name):
    assert name in entries(), f"{name} is on no page of docs/api"


@pytest.mark.parametrize("name", PUBLIC)
def test_example(name, monkeypatch, tmp_path):
    if name.startswith(f"{PEFT}."):
        pytest.importorskip(PEFT, exc_type=ImportError)
    importlib.import_module("torch_subspace.metrics")  # an attribute of the package from then on
    public = functools.reduce(getattr, name.split(".")[1:], ts)
    examples = doctest.DocTestFinder(recurse=False).find(public, name, extraglobs={"torch": torch, "ts": ts})
    assert any(test.examples for test in examples), f"{name}: no example in its docstring"
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    torch.manual_seed(0)
    said = []
    for test in examples:
        doctest.DocTestRunner().run(test, out=said.append)
    assert not said, "".join(said)


# ------------------------------------------------------------------------------------------------------ code and links


@pytest.mark.parametrize("path", [p for p in GUIDES if "```python" in p.read_text()], ids=relative)
def test_code_of_a_page_runs(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    quick = functools.partial(ts.ManifoldClustering, init_epochs=1, epochs=1)
    monkeypatch.setattr(ts, "ManifoldClustering", quick, raising=False)
    torch.manual_seed(0)
    namespace = {}
    for block in re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.S):
        exec(compile(block, relative(path), "exec"), namespace)


@pytest.mark.parametrize("path", PAGES, ids=relative)
def test_links_lead_to_files(path):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text())
    missing = [link for link in links if not (path.parent / link).exists()]
    assert not missing
