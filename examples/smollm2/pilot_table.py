"""Print the pilot's tables: accuracy by step, gains, what was trained on, and the difference five seeds can show.

Reads the `log.jsonl` of folders named CHOICE-SEED. Intervals are 95 % bootstrap intervals over questions, paired
between the evaluations of a run. The spread s between seeds is pooled over the choices. A comparison of n seeds finds,
with a power of 80 % at the 5 % level, the difference (t(0.975, n - 1) + t(0.8, n - 1)) s sqrt(2 / n).
"""

import argparse
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np

STUDENT = {3: (4.303, 1.061), 5: (2.776, 0.941), 8: (2.365, 0.896)}  # t(0.975) and t(0.8) with n - 1 degrees of freedom


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def interval(differences: Any) -> tuple[float, float]:
    """Percentile bootstrap."""
    count = len(differences)
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=2000) @ differences / count
    low, high = np.quantile(drawn, [0.025, 0.975])
    return round(float(low), 3), round(float(high), 3)


def area(evaluations: list[dict[str, Any]]) -> float:
    """Mean targeted accuracy over the steps, by trapezoids."""
    steps = [e["evaluated"] for e in evaluations]
    values = [np.mean(e["by_question"]) for e in evaluations]
    return float(np.trapezoid(values, steps) / (steps[-1] - steps[0]))


def untargeted(evaluation: dict[str, Any]) -> float:
    return float(np.mean(list(evaluation["untargeted"].values())))


def row(name: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
    evaluations = [line for line in lines if "evaluated" in line]
    trained = [line for line in lines if "step" in line]
    before, after = (np.array(evaluations[n]["by_question"]) for n in (0, -1))
    sources: Counter[str] = Counter()
    for line in trained:
        sources.update(line["sources"])
    return {
        "run": name,
        "steps": evaluations[-1]["evaluated"],
        "targeted": [round(float(np.mean(e["by_question"])), 3) for e in evaluations],
        "gain": round(float((after - before).mean()), 3),
        "gain_interval": interval(after - before),
        "greedy": [e["greedy"] for e in evaluations],
        "untargeted": [round(untargeted(e), 3) for e in evaluations],
        "area": round(area(evaluations), 4),
        "relevant_share": round(sources["two-step"] / sum(sources.values()), 3),
        "mixed_share": round(sum(line["mixed"] for line in trained) / sum(sources.values()), 3),
        "generated_tokens": sum(line["tokens"] for line in trained),
        "seconds": [round(sum(line["seconds"][n] for line in trained)) for n in (0, 1)],
    }


def power(rows: list[dict[str, Any]], seeds: int) -> dict[str, Any]:
    """Spread between seeds of the final accuracy and of the area, and the difference that `seeds` of them can show."""
    found: dict[str, Any] = {}
    factor = sum(STUDENT[seeds]) * (2 / seeds) ** 0.5
    for name, value in (("final", lambda r: r["targeted"][-1]), ("area", lambda r: r["area"])):
        groups = defaultdict(list)
        for each in rows:
            groups[each["run"].rsplit("-", 1)[0]].append(value(each))
        several = [values for values in groups.values() if len(values) > 1]
        freedom = sum(len(values) - 1 for values in several)
        if not freedom:
            continue
        spread = (sum(np.var(values) * len(values) for values in several) / freedom) ** 0.5
        found[name] = {"spread": round(float(spread), 4), "degrees_of_freedom": freedom}
        found[name][f"difference_{seeds}_seeds"] = round(float(factor * spread), 4)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of pilot.py")
    parser.add_argument(
        "--seeds", type=int, choices=STUDENT, default=5, help="of the comparison that is planned (default: 5)"
    )
    arguments = parser.parse_args()
    rows = [row(folder.name, read(folder)) for folder in sorted(arguments.runs)]
    for each in rows:
        print(json.dumps(each))
    print(json.dumps(power(rows, arguments.seeds)))


if __name__ == "__main__":
    main()
