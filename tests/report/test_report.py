import base64
import hashlib
import itertools
import json
import re
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt

from cropi.artifacts import PROMPTS, finish, write_table
from cropi.config.loading import load_config
from cropi.errors import ArtifactError, printable
from cropi.report.closeups import before_and_after, closeups, pick, shortened, telling
from cropi.report.rendering import escaped, fenced, prose
from cropi.report.run_report import make_report
from cropi.report.summary import headline
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
        self.tags, self.attributes, self.text, self._open, self.scripts = [], [], "", [], []
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
        if self._open[-1:] == ["script"]:
            self.scripts.append(data)
        elif self._open[-1:] != ["style"]:
            self.text += data


def checked(page):
    """The outline of a page that loads nothing, and whose only script is the one that its policy lets run."""
    outline = Outline(page)
    assert not {"img", "link", "iframe", "object", "image"} & set(outline.tags)
    links = [value for name, value in outline.attributes if name in {"src", "href", "xlink:href", "action", "srcset"}]
    assert links
    assert all(link.startswith("#") for link in links)
    ids = [value for name, value in outline.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    (script,) = outline.scripts
    (policy,) = [value for name, value in outline.attributes if name == "content" and "script-src" in value]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; script-src 'sha256-{digest}'; style-src" in policy
    assert outline.tags.count("script") == 1
    assert not [name for name, _ in outline.attributes if name.startswith("on")]
    assert not re.search(r"alert\(1\)|fetch\(|XMLHttpRequest|WebSocket|import\(|\beval\b", script)
    return outline


def plain_tokens(markdown):
    """(block tokens, inline tokens) of Markdown that holds no HTML, link or image."""
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown)
    inline = [child for token in tokens for child in token.children or []]
    assert not [t for t in [*tokens, *inline] if t.type in {"html_block", "html_inline", "link_open", "image"}]
    return tokens, inline


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
    assert page.tags.count("section") == len(re.findall("^## ", text, flags=re.MULTILINE)) == 8
    assert page.tags.count("svg") == 2
    assert "Not there yet" not in text
    assert [path.name for path in space.folder.glob(".*.part")] == []  # no temporary file is left


def test_the_page_is_one_file_that_loads_nothing(files):
    page = files["report.html"]
    checked(page)
    assert "@import" not in page
    assert set(re.findall(r"url\(([^)]*)\)", page)) <= set(re.findall(r"url\((#[^)]*)\)", page))
    assert len(page) < 2_000_000


def test_two_reports_of_one_folder_are_equal_byte_by_byte(files, finished):
    assert written(finished) == files


def test_data_cannot_become_markup(fabricate):
    space = fabricate(source_names=("<b>x</b>", "a|b", "`tick`"), prompt_text=HOSTILE, completion_text=HOSTILE[:-2])
    files = written(space)
    outline = checked(files["report.html"])
    assert "b" not in outline.tags
    assert "<script>alert(1)</script>" in outline.text
    assert "<b>x</b>" in outline.text
    tokens, inline = plain_tokens(files["report.md"])
    headings = [after.content for token, after in itertools.pairwise(tokens) if token.type == "heading_open"]
    assert not [content for content in headings if "no heading" in content]
    cells = {token.content for token in inline if token.type == "text"}
    assert {"<b>x</b>", "a|b", "`tick`"} <= cells
    fences = [token.content for token in tokens if token.type == "fence"]
    assert printable(HOSTILE) + "\n" in fences


def test_markdown_tables_keep_their_shape(fabricate):
    tokens, _ = plain_tokens(written(fabricate(source_names=("a|b", "c\\|d", "e"), trained=False))["report.md"])
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
    assert len(widths) >= 7
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
    assert page.tags.count("section") >= 2
    assert "nan" not in re.findall(r"\w+", page.text.lower())
    assert "None" not in page.text


def test_what_is_not_there_is_said(fabricate):
    text = written(fabricate(**PARTS[0]))["report.md"]
    assert "Nothing has been evaluated yet." in section_text(text, "Result")
    missing = section_text(text, "Not there yet")
    for title in ("Answers before and after", "What was selected", "Cost", "What became of every prompt"):
        assert title in missing
        assert not re.search(rf"^#.* {re.escape(title)}$", text, re.MULTILINE)


