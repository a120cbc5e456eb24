"""Take figures out of the report of a run or a comparison, as SVG files for the docs.

python benchmarks/figures.py runs/quickstart/report.html research/figures/quickstart
python benchmarks/figures.py runs/suite/compare.html research/figures/suite speedups curves-flops
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

FIGURE = re.compile(r"<svg\b.*?</svg>", re.DOTALL)
NAME = re.compile(r'id="(.+?)-figure_1"')
# A figure inside a page needs no name space and takes the page's colours; a file by itself needs both.
HEAD = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    'style="background: #fff; color: #222" '
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("prefix", type=Path)
    parser.add_argument("names", nargs="*", help="figures to take; all, where none is named")
    arguments = parser.parse_args()
    figures = {}
    for figure in FIGURE.findall(arguments.report.read_text(encoding="utf-8")):
        found = NAME.search(figure)
        assert found is not None, "every figure of a report has a name"
        figures[found[1]] = figure
    unknown = set(arguments.names) - set(figures)
    if unknown:
        parser.error(f"no figure {', '.join(sorted(unknown))}; there are {', '.join(figures)}")
    arguments.prefix.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.names or figures:
        path = arguments.prefix.with_name(f"{arguments.prefix.name}-{name}.svg")
        path.write_text(figures[name].replace("<svg ", HEAD, 1) + "\n", encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
