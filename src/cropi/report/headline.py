"""The headline: one paragraph with the result of a run. Text between backticks is a name."""

from __future__ import annotations

from cropi.functional.bootstrap import CONFIDENCE
from cropi.report.results import Summary
from cropi.report.wording import count, decimal, percent, share, with_interval


def headline(summary: Summary) -> str:
    """Say what the run reached, with intervals and the number of seeds."""
    sentences = [_accuracy(summary), _untargeted(summary), _cost(summary), _caveat(summary)]
    return " ".join(sentence for sentence in sentences if sentence)


def _accuracy(summary: Summary) -> str:
    base = with_interval(summary.base.targeted) if summary.base and summary.base.targeted else ""
    if summary.last is None:
        if not summary.tested:
            return f"This run has no test set, so its accuracy is not measured. {_rewards(summary)}"
        if not base:
            return "Nothing has been evaluated yet."
        return f"Training has not been evaluated yet; the base policy solves {base} of the targeted test questions."
    if summary.last.targeted is None:
        return "No test set is marked as targeted, so there is no targeted accuracy."
    solved = with_interval(summary.last.targeted)
    start = f"After {_progress(summary)}, `{summary.strategy}` ({_share(summary)}) solves {solved}"
    return f"{start} of the targeted test questions" + (f"; the base policy solved {base}." if base else ".")


def _rewards(summary: Summary) -> str:
    rewards = [reward for reward in summary.rewards if reward is not None]
    if not rewards:
        return "No training reward has been recorded yet."
    if len(rewards) == 1:
        return f"The mean reward of training is {decimal(rewards[0])} in its first stage."
    return (
        f"The mean reward of training went from {decimal(rewards[0])} in the first stage to {decimal(rewards[-1])} in "
        f"stage {len(summary.rewards) - 1}, on the prompts that each stage chose."
    )


def _share(summary: Summary) -> str:
    prompts = f"{count(summary.pool)} prompts" if summary.pool is not None else "the prompts"
    return f"pool of {prompts}" if summary.fraction is None else f"{percent(summary.fraction)} of {prompts} per stage"


def _progress(summary: Summary) -> str:
    return f"{summary.steps} steps" if summary.finished else f"{summary.steps} of {summary.total_steps} steps"


def _untargeted(summary: Summary) -> str:
    if summary.last is None or summary.last.untargeted is None:
        return ""
    text = f"Of the untargeted questions it solves {with_interval(summary.last.untargeted)}"
    base = summary.base.untargeted if summary.base else None
    return text + (f"; the base policy solved {with_interval(base)}." if base else ".")


def _cost(summary: Summary) -> str:
    """Share of the time that was not training."""
    cost = summary.cost
    if not summary.finished or not cost.total or cost.train is None:
        return ""
    return f"Collecting, scoring and selecting took {share(1 - cost.train / cost.total)} of the run's time."


def _caveat(summary: Summary) -> str:
    if summary.base is None and not summary.steps:
        return ""
    level = percent(CONFIDENCE)
    return f"One seed ({summary.seed}): the {level} intervals cover the choice of questions, not of seeds."
