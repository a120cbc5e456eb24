"""What `cropi audit` found: stored trajectories beside fresh ones, and beside the ceiling that noise sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from cropi.artifacts import read_sealed
from cropi.errors import ArtifactError
from cropi.report.blocks import Block, Picture, Table, Text
from cropi.report.drawing import BLUE, GREY, grid, in_style, new_figure, shortened, svg
from cropi.report.wording import ABSENT

TITLE = "Is the estimate right?"
MAX_PANELS = 6

CAPTION = (
    "Agreement of influence with that of other, fresh trajectories of the same prompts. Stored: from the trajectories "
    "that the run scores. Ceiling: from as many fresh ones. What the ceiling lacks to 1 is noise, what stored lacks to "
    "the ceiling is bias of the estimate. Spearman: of all audited prompts; top: share of the best that both name; "
    "95 % intervals over prompts. Without noise: the correlation that would be left, by reliability. ESS: effective "
    "sample size of the ratios as a share of the tokens; KL: divergence per token, in nats."
)
VARIANTS_CAPTION = (
    "Corrections of the estimate. Bias and variance: mean squares of the stored scores' error, in units of the "
    "variance of the true ones; slope: of stored on true scores, 1 without bias. `token` is the paper's estimate."
)


def audit(folder: Path) -> list[Block]:
    """The section's blocks; none where the run has not been audited. ArtifactError where the file is damaged."""
    path = folder / "audit.json"
    if not path.is_file():
        return []
    try:
        found = read_sealed(path)
        stages = found["stages"]
        share = float(found["settings"]["fraction"])
        drawn = agreement_by_count(stages)
        return [
            Text(_sentence(found)),
            *([Picture(drawn, "Spearman by the number of trajectories, stored and fresh.")] if drawn else []),
            _agreement_table(stages, share),
            _variants_table(stages),
            _gradient_table(stages),
        ]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ArtifactError(
            f"cannot be read ({type(error).__name__}: {error})",
            where=str(path),
            fix="delete it and run `cropi audit` again.",
        ) from None


def _last(found: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The agreement at the largest number of trajectories."""
    return found["by_trajectories"][-1] if found["by_trajectories"] else None


def _sentence(found: Mapping[str, Any]) -> str:
    """What the last policy's agreement says, and what would help."""
    stage = found["stages"][-1]
    known = {name: at for name, part in stage["sets"].items() if (at := _last(part)) is not None}
    if not known:
        return "Too few trajectories were sampled for a ceiling."
    parts, biased = [], []
    for name, at in known.items():
        stored, ceiling = at["off_policy"]["spearman"], at["ceiling"]["spearman"]
        reached = f"where as many fresh ones reach {_number(ceiling['value'])}"
        parts.append(f"{_number(stored['value'])} on {name}, {reached}")
        if None not in (stored["value"], ceiling["low"]) and stored["value"] < ceiling["low"]:
            biased.append(name)
    count = next(iter(known.values()))["trajectories"]
    text = (
        f"At stage {stage['stage']}, the rank correlation of influence from {count} stored trajectories with fresh "
        f"ones is {'; '.join(parts)}. "
    )
    if biased:
        names = ", ".join(biased)
        return f"{text}What is missing is more than noise on {names}: fresher trajectories would help (`refresh`)."
    return f"{text}That is within noise: more trajectories would help more than fresher ones."


@in_style
def agreement_by_count(stages: Sequence[Mapping[str, Any]]) -> str | None:
    """A panel for each policy and validation set; None where there is nothing to draw."""
    panels = [
        (f"stage {stage['stage']}, {shortened(name, 14)}", part["by_trajectories"])
        for stage in stages
        for name, part in stage["sets"].items()
        if part["by_trajectories"]
    ][-MAX_PANELS:]
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(0.4 + 2.2 * rows)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for unused in axes[len(panels) :]:
        unused.remove()
    for panel, (title, found) in zip(axes, panels, strict=False):
        _curves(panel, title, found)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2)
    return svg(figure, "audit")


