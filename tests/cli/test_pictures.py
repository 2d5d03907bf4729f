"""The results sheet and the page of a run."""

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from lares_fast.cli.plots import sheet, step_values
from lares_fast.cli.report_page import page
from lares_fast.train.checkpoint import load_state

METRICS = {"recall@10": 0.2, "ndcg@10": 0.1, "mrr@10": 0.05}


def texts(svg):
    """Return the text of every comment: matplotlib draws letters as shapes, and has the text in a comment before them."""
    parser = ET.XMLParser(target=ET.TreeBuilder(insert_comments=True))
    root = ET.fromstring(svg, parser)
    return [node.text.strip() for node in root.iter() if node.tag is ET.Comment]


def row(phase, split, history="not masked", **more):
    return {"phase": phase, "split": split, "history": history, **METRICS, **more}


@pytest.fixture(scope="module")
def steps():
    return {"spt": {"number": [1.0, 2.0], "loss": [3.0, 2.5]}, "rpt": {"number": [1.0], "reward": [0.5], "kl": [0.1]}}


def test_the_sheet_of_a_run(trained):
    history, values = load_state(trained / "state.pt")["history"], step_values(trained)
    svg = sheet(history, values, "a log, seed 1")
    found = texts(svg)
    for text in ("a log, seed 1", "epoch", "NDCG@10", "baseline popularity", "baseline markov", "milliseconds", "reward"):
        assert text in found, text
    assert "phase 2, history masked" in found and "recall@10" not in found
    # The same numbers give the same file, at any time.
    assert svg == sheet(history, values, "a log, seed 1") and "dc:date" not in svg


def test_a_sheet_without_a_second_phase_has_no_panel_for_it(steps):
    found = texts(sheet([], {"spt": steps["spt"]}, "new"))
    assert found.count("no data yet") == 3 and not any("Phase 2" in text for text in found)
    assert sum("Phase 2" in text for text in texts(sheet([], steps, "new"))) == 2


def test_one_epoch_has_whole_ticks(steps):
    history = [row("spt", "valid", epoch=1), row("spt", "test", epoch=1, test_T=2, ms_per_user=0.5)]
    found = texts(sheet(history, steps, "short"))
    assert not [text for text in found if text.startswith(("0.9", "1.0", "1.5"))]


@pytest.mark.parametrize("title", ["$x_1$ costs $5", "<b> & 'quotes'", "日本語\x00\n"])
def test_any_title_is_drawn(title):
    ET.fromstring(sheet([], {}, title))
    text = page(title, [title], "<svg></svg>", [], (10,), "", "name: <i>\n")
    assert "<b>" not in text and "<i>" not in text and "\x00" not in text


def test_settings_of_matplotlib_are_not_used(steps):
    import matplotlib

    with matplotlib.rc_context({"text.usetex": True, "svg.fonttype": "none", "axes.titlesize": 50}):
        other = sheet([], steps, "plain")
        assert matplotlib.rcParams["text.usetex"]
    assert other == sheet([], steps, "plain")


def test_steps_are_averaged_and_damage_is_left_out(tmp_path):
    lines = ["number,loss", *(f"{number},{number / 10}" for number in range(1, 401)), "401,x", "402"]
    (tmp_path / "steps-spt.csv").write_text("\n".join(lines))
    (tmp_path / "steps-rpt.csv").write_bytes(b"\xff\xfe\x00")
    values = step_values(tmp_path)
    assert list(values) == ["spt"] and len(values["spt"]["loss"]) == 200
    assert values["spt"]["number"][:2] == [1.5, 3.5] and values["spt"]["loss"][-1] == pytest.approx(39.95)
    assert step_values(tmp_path / "nowhere") == {}


def test_the_page_needs_no_other_file(trained):
    text = (Path(trained) / "report.html").read_text()
    links = {link for link in re.findall(r'(?:src|href)="([^"]*)"', text) if not link.startswith("#")}
    assert text.count("<svg") == 1 and not links and "url(http" not in text
    assert "LARES rpt T=2" in text and "Markov chain" in text and "hidden_size" in text and "history masked" in text
