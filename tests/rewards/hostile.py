"""Answers that hang, crash, fill memory, run code or pass for something else, where a verifier lets them.

Each is (completion, gold answer); none of them is right.
"""

from __future__ import annotations

CODE = (
    "__import__('os').system('touch {0}')",
    "exec(\"open('{0}','w')\")",
    "eval(\"open('{0}','w')\")",
    "open('{0}', 'w').write('x')",
    "[c for c in ().__class__.__base__.__subclasses__()][0]",
    "(lambda: open('{0}', 'w'))()",
    "getattr(__builtins__, 'open')('{0}', 'w')",
    "Symbol('x').__class__.__mro__[-1].__subclasses__()",
    "print(open('/etc/passwd').read())",
    "\\input{{/etc/passwd}}",
    "\\write18{{touch {0}}}",
    "${{7*7}}",
    "{{{{7*7}}}}",
    "<script>alert(1)</script>",
    "'; DROP TABLE prompts; --",
    "os.system('touch {0}')",
    "breakpoint()",
    "exit()",
    "quit(0)",
    "input('7')",
)


BYTES = [
    "\x00", "7\x00", "\x007", "\x00" * 1000, "\u202e8\u202c", "\u200f8", "\u0668", "\uff18", "\U0001d7d8", "\u2467",
    "\U0001f600", "\u516b", "\xbd", "7\u0338", "8\u200b", "e\u0301" * 50, "\u202e" * 100, "\ufeff8", "\x1b[31m8",
    "\x7f", "\r\n" * 50, "\t" * 50, "\u2028" * 9, "8\xad9",
]  # fmt: skip

# Not a number, another one, or more than one.
ODD = r"""
nan ¦ NaN ¦ inf ¦ -inf ¦ Infinity ¦ \infty ¦ -\infty ¦ \infty - \infty ¦ \infty/\infty ¦ 0/0 ¦ 1/0 ¦ \frac{1}{0}
\frac{0}{0} ¦ zoo ¦ oo ¦ 0^0 ¦ 0^{-1} ¦ \ln 0 ¦ \tan(\pi/2) ¦ i ¦ \sqrt{-1} ¦ 8,0 ¦ 8.000,5 ¦ 7 000 ¦ 8'000
0x8 ¦ 0b111 ¦ 0o8 ¦ 7e0e0 ¦ 8_0 ¦ +-7 ¦ --8 ¦ 8- ¦ 8..0 ¦ . ¦ - ¦ + ¦ 6 7 ¦ 6, 7 ¦ 6 or 7 ¦ 6 and 7 ¦ 7 or 8
{6,7} ¦ [6,7] ¦ (6,7) ¦ x=6 ¦ y=x ¦ 8=8 ¦ 0=0 ¦ x=x ¦ 7<8 ¦ 6\frac{1}{2} ¦ 6 1/2 ¦ 1 6/7 ¦ 7 1/7 ¦ \frac{7}{2}
7/2 ¦ 8\% ¦ 800\% ¦ 0.07 ¦ 7\pm 1 ¦ \pm 7 ¦ \approx 8 ¦ \neq 7 ¦ \not 7 ¦ > 7 ¦ \le 7 ¦ \text{not } 7 ¦ not 7
never ¦ True ¦ None ¦ VIII ¦ 7cm^2x ¦ 7x ¦ x7 ¦ 7\text{ or }8 ¦ 7\text{ is wrong; it is }8 ¦ 7\text{ (wrong), 8}
7\text{ or so} ¦ 7 or so ¦ 7_{\text{wrong}} ¦ **8** ¦ __8__ ¦ `8` ¦ *8* ¦ ~~7~~8 ¦ # 8 ¦ - 8 ¦ | 8 |
\begin{pmatrix} 8 \\ 9 \end{pmatrix} ¦ \begin{cases} 8 \\ 9 \end{cases} ¦ \begin{align} 8 \\ 9 \end{align}
\begin{array} 8 \\ 9 \end{array} ¦ \begin{tikzpicture} 8 \end{tikzpicture} ¦ \def\x{\x\x}\x
\loop\iftrue\repeat ¦ \newcommand{\a}{\a\a}\a ¦ \csname x ¦ \relax
"""


