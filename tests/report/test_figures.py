import re
from xml.etree import ElementTree

import matplotlib as mpl
import pytest

from cropi.report import figures, reliability_figures
from cropi.report.drawing import STRATEGY_STYLES
from cropi.report.reading import Selection, read_scores, read_selections
from cropi.report.reliability_figures import MAX_BARS, shown_rows
from cropi.report.shares import MAX_SOURCES, jaccard, random_jaccard, source_shares
from cropi.report.summary import summarise

NAMES = ["alpha", "beta"]


def parsed(svg):
    """The element of an SVG without namespaces; fails where it is not well-formed."""
    return ElementTree.fromstring(svg.replace("xlink:href", "href"))


def selections_of(space):
    return read_selections(space.stages, 2)


def all_figures(space):
    summary, selections = summarise(space.config, space), selections_of(space)
    scores = read_scores(space.config, space.stages)
    return {
        "curves": figures.learning_curves(summary),
        "shares": figures.selection_shares(source_shares(selections)) if selections else None,
        "turnover": figures.turnover(jaccard(selections), 0.25) if selections else None,
        "scores": figures.score_distributions(scores, selections, NAMES),
        "cost": figures.cost_split(summary.cost),
        "errors": errors_drawn(scores, selections),
        "worth": reliability_figures.quality_by_stage(summary.stages, NAMES),
    }


def errors_drawn(scores, selections):
    if not scores or not selections:
        return None
    return reliability_figures.influence_errors(scores[1], selections[1], NAMES, 0.375)


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


def test_figures_are_the_same_every_time(drawn, finished):
    assert all_figures(finished) == drawn


def test_figures_do_not_depend_on_the_users_settings_and_leave_them_alone(drawn, finished):
    summary = summarise(finished.config, finished)
    with mpl.rc_context({"lines.linewidth": 9.0, "svg.hashsalt": "other"}):
        assert figures.learning_curves(summary) == drawn["curves"]
        assert mpl.rcParams["lines.linewidth"] == 9.0


def test_every_style_is_its_own():
    looks = [(style["color"], style["marker"], str(style["linestyle"])) for style in STRATEGY_STYLES.values()]
    assert all(len(set(column)) == len(STRATEGY_STYLES) for column in zip(*looks, strict=True))


def test_names_are_shown_as_they_are(fabricate):
    space = fabricate(source_names=("<b>bold</b>", "$x^2$", "東京\x07"))
    svg = figures.selection_shares(source_shares(selections_of(space)))
    texts = [element.text for element in parsed(svg).iter("text")]
    assert {"<b>bold</b>", "$x^2$", "東京\N{REPLACEMENT CHARACTER}"} <= set(texts)
    assert "<b>" not in svg


def test_nothing_to_draw_is_nothing_drawn(fabricate):
    space = fabricate(collected=False, base=None, stages_scored=0, stages_selected=0, trained=False)
    assert set(all_figures(space).values()) == {None}


def test_scores_without_a_selection_are_drawn(fabricate):
    space = fabricate(stages_selected=0, trained=False)
    svg = figures.score_distributions(read_scores(space.config, space.stages), {}, NAMES)
    assert "selected" not in svg


def test_without_errors_no_error_bars_are_drawn(fabricate):
    space = fabricate(errors=False, trained=False)
    scores = read_scores(space.config, space.stages)
    assert errors_drawn(scores, selections_of(space)) is None


def test_drift_is_drawn_from_two_stages_on_and_reliability_where_it_was_measured(fabricate):
    one = summarise_stages(fabricate(stages_scored=1, stages_selected=1, trained=False))
    assert reliability_figures.quality_by_stage(one, NAMES) is None
    drawn = reliability_figures.quality_by_stage(summarise_stages(fabricate(errors=False, trained=False)), NAMES)
    texts = {element.text for element in parsed(drawn).iter("text")}
    assert "clip share" in texts
    assert "reliability" not in texts


