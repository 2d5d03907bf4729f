"""The documents: links lead somewhere, snippets run, the API reference is complete, and configuration files are valid."""

import csv
import importlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import lares_fast
from lares_fast.cli import main

ROOT = Path(__file__).parent.parent
# Folders of documents that belong to the repository.
FOLDERS = (".github", "benchmarks", "csrc", "docs", "examples", "tests")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
PUBLIC = ("lares_fast", "lares_fast.convert", "lares_fast.data", "lares_fast.ops", "lares_fast.reference", "lares_fast.train")


def anchors(page):
    """Return the anchors that GitHub and the site give to the headings of ``page``."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"(?m)^#+ (.*)$", text)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page):
    """Return the relative links of ``page`` that lead to no file or to no heading."""
    broken = []
    for link in LINK.findall(CODE.sub("", page.read_text())):
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        # The API pages have the anchors of public names; the strict build of the site checks these.
        generated = anchor.startswith("lares_fast.")
        if not target.exists() or (anchor and not generated and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_every_link_leads_somewhere(page):
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "there.md").write_text("# A heading, here\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](there.md) [b](gone.md) [c](there.md#a-heading-here) [d](there.md#no) [e](#top) `[f](code.md)`\n# Top\n"
    )
    assert broken_links(page) == ["gone.md", "there.md#no"]


def test_pages_of_the_site_link_to_nothing_outside_of_it():
    for page in (ROOT / "docs").rglob("*.md"):
        for link in LINK.findall(CODE.sub("", page.read_text())):
            if not link.startswith("http"):
                assert (page.parent / link.partition("#")[0]).resolve().is_relative_to(ROOT / "docs"), f"{page}: {link}"


# The API reference


def part(name):
    """Import ``docs/_site/<name>.py``, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "_site" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_public_name_is_in_the_reference():
    pages = part("pages")
    markdown = "\n".join(pages.on_page_markdown(page.read_text()) for page in (ROOT / "docs" / "api").glob("*.md"))
    for name in PUBLIC:
        module = importlib.import_module(name)
        public = pages.public_names(module)
        assert public, f"{name} has no public name"
        for each in public:
            assert f'<a id="{name}.{each}"></a>' in markdown, f"{name}.{each} is on no page"
    assert set(lares_fast.__all__) - {"__version__"} == {
        *pages.public_names(lares_fast),
        *(name.partition(".")[2] for name in PUBLIC[1:]),
    }


def test_a_public_name_is_shown_by_its_definition():
    entries = part("pages").entries("lares_fast.ops")
    # The function topk, and not the module of this name.
    assert "::: lares_fast.ops.topk.topk\n    options:\n      heading: topk\n" in entries


def test_docstrings_become_markdown():
    pytest.importorskip("griffe")
    text = (
        "Read it.\n\n``path``\n    A file, or\n    nothing.\n``size, seed``\n    As in :func:`~lares_fast.load`.\n\n"
        ">>> load(1)  # doctest: +SKIP\n2\n\nThe end."
    )
    markdown = part("docstrings").to_markdown(text)
    assert (
        "``path``\n:   A file, or\n    nothing.\n" in markdown and "``size, seed``\n:   As in `lares_fast.load`.\n" in markdown
    )
    assert markdown.endswith("```pycon\n>>> load(1)\n2\n```\n\nThe end.")


# Snippets


def snippets(name):
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / name).read_text(), re.DOTALL)


def test_the_snippet_of_the_quick_start_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = snippets("quickstart.md")
    exec(code.replace("n_users=400", "n_users=60").replace("epochs=2", "epochs=1"), {})
    assert len(re.findall(r"brand\d\d-type\d\d", capsys.readouterr().out)) == 5


def test_the_snippets_of_the_training_loop_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {}
    for code in snippets("training-loop.md"):
        exec(code.replace("n_users=400", "n_users=60"), names)
    assert "ndcg@10" in capsys.readouterr().out
    assert len(names["answer"].ids[0]) == 10 and names["again"].config == names["model"].config
    assert names["loss"].rewards.shape == (4, len(names["batch"])) and names["ids"].shape == (2, 10)


def test_the_snippets_of_the_tutorial_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    log, serve, application, worker = snippets("tutorial.md")
    exec(log.replace("n_users=1000", "n_users=60"), {})
    settings = re.search(r"```yaml\n(.*?)```", (ROOT / "docs" / "tutorial.md").read_text(), re.DOTALL)[1]
    Path("movies.yaml").write_text(settings.replace("epochs: 5", "epochs: 1"))
    commands = re.findall(
        r"(?m)^\$? ?(lares-fast (?:train --config|recommend) .*)$", (ROOT / "docs" / "tutorial.md").read_text()
    )
    assert len(commands) == 4
    for command in commands:
        assert main(command.split()[1:]) == 0, command
    assert Path("recs.parquet").is_file()
    capsys.readouterr()
    exec(serve, {})
    assert capsys.readouterr().out.startswith("[['")
    before, names = torch.get_num_threads(), {}
    try:
        exec(application, names)
        assert torch.get_num_threads() == 1 and names["recommender"].item_ids
        exec(worker, names)
        names["post_fork"](None, None)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# Numbers