def _curves(axes: Axes, title: str, found: Sequence[Mapping[str, Any]]) -> None:
    counts = [at["trajectories"] for at in found]
    for side, label, colour, marker in (("off_policy", "stored", BLUE, "o"), ("ceiling", "fresh: ceiling", GREY, "s")):
        known = [(n, at[side]["spearman"]) for n, at in zip(counts, found, strict=True)]
        known = [(n, value) for n, value in known if None not in value.values()]
        axes.plot([n for n, _ in known], [v["value"] for _, v in known], marker=marker, color=colour, label=label)
        axes.fill_between(
            [n for n, _ in known], [v["low"] for _, v in known], [v["high"] for _, v in known], color=colour, alpha=0.15
        )
    axes.set_title(title)
    axes.set(xscale="log", xlabel="trajectories a prompt", ylim=(-0.1, 1.05))
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.minorticks_off()
    grid(axes, "y")


def _agreement_table(stages: Sequence[Mapping[str, Any]], share: float) -> Table:
    header = ["stage", "set", "K", "Spearman stored", "ceiling", f"top {share:.0%} stored", "ceiling", "without noise"]
    header += ["ESS", "KL"]
    rows = []
    for stage in stages:
        for name, part in stage["sets"].items():
            at = _last(part)
            cells = [str(stage["stage"]), name, ABSENT if at is None else str(at["trajectories"])]
            for measure in ("spearman", "top_overlap"):
                cells += [ABSENT if at is None else _interval(at[side][measure]) for side in ("off_policy", "ceiling")]
            cells.append(_number(part["overall"]["pearson_without_noise"]))
            rows.append([*cells, _number(stage["drift"]["ratio_ess"]), _number(stage["drift"]["kl"], 3)])
    return Table(CAPTION, header, rows, left=2)


def _variants_table(stages: Sequence[Mapping[str, Any]]) -> Table:
    header = ["stage", "set", "variant", "bias", "variance", "slope", "Spearman"]
    rows = [
        [
            str(stage["stage"]),
            name,
            variant,
            *(_interval(parts[key]) for key in ("bias", "variance", "slope")),
            _interval(parts["overall"]["spearman"]),
        ]
        for stage in stages
        for name, part in stage["sets"].items()
        for variant, parts in part["variants"].items()
    ]
    return Table(VARIANTS_CAPTION, header, rows, left=3, collapsed=True)


def _gradient_table(stages: Sequence[Mapping[str, Any]]) -> Table:
    header = ["stage", "prompts", "cosine, stored", "above 0.6", "cosine, ceiling", "above 0.6", "directions"]
    header += ["ceiling", "sketch"]
    rows = []
    for stage in stages:
        cells = [str(stage["stage"]), str(stage["prompts"])]
        for side in ("off_policy", "ceiling"):
            found = stage["gradient_cosine"]
            cells += (
                [ABSENT] * 2
                if found is None
                else [_number(found[side]["median"]), f"{100 * found[side]['above_0.6']:.0f} %"]
            )
        for fact, value in (
            ("direction_cosine", "off_policy"),
            ("direction_cosine", "ceiling"),
            ("projection", "top_overlap"),
        ):
            cells.append(", ".join(_number(part[fact][value]) for part in stage["sets"].values()))
        rows.append(cells)
    caption = (
        "Gradients of single prompts: median cosine between stored and fresh, and between two fresh ones of as many "
        "trajectories. Directions: cosine between the stored and a fresh validation direction, and between "
        "two fresh ones, by set. Sketch: share "
        "of the exact best that the projection finds, by set."
    )
    return Table(caption, header, rows, collapsed=True)


def _interval(found: Mapping[str, float | None]) -> str:
    if found["value"] is None:
        return ABSENT
    return f"{_number(found['value'])} [{_number(found['low'])}, {_number(found['high'])}]"


def _number(value: float | None, digits: int = 2) -> str:
    return ABSENT if value is None else f"{value:.{digits}f}"
