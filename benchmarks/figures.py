"""Take the figures out of a run's report, as SVG files for the docs.

python benchmarks/figures.py runs/quickstart docs/figures/quickstart
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

FIGURE = re.compile(r"<svg\b.*?</svg>", re.DOTALL)
# A figure inside a page needs no name space and takes the page's colours; a file by itself needs both.
HEAD = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    'style="background: #fff; color: #222" '
)
NAMES = ("curves", "sources", "turnover", "scores", "costs")  # in the report's order


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("prefix", type=Path)
    arguments = parser.parse_args()
    figures = FIGURE.findall((arguments.run / "report.html").read_text(encoding="utf-8"))
    arguments.prefix.parent.mkdir(parents=True, exist_ok=True)
    for name, figure in zip(NAMES, figures, strict=True):
        path = arguments.prefix.with_name(f"{arguments.prefix.name}-{name}.svg")
        path.write_text(figure.replace("<svg ", HEAD, 1) + "\n", encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