def test_a_file_that_was_changed_is_refused(fabricate):
    space = fabricate()
    with (space.stages.selection(1) / "selection.parquet").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ArtifactError, match="checksum"):
        make_report(RunFolder(space.config))


# -- sections ----------------------------------------------------------------------------------------------------------


def section_text(text, title):
    return re.split(rf"^## \d+ {re.escape(title)}$", text, flags=re.MULTILINE)[1].split("\n## ")[0]


def cells(text, *, section):
    """Rows of the tables of a Markdown section, as lists of cells."""
    lines = [line for line in section_text(text, section).splitlines() if line.startswith("| ")]
    return [[cell.strip().strip("*").replace("\\", "") for cell in line.strip("|").split("|")] for line in lines]


def test_the_page_begins_with_numbers_and_the_curve(files):
    """17 s of 33 s were not training."""
    result = files["report.html"].split('<section id="s1">')[1].split("</section>")[0]
    assert re.findall(r'"value">([^<]*)', result) == ["1.00", "0.50", "8", "33.0 s"]
    places = [result.index(part) for part in ('class="numbers"', "<svg", 'class="lead"', "<table")]
    assert places == sorted(places)
    text = section_text(files["report.md"], "Result")
    assert "- **1.00** targeted accuracy (0.12 before; " in text
    assert "51.5 % of it beside training" in text


def test_accuracy_by_set_and_step(files):
    rows = cells(files["report.md"], section="Result")
    assert [row[3].split()[0] for row in rows if row[:2] == ["far", "greedy"]] == ["1.00"]
    assert ["8", "1.00 [1.00, 1.00]"] in [row[:2] for row in rows]


def test_the_funnel_counts_every_row(files):
    rows = cells(files["report.md"], section="What became of every prompt")
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
        files["report.md"], section="Cost"
    )


def test_the_turnover_table(files):
    rows = cells(files["report.md"], section="What was selected")
    assert ["0 → 1", "2", "1", "1", "0.50", "0.14"] in rows  # 0.25 ÷ 1.75 of two random quarters


def test_the_ranking_is_judged_by_stage(files):
    # 3 selected of 8 with signal: 3 x 0.6 = 1.8 expected, 3 x 3/8 = 1.1 by chance
    rows = cells(files["report.md"], section="Can the ranking be trusted?")
    assert ["0", "0.50", "0.25", "0.90", "not measured", "3", "1.8", "1.1"] in rows
    assert ["1", "0.75", "12.5 %", "0.020"] in rows


def test_errors_that_were_not_measured_are_said_to_be(fabricate):
    text = section_text(written(fabricate(errors=False))["report.md"], "Can the ranking be trusted?")
    assert "`score.standard_errors=true`" in text
    row = next(line for line in text.splitlines() if line.startswith("| 0 |"))
    assert row.split(" | ")[1:3] == ["not measured", "not measured"]


def test_a_strategy_without_scores_has_no_ranking_to_trust(fabricate):
    text = written(fabricate(strategy="random", stages_scored=0, evaluations={}))["report.md"]
    assert "Can the ranking be trusted?" in section_text(text, "Not there yet")


def test_a_run_without_test_sets_shows_the_rewards_of_training(fabricate):
    """The curriculum of a TRL script has none. Rewards 0.5 over stage 0, 1 over stage 1."""
    builtin = [{"type": "builtin", "families": ["sum"], "count": 4}]
    settings = {"prompts": {"train": builtin, "validation": dict.fromkeys(("alpha", "beta"), builtin)}}
    space = fabricate(settings=settings, evaluations={}, base=None, trained=False)
    for step, rewards in enumerate(([0.0, 1.0], [None, 0.5], [0.5], [0.5], [1.0, 1.0], [1.0])):
        row = {"step": step, "prompt_ids": ["p000"] * len(rewards), "rewards": rewards, "verdicts": {}, "tokens": 3}
        append_jsonl(space.stages.rewards, row)
    text = written(space)["report.md"]
    assert "has no test set, so its accuracy is not measured" in section_text(text, "Result")
    assert "was 0.50 in the first quarter of its steps so far, and 1.00 in the last" in section_text(text, "Result")
    assert ["0", "0.50"] in cells(text, section="Result")
    assert ["1", "1.00"] in cells(text, section="Result")


