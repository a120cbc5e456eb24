"""The pages in a real browser: hover, zoom, legend, sorting, filtering, both themes, a phone, and no request."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.lab.compare.comparisons import NEVER, QUICK, SLOW, compared, rows
from tests.report.browser import Browser, needs_chromium

from cropi.lab.compare.report.comparison_page import write_comparison_report
from cropi.report.blocks import Section, Table
from cropi.report.rendering import write_report
from cropi.report.run_report import make_report
from cropi.run_folder import RunFolder

pytestmark = needs_chromium

CELLS = ["10", "< 2.5 [1, 3]", "–", "−4", "1:02:03", "1,200", "12.5 k", "0"]
ROWS = "[...document.querySelectorAll('#s1 tbody tr')]"
VISIBLE = f"{ROWS}.filter(row => !row.hidden).map(row => row.cells[1].textContent)"
FIRST = "document.querySelectorAll('.charts > div')[0]"
LEGEND = f"[...{FIRST}.querySelectorAll('.u-series:not(.band) td')].map(cell => cell.textContent)"
BOX = "(b => [b.x, b.y, b.width, b.height])(document.querySelector('{}').getBoundingClientRect())"
FILTER = "(i => {{ i.value = '{}'; i.dispatchEvent(new Event('input')) }})(document.querySelector('.filter input'))"
TROUBLE = {"Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("chromium"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def run_page(finished: Any) -> Path:
    make_report(RunFolder(finished.config))
    return finished.folder / "report.html"


@pytest.fixture(scope="module")
def compare_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    curves = {"full": SLOW, "quick": QUICK, "never": NEVER}
    found = [rows(scenario, name, 0, curve) for scenario in ("a", "b") for name, curve in curves.items()]
    comparison = compared(tmp_path_factory.mktemp("compare"), *found)
    write_comparison_report(comparison)
    return comparison.folder / "compare.html"


def hover(browser: Browser, selector: str, share: float) -> None:
    """Move the mouse over an element, at a share of its width."""
    browser.value(f"document.querySelector('{selector}').scrollIntoView({{block: 'center'}})")
    box = browser.value(BOX.format(selector))
    browser.mouse("mouseMoved", box[0] + share * box[2], box[1] + box[3] / 2)


def test_hover_shows_the_values_of_the_curve(browser: Browser, run_page: Path) -> None:
    """Step 4 of 8: near 3 of 4, far 1 of 2."""
    browser.open(run_page)
    hover(browser, ".u-over", 0.5)
    step, value = browser.value(LEGEND)
    assert step == "4"
    assert value.startswith("0.625 [")


def test_a_name_hides_its_curve_and_dragging_zooms(browser: Browser, compare_page: Path) -> None:
    browser.open(compare_page)
    names = "[...document.querySelectorAll('.charts')[0].querySelectorAll('.u-series.u-off:not(.band)')].length"
    assert browser.value(names) == 0
    browser.value("document.querySelectorAll('.charts .u-series:not(.band) th')[1].click()")
    assert browser.value(names) == 1
    hover(browser, ".u-over", 0.5)
    left, top, width, _ = browser.value(BOX.format(".u-over"))
    for kind, share in (("mousePressed", 0.25), ("mouseMoved", 0.6), ("mouseReleased", 0.6)):
        browser.mouse(kind, left + share * width, top + 40)
    hover(browser, ".u-over", 0.02)
    assert float(browser.value(LEGEND)[0]) > 0  # the axis began at 0


def test_a_table_is_sorted_by_the_numbers_of_its_cells_and_filtered(browser: Browser, tmp_path: Path) -> None:
    lines = [[f"row {number}", cell] for number, cell in enumerate(CELLS)]
    write_report(tmp_path, "page", "t", [Section("s", [Table("c", ["a", "b"], [*lines, ["x", "7"], ["all", "3"]])])])
    browser.open(tmp_path / "page.html")
    browser.value("document.querySelectorAll('#s1 th button')[1].click()")
    ascending = ["−4", "0", "< 2.5 [1, 3]", "7", "10", "1,200", "1:02:03", "12.5 k"]
    assert browser.value(VISIBLE) == [*ascending, "–", "3"]
    assert browser.value("document.querySelectorAll('#s1 th')[1].getAttribute('aria-sort')") == "ascending"
    browser.value("document.querySelectorAll('#s1 th button')[1].click()")
    assert browser.value(VISIBLE) == ["–", *reversed(ascending), "3"]
    browser.value(FILTER.format("ROW 3"))
    assert browser.value(VISIBLE) == ["−4"]


@pytest.mark.parametrize("look", [{}, {"width": 400}, {"dark": True}, {"scripts": False}], ids=str)
def test_no_error_no_request_and_nothing_wider_than_the_page(
    browser: Browser, run_page: Path, compare_page: Path, look: dict[str, Any]
) -> None:
    for page in (run_page, compare_page):
        browser.open(page, **look)
        if look.get("scripts", True):
            assert browser.value("document.documentElement.scrollWidth") <= look.get("width", 1280)
            assert browser.value("document.querySelectorAll('figure[data-charts] canvas').length") >= 2
        told = [event for event in browser.events if event["method"] in TROUBLE]
        assert told == []
        asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
        assert {re.sub("#.*", "", url) for url in asked} == {page.resolve().as_uri()}


def test_a_script_of_another_is_not_run(browser: Browser, run_page: Path, tmp_path: Path) -> None:
    """What escaping would let through, the page's policy stops."""
    page = run_page.read_text(encoding="utf-8")
    (tmp_path / "page.html").write_text(page.replace("</main>", "<script>document.title = 'owned'</script></main>", 1))
    browser.open(tmp_path / "page.html")
    assert browser.value("document.title") == "cropi run small"
    assert any("Content Security Policy" in str(event) for event in browser.events)


def test_without_scripts_and_in_print_the_drawing_is_shown(browser: Browser, run_page: Path) -> None:
    display = "getComputedStyle(document.querySelector('figure[data-charts] > svg')).display"
    browser.open(run_page)
    assert browser.value(display) == "none"
    browser("Emulation.setEmulatedMedia", media="print")
    assert browser.value(display) == "block"
    assert browser.value("getComputedStyle(document.querySelector('.charts')).display") == "none"


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_in_both_themes(browser: Browser, compare_page: Path, dark: bool) -> None:
    """Contrast by the formula of WCAG 2: at least 4.5 on both grounds."""
    browser.open(compare_page, dark=dark)
    style = "getComputedStyle(document.documentElement).getPropertyValue('--{}').trim()"
    colours = {name: luminance(browser.value(style.format(name))) for name in ("ink", "muted", "link", "page", "panel")}
    for text in ("ink", "muted", "link"):
        for ground in ("page", "panel"):
            low, high = sorted((colours[text], colours[ground]))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_every_figure_scroll_area_and_control_has_a_name(browser: Browser, run_page: Path) -> None:
    browser.open(run_page)
    nodes = browser("Accessibility.getFullAXTree")["nodes"]
    named = {"image", "region", "button", "searchbox"}
    pairs = ((node.get("role", {}).get("value"), node.get("name", {}).get("value")) for node in nodes)
    found = [(role, name) for role, name in pairs if role in named]
    assert found
    assert [role for role, name in found if not name] == []
