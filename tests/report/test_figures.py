import json
import re
from xml.etree import ElementTree

import matplotlib as mpl
import pytest

from cropi.report import figures
from cropi.report.blocks import Chart, Line
from cropi.report.choosing import MAX_SOURCES, jaccard, random_jaccard, selected_sources, share_table
from cropi.report.figures import INK, chart_data, chart_picture
from cropi.report.reading import Selection
from cropi.report.summary import summarise

HOSTILE = Chart("<b>bold</b>", "x", [Line("$x^2$", [1, 2], [0, 1]), Line("東京\x07", [1, 2], [1, 0])])


def parsed(svg):
    """The element of an SVG without namespaces; fails where it is not well-formed."""
    return ElementTree.fromstring(svg.replace("xlink:href", "href"))


def all_figures(space):
    """By the name that keeps their ids apart."""
    summary = summarise(space.config, space)
    curves = figures.learning_curves(summary, "")
    spent = {phase: getattr(summary.cost, phase) or 0.0 for phase in figures.PHASES}
    gain = figures.gain_of_choosing({4: (1.0, 0.5, 2.0), 8: (1.5, 1.0, 9.0)}, "")
    beliefs = figures.influence_by_kind({"alpha": {"sum": {4: (1.0, 0.5), 8: (2.0, 0.25)}}}, ["sum", "sort"], "")
    cost = figures.cost_split({"seconds": {"cropi": spent}}, "cost")
    return {"curves": curves.svg, "cost": cost, "gain": gain.svg, "beliefs": beliefs.svg}


@pytest.fixture(scope="module")
def drawn(finished):
    return all_figures(finished)


def test_every_figure_is_well_formed_and_refers_to_nothing_outside(drawn):
    for name, svg in drawn.items():
        parsed(svg)
        assert svg.startswith("<svg")
        assert "http" not in svg
        assert not re.search(r"<(script|image|metadata|foreignObject)", svg)
        ids = re.findall(r'\sid="([^"]*)"', svg)
        assert len(ids) == len(set(ids))
        assert all(i.startswith(f"{name}-") for i in ids)
        assert set(re.findall(r'(?:href="#|url\(#)([^")]*)', svg)) <= set(ids)


def test_figures_do_not_depend_on_the_users_settings_and_leave_them_alone(drawn, finished):
    summary = summarise(finished.config, finished)
    with mpl.rc_context({"lines.linewidth": 9.0, "svg.hashsalt": "other"}):
        assert figures.learning_curves(summary, "").svg == drawn["curves"]
        assert mpl.rcParams["lines.linewidth"] == 9.0


def test_names_are_shown_as_they_are():
    svg = chart_picture([HOSTILE], "names", "").svg
    texts = [element.text for element in parsed(svg).iter("text")]
    assert {"<b>bold</b>", "$x^2$", "東京\N{REPLACEMENT CHARACTER}"} <= set(texts)
    assert "<b>" not in svg


def test_the_script_gets_the_numbers_of_the_drawing(finished):
    """The targeted curve by hand: near 1/4 and far 0, up to 1 and 1."""
    picture = figures.learning_curves(summarise(finished.config, finished), "")
    targeted, others = json.loads(chart_data(picture.charts))
    (line,) = targeted["lines"]
    assert (line["x"], line["y"]) == ([0, 2, 4, 6, 8], [0.125, 0.5, 0.625, 0.75, 1.0])
    assert all(low <= y <= high for low, y, high in zip(line["low"], line["y"], line["high"], strict=True))
    assert others["lines"][0]["y"] == [0.5] * 5
    assert picture.alt.startswith("targeted test sets: accuracy: influence from 0.125 at 0 to 1 at 8; untargeted")


def test_what_a_script_cannot_read_is_a_gap_and_own_colours_are_named():
    chart = Chart("a", "x", [Line("b", [1.0, 2.0], [float("nan"), 0.123456], look={"color": INK, "linestyle": "--"})])
    (line,) = json.loads(chart_data([chart]))[0]["lines"]
    assert (line["y"], line["color"], line["dash"]) == ([None, 0.1235], "--ink", [7, 3])


def test_nothing_to_draw_is_nothing_drawn(fabricate):
    space = fabricate(collected=False, base=None, stages_scored=0, stages_selected=0, trained=False)
    assert figures.learning_curves(summarise(space.config, space), "") is None
    assert figures.gain_of_choosing({}, "") is None
    assert figures.cost_split({"seconds": {}}, "cost") is None


# -- shares and overlaps -----------------------------------------------------------------------------------------------


def a_selection(sources, taken):
    return Selection([f"p{number}" for number in range(len(sources))], sources, taken)


def test_shares_by_hand():
    stage = a_selection(["a", "a", "a", "b"], [True, False, False, True])
    table = share_table(selected_sources({0: stage}), "")
    assert table.header == ["source", "pool", "stage 0"]
    assert table.rows == [["a", "3 (75 %)", "1 (50 %)"], ["b", "1 (25 %)", "1 (50 %)"], ["all", "4", "2"]]
    assert table.shades == [[None, 1.0, 2 / 3], [None, 1 / 3, 2 / 3]]  # of the largest share


def test_a_long_list_of_sources_keeps_those_that_matter_and_loses_no_prompt():
    sources = [f"s{number:02}" for number in range(50) for _ in range(2 if number < 30 else 1)]
    last = a_selection(sources, [source == "s49" for source in sources])  # small in the pool, all of the selection
    rows = share_table(selected_sources({0: last}), "").rows
    assert [row[0] for row in rows[-3:]] == ["s49", f"{51 - MAX_SOURCES} other sources", "all"]
    assert sum(int(row[1].split()[0]) for row in rows[:-1]) == len(sources) == int(rows[-1][1])
    assert [row[2] for row in rows[-3:]] == ["1 (100 %)", "0", "1"]


def test_overlaps_by_hand():
    first, second = a_selection("aaaa", [True, True, False, False]), a_selection("aaaa", [False, True, True, False])
    assert jaccard({0: first, 1: second}) == {1: pytest.approx(1 / 3)}
    assert jaccard({0: first, 2: second}) == {}  # not consecutive


def test_the_overlap_of_random_draws():
    assert random_jaccard(1.0) == 1.0
    # 100 of 1,000 twice: 10 in common of 190
    assert random_jaccard(0.1) == pytest.approx(10 / 190)