# Numbers that nobody can write down, and work without end.
ENDLESS = r"""
9^{9^{9}} ¦ 9^{9^{9^{9}}} ¦ 9**9**9**9**9 ¦ 9^9^9^9 ¦ (10^{10})! ¦ \frac{1}{9^{9^9}} ¦ 0.5^{10^{9}}
\Gamma(10^{9}) ¦ (x+y+z)^{200} ¦ \sum_{k=1}^{9999} k! ¦ \{9^{9^9}\} ¦ x=9^{9^9} ¦ 99!! ¦ 99999999!
\binom{10000000}{5000000} ¦ \binom{100000000000000}{50000000000000} ¦ \sum_{k=1}^{100000000} k^{k}
\prod_{k=1}^{100000000} k ¦ \int_0^{1} x^x e^{x^x} dx
\sin \sin \sin \sin \sin \sin \sin \sin \sin \sin \sin \sin \sin \sin \sin \sin \sin \sin \sin \sin 2
"""


def listed(text: str) -> list[str]:
    """What a bar or the end of a line ends."""
    return [piece.strip() for line in text.strip().split("\n") for piece in line.split("¦")]


def nested(opening: str, inner: str, closing: str, depth: int) -> str:
    return opening * depth + inner + closing * depth


def expressions(marker: str) -> list[str]:
    """What may stand in a box, or after `answer is`. `marker` is a path that no code may create."""
    found = [code.format(marker) for code in CODE]
    # depth
    for depth in (5, 20, 50, 90, 300, 2000, 20000):
        found += [
            nested("\\frac{1}{", "2", "}", depth),
            nested("\\sqrt{", "2", "}", depth),
            nested("(", "2", ")", depth),
            nested("[", "2", "]", depth),
            nested("{", "2", "}", depth),
            nested("-", "2", "", depth),
            nested("\\text{", "2", "}", depth),
            nested("\\left(", "2", "\\right)", depth),
            nested("|", "2", "|", depth),
        ]
    # length
    found += ["9" * 2_000_000, "0." + "3" * 3_000_000]
    for size in (10, 100, 1000, 100_000):
        found += [
            "9" * size,
            "0." + "0" * size + "1",
            "1" + "0" * size,
            ",".join(["1"] * size),
            "(" + ",".join(["1"] * size) + ")",
            "+".join(["1"] * size) + "+x",
            "x" * size,
            "\\" * size,
            "{" * size,
            "}" * size,
            "$" * size,
            " " * size + "8",
            "1e" + "9" * min(size, 1000),
            "a=" * size + "8",
            "\\cdot ".join(["2"] * size) + "\\cdot x",
        ]
    found += BYTES + listed(ODD) + [""]
    found += [str(n) for n in range(8, 28)]
    return found


def rows(marker: str, gold: str = "7") -> list[tuple[str, str]]:
    """Completions around every expression, and some that concern the box itself."""
    found = []
    for expression in dict.fromkeys(expressions(marker)):
        found += [(f"so \\boxed{{{expression}}}", gold), (f"The answer is {expression}", gold)]
    found += [(f"\\boxed{{{expression}}}", gold) for expression in listed(ENDLESS)]
    found += [
        ("\\boxed{7} no: \\boxed{8}", gold),
        ("\\boxed{7}\\boxed{8}", gold),
        ("\\boxed{\\boxed{8}}", gold),
        ("\\boxed{7", "8"),
        ("\\boxed 8", gold),
        ("boxed{7}", gold),
        ("\\boxed{}", gold),
        ("\\boxed{" * 500, gold),
        ("\\boxed{8}" * 50_000, gold),
        ("\\boxed{" + "{" * 100_000, gold),
        ("####" * 100_000, gold),
        ("#### 8 " * 50_000, gold),
        ("answer: " * 100_000, gold),
        ("<answer>" * 50_000, gold),
        ("", gold),
        (" " * 1_000_000, gold),
    ]
    return found
