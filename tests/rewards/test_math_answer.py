r"""The verifier `math`, with the wrong verdicts known of math-verify: what we do in each case."""

from __future__ import annotations

import time

import pytest

from cropi.rewards.verdicts import CORRECT, UNPARSEABLE_ANSWER, UNPARSEABLE_GOLD, WRONG, Answered
from cropi.rewards.verifiers import math_answer
from cropi.rewards.verifiers.math_answer import MathVerifier
from cropi.rewards.verifiers.math_reading import answer_text


def verdict(gold: str, answer: str) -> str:
    completion = answer if "boxed" in answer else f"\\boxed{{{answer}}}"
    return MathVerifier(type="math").load()(Answered(completion, gold))


@pytest.mark.parametrize(
    ("gold", "answer", "expected"),
    [
        # 14: numbers near zero are rounded to the same one
        (r"1/2004!", r"1/2006!", WRONG), (r"1/2004!", r"\frac{1}{2004!}", CORRECT), ("0.0000001", "0.0000002", WRONG),
        ("10^{-7}", "2 \\cdot 10^{-7}", WRONG),
        # 47: a part of an answer in several parts
        ("1,2", "1", WRONG), ("1,2", "2", WRONG), ("1,2", "2,1", CORRECT), (r"\{1,2,3\}", r"\{3,1,2\}", CORRECT),
        (r"(1,2)", "1", WRONG),
        ("1, 2", r"\boxed{1} or \boxed{2}", WRONG),  # the last box counts, alone
        # 60: equations that say nothing
        ("0=0", "x=x", WRONG), ("x=x", "2=2", WRONG), ("x=3", "3=3", WRONG), ("x+y=0", "2x+2y=0", CORRECT),
        # 70: a gold answer outside a LaTeX environment
        (r"\frac{1}{2}", "0.5", CORRECT), (r"\sqrt{2}", r"\frac{2}{\sqrt{2}}", CORRECT),
        ("x^2+2x+1", "(x+1)^2", CORRECT),
        # 76: Markdown
        ("73", "**73**", CORRECT), ("**73**", "73", CORRECT), ("73", "`74`", WRONG),
        # 81: mixed numbers
        ("2", "2 2/3", WRONG), ("8/3", "2 2/3", CORRECT), (r"2\frac{2}{3}", "8/3", CORRECT), ("4/3", "2 2/3", WRONG),
        ("-8/3", "-2 2/3", CORRECT),
    ],
)  # fmt: skip
def test_known_wrong_verdicts_of_the_library(gold: str, answer: str, expected: str) -> None:
    assert verdict(gold, answer) == expected


