"""Answers that hang, crash, fill memory, run code or pass for something else, where a verifier lets them.

Each is (completion, gold answer); none of them is right.
"""

from __future__ import annotations

import re
from pathlib import Path

_TEXT = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8")
# Code; not a number, another one, or more than one; numbers that nobody can write down, and work without end.
CODE, ODD, ENDLESS = (
    part.splitlines()[1:] for part in re.split(r"(?=^# (?:code|odd|endless)$)", _TEXT, flags=re.M)[1:]
)

BYTES = [
    "\x00", "7\x00", "\x007", "\x00" * 1000, "\u202e8\u202c", "\u200f8", "\u0668", "\uff18", "\U0001d7d8", "\u2467",
    "\U0001f600", "\u516b", "\xbd", "7\u0338", "8\u200b", "e\u0301" * 50, "\u202e" * 100, "\ufeff8", "\x1b[31m8",
    "\x7f", "\r\n" * 50, "\t" * 50, "\u2028" * 9, "8\xad9",
]  # fmt: skip


def expressions(marker: str) -> list[str]:
    """What may stand in a box, or after `answer is`. `marker` is a path that no code may create."""
    found = [code.format(marker) for code in CODE]
    # depth
    pairs = ["\\frac{1}{ }", "\\sqrt{ }", "( )", "[ ]", "{ }", "- ", "\\text{ }", "\\left( \\right)", "| |"]
    for depth in (5, 20, 50, 90, 300, 2000, 20000):
        found += [f"{opening * depth}2{closing * depth}" for opening, closing in (pair.split(" ") for pair in pairs)]
    # length
    found += ["9" * 2_000_000, "0." + "3" * 3_000_000]
    for size in (10, 100, 1000, 100_000):
        ones, twos = ["1"] * size, ["2"] * size
        found += [digit * size for digit in "9x\\{}$"]
        found += ["0." + "0" * size + "1", "1" + "0" * size, ",".join(ones), "(" + ",".join(ones) + ")"]
        found += ["+".join(ones) + "+x", " " * size + "8", "1e" + "9" * min(size, 1000), "a=" * size + "8"]
        found += ["\\cdot ".join(twos) + "\\cdot x"]
    found += BYTES + ODD + [""]
    found += [str(n) for n in range(8, 28)]
    return found


def rows(marker: str, gold: str = "7") -> list[tuple[str, str]]:
    """Completions around every expression, and some that concern the box itself."""
    found = []
    for expression in dict.fromkeys(expressions(marker)):
        found += [(f"so \\boxed{{{expression}}}", gold), (f"The answer is {expression}", gold)]
    found += [(f"\\boxed{{{expression}}}", gold) for expression in ENDLESS]
    found += [("\\boxed{7", "8")]
    texts = [
        "\\boxed{7} no: \\boxed{8}",
        "\\boxed{7}\\boxed{8}",
        "\\boxed{\\boxed{8}}",
        "\\boxed 8",
        "boxed{7}",
        "\\boxed{}",
    ]
    texts += ["\\boxed{" * 500, "\\boxed{8}" * 50_000, "\\boxed{" + "{" * 100_000, "####" * 100_000, "#### 8 " * 50_000]
    return found + [(text, gold) for text in (*texts, "answer: " * 100_000, "<answer>" * 50_000, "", " " * 1_000_000)]
