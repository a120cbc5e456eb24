import json

import pytest

from cropi.report.summary import headline, summarise
from cropi.streams import append_jsonl

STEADY = {2: ("1000", "00", "10"), 4: ("1100", "00", "10")}


def summary_of(space):
    return summarise(space.config, space)


# -- costs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("strategy", "seconds"), [("learnability", 10.0), ("pass_rate", 10.0), ("full", None)])
def test_only_strategies_that_read_the_trajectories_pay_for_them(fabricate, strategy, seconds):
    assert summary_of(fabricate(strategy=strategy, evaluations={})).cost.collect == seconds


def test_collection_at_a_later_stage_is_charged_whatever_the_strategy(fabricate):
    space = fabricate(strategy="full")
    append_jsonl(space.stages.ledger, {"phase": "collect", "stage": 1, "tokens": 20, "seconds": 5.0})
    cost = summary_of(space).cost
    assert (cost.collect, cost.collect_tokens) == (5.0, 20)


# -- quality of the scores ---------------------------------------------------------------------------------------------


def test_reliability_and_drift_by_stage(fabricate):
    stages = summary_of(fabricate()).as_json()["stages"]
    assert [stage["stage"] for stage in stages] == [0, 1]
    last = json.loads(json.dumps(stages[1]))
    assert last["reliability"] == {
        "by_set": {"alpha": 0.5, "beta": 0.25},
        "best": 3,  # a quarter of twelve
        "expected_overlap": 0.6,
        "chance": 0.375,
    }
    assert last["drift"] == {"ratio_ess": 0.75, "clip_share": 0.125, "kl": 0.02}
    assert last["direction_reliability"] == {"alpha": 0.9, "beta": None}


def test_what_was_not_measured_is_null(fabricate):
    stages = summary_of(fabricate(errors=False)).as_json()["stages"]
    assert [stage["reliability"] for stage in stages] == [None, None]
    assert stages[0]["drift"]["ratio_ess"] == 1.0


def test_fewer_prompts_with_signal_than_places(fabricate):
    settings = {"select": {"strategy": {"type": "influence"}, "fraction": 0.9}}
    assert summary_of(fabricate(settings=settings)).stages[0].reliability.best == 8  # of eleven places


# -- a run that is not finished ----------------------------------------------------------------------------------------


def test_before_training_there_is_the_base_policy(fabricate):
    summary = summary_of(fabricate(stages_scored=0, stages_selected=0, trained=False))
    assert summary.pool == 12
    assert summary.base.targeted.mean == 0.125
    assert headline(summary).startswith("The base policy solves 0.12 [")
    assert "Training has not been evaluated yet." in headline(summary)
    assert (summary.last, summary.final, summary.cost.train) == (None, {}, None)


# -- the paragraph -----------------------------------------------------------------------------------------------------


def test_the_paragraph_of_a_finished_run(fabricate):
    text = headline(summary_of(fabricate()))
    assert text.startswith("After 8 steps, `influence` solves 1.00 [")
    assert "It trained on 25 % of 12 prompts per stage." in text
    assert "the base policy solved 0.12 [" in text
    assert "took 51.5 % of the run's time." in text  # 17 s of 33 s
    assert "One seed (3): the 95 % intervals cover the choice of questions, not of seeds." in text


def test_the_paragraph_of_an_interrupted_run(fabricate):
    text = headline(summary_of(fabricate(evaluations=STEADY)))
    assert text.startswith("After 4 of 8 steps, `influence` solves 0.25")
    assert "of the run's time" not in text


def test_a_run_without_targeted_sets_says_so(fabricate):
    builtin = {"type": "builtin", "families": ["sum"], "count": 4}
    test = {name: {"targeted": False, "sources": [builtin]} for name in ("near", "far", "other")}
    prompts = {"train": [builtin], "validation": {"alpha": [builtin], "beta": [builtin]}, "test": test}
    text = headline(summary_of(fabricate(settings={"prompts": prompts})))
    assert text.startswith("No test set is marked as targeted")
    assert "Of the untargeted questions it solves 0.83" in text
