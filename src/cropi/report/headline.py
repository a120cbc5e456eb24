"""The paragraph that says what was seen, whichever way it went. Text between backticks names an arm."""

from __future__ import annotations

from cropi.functional.statistics import CONFIDENCE
from cropi.report.results import ArmSummary, Difference, Summary
from cropi.report.wording import count, decimal, difference, listed, percent, seconds, times, with_interval


def headline(summary: Summary) -> str:
    """What the run shows, with intervals and the number of seeds; it claims nothing that the numbers do not hold."""
    trained = [arm for arm in summary.arms if arm.steps]
    sentences = [_accuracies(summary, trained)]
    sentences += [_compared(d, summary) for d in summary.differences]
    sentences += [_speed(summary), _time(summary), _untargeted(summary, trained), _missing(summary), _caveat(summary)]
    return " ".join(sentence for sentence in sentences if sentence)


def _accuracies(summary: Summary, trained: list[ArmSummary]) -> str:
    base = with_interval(summary.base.targeted) if summary.base and summary.base.targeted else ""
    if not trained:
        if not summary.tested:
            return f"This run has no test set, so its accuracy is not measured. {_rewards(summary)}"
        if not base:
            return "Nothing has been evaluated yet."
        return f"No arm has been evaluated yet; the base policy solves {base} of the targeted test questions."
    if not any(arm.last and arm.last.targeted for arm in trained):
        return "No test set is marked as targeted, so there is no accuracy to compare the arms by."
    together = len({arm.steps for arm in trained}) == 1
    parts = [_solves(arm, summary, first=not number, together=together) for number, arm in enumerate(trained)]
    start = f"After {_progress(trained[0], summary)} " if together else ""
    return start + ", ".join(parts) + (f"; the base policy solved {base}." if base else ".")


def _rewards(summary: Summary) -> str:
    rewards = [reward for reward in summary.main.rewards if reward is not None]
    if not rewards:
        return "No training reward has been recorded yet."
    if len(rewards) == 1:
        return f"The mean reward of training is {decimal(rewards[0])} in its first stage."
    return (
        f"The mean reward of training went from {decimal(rewards[0])} in the first stage to {decimal(rewards[-1])} in "
        f"stage {len(summary.main.rewards) - 1}, on the prompts that each stage chose."
    )


def _solves(arm: ArmSummary, summary: Summary, *, first: bool, together: bool) -> str:
    accuracy = with_interval(arm.last.targeted if arm.last else None)
    notes = [_share(summary)] if arm.name == summary.main.name else []
    notes += [] if together else [f"after {_progress(arm, summary)}"]
    name = f"`{arm.name}`" + (f" ({', '.join(notes)})" if notes else "")
    return f"{name} solves {accuracy} of the targeted test questions" if first else f"{name} {accuracy}"


def _share(summary: Summary) -> str:
    prompts = f"{count(summary.pool)} prompts" if summary.pool is not None else "the prompts"
    return f"all {prompts}" if summary.main.name == "full" else f"{percent(summary.fraction)} of {prompts} per stage"


def _progress(arm: ArmSummary, summary: Summary) -> str:
    return f"{arm.steps} steps" if arm.finished else f"{arm.steps} of {summary.total_steps} steps"


def _compared(d: Difference, summary: Summary) -> str:
    """One difference, and whether its interval tells the arms apart."""
    told = "" if d.accuracy.low > 0 or d.accuracy.high < 0 else ", an interval that holds 0: not told apart"
    ends = {arm.steps for arm in summary.arms if arm.name in (d.main, d.other)}
    at = "" if ends == {d.step} else f" after {d.step} steps"
    return f"`{d.main}` − `{d.other}` = {difference(d.accuracy)}{at}{told}."


def _speed(summary: Summary) -> str:
    """Steps to the accuracy at which `full` ended."""
    main, full = summary.main, summary.arm("full")
    if main.name == "full" or full is None or summary.target is None or full.steps_to_target is None or not main.steps:
        return ""
    goal = f"`full`'s final accuracy of {decimal(summary.target)}"
    if full.steps_to_target == 0:
        return "`full` ended no higher than the base policy, so there is no gain of its to reach sooner."
    if main.steps_to_target is None:
        verb = "did not reach" if main.finished else "has not yet reached"
        return f"`{main.name}` {verb} {goal} in {_progress(main, summary)}."
    own = full.steps_to_target
    if main.steps_to_target == own:
        return f"`{main.name}` reached {goal} after {own} steps, as `full` did."
    ratio = own / main.steps_to_target
    how = f"{times(ratio)} fewer steps" if ratio > 1 else f"{times(1 / ratio)} as many"
    when = "after" if own == summary.total_steps else "first after"
    return f"`{main.name}` reached {goal} after {main.steps_to_target} steps, `full` {when} {own} ({how})."


def _time(summary: Summary) -> str:
    """Seconds against `full`'s, everything charged."""
    main, full = summary.main, summary.arm("full")
    if main.name == "full" or full is None or not (main.finished and full.finished):
        return ""
    own, theirs = main.cost.total, full.cost.total
    if not own or not theirs:
        return ""
    text = f"Counting rollouts and selection, the whole run took {times(own / theirs)} `full`'s time"
    if main.seconds_to_target and full.seconds_to_target:
        spent = f"{seconds(main.seconds_to_target)} against {seconds(full.seconds_to_target)}"
        text += f", and {times(main.seconds_to_target / full.seconds_to_target)} up to that accuracy ({spent})"
    return text + "."


def _untargeted(summary: Summary, trained: list[ArmSummary]) -> str:
    values = [(f"`{arm.name}`", arm.last.untargeted) for arm in trained if arm.last and arm.last.untargeted]
    if not values:
        return ""
    if summary.base and summary.base.untargeted:
        values.append(("the base policy", summary.base.untargeted))
    return "On the untargeted questions: " + ", ".join(f"{name} {with_interval(i)}" for name, i in values) + "."


def _missing(summary: Summary) -> str:
    names = [f"`{arm.name}`" for arm in summary.arms if not arm.steps]
    if not names or len(names) == len(summary.arms):
        return ""
    return f"Not evaluated yet: {listed(names)}."


def _caveat(summary: Summary) -> str:
    if summary.base is None and not any(arm.steps for arm in summary.arms):
        return ""
    level = percent(CONFIDENCE)
    return f"One seed ({summary.seed}): the {level} intervals cover the choice of questions, not of seeds."