def committed_ranges():
    """Return the (median, lowest, highest) of every committed ratio and share of the peak."""
    ranges, shares = [], {}
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.csv")):
        for row in csv.DictReader(path.read_text().splitlines()):
            if "ratio_median" in row:
                ranges.append(tuple(float(row[f"ratio_{name}"]) for name in ("median", "min", "max")))
            elif row["name"].startswith("% of FMA peak, "):
                share = shares.setdefault((row["group"], row["shape"], row["commit"], row["machine"]), {})
                share[row["name"].split(", ")[1]] = float(row["value"])
    return ranges + [(share["median"], share["min"], share["max"]) for share in shares.values()]


def test_every_range_on_the_performance_page_is_a_committed_row():
    committed = committed_ranges()
    found = re.findall(r"(\d*\.?\d+) \((\d*\.?\d+) to (\d*\.?\d+)\)", (ROOT / "docs" / "performance.md").read_text())
    assert len(found) > 30
    for shown in found:
        # A number may be off by half a unit of its last digit.
        slack = [0.501 * 10 ** -len(text.partition(".")[2]) for text in shown]
        near = [all(abs(float(s) - x) <= d for s, x, d in zip(shown, row, slack, strict=True)) for row in committed]
        assert any(near), f"no committed row has {' '.join(shown)}"


def test_the_speed_table_of_the_readme_is_that_of_the_performance_page():
    exact = {float(text) for text in re.findall(r"\d+\.\d+", (ROOT / "docs" / "performance.md").read_text())}
    rows = re.findall(r"(?m)^\| (?:training|encode|exact|\| ).*$", (ROOT / "README.md").read_text())
    shown = [text for row in rows for text in re.findall(r"(?<![\d.])\d+\.\d(?!\d)", row.partition("|")[2].partition("|")[2])]
    assert len(shown) == 18
    for text in shown:
        assert any(abs(float(text) - value) <= 0.0501 for value in exact), f"{text} is not on the performance page"


# Configuration files


def read(name):
    return yaml.safe_load((ROOT / name).read_text())


@pytest.mark.parametrize("name", ["ci", "wheels"])
def test_a_workflow_is_valid(name):
    workflow = read(f".github/workflows/{name}.yml")
    # YAML 1.1 reads the key "on" as true.
    assert workflow["name"] == name and workflow[True] and workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["runs-on"] and all(("uses" in step) != ("run" in step) for step in job["steps"])


def test_the_workflow_runs_both_lanes():
    jobs = read(".github/workflows/ci.yml")["jobs"]
    commands = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in jobs.items()}
    assert commands == {"quick": ['bash .ci/run quick "origin/${BASE}"'], "everything": ["bash .ci/run"]}
    assert (ROOT / ".ci" / "run").is_file()


FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config")


@pytest.mark.parametrize("path", FORMS, ids=[path.stem for path in FORMS])
def test_an_issue_form_is_valid(path):
    form = yaml.safe_load(path.read_text())
    assert form["name"] and form["description"] and form["body"]
    identifiers = [field["id"] for field in form["body"]]
    assert len(set(identifiers)) == len(identifiers)
    for field in form["body"]:
        assert field["type"] in ("checkboxes", "dropdown", "input", "textarea") and field["attributes"]["label"]
    if path.stem != "idea":
        (doctor,) = [field for field in form["body"] if field["id"] == "doctor"]
        assert "lares-fast doctor --json" in doctor["attributes"]["label"] and doctor["validations"]["required"]


def test_what_the_forms_ask_for_exists():
    command = [sys.executable, "-P", "-m", "lares_fast", "doctor", "--json"]
    assert json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_hooks_before_a_commit_are_valid():
    hooks = {hook["id"]: hook for repository in read(".pre-commit-config.yaml")["repos"] for hook in repository["hooks"]}
    for name in ("ruff", "ruff-format", "mypy"):
        assert hooks[name]["language"] == "system" and hooks[name]["entry"].split()[0] == name.split("-")[0]


def test_the_citation_is_valid():
    citation = read("CITATION.cff")
    assert citation["cff-version"] == "1.2.0" and citation["title"] and citation["message"] and citation["authors"]
    assert citation["license"] == "Apache-2.0"
    assert citation.get("version", lares_fast.__version__) == lares_fast.__version__


def test_the_site_needs_no_network():
    settings = read("mkdocs.yml")
    assert settings["theme"]["font"] is False
    # The plug-in "offline" makes pages load a script from a server.
    assert [plugin if isinstance(plugin, str) else next(iter(plugin)) for plugin in settings["plugins"]] == [
        "search",
        "mkdocstrings",
    ]


@pytest.mark.skipif(not shutil.which("mkdocs"), reason="mkdocs is not installed")
def test_the_site_builds_without_warnings(tmp_path):
    command = ["mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        assert not re.search(r"<(?:script|link|img)[^>]*(?:src|href)=.?https?:", page.read_text()), (
            f"{page.name} loads from a server"
        )
