"""Turn the logs of compare.py into the table that `cropi compare --results` reads, and print what it does not show.

Printed, by pool and way over its seeds: share of the chosen prompts that were relevant, agreement of the directions,
passes by phase relative to training's, seconds a step, and steps and FLOPs to the final targeted accuracy of `full`
with the same seed (first crossing by straight lines; the run's end where it is never reached). Ratios are geometric
means with a 95 % interval over seeds (t distribution, paired). `inf` stands where `full` ended no higher than it began:
there is nothing to reach.
"""

import argparse
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cropi.artifacts import write_table
from cropi.lab.compare.curve_statistics import first_crossings
from cropi.lab.compare.result_table import RESULTS, RESULTS_FILE
from cropi.report.costs import FORWARD

SET = "two-step"
STUDENT = {1: np.inf, 2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}  # t(0.975) by seeds
PHASES = ("collect", "score", "train")
Line = dict[str, Any]
Logs = dict[tuple[str, str, int], list[Line]]  # by pool, way and seed


def read(folder: Path) -> Logs:
    """Logs of POOL/WAY-SEED in a folder."""
    found: Logs = {}
    for path in sorted(folder.glob("*/*/log.jsonl")):
        way, _, seed = path.parent.name.rpartition("-")
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found[path.parent.parent.name, way, int(seed)] = lines
    return found


def is_finished(lines: list[Line]) -> bool:
    return any(line.get("evaluated") == lines[0]["settings"]["steps"] for line in lines)


def costs(lines: list[Line]) -> list[dict[str, float]]:
    """Cumulative costs at every evaluation, in the columns of the table. The first comes before anything is paid."""
    parameters, found = lines[0]["matrix_parameters"], list[dict[str, float]]()
    total: dict[str, float] = dict.fromkeys(RESULTS.names[8:], 0)
    for line in lines:
        if "evaluated" in line:
            found.append(dict(total) if line["evaluated"] else dict.fromkeys(total, 0))
        for phase, passes in line.get("passes", {}).items():
            total[f"{phase}_flops"] += FORWARD * parameters * passes
            total["flops"] += FORWARD * parameters * passes
        for phase, seconds in line.get("seconds", {}).items():
            total[f"{phase if phase in PHASES else 'train'}_seconds"] += seconds
        for phase in PHASES:
            total[f"{phase}_tokens"] += line.get(f"{phase}_tokens", 0)
    return found


def rows(logs: Logs) -> Iterator[Line]:
    """Rows of the table: one for every evaluation and test set."""
    for (pool, way, seed), lines in logs.items():
        evaluations = [line for line in lines if "evaluated" in line]
        for evaluation, paid in zip(evaluations, costs(lines), strict=True):
            for name, correct in evaluation["by_question"].items():
                own = {"scenario": pool, "strategy": way, "seed": seed, "step": evaluation["evaluated"], "set": name}
                digest = hashlib.sha256(f"{name} {len(correct)}".encode()).hexdigest()[:16]
                yield own | {"targeted": name == SET, "questions": digest, "correct": correct} | paid


def crossing(lines: list[Line], full: list[Line]) -> dict[str, float]:
    """Steps and FLOPs to the final targeted accuracy of `full`; infinite where that is no gain."""
    own, theirs = (
        np.array([np.mean(line["by_question"][SET]) for line in each if "evaluated" in line]) for each in (lines, full)
    )
    if theirs[-1] <= theirs[0]:
        return {"steps": np.inf, "flops": np.inf}
    place = float(first_crossings(own[None, None], theirs[-1:])[0, 0])
    place = len(own) - 1 if np.isnan(place) else place
    steps = [line["evaluated"] for line in lines if "evaluated" in line]
    paid = [each["flops"] for each in costs(lines)]
    return {name: float(np.interp(place, range(len(own)), v)) for name, v in (("steps", steps), ("flops", paid))}


def ratio(values: list[float]) -> list[float]:
    """Geometric mean with its 95 % interval by the t distribution."""
    logs = np.log(values)
    if not np.isfinite(logs).all():
        return [float("inf")]
    error = STUDENT[len(logs)] * (float(logs.std(ddof=1)) / len(logs) ** 0.5 if len(logs) > 1 else 1.0)
    return [round(float(value), 3) for value in np.exp([logs.mean(), logs.mean() - error, logs.mean() + error])]


def summary(pool: str, way: str, logs: Logs) -> Line:
    """What cropi's report does not have."""
    own = {seed: lines for (p, w, seed), lines in logs.items() if (p, w) == (pool, way)}
    sources, passes = Counter[str](), Counter[str]()
    agreements, cosines = defaultdict[int, list[float]](list), defaultdict[int, list[float]](list)
    seconds = list[float]()
    for line in (line for lines in own.values() for line in lines):
        sources.update(line.get("sources", {}))
        passes.update(line.get("passes", {}))
        if "cosine_of_halves" in line:
            cosines[line["validation"]].append(line["cosine_of_halves"])
        if "agreement" in line:
            agreements[line["validation"]].append(line["agreement"])
        seconds += [sum(line["seconds"].values())] if "step" in line else []
    found: Line = {
        "pool": pool,
        "way": way,
        "seeds": len(own),
        "final": round(float(np.mean([costed_final(lines) for lines in own.values()])), 4),
        "relevant_share": round(sources[SET] / max(1, sum(sources.values())), 3),
        "passes_relative_to_training": {p: round(passes[p] / passes["train"], 3) for p in passes if p != "train"},
        "seconds_a_step": round(float(np.mean(seconds)), 1),
    }
    for name, by_step in (("agreement", agreements), ("cosine_of_halves", cosines)):
        if by_step:
            found[name] = {step: round(float(np.mean(values)), 3) for step, values in sorted(by_step.items())}
    paired = [(logs[pool, "full", s], own[s]) for s in sorted(own) if (pool, "full", s) in logs]
    if way != "full" and paired:
        pairs = [(crossing(full, full), crossing(lines, full)) for full, lines in paired]
        for name in ("steps", "flops"):
            found[f"{name}_of_full_by_own"] = ratio([theirs[name] / max(mine[name], 1e-9) for theirs, mine in pairs])
    return found


def costed_final(lines: list[Line]) -> float:
    return float(np.mean([line for line in lines if "evaluated" in line][-1]["by_question"][SET]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="the --output of compare.py; the table is written into it")
    parser.add_argument("--seeds", type=int, nargs="*", help="only these (default: all)")
    arguments = parser.parse_args()
    logs = {
        key: lines
        for key, lines in read(arguments.runs).items()
        if is_finished(lines) and (not arguments.seeds or key[2] in arguments.seeds)
    }
    write_table(arguments.runs / RESULTS_FILE, rows(logs), RESULTS)
    for pool, way in dict.fromkeys(key[:2] for key in logs):
        print(json.dumps(summary(pool, way, logs)))


if __name__ == "__main__":
    main()