@pytest.mark.parametrize(
    ("gold", "answer", "expected"),
    [
        ("1000000", "1000001", WRONG),  # integers are exact
        ("1,000", "1000", CORRECT), ("1{,}000", "1000", CORRECT), ("12345", "12 345", CORRECT),
        ("0.333333", "1/3", CORRECT), ("3.14159", r"\pi", WRONG), (r"\sqrt{2}", "1.41421356", CORRECT),
        (r"50\%", "0.5", CORRECT), ("50", r"50\%", CORRECT), ("50", "0.5", WRONG),
        ("3", "1 2", UNPARSEABLE_ANSWER),  # no sum, no product
        ("east", "seat", WRONG),  # no product of symbols
        (r"\text{East}", "east", CORRECT), ("5 cm", "5", CORRECT), ("x=3", "3", CORRECT), (r"\infty", "2", WRONG),
        ("[1,2)", r"1 \leq x < 2", CORRECT), ("", "5", UNPARSEABLE_GOLD), ("5", "", UNPARSEABLE_ANSWER),
        ("5", "(" * 11 + "5" + ")" * 11, UNPARSEABLE_ANSWER),
        ("5", "5" + "0" * 60 + "/1" + "0" * 60, UNPARSEABLE_ANSWER),
    ],
)  # fmt: skip
def test_meaning(gold: str, answer: str, expected: str) -> None:
    assert verdict(gold, answer) == expected


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        # an equation is no number because a number stands in it
        ("7", "8=7"), ("7", "0=7"), ("7", "2x=7"), ("7", "x^2=7"), ("7", "x+1=7"), ("7", "x+y=7"), ("7", "x=8=7"),
        ("2x", "3=2x"),
        # R is not r
        ("R-r", "r-R"), ("V-v", "v-V"), ("2x", "2X"), ("n!", "N!"),
        # what stands apart
        ("12", "1 2"), ("23", r"2 \quad 3"), ("21/2", "2 1/2"), ("4/3", r"2\ 2/3"), ("3", r"1\ 2"), ("3", r"1\quad 2"),
        ("3", r"1\,2"),
        # units and text
        (r"2\text{ hours }30\text{ minutes}", "2"),
        (r"2\text{ hours }30\text{ minutes}", r"2\text{ hours }40\text{ minutes}"),
        (r"5\text{ am}", r"5\text{ pm}"), (r"10\text{ m}", r"10\text{ km}"), (r"10\text{ minutes}", r"10\text{ hours}"),
        # bases
        ("1010_2", "1010_3"), ("12_5", "12_7"), ("7", "7_8"),
        # lists, brackets, infinity, dots
        ("1,1,2", "1,2,2"), ("(1,2)", r"\{1,2\}"), (r"\infty", r"\infty+1"), (r"\infty", r"-\infty"),
        ("0.333", "0.333..."),
    ],
)  # fmt: skip
def test_more_that_the_library_lets_pass(gold: str, answer: str) -> None:
    assert verdict(gold, answer) in {WRONG, UNPARSEABLE_ANSWER}


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("7", "x=7"), ("7", "f(x)=7"), ("7", "3+4=7"), ("x-y", "-y+x"), ("-3", r"\log_2\frac{1}{8}"),
        ("12345", r"12\,345"), (r"10\text{ m}", "10"), (r"10\text{ hours}", "10 hour"), ("1010_2", "1010_{2}"),
        ("1010_2", "1010"), ("(1,2)", "(1, 2)"), (r"\infty", r"+\infty"), ("2 1/2", "5/2"), (r"2\frac12", "2.5"),
        ("1{,}234", "1234"), (r"\{1,1,2\}", r"\{1,2,1\}"),
        ("6", "2·3"), ("(1,2)", r"\bigl(1,2\bigr)"), (r"1,\ldots,5", "1, …, 5"), ("5", r"\textstyle 5"), ("x^2", "x²"),
    ],
)  # fmt: skip
def test_what_is_right_in_another_writing(gold: str, answer: str) -> None:
    assert verdict(gold, answer) == CORRECT


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        (r"\text{E}", "E"), (r"\text{E}", r"\text{(E)}"), ("I", r"\text{I}"), ("A,B", r"\text{A, B}"), ("No", "NO"),
        (r"\text{No}", "No"), ("no solution", r"\text{No solution}"), (r"19, 46, \text{ and } 82", "19,46,82"),
        ("1,2", r"1\text{ or }2"), ("5", r"5\text{ cm}^2"), (r"5\text{ cm}^2", "5"),
        (r"5\text{ cm}^2", r"5\mathrm{~cm}^2"), ("e^2", r"\mathrm{e}^2"), (r"\frac{1}{\mathrm{e}}", r"\frac{1}{e}"),
        ("E", "(E)"), ("E", r"\textbf{(E)}"), ("E", "E."), ("E", r"\mathrm{E}"), ("E", r"\text{ E }"),
        ("E", r"\mathbf{E}"), ("E", r"\text{E.}"), ("(E)", "E"), ("B", "b"), ("A,B", "B,A"),
        (r"\text{A and B}", "A,B"), (r"A, B, \text{ and } C", r"\text{A, B, C}"), (r"x=5\text{ or }x=-5", "x=-5,x=5"),
        ("5,-5", r"x=5\text{ or }x=-5"), (r"x=5\text{ or }x=-5", "5,-5"), (r"x=5\text{ or }x=-5", r"\pm 5"),
        ("x = 5 or x = -5", "x=5, x=-5"), (r"\pm 5", "5,-5"), (r"3\text{ and }4", "3,4"), (r"3\text{ and }4", "4, 3"),
        (r"3\text{ and }4", "3 and 4"), (r"5\text{ meters}", r"5\text{ m}"), (r"5\text{ m}", "5 m"),
        ("5 cm", r"5\text{ centimeters}"), ("5", "5cm"), ("5", "5 cm^2"), ("5 cm^2", r"5\text{ square centimeters}"),
        (r"5\text{ sq. ft}", r"5\text{ square feet}"), (r"60\text{ mph}", r"60\text{ miles per hour}"),
        (r"60\text{ km/h}", r"60\frac{\text{km}}{\text{h}}"), (r"9.8\text{ m/s}^2", r"9.8\,\mathrm{m/s^2}"),
        (r"9.8\text{ m/s}^2", r"9.8\ \mathrm{m\,s^{-2}}"), ("9.8", r"9.8\text{ m}\cdot\text{s}^{-2}"),
        ("90", r"90^\circ"), (r"90^\circ", "90"), (r"90^{\circ}", r"90\text{ degrees}"), ("90°", r"90^\circ"),
        (r"25^\circ\text{C}", "25"), (r"25\text{ °C}", r"25^\circ C"), (r"\$5", "5"), ("5", r"\$5"), ("5", r"\$5.00"),
        (r"\$5", r"5\text{ dollars}"), (r"\$1,000", "1000"), (r"-\$5", "-5"), (r"\$3{,}500", "3500"), (r"5\%", "5"),
        ("5", r"5\%"), (r"5\%", "0.05"), (r"5\%", r"5\text{ percent}"), (r"5\%", "5 percent"), (r"\text{Yes}", "yes"),
        ("yes", r"\text{YES}"), (r"\text{True}", "true"), (r"\text{None}", "none"), (r"\text{DNE}", "dne"),
        ("DNE", r"\text{DNE}"), (r"\text{does not exist}", "Does not exist."), (r"\infty", r"\text{infinity}"),
        (r"\infty", "infinity"), (r"\infty", "∞"), (r"(-\infty, 3]", r"(-\infty,3]"),
        (r"(-\infty,3] \cup [5,\infty)", r"(-\infty, 3]\cup[5, \infty)"), ("[1,2]", r"\left[1,2\right]"),
        ("(1,2)", r"\left( 1, 2 \right)"), (r"\{1,2\}", r"\{2,1\}"), (r"\{1,2\}", "1,2"),
        (r"\left\{1,2\right\}", r"\{1, 2\}"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix}1 & 2\\3 & 4\end{bmatrix}"),
        (r"2\pi", r"2 \cdot \pi"), (r"2\pi", "2π"), (r"2\pi", "2pi"), (r"\pi", r"\mathrm{\pi}"), ("e", r"\mathrm{e}"),
        ("e^{x}", r"\mathrm{e}^{x}"), (r"2\mathrm{i}", "2i"), ("3+4i", r"3+4\mathrm{i}"), ("3+4i", "4i+3"),
        ("(1+i)^2", "2i"), (r"\dfrac{1}{2}", r"\frac12"), (r"\tfrac{1}{2}", "1/2"), (r"\cfrac{1}{2}", "0.5"),
        (r"\frac{1}{2}", "½"), (r"2\frac{1}{2}", "2.5"), (r"2 \dfrac{1}{2}", r"\frac{5}{2}"), ("-5", "−5"),
        ("-5", "–5"), ("-5", "—5"), ("5", "５"), ("5", " 5 "), ("1000", "1 000"), ("10000", r"10\,000"),
        ("10000", r"10,\!000"), ("10000", "10{,}000"), ("10000", "10,000"), ("5", "**5**"), ("5", "$5$"),
        ("5", r"\(5\)"), ("5", r"\[5\]"), ("x^2+1", "1+x^2"), ("xy", "yx"), ("abc", r"a \cdot b \cdot c"),
        ("abc", "a b c"), (r"\frac{abc}{4R}", r"\frac{cab}{4R}"), ("2x", r"x \cdot 2"), ("mgh", "hgm"),
        ("f(x)=2x", "f(x) = 2x"), ("y=2x+1", "y = 1 + 2x"), ("2x+1", "y=2x+1"), (r"\text{East}", r"\text{east}"),
        (r"\text{Monday}", "Monday"), (r"\text{red, blue}", r"\text{blue, red}"),
        (r"\text{red and blue}", "red, blue"), (r"x\text{-axis}", r"\text{x-axis}"),
        (r"\text{right-angled}", r"\text{Right-angled}"), (r"\text{Case 2}", r"\text{case 2}"),
        (r"2\text{ hours }30\text{ minutes}", r"2\text{ h }30\text{ min}"),
        (r"2\text{ hours }30\text{ minutes}", "2 hours 30 minutes"),
        (r"2\text{ hours and }30\text{ minutes}", r"2\text{ hours }30\text{ minutes}"),
        (r"5\text{ cm}, 6\text{ cm}", "5, 6"), (r"5\text{ cm and }6\text{ cm}", r"6\text{ cm},5\text{ cm}"),
        (r"5\sqrt{2}\text{ cm}", r"5\sqrt2"), (r"6\pi\text{ cm}^2", r"6\pi"), (r"6\pi", r"6\pi\text{ square units}"),
        (r"12\text{ ways}", "12"), ("12", r"12\text{ people}"), ("12", "12 students"),
        (r"7:30\text{ am}", r"7:30\text{ a.m.}"), (r"\text{5}", "5"), ("5", r"\text{5 cm}"),
        (r"\text{5 cm}", r"5\text{ cm}"), (r"\mathrm{5}", "5"), (r"3^{\text{rd}}", r"3^{\text{rd}}"),
        (r"\sin x", r"\sin(x)"), (r"\sin x", r"\mathrm{sin} x"), (r"\ln 2", "ln 2"),
        (r"-\frac{1}{2}", r"\frac{-1}{2}"), (r"\sqrt{2}", "2^{1/2}"), ("10^{-7}", "10^-7"), ("2^{10}", "1024"),
        ("2^{10}", "2**10"), (r"x \in [1,2]", "[1,2]"), (r"x\geq 3", "x ≥ 3"), (r"x \ge 3", r"[3,\infty)"),
        (r"3 \le x \le 5", "[3,5]"), (r"x\neq 2", r"x \ne 2"), (r"\emptyset", "∅"), (r"\emptyset", r"\varnothing"),
        ("5!", "120"), (r"\binom{5}{2}", "10"), (r"0.\overline{3}", r"0.\overline{3}"),
        (r"1,2,\ldots,10", "1,2,...,10"), (r"\frac{1}{3}", "0.333333"), ("3:4", "3 : 4"), ("3:4", r"\frac34"),
        (r"\text{(A), (B)}", "A,B"), ("x=1, y=2", "y=2, x=1"), ("x^2-1", "(x-1)(x+1)"), (r"\text{\$5}", "5"),
        (r"100\text{ dollars}", r"\$100"), (r"\mathrm{100~cm}", "100"),
        (r"3 \text{ units}^2", r"3\text{ square units}"), (r"4\text{ square inches}", r"4\text{ in}^2"),
        (r"4\text{ in}", r"4\text{ inches}"), (r"4\text{ feet}", r"4\text{ ft.}"),
        (r"24\text{ ft}^3", r"24\text{ cubic feet}"), (r"0.\overline{3}", r"\frac{1}{3}"),
        (r"1.2\overline{34}", r"1.2\overline{34}"), (r"\frac{1}{3}", r"0.\bar{3}"), ("i", r"\mathrm{i}"),
        ("1+2i", "2i+1"), (r"\frac{1+i}{2}", r"\frac{1}{2}+\frac{i}{2}"), ("x_i", "x_i"), ("CA", "CA"), ("AB", "BA"),
        (r"\overline{AB}", r"\overline{AB}"), (r"\text{July } 4", r"\text{july 4}"),
        (r"10\text{ a.m.}", r"10\text{ AM}"), (r"2.5\text{ million}", r"2.5\text{ million}"), ("a", r"\text{(a)}"),
        (r"\textbf{(C)}", "C"), ("(C)", r"\text{C}"), (r"\text{ECHO}", "echo"), ("even", r"\text{Even}"),
        (r"\text{odd}", "Odd"), (r"\mathrm{H_2O}", r"\text{H}_2\text{O}"), ("x<3", "3>x"),
        (r"x > 3 \text{ or } x < 1", "x<1, x>3"), (r"x > 3 \text{ or } x < 1", r"x<1 \text{ or } x>3"),
        (r"\left(\frac{1}{2},3\right)", "(0.5, 3)"), ("(1,2),(3,4)", "(3,4),(1,2)"),
        (r"(1,2)\text{ and }(3,4)", "(3,4),(1,2)"), (r"3, 4, \text{or } 5", "3,4,5"), (r"3\text{, }4", "3,4"),
        (r"\{3, 4\}", r"3\text{ and }4"), ("n(n+1)", "n^2+n"), (r"\frac{n(n+1)}{2}", r"\frac{n^2+n}{2}"),
        (r"2\sqrt{3}", r"\sqrt{12}"), (r"\log_2 8", "3"), (r"\cos\theta", r"\cos(\theta)"), ("θ", r"\theta"),
        (r"\sqrt[3]{2}", "2^{1/3}"), ("4.0", "4"), (".5", "0.5"), (r"1.5 \times 10^{3}", "1500"),
        (r"1.5\times10^3", "1.5 × 10^3"), ("+5", "5"), ("5.", "5"), ("5", "5.0"), ("3/4", r"\frac{3}{4}"),
        ("-3/4", r"-\frac34"), (r"\frac{-3}{4}", "-3/4"), ("2 : 3", r"\frac{2}{3}"), ("5", r"\boldsymbol{5}"),
        ("5", r"\displaystyle 5"), ("5", r"\mathbf{5}"), ("5", r"\textbf{5}"), ("5", "{5}"), ("5", r"5\;"),
        ("5", r"5\text{ }"), ("5", r"5\text{.}"), ("5", r"\;5\,"), (r"\frac{1}{2}", r"\displaystyle\frac{1}{2}"),
        ("5", r"5\ \text{units}"), ("60", "60 minutes"), (r"\text{60 minutes}", "60"), ("3", r"3\text{ s}"),
        (r"3\text{ seconds}", r"3\text{ s}"), (r"3\text{ seconds}", r"3\text{ sec}"),
        (r"3\text{ L}", r"3\text{ liters}"), (r"70\text{ in.}", r"70\text{ inches}"),
        (r"3\frac{1}{2}\text{ cups}", "3.5"), (r"\frac{1}{2}\text{ hour}", r"\frac12"),
        (r"\frac{5\text{ m}}{2}", r"2.5\text{ m}"), (r"\text{neither}", "Neither"), ("0", r"\text{0}"),
        (r"100\%", "100"), ("1", r"100\%"), (r"33\frac{1}{3}\%", r"\frac{1}{3}"), (r"\text{(i)}", "(i)"),
        (r"\text{II}", "II"), ("II", r"\text{ii}"), (r"\text{I and II}", "I, II"),
        (r"\text{I and II}", r"\text{II and I}"), (r"\mathbb{R}", r"\mathbb{R}"),
        (r"x \in \mathbb{R}", r"\mathbb{R}"), (r"\text{all real numbers}", "all real numbers"),
        ("f^{-1}(x)", "f^{-1}(x)"), ("(x+1)(x+2)", "(x+2)(x+1)"), (r"e^{i\pi}", "-1"),
        (r"\frac{e}{2}", r"\frac{\mathrm e}{2}"), (r"\pi r^2", r"\pi{r^2}"), (r"8\pi", "25.1327412"),
        (r"3 \pm 2 \sqrt{2}", r"3 + 2\sqrt{2}, 3 - 2\sqrt{2}"),
        (r"(-\infty,-3) \cup (3,\infty)", r"\left(-\infty,-3\right)\cup\left(3,\infty\right)"),
        ("2220_5", "2220_{5}"), (r"\left( \frac{1}{2}, \infty \right)", r"(0.5,\infty)"), (r"\$18.90", "18.9"),
        ("18.90", r"\$18.9"), (r"5 \text{ inches}", "5 in"), (r"32,\!000", "32000"), (r"864 \mbox{ inches}^2", "864"),
        (r"864 \mbox{ inches}^2", r"864 \text{ in}^2"), (r"15\mbox{ cm}^2", r"15\,\text{cm}^2"), (r"\mbox{3}", "3"),
        (r"5.4 \text{ cents}", "5.4"), ("3R^2", r"3\cdot R^2"), ("r=3", "3"),
        (r"\{1\pm\sqrt{5},-2\}", r"1+\sqrt5,1-\sqrt5,-2"), ("-2 < x < 1", "(-2,1)"), ("(-2,1)", "-2<x<1"),
        (r"x \in [-2,7]", r"-2 \le x \le 7"), (r"\frac{1}{2}, \frac{3}{2}", "0.5 and 1.5"),
        (r"\frac43", r"\frac{4}{3}"), (r"11\sqrt2", r"11 \sqrt{2}"),
        (r"(3,\frac{\pi}{2})", r"\left(3, \frac{\pi}{2}\right)"), (r"\text{Evelyn}", "Evelyn"), ("4:3", "4/3"),
        (".0625", r"\frac{1}{16}"), ("6-5i", "-5i+6"),
        (r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}", r"\begin{pmatrix} \frac{1}{5} \\ -\frac{18}{5} \end{pmatrix}"),
        ("y = 2x + 3", "y=3+2x"), ("2k+2", "2(k+1)"), (r"17\text{ min}", r"17\text{ minutes}"), ("58,500", "58500"),
        (r"\frac{x+2}{7}", r"\frac17 x + \frac27"), (r"\sqrt{51}", r"\sqrt{51}\text{ units}"), (r"\pi-2", r"-2+\pi"),
        ("1,2,3", r"1, 2, \text{ and } 3"), (r"\{2, 4\} ", r"\{ 4,2 \}"), ("0", r"0\text{ solutions}"),
        ("(0,0)", r"\left(0,0\right)"), ("x+y=5", "y+x=5"), ("3x-y=2", "y=3x-2"),
        (r"\frac{3}{2}\pi", r"\frac{3\pi}{2}"), (r"120^\circ", r"120\degree"), ("120", "120 degrees"),
        ("120", "120 deg"), (r"\angle ABC", r"\angle ABC"), (r"4\sqrt{3}\text{ square feet}", r"4\sqrt{3}"),
        (r"\text{Tuesday}", r"\textbf{Tuesday}"), ("5", "x = 5"), ("5", r"x=5\text{ cm}"), ("5", r"\boxed{5}"),
        ("3", r"3\text{ sides}"), ("-1", "{-1}"), ("-1", "(-1)"), (r"\sqrt{3}i", r"i\sqrt{3}"),
        (r"2i\sqrt{2}", r"2\sqrt{2}i"), ("a+bi", "bi+a"), (r"\cos x + i \sin x", r"i\sin x+\cos x"), ("k=1", "1"),
        (r"\tan^{-1}(2)", r"\arctan 2"), (r"\sin^2 x", r"(\sin x)^2"), ("n^2", "{n}^{2}"), ("A = 5", "5"),
        (r"A=\pi r^2", r"\pi r^2"), (r"V = \frac{4}{3}\pi r^3", r"\frac{4}{3} \pi r^3"), ("f(x) = x^2", "x^2"),
        ("10^{12}", "1000000000000"), (r"6.02 \times 10^{23}", r"6.02\cdot 10^{23}"), (r"1.0\times 10^{-3}", "0.001"),
        (r"5\times 10^3\text{ m}", "5000"), (r"3\text{ cm} \times 4\text{ cm}", r"3 \times 4"),
        (r"2:30\text{ p.m.}", r"2:30\text{ PM}"), ("12:00", "12 : 00"), (r"1\text{ hour }", r"1\text{ hr}"),
        (r"\text{1, 2, and 3}", "1,2,3"), (r"\text{the 2nd}", r"\text{The 2nd}"), (r"\text{2 and 3}", "3,2"),
        (r"x=\frac{1}{2} \text{ or } 3", r"x=\frac12, 3"), (r"\text{No real solutions}", "no real solutions"),
        (r"\text{parabola}", "Parabola."), (r"\text{(B) and (C)}", "B, C"), ("BC", r"\text{BC}"),
        (r"18\text{ m}", r"18\text{m}"), (r"18\text{ m}", "$18$ m"), (r"5\%", r"5 \%"), (r"12.5\%", r"\frac{1}{8}"),
        ("0.125", r"12.5\%"), (r"75\text{ cm}^3", "75cm^3"), ("75", "75 cm³"), (r"4.5\text{ kg}", "4.5kg"),
        (r"20\text{ N}\cdot\text{m}", r"20 \text{ N m}"), ("x^{2}y", "yx^2"),
        ("1e5", "10^5"), ("1.5e-3", "0.0015"), (r"2\frac{2}{3}x", r"\frac{8x}{3}"), (r"-2\frac12", "-2.5"),
        (r"2\frac12", "2 1/2"), (r"1\frac{1}{2},2\frac{1}{2}", "1.5,2.5"), (r"50\%", "0.5"), ("0.5", r"50\%"),
        (r"50\%", "50"), (r"50\%", r"50\%"), (r"50\%, 25\%", r"50\%,25\%"), (r"50\%", r"\frac12"),
        (r"\text{Yes}", r"\text{Yes.}"), ("no", r"\text{No.}"), ("x=2,-3", "2,-3"),
        (r"\sqrt{2},-\sqrt{2}", r"\pm\sqrt{2}"), (r"x=\pm 2", r"\pm 2"), (r"\text{5 and 6}", r"5\text{ and }6"),
        (r"5 \text{ or } 6", "6,5"), (r"5\ \text{or}\ 6", "5,6"), (r"\text{$5$}", "5"), ("5", "5e0"),
        (r"\$5 \text{ and } \$6", "5,6"), (r"\$\frac{1}{2}", "0.5"), (r"\$5\text{ per hour}", "5"),
        (r"5\text{ miles}^2", r"5\text{ square miles}"), (r"30\text{ cents}", "30¢"),
        (r"\text{5 apples and 6 apples}", "5,6"), (r"\text{Alice}", "Alice"), (r"\text{Alice and Bob}", "Bob, Alice"),
        (r"\text{1st}", r"\text{1st}"), ("a=1, b=2", r"a=1\text{ and }b=2"), ("(a,b)=(1,2)", "(1,2)"),
        (r"x \approx 3", "3"), (r"\approx 3.14", "3.14"), (r"y=\frac{1}{x}", "y=x^{-1}"), (r"\frac{a}{b}", "a/b"),
        ("x^{10}", "x^10"), (r"\{\}", r"\emptyset"), (r"\lfloor x \rfloor", r"\lfloor x\rfloor"),
        (r"\lim_{x\to 0} x", "0"), (r"\sqrt{x^2}", r"\lvert x\rvert"), (r"\binom{n}{2}", r"\frac{n(n-1)}{2}"),
        (r"P(A)=\frac12", "0.5"), ("S_n = n^2", "n^2"), ("a_n=2n", "2n"),
        (r"3 \text{ km/h}", r"3\text{ kilometers per hour}"), (r"12:30\text{ PM}", r"12:30\text{ pm}"),
        (r"\text{12:30 PM}", "12:30 PM"), ("0.5", ".50"), ("1/3", "0.33333333"),
        (r"\text{Saturday}", r"\text{saturday }"), ("C", r"\boxed{C}"), ("C", r"\text{C}"), ("x", r"\mathit{x}"),
        (r"\vec{v}", r"\vec{v}"), (r"\mathbf{i}+2\mathbf{j}", r"2\mathbf{j}+\mathbf{i}"),
        (r"48\ \text{cm}^2", r"48\text{ cm}^{2}"), ("2^{-3}", "0.125"), (r"7.0 \times 10^2", "700"),
        (r"3\text{ and a half}", r"3\text{ and a half}"),
        (r"10\text{ inches by }5\text{ inches}", r"10\text{ inches by }5\text{ inches}"), (r"\$x", "x"),
        (r"\$2x", "2x"), (r"-\$\frac{1}{2}", r"-\frac12"), (r"5\$", "5"), ("5", "≈5"), (r"€\frac{1}{2}, €2", "0.5,2"),
        ("true", r"\text{True}"), ("monday", r"\text{Monday}"),
    ],
)  # fmt: skip
def test_an_answer_in_another_writing_is_right(gold: str, answer: str) -> None:
    assert verdict(gold, answer) == CORRECT


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("no", "on"), ("42", r"42 \text{ is wrong; it is 43}"), ("42", r"42 \text{ (wrong), 43}"),
        ("42", r"42\text{ or so}"), ("42", "42 or so"), ("42", "42 is wrong"), ("42", r"\text{not } 42"),
        ("42", "not 42"), ("42", r"\text{about } 42"), ("42", r"42\text{ roughly}"), ("42", r"42 \text{ or } 43"),
        ("42", r"42\text{ and more}"), ("42", r"\text{42 or maybe 43}"), ("42", r"42\text{?}43"), ("E", "D"),
        ("E", r"\text{D}"), ("E", r"\text{(D)}"), ("E", "(E) 5"), ("A,B", "A,C"), (r"x=5\text{ or }x=-5", "x=5"),
        ("5", r"x=5\text{ or }x=-5"), (r"\pm 5", "5"), ("5", r"\pm 5"), (r"5\text{ cm}^2", r"5\text{ cm}"),
        (r"5\text{ cm}^2", r"5\text{ cm}^3"), (r"5\text{ cm}", r"5\text{ m}"), (r"5\text{ cm}", r"6\text{ cm}"),
        (r"5\text{ cm}", r"5\text{ kg}"), (r"5\text{ apples}", r"5\text{ oranges}"),
        (r"9.8\text{ m/s}", r"9.8\text{ m/s}^2"), (r"90^\circ", r"80^\circ"),
        (r"25^\circ\text{C}", r"25^\circ\text{F}"), (r"\$5", r"\text{€}5"), (r"\$5", r"5\text{ cents}"),
        (r"-\$5", r"\$5"), (r"5\%", "50"), (r"5\%", r"5\text{ cm}"), ("50", "0.5"), (r"\text{True}", r"\text{False}"),
        ("yes", "no"), ("none", "0"), (r"\infty", r"-\infty"), (r"(-\infty, 3]", r"(-\infty,3)"), ("[1,2]", "(1,2)"),
        ("(1,2)", "(2,1)"), (r"\{1,2\}", r"\{1,3\}"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}"), (r"\pi", "3.14"),
        ("3+4i", "3-4i"), ("-5", "5"), ("R-r", "r-R"), ("xy", "xY"), ("x", "y"), ("5", "5x"), ("5", "5m"),
        ("east", "seat"), (r"\text{red and blue}", "red"), (r"\text{left}", r"\text{felt}"),
        (r"\text{Case 2}", r"\text{Case 3}"), (r"\text{Case 2}", "2"),
        (r"2\text{ hours }30\text{ minutes}", r"30\text{ hours }2\text{ minutes}"),
        (r"2\text{ hours }30\text{ minutes}", r"2\text{ hours}"),
        (r"5\text{ cm}, 6\text{ m}", r"5\text{ m}, 6\text{ cm}"), ("5", r"\text{five}"), (r"1,2,\ldots,10", "1,10"),
        (r"\frac{1}{3}", "0.33"), ("x=1, y=2", "x=2, y=1"), ("5", r"5\text{ is the answer}"),
        ("5", r"\text{The answer is } 5"), ("5", r"5\text{ since }2+3=5"), ("5", r"6\text{ no, }5"),
        ("12", r"1\text{ or }2"), ("5", r"5\text{ or }"), ("5", r"\text{or }5"), (r"0.\overline{3}", "0.3"),
        ("1+2i", "1-2i"), (r"10\text{ a.m.}", r"10\text{ p.m.}"), (r"2.5\text{ million}", "2.5"), ("even", "odd"),
        (r"x > 3 \text{ or } x < 1", "x>3"), ("(1,2),(3,4)", "(1,2),(3,5)"), ("(1,2)", "1"), ("1,2", "1"),
        ("1,2", "1,2,3"), ("5", r"5\text{x}y"), ("5", r"5\mathrm{e}"), (r"10\%", "0.01"),
        (r"\text{I and II}", r"\text{I and III}"), (r"8\pi", "25.13"),
        ("(1,2)", "(1,3)"), (r"\frac{1}{2}", r"\frac{1}{2}\text{ of a mile}"), ("7", r"7\text{th}"),
        (r"2:30\text{ p.m.}", r"3:30\text{ p.m.}"), (r"2:30\text{ p.m.}", r"2.30\text{ p.m.}"), ("BC", "AC"),
        ("0.125", r"125\%"), (r"50\%", "5000"), ("5", r"5\text{ or five}"), ("7", r"7\text{ but not }8"),
        ("7", r"\text{7 or 8}"), ("7", r"\frac{7}{\text{wrong}}"), ("7", r"7^{\text{wrong}}"),
        ("7", r"7_{\text{wrong}}"), ("7", r"\text{wrong}7"), ("7", r"7\text{wrong}"), ("7", "7 wrong"),
        ("7", "7 nope"), ("7", "7, 8"), ("7", "7; 8"), ("7", r"7 \quad 8"), ("7", r"7 \\ 8"), ("7", "7 / 8"),
        ("7", r"7 \to 8"), ("7", r"7 \Rightarrow 8"), ("7", r"7 \text{ cm} 8"), ("7", r"7 \neq 8"), ("7", r"\neq 7"),
        ("7", r"x \neq 7"), ("7", "x > 7"), ("7", "x < 7"), ("7", r"\leq 7"), ("7", "-7"), ("7", r"\pm 7"),
        ("7", r"7 \pm 1"), ("7", "7i"), ("7", r"7\%\%"), ("7", "7x"), ("7", "70"), ("7", "7?"), ("7", "?7"),
        ("7", "7!"), ("7", "7 _8"), ("7", "7_{8}"),
        (r"1\frac{1}{0}", "5"), ("5", r"1\frac{4}{0}"), (r"50\%", r"60\%"),
        ("No", r"\text{Not}"), ("seat", "teas"), ("mon", "nom"), ("true", "false"),
        (r"\text{Alice and Bob}", "Alice"), (r"\text{Alice}", "Bob"),
        (r"3\text{ and a half}", "3"),
        ("7", "7e0e0"), ("7", "7e0.5"), ("7", "7e0x"),
    ],
)  # fmt: skip
def test_another_answer_is_not_right(gold: str, answer: str) -> None:
    assert verdict(gold, answer) in {WRONG, UNPARSEABLE_ANSWER}


