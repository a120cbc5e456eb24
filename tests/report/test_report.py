import itertools
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt

from cropi.errors import ArtifactError, printable
from cropi.loading import load_config
from cropi.report.closeups import closeups, pick, shortened, telling
from cropi.report.headline import headline
from cropi.report.markdown import escaped, fenced
from cropi.report.reading import read_scores
from cropi.report.rendering import prose
from cropi.report.run_report import make_report
from cropi.run_folder import RunFolder
from cropi.streams import append_jsonl

HOSTILE = (
    "<script>alert(1)</script>\n```\n````\n| a | b |\n# no heading\n[x](http://example.com) &amp; `code` \ud800\x00"
)
VOID = {"meta", "br"}


class Outline(HTMLParser):
    """Tags, attributes and text of a page; fails where tags are not closed in order."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text, self._open = [], [], "", []
        self.feed(page)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data


def written(space):
    make_report(RunFolder(space.config))
    return {name: (space.folder / name).read_text(encoding="utf-8") for name in ("report.html", "report.md")}


def test_the_three_files_and_what_is_returned(finished):
    space = finished
    summary = make_report(RunFolder(space.config))
    page = Outline((space.folder / "report.html").read_text(encoding="utf-8"))
    text = (space.folder / "report.md").read_text(encoding="utf-8")
    assert headline(summary) in text
    assert headline(summary).replace("`", "") in page.text
    stored = json.loads((space.folder / "summary.json").read_text(encoding="utf-8"))
    assert stored == json.loads(json.dumps(summary.as_json()))
    assert page.tags.count("section") == len(re.findall("^## ", text, flags=re.MULTILINE)) == 11
    assert page.tags.count("svg") == 7
    assert [path.name for path in space.folder.glob(".*.part")] == []  # no temporary file is left


def test_the_page_is_one_file_that_loads_nothing(files):
    page = files["report.html"]
    outline = Outline(page)
    assert not {"script", "img", "link", "iframe", "object", "image"} & set(outline.tags)
    links = [value for name, value in outline.attributes if name in {"src", "href", "xlink:href", "action", "srcset"}]
    assert links
    assert all(link.startswith("#") for link in links)
    assert "@import" not in page
    assert set(re.findall(r"url\(([^)]*)\)", page)) <= set(re.findall(r"url\((#[^)]*)\)", page))
    assert not [name for name, _ in outline.attributes if name.startswith("on")]
    ids = [value for name, value in outline.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_two_reports_of_one_folder_are_equal_byte_by_byte(files, finished):
    assert written(finished) == files


def test_data_cannot_become_markup(fabricate):
    space = fabricate(source_names=("<b>x</b>", "a|b", "`tick`"), prompt_text=HOSTILE, completion_text=HOSTILE[:-2])
    files = written(space)
    outline = Outline(files["report.html"])
    assert not {"script", "b"} & set(outline.tags)
    assert "<script>alert(1)</script>" in outline.text
    assert "<b>x</b>" in outline.text
    tokens = MarkdownIt("commonmark").enable("table").parse(files["report.md"])
    inline = [child for token in tokens for child in token.children or []]
    assert not [t for t in [*tokens, *inline] if t.type in {"html_block", "html_inline", "link_open", "image"}]
    headings = [after.content for token, after in itertools.pairwise(tokens) if token.type == "heading_open"]
    assert not [content for content in headings if "no heading" in content]
    cells = {token.content for token in inline if token.type == "text"}
    assert {"<b>x</b>", "a|b", "`tick`"} <= cells
    fences = [token.content for token in tokens if token.type == "fence"]
    assert printable(HOSTILE) + "\n" in fences


def test_markdown_tables_keep_their_shape(fabricate):
    tokens = (
        MarkdownIt("commonmark")
        .enable("table")
        .parse(written(fabricate(source_names=("a|b", "c\\|d", "e"), trained=False))["report.md"])
    )
    widths, width = [], 0
    for token in tokens:
        if token.type == "table_open":
            widths.append([])
        elif token.type == "tr_open":
            width = 0
        elif token.type in {"td_open", "th_open"}:
            width += 1
        elif token.type == "tr_close":
            widths[-1].append(width)
    assert len(widths) >= 8
    assert all(len(set(rows)) == 1 for rows in widths)


@pytest.mark.parametrize(
    "text", ["`a`", "a|b", "*a*", "_a_", "[a](b)", "[a][b]", "![a](b)", "<i>", "&lt;", "~~a~~", "\\", "$a$", "a\n\n# b"]
)
def test_escaped_markdown_reads_as_it_was(text):
    tokens = MarkdownIt("commonmark").enable(["strikethrough", "table"]).parse(f"- a: {escaped(text)}\n\n[b]: /c\n")
    inline = [token for token in tokens if token.type == "inline"]
    assert {child.type for child in inline[0].children} <= {"text", "text_special"}
    assert "".join(child.content for child in inline[0].children) == "a: " + " ".join(text.split())


def test_a_fence_is_longer_than_what_it_holds():
    assert fenced("a\n`````\nb").startswith("``````text\n")


def test_prose_is_escaped_between_backticks_and_outside():
    assert prose("<a> `<b>` c") == "&lt;a&gt; <code>&lt;b&gt;</code> c"


@pytest.fixture(scope="module")
def files(finished):
    return written(finished)


# -- parts of a run ----------------------------------------------------------------------------------------------------

PARTS = [
    {"collected": False, "base": None, "stages_scored": 0, "stages_selected": 0, "trained": False},
    {"base": None, "stages_scored": 0, "stages_selected": 0, "trained": False},
    {"stages_scored": 0, "stages_selected": 0, "trained": False},
    {"stages_scored": 1, "stages_selected": 0, "trained": False},
    {"errors": False},
    {"stages_scored": 1, "stages_selected": 1, "trained": False},
    {"evaluations": {}, "stages_scored": 1},
    {"strategy": "random", "evaluations": {}},
    {"strategy": "full", "evaluations": {8: ("1110", "10", "10")}},
]


@pytest.mark.parametrize("parts", PARTS)
def test_a_run_can_be_reported_at_any_time(fabricate, parts):
    page = Outline(written(fabricate(**parts))["report.html"])
    assert page.tags.count("section") == 11
    assert "nan" not in re.findall(r"\w+", page.text.lower())
    assert "None" not in page.text


def test_what_is_not_there_is_said(fabricate):
    text = written(fabricate(**PARTS[0]))["report.md"]
    for sentence in ("Nothing has been evaluated yet.", "Nothing has been selected yet.", "There are no prompts yet."):
        assert sentence in text


def test_a_file_that_was_changed_is_refused(fabricate):
    space = fabricate()
    with (space.stages.selection(1) / "selection.parquet").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ArtifactError, match="checksum"):
        make_report(RunFolder(space.config))


# -- sections ----------------------------------------------------------------------------------------------------------


def cells(text, *, section):
    """Rows of the tables of a Markdown section, as lists of cells."""
    part = text.split(f"## {section} ")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("| ")]
    return [[cell.strip().strip("*").replace("\\", "") for cell in line.strip("|").split("|")] for line in lines]


def test_the_result_table(files):
    rows = {row[0].strip("`"): row for row in cells(files["report.md"], section=1)}
    assert rows["influence"][1:3] == ["8", "1.00 [1.00, 1.00]"]
    assert rows["base policy"][1] == "0"


def test_the_funnel_counts_every_row(files):
    rows = cells(files["report.md"], section=7)
    assert ["trajectories", "train", "ok", "47", "97.9 %"] in rows
    assert ["trajectories", "train", "truncated", "1", "2.1 %"] in rows
    assert ["prompts", "all sets but test", "prompt_too_long", "1", ""] in rows
    assert ["training groups", "", "mixed", "8", "66.7 %"] in rows
    assert ["training groups", "", "no_signal", "4", "33.3 %"] in rows
    assert ["scores", "influence, stage 1", "ok", "8", "66.7 %"] in rows
    assert ["selection", "stage 0", "selected", "3", "25.0 %"] in rows
    assert ["train", "correct", "32", "66.7 %"] in rows


def test_the_cost_table(files):
    assert ["10.0", "6.0", "1.0", "16.0", "33.0", "10.0", "43.8 %", "144", "240"] in cells(
        files["report.md"], section=8
    )


def test_the_turnover_table(files):
    rows = cells(files["report.md"], section=4)
    assert ["0 → 1", "2", "1", "1", "0.50"] in rows


def section_text(text, number):
    return text.split(f"## {number} ")[1].split("\n## ")[0]


def test_the_ranking_is_judged_by_stage(files):
    text = section_text(files["report.md"], 6)
    assert text.startswith("Can the ranking be trusted?")
    # 3 selected of 8 with signal: 3 x 0.6 = 1.8 expected, 3 x 3/8 = 1.1 by chance
    rows = cells(files["report.md"], section=6)
    assert ["0", "0.50", "0.25", "0.90", "not measured", "3", "1.8", "1.1"] in rows
    assert ["1", "0.75", "12.5 %", "0.020"] in rows


def test_errors_that_were_not_measured_are_said_to_be(fabricate):
    text = section_text(written(fabricate(errors=False))["report.md"], 6)
    assert "`score.standard_errors=true`" in text
    row = next(line for line in text.splitlines() if line.startswith("| 0 |"))
    assert row.split(" | ")[1:3] == ["not measured", "not measured"]


@pytest.mark.parametrize("strategy", ["influence", "gradient_norm"])
def test_the_scores_of_any_strategy_are_shown(fabricate, strategy):
    text = written(fabricate(strategy=strategy, evaluations={}))["report.md"]
    assert ["alpha", "0", "8"] in [row[:3] for row in cells(text, section=5)]
    assert "two scorings from other trajectories" in section_text(text, 6)


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        ("random", "This run computes no influence: `random` chooses without it."),
        ("influence", "Influence has not been computed yet."),
    ],
)
def test_without_scores_it_says_whether_there_will_be_any(fabricate, strategy, said):
    text = written(fabricate(strategy=strategy, stages_scored=0, evaluations={}))["report.md"]
    assert said in section_text(text, 5)
    assert said in section_text(text, 6)


def test_a_run_without_test_sets_shows_the_rewards_of_training(fabricate):
    """The curriculum of a TRL script has none. Rewards 0.5 over stage 0, 1 over stage 1."""
    builtin = [{"type": "builtin", "families": ["sum"], "count": 4}]
    settings = {"prompts": {"train": builtin, "validation": dict.fromkeys(("alpha", "beta"), builtin)}}
    space = fabricate(settings=settings, evaluations={}, base=None, trained=False)
    for step, rewards in enumerate(([0.0, 1.0], [None, 0.5], [0.5], [0.5], [1.0, 1.0], [1.0])):
        row = {"step": step, "prompt_ids": ["p000"] * len(rewards), "rewards": rewards, "verdicts": {}, "tokens": 3}
        append_jsonl(space.stages.rewards, row)
    text = written(space)["report.md"]
    assert "has no test set, so its accuracy is not measured" in section_text(text, 1)
    assert "went from 0.50 in the first stage to 1.00 in stage 1" in section_text(text, 1)
    assert ["0", "0.50"] in cells(text, section=2)
    assert ["1", "1.00"] in cells(text, section=2)


def test_close_ups_show_errors(fabricate):
    space = fabricate(trained=False)
    scores = read_scores(space.config, space.stages)
    cards = {dict(card.facts)["prompt id"]: dict(card.facts) for card in closeups(space.config, space, scores)[1:]}
    assert cards["p001"]["influence on alpha"].endswith(" ± 0.025")  # 0.25 x 10^-1
    assert cards["p001"]["influence on beta"].endswith(" ± 0.05")
    assert cards["p001"]["probability of being truly best"] == "0.50"
    assert cards["p002"]["influence on alpha"] == "–"  # no signal


def test_close_ups_without_errors_say_so(fabricate):
    space = fabricate(errors=False, trained=False)
    scores = read_scores(space.config, space.stages)
    facts = dict(closeups(space.config, space, scores)[1].facts)
    assert facts["influence on alpha"].endswith(" ± not measured")
    assert facts["probability of being truly best"] == "not measured"


def test_close_ups_are_the_top_the_bottom_and_others():
    rows = [{"prompt_id": f"p{n:02}", "rank": None if n >= 18 else n + 1} for n in range(20)]
    chosen = pick(list(reversed(rows)), seed=0)
    assert [row["prompt_id"] for row in chosen["highest ranked"]] == ["p00", "p01", "p02"]
    assert [row["prompt_id"] for row in chosen["lowest ranked"]] == ["p15", "p16", "p17"]
    assert chosen == pick(rows, seed=0)
    assert chosen["at random"] != pick(rows, seed=1)["at random"]
    ids = [row["prompt_id"] for part in chosen.values() for row in part]
    assert len(ids) == len(set(ids)) == 9


def test_close_ups_of_a_tiny_pool_repeat_nothing():
    chosen = pick([{"prompt_id": f"p{n}", "rank": n + 1} for n in range(4)], seed=0)
    assert [len(part) for part in chosen.values()] == [3, 1, 0]


def test_completions_shown_are_right_and_wrong():
    rows = [{"sample": n, "verdict": "correct" if n in {3, 4} else "wrong"} for n in range(6)]
    assert [row["sample"] for row in telling(rows)] == [3, 0, 1]


def test_a_long_text_is_cut_and_says_so():
    assert shortened("a" * 2500).endswith("a… (500 more characters)")
    assert shortened("a" * 2000) == "a" * 2000


def test_chat_prompts_show_their_turns(fabricate):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1 + 1 ?"}]
    space = fabricate(prompt_text=messages, trained=False)
    card = closeups(space.config, space, {})[1]
    assert dict(card.texts)["prompt"] == "[system] be brief\n[user] 1 + 1 ?"


def test_the_command_that_is_named_loads_the_same_config(files, finished):
    text = files["report.md"]
    path, again = re.search(r"cropi run (\S*config\.json) (run_dir=again)", text).groups()
    assert load_config(path, [again]).model_copy(update={"run_dir": finished.config.run_dir}) == finished.config
    assert "name=small-seed4 seed=4" in text


# -- imports -----------------------------------------------------------------------------------------------------------


def test_reporting_does_not_import_torch():
    heavy = {"torch", "trl", "transformers", "matplotlib.pyplot"}
    code = f"import sys, cropi.report.run_report; print({heavy} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"
