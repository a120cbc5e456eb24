"""Formulas in answers become MathML; everything else stays text, escaped."""

import re

import pytest

from cropi.report.rendering import with_formulas


def bare(text: str) -> str:
    """What a reader sees: the page without its tags."""
    return re.sub(r"<[^>]*>", "", with_formulas(text))


@pytest.mark.parametrize(
    ("text", "element"),
    [
        (r"so \(\frac{3}{4}\) is left", "<mfrac><mrow><mn>3</mn></mrow><mrow><mn>4</mn></mrow></mfrac>"),
        (r"it is $14$.", "<mn>14</mn>"),
        (r"$x^2$", "<msup><mi>x</mi><mn>2</mn></msup>"),
        (r"\[\sqrt{2}\]", "<msqrt>"),
        (r"$$\pi$$", "<mi>π</mi>"),
        (r"the answer is \boxed{\frac{1}{2}}.", "<menclose"),
        (r"\frac{3}{4}", "<mfrac>"),
    ],
)
def test_a_formula_is_drawn_with_its_source_on_hover(text: str, element: str) -> None:
    page = with_formulas(text)
    assert element in page
    assert page.count("<math ") == 1
    source = re.search(r'title="([^"]*)"', page)
    assert source
    assert source[1] in text


@pytest.mark.parametrize(
    "text",
    [
        "it costs $5 and then $6 more",
        "paid $5 $6 and $7",
        "no formula & <b>",
        r"\frac of nothing, in words",
        r"\(\nosuchcommand{x}\)",
        r"\boxed{never closed",
        "$" + "x^2+" * 400 + "$",
    ],
)
def test_what_is_no_formula_stays_as_it_is_written(text: str) -> None:
    page = with_formulas(text)
    assert "<math" not in page
    assert page.unescape() == text


@pytest.mark.parametrize(
    "text",
    [
        r"\(\text{<img src=x onerror=alert(1)>}\)",
        r"\(\href{javascript:alert(1)}{x}\)",
        r"\(\style{background:url(x)}{x}\)",
        r'\(\class{" onclick="x}{x}\)',
        r"$\mathrm{</math><script>alert(1)</script>}$",
        r"$x^2 \text{&lt;script&gt;}$",
        r"$\color{red\"onload=x}{x}$",
    ],
)
def test_nothing_of_a_formula_becomes_markup_of_the_page(text: str) -> None:
    page = with_formulas(text)
    tags = set(re.findall(r"</?([a-zA-Z]+)", page))
    assert all(tag.startswith("m") for tag in tags), page
    attributes = {name for tag in re.findall(r"<[^>]*>", page) for name in re.findall(r'\s([\w-]+)="', tag)}
    assert not attributes & {"href", "style", "class", "onclick", "onload", "onerror"}, page


def test_text_around_formulas_is_kept_in_order() -> None:
    assert bare("a < b, so $x=1$ & $y=2$.") == "a &lt; b, so x=1 &amp; y=2."


def test_a_completion_of_opening_delimiters_alone_is_shown_at_once() -> None:
    text = "\\(" * 20_000
    assert str(with_formulas(text)) == text