@pytest.mark.parametrize(
    ("completion", "gold"),
    [
        ("The answer is:\n5", "5"), ("**Answer:**\n5", "5"), ("**Answer**: 5", "5"), ("The answer is:\n\n$$5$$", "5"),
        ("The answer is 5, so we are done.", "5"), ("The final answer is $5$. I hope it is correct.", "5"),
        ("**Final Answer:** 5", "5"), ("Answer: **5**", "5"), ("the answer is: 5.", "5"), ("Answer:\n\\[5\\]", "5"),
        ("The answer is \\[\n5\n\\]", "5"), (r"The answer is \(5\).", "5"), ("The answer is $5$.", "5"),
        ("**Final Answer**\n\n5", "5"), ("### Final Answer\n5", "5"), ("## Answer\n\n$x=5$", "5"),
        ("Answer = 5", "5"), ("The answers are 2 and 3.", "2,3"), ("The answer is $2$ and $3$.", "2,3"),
        ("The answer is $5$ cm.", "5"), ("The answer is 5 because 2+3=5.", "5"),
        ("The answer is $5$ since it is prime", "5"), ("The answer is 4. No: the answer is 5.", "5"),
        ("The answer is 5. I hope the answer is correct.", "5"), ("Answer: 5\n\nThe answer is not 6.", "5"),
        ("The answer is 5, not 6.", "5"), ("The answer is 3.5.", "3.5"), ("The answer is 3.5, which is more.", "3.5"),
        ("The answer is 1,000.", "1000"), ("The answer is (E).", "E"), ("The answer is **(E)**.", "E"),
        (r"The correct answer is \textbf{(E)}.", "E"), ("Answer: E", "E"), ("Answer: E\nBecause", "E"),
        ("The answer is Yes, because 5>3.", "yes"), (r"The answer is \$5.", "5"), ("The answer is $5.", "5"),
        ("The answer is −5", "-5"), ("The answer is 5 apples.", "5"), (r"The answer is \frac{1}{2}.", "0.5"),
        (r"The answer is $\frac{1}{2}$, as claimed.", "0.5"), ("The answer is `5`.", "5"), ("The answer is *5*", "5"),
        ("Answer: $x = 5$", "5"), ("The answer is 5; done", "5"), ("#### 5", "5"), ("#### **5**", "5"),
        ("ANSWER: 5", "5"), ("Final answer: 5", "5"), (r"final answer is \boxed{5}", "5"),
        ("The answer is $(1,2)$.", "(1,2)"), ("The answer is $x=5$ or $x=-5$.", "5,-5"),
        ("The answer is $5$, $6$ and $7$.", "5,6,7"), ("The answer is red and blue.", r"\text{blue, red}"),
        ("Answer: 5\n", "5"), ("Answer\n5", "5"), ("**Answer: 5**", "5"), ("**Answer: $5$**", "5"),
        ("__Answer:__ 5", "5"), ("*Answer*: 5", "5"), ("Answer:5", "5"), ("The answer is **5** because", "5"),
        ("Answer: $$\n5\n$$", "5"), ("The answer is:\n\n\\boxed{5}", "5"), ("The answer is: \n\n**5**\n\nDone", "5"),
        ("The answer is 5.\n\nLet me know if you need more.", "5"), ("The answer is $5$\n", "5"),
        (r"The answer is $\$5$.", "5"), (r"The answer is $5\%$.", "5"), ("The answer is 5 and we are done.", "5"),
        ("So the answer is 5, and that is it.", "5"), ("The answer is $a$ and $b$", "a,b"),
        ("The answer is 2:3", "2/3"), ("Answer: 12 minutes.", "12"),
        ("The answer is 2 hours 30 minutes.", r"2\text{ hours }30\text{ minutes}"),
    ],
)  # fmt: skip
def test_an_announced_answer_is_read(completion: str, gold: str) -> None:
    assert MathVerifier(type="math").load()(Answered(completion, gold)) == CORRECT