def test_close_ups_tell_what_is_known_of_a_prompt_by_stage(fabricate):
    space = fabricate(trained=False)
    cards = {dict(card.facts)["prompt id"]: card for card in closeups(space.config, space)[1:]}
    header, first = cards["p001"].table.header, cards["p001"].table.rows[0]
    row = dict(zip(header, first, strict=True))
    assert row["alpha"].split(" #")[0].endswith(" ± 0.25")
    assert (row["P(best)"], row["outcome"]) == ("0.50", "selected (influence: #2)")
    assert dict(cards["p001"].facts)["training"] == "not trained on so far"
    assert [label for label, _ in cards["p001"].texts[2:]] == [
        "sample 0: correct",
        "sample 2: wrong",
        "sample 1: correct",
    ]


def test_close_ups_are_the_top_the_bottom_and_others():
    everything = [f"p{n:02}" for n in range(20)]
    chosen = pick(everything[:18], everything, seed=0)
    assert chosen["chosen first"] == ["p00", "p01", "p02"]
    assert chosen["chosen last"] == ["p15", "p16", "p17"]
    assert chosen["at random"] != pick(everything[:18], everything, seed=1)["at random"]
    ids = [prompt_id for part in chosen.values() for prompt_id in part]
    assert len(ids) == len(set(ids)) == 9


def test_close_ups_of_a_tiny_pool_repeat_nothing():
    ids = [f"p{n}" for n in range(4)]
    assert [len(part) for part in pick(ids, ids, seed=0).values()] == [3, 1, 0]


def test_answers_before_and_after_by_hand(fabricate):
    """near 1000 -> 1111, far 00 -> 11, other 10 -> 10; the prompt table gets the text of one question."""
    space = fabricate()
    question = {"prompt_id": "near-1", "set": "test/near", "source": "sum", "messages": '"1 + 2 ?"', "answer": "3"}
    rows = [{**row} for row in space.prompt_rows]
    write_table(space.prompts / "prompts.parquet", [*rows, question], PROMPTS)
    finish(space.prompts, "prompts", inputs={}, counts={"train": 12})
    table, card = before_and_after(space.config, RunFolder(space.config))
    assert table.rows == [["near", "3", "0", "1", "0"], ["far", "2", "0", "0", "0"], ["other", "0", "0", "1", "1"]]
    assert card.title == "learned"
    assert card.texts == [
        ("question", "1 + 2 ?"),
        ("gold answer", "3"),
        ("before: wrong", "2"),
        ("step 8: correct", "2"),
    ]


def test_completions_shown_are_right_and_wrong():
    rows = [{"sample": n, "verdict": "correct" if n in {3, 4} else "wrong"} for n in range(6)]
    assert [row["sample"] for row in telling(rows)] == [3, 0, 1]


def test_a_long_text_is_cut_and_says_so():
    assert shortened("a" * 2500).endswith("a… (500 more characters)")
    assert shortened("a" * 2000) == "a" * 2000


def test_chat_prompts_show_their_turns(fabricate):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1 + 1 ?"}]
    space = fabricate(prompt_text=messages, trained=False)
    card = closeups(space.config, space)[1]
    assert dict(card.texts)["prompt"] == "[system] be brief\n[user] 1 + 1 ?"


def test_the_command_that_is_named_loads_the_same_config(files, finished):
    text = files["report.md"]
    path, again = re.search(r"cropi run (\S*config\.json) (run_dir=again)", text).groups()
    assert load_config(path, [again]).model_copy(update={"run_dir": finished.config.run_dir}) == finished.config
    assert "name=small-seed4 seed=4" in text