def summarise_stages(space):
    return summarise(space.config, space).stages


def test_the_prompts_shown_are_the_selected_and_as_many_that_follow_with_signal(fabricate):
    space = fabricate(trained=False)
    scores = read_scores(space.config, space.stages)
    selection = selections_of(space)[0]
    # p000, p001 and p002 are selected; p002, p005 and p008 have no signal.
    assert selection.chosen == {"p000", "p001", "p002"}
    assert [row["prompt_id"] for row in shown_rows(scores[0], selection)] == ["p000", "p001", "p003", "p004", "p006"]


def test_error_bars_are_one_standard_error_to_either_side(monkeypatch, fabricate):
    space = fabricate(trained=False)
    bars = {}

    def noted(axes, at, low, high, **style):
        bars.setdefault(axes.get_subplotspec().num1, []).extend(zip(at, low, high, strict=True))

    monkeypatch.setattr("matplotlib.axes.Axes.vlines", noted)
    scores = read_scores(space.config, space.stages)
    reliability_figures.influence_errors(scores[0], selections_of(space)[0], NAMES, 0.375)
    assert len(bars[0]) == len(bars[1]) == 5
    assert all((high - low) / 2 == pytest.approx(0.25) for _, low, high in bars[0])
    assert all((high - low) / 2 == pytest.approx(0.5) for _, low, high in bars[1])
    middles = [(low + high) / 2 for _, low, high in sorted(bars[0])]
    rows = {row["prompt_id"]: row["influence/alpha"] for row in scores[0].to_pylist()}
    shown = ["p000", "p001", "p003", "p004", "p006"]
    assert middles == pytest.approx(sorted((rows[i] for i in shown), reverse=True))


def test_a_large_selection_is_thinned_and_stays_small(fabricate):
    space = fabricate(prompts=6000, trained=False, stages_scored=1, stages_selected=1)
    scores = read_scores(space.config, space.stages)
    selection = read_selections(space.stages, 1)[0]
    assert len(selection.chosen) == 1500
    svg = reliability_figures.influence_errors(scores[0], selection, NAMES, 0.375)
    assert svg.count("<use") < 3 * MAX_BARS + 100  # a mark for each prompt of three panels, and ticks
    assert len(svg) < 300_000


# -- shares and overlaps -----------------------------------------------------------------------------------------------


def a_selection(sources, taken):
    return Selection([f"p{number}" for number in range(len(sources))], sources, taken)


def test_shares_by_hand():
    stage = a_selection(["a", "a", "a", "b"], [True, False, False, True])
    shares = source_shares({0: stage})
    assert shares.sources == ["a", "b"]
    assert shares.pool == [0.75, 0.25]
    assert shares.by_stage == {0: [0.5, 0.5]}


def test_a_long_list_of_sources_keeps_those_that_matter_and_loses_no_prompt():
    sources = [f"s{number:02}" for number in range(50) for _ in range(2 if number < 30 else 1)]
    last = a_selection(sources, [source == "s49" for source in sources])  # small in the pool, all of the selection
    shares = source_shares({0: last})
    assert len(shares.sources) == MAX_SOURCES
    assert shares.sources[-2:] == ["s49", f"{51 - MAX_SOURCES} other sources"]
    assert sum(shares.pool_counts) == len(sources)
    assert shares.stage_counts[0][-2:] == [1, 0]


def test_overlaps_by_hand():
    first, second = a_selection("aaaa", [True, True, False, False]), a_selection("aaaa", [False, True, True, False])
    assert jaccard({0: first, 1: second}) == {1: pytest.approx(1 / 3)}
    assert jaccard({0: first, 2: second}) == {}  # not consecutive


def test_the_overlap_of_random_draws():
    assert random_jaccard(1.0) == 1.0
    # 100 of 1,000 twice: 10 in common of 190
    assert random_jaccard(0.1) == pytest.approx(10 / 190)