@pytest.mark.parametrize(
    ("completion", "gold"),
    [
        ("the answer is not 5", "5"), ("The answer is $5$ cm.", "6"), ("The answer is 5 or so", "5"),
        ("The answer is $5$ or so", "5"), ("The answer is 5. No: the answer is 4.", "5"),
        ("The answer is yes.", "no"), ("The answer is -5", "5"), ("The answer is", "5"), ("no answer", "5"),
        ("<answer>5</answer>", "5"), ("The answer is 42 is wrong; it is 43", "42"),
    ],
)  # fmt: skip
def test_what_announces_another_answer_or_none_is_not_right(completion: str, gold: str) -> None:
    assert MathVerifier(type="math").load()(Answered(completion, gold)) in {WRONG, UNPARSEABLE_ANSWER}


@pytest.mark.parametrize(
    "answer",
    [
        "9^{9^{9^9}}", "(10^{10})!", "1000000!", "99!!", r"\frac{1}{9^{9^9}}", r"\binom{10000000}{5000000}",
        r"\binom{10^9}{10^8}", r"\sum_{k=1}^{100000000} k^k", r"\sum_{k=1}^{9999} k!", r"\prod_{k=1}^{100000000} k",
        r"\gcd(9^{9^9},3)", "(x+y+z)^{200}", "(x+1)^{100000}", "e^{10^{10}}", "0.5^{10^9}", "x=9^{9^9}", r"\{7!!!\}",
        r"\begin{pmatrix}9^{9^9}&1\\2&3\end{pmatrix}", r"\Gamma(10^{9})", r"\sin " * 20 + "2",
    ],
)  # fmt: skip
def test_what_nobody_could_work_out_is_refused_before_it_is_evaluated(answer: str) -> None:
    start = time.process_time()
    assert verdict("7", answer) == UNPARSEABLE_ANSWER
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("2^{2010}", r"4^{1005}"), ("2009!", r"2009 \cdot 2008!"), (r"\sum_{k=1}^{100} k", "5050"),
        (r"\binom{20}{10}", "184756"), ("10^{100}", r"100^{50}"), ("(x+1)^{10}", r"(x+1)^5 (x+1)^5"),
    ],
)  # fmt: skip
def test_large_numbers_that_can_be_worked_out_are(gold: str, answer: str) -> None:
    assert verdict(gold, answer) == CORRECT


