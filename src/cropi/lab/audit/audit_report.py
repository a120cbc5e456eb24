"""The report of an audit: stored trajectories against fresh ones, and against the ceiling that noise sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from cropi.functional.intervals import Interval
from cropi.lab.number_format import code, listed
from cropi.report.blocks import Block, Picture, Section, Table, Text
from cropi.report.figures import BLUE, GREY, grid, in_style, panel_grid, shortened, svg
from cropi.report.wording import ABSENT, decimal, percent, with_interval

MAX_PANELS = 6

AGREEMENT_CAPTION = (
    "Agreement of influence with influence from other, fresh trajectories of the same prompts. Stored: from the "
    "trajectories that the run scores. Ceiling: from as many fresh ones. 1 − ceiling is noise; ceiling − stored is "
    "bias. Spearman: over all audited prompts. Top: share of the best prompts that both name. Brackets: 95 % intervals "
    "over prompts. Without noise: the correlation corrected for reliability. ESS: effective sample size of the ratios "
    "as a share of the tokens. KL: divergence per token, in nats."
)
VARIANTS_CAPTION = (
    "Corrections of the estimate; `token` is the paper's. Bias and variance: mean squares of the stored scores' error, "
    "divided by the variance of the true scores. Slope: of stored on true scores, 1 without bias."
)
GRADIENT_CAPTION = (
    "Gradients of single prompts: median cosine between stored and fresh, and between two fresh ones from as many "
    "trajectories. Directions: cosine between the stored and a fresh validation direction, and between two fresh ones, "
    "by set. Sketch: share of the exact best prompts that the projection finds, by set."
)

Stages = Sequence[Mapping[str, Any]]


def audit_sections(result: Mapping[str, Any]) -> list[Section]:
    """Lay out the result of an audit."""
    stages = result["stages"]
    drawn = agreement_by_count(stages)
    figure: list[Block] = [Picture(drawn, "Spearman by the number of trajectories.")] if drawn else []
    agreement = _agreement_table(stages, float(result["settings"]["fraction"]))
    return [
        Section("Is the estimate right?", [Text(_headline(stages[-1]), lead=True), *figure, agreement]),
        Section("Corrections of the estimate", [_variants_table(stages)]),
        Section("Gradients and projection", [_gradient_table(stages)]),
    ]


def _largest_count(one_set: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The agreement at the largest number of trajectories."""
    return one_set["by_trajectories"][-1] if one_set["by_trajectories"] else None


def _headline(stage: Mapping[str, Any]) -> str:
    """Say how far stored trajectories fall short of fresh ones at one stage, and what would help."""
    known = {name: at for name, part in stage["sets"].items() if (at := _largest_count(part)) is not None}
    if not known:
        return "Too few trajectories were sampled for a ceiling."
    reached, biased = [], []
    for name, at in known.items():
        stored, ceiling = at["off_policy"]["spearman"], at["ceiling"]["spearman"]
        reached.append(f"{decimal(stored['value'])} of at most {decimal(ceiling['value'])} on {code(name)}")
        if None not in (stored["value"], ceiling["low"]) and stored["value"] < ceiling["low"]:
            biased.append(code(name))
    text = f"At stage {stage['stage']}, stored trajectories reach a rank correlation of {listed(reached)}."
    if biased:
        return f"{text} The gap exceeds noise on {listed(biased)}: fresher trajectories would help (`cropi import`)."
    return f"{text} The gap is within noise: more trajectories would help more than fresher ones."


@in_style
def agreement_by_count(stages: Stages) -> str | None:
    """Draw a panel for each policy and validation set; None where there is nothing to draw."""
    found = [
        (f"stage {stage['stage']}, {shortened(name, 14)}", part["by_trajectories"])
        for stage in stages
        for name, part in stage["sets"].items()
        if part["by_trajectories"]
    ][-MAX_PANELS:]
    if not found:
        return None
    figure, panels = panel_grid(len(found), 2.2)
    for panel, (title, curves) in zip(panels, found, strict=True):
        _curves(panel, title, curves)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2)
    return svg(figure, "audit")


def _curves(axes: Axes, title: str, found: Sequence[Mapping[str, Any]]) -> None:
    counts = [at["trajectories"] for at in found]
    for side, label, colour, marker in (("off_policy", "stored", BLUE, "o"), ("ceiling", "fresh: ceiling", GREY, "s")):
        known = [(n, at[side]["spearman"]) for n, at in zip(counts, found, strict=True)]
        known = [(n, value) for n, value in known if None not in value.values()]
        at, low, high = [n for n, _ in known], [v["low"] for _, v in known], [v["high"] for _, v in known]
        axes.plot(at, [v["value"] for _, v in known], marker=marker, color=colour, label=label)
        axes.fill_between(at, low, high, color=colour, alpha=0.15)
    axes.set_title(title)
    axes.set(xscale="log", xlabel="trajectories a prompt", ylim=(-0.1, 1.05))
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.minorticks_off()
    grid(axes, "y")


def _agreement_table(stages: Stages, share: float) -> Table:
    top = f"top {percent(share)} stored"
    header = ["stage", "set", "K", "Spearman stored", "ceiling", top, "ceiling", "without noise", "ESS", "KL"]
    rows = []
    for stage in stages:
        for name, part in stage["sets"].items():
            at = _largest_count(part)
            cells = [str(stage["stage"]), name, ABSENT if at is None else str(at["trajectories"])]
            for measure in ("spearman", "top_overlap"):
                cells += [ABSENT if at is None else _interval(at[side][measure]) for side in ("off_policy", "ceiling")]
            cells.append(decimal(part["overall"]["pearson_without_noise"]))
            rows.append([*cells, decimal(stage["drift"]["ratio_ess"]), decimal(stage["drift"]["kl"], 3)])
    return Table(AGREEMENT_CAPTION, header, rows, left=2)


def _variants_table(stages: Stages) -> Table:
    header = ["stage", "set", "variant", "bias", "variance", "slope", "Spearman"]
    rows = []
    for stage in stages:
        for name, part in stage["sets"].items():
            for variant, found in part["variants"].items():
                cells = [_interval(found[key]) for key in ("bias", "variance", "slope")]
                rows.append([str(stage["stage"]), name, variant, *cells, _interval(found["overall"]["spearman"])])
    return Table(VARIANTS_CAPTION, header, rows, left=3)


def _gradient_table(stages: Stages) -> Table:
    header = ["stage", "prompts", "cosine, stored", "above 0.6", "cosine, ceiling", "above 0.6", "directions"]
    rows = []
    for stage in stages:
        cells, found = [str(stage["stage"]), str(stage["prompts"])], stage["gradient_cosine"]
        for side in ("off_policy", "ceiling"):
            cells += (
                [ABSENT] * 2 if found is None else [decimal(found[side]["median"]), percent(found[side]["above_0.6"])]
            )
        sides = (("direction_cosine", "off_policy"), ("direction_cosine", "ceiling"), ("projection", "top_overlap"))
        for fact, side in sides:
            cells.append(", ".join(decimal(part[fact][side]) for part in stage["sets"].values()))
        rows.append(cells)
    return Table(GRADIENT_CAPTION, [*header, "ceiling", "sketch"], rows)


def _interval(found: Mapping[str, float | None]) -> str:
    value, low, high = (found[key] for key in ("value", "low", "high"))
    if value is None:
        return ABSENT
    if low is None or high is None:
        return decimal(value)
    return with_interval(Interval(value, low, high))