@pytest.mark.parametrize("gold", [r"0.\overline{3}", r"\log_2 8 8", "3 4", "9" * 60])
def test_whether_a_gold_answer_can_be_read_does_not_depend_on_the_completion(gold: str) -> None:
    """Else a prompt would be left out exactly where it is answered wrongly."""
    assert len({verdict(gold, answer) == UNPARSEABLE_GOLD for answer in (gold, "1/3", "7", "x")}) == 1


def test_long_runs_of_dots_and_spaces_cost_nothing() -> None:
    verify = MathVerifier(type="math").load()
    start = time.process_time()
    for run in (".", " ", "_", "*", "$"):
        verify(Answered(f"The answer is 7 {run * 200_000} hm", "7"))
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (r"first \boxed{1}, then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}} and \boxed{3", r"\frac{1}{2}"),
        (r"nested \boxed{x = \boxed{4}}", r"x = \boxed{4}"),
        ("so\n#### 12\nbye", "12"),
        ("The answer is **5**.", "5"),
        ("Answer: 0.5", "0.5"),
        ("the answer is 3, no: the answer is 4", "4"),
        ("no answer", None),
        ("The answer is", ""),
    ],
)
def test_where_the_answer_stands(completion: str, expected: str | None) -> None:
    assert answer_text(completion, boxed_only=False) == expected


def test_boxed_only() -> None:
    verify = MathVerifier(type="math", boxed_only=True).load()
    assert verify(Answered("The answer is 5", "5")) == UNPARSEABLE_ANSWER
    assert verify(Answered("The answer is \\boxed{5}", "5")) == CORRECT
    assert verify(Answered("\\boxed{5}", "It takes 2 + 3. #### 5")) == CORRECT


def test_an_answer_longer_than_allowed_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(math_answer, "MAX_LENGTH", 3)
    assert verdict("2", "1+1") == CORRECT
    assert verdict("2", "1+1 ") == CORRECT  # white space around it does not count
    assert verdict("2", "1 + 1") == UNPARSEABLE_ANSWER
