import json

import pytest

from cropi.artifacts import append_jsonl
from cropi.report.summary import headline, summarise

FLAT = dict.fromkeys((2, 4, 6, 8), ("1000", "00", "10"))  # stays at the base policy's 0.125
STEADY = {2: ("1000", "00", "10"), 4: ("1100", "00", "10"), 6: ("1100", "10", "10"), 8: ("1110", "10", "10")}
EARLY = {2: ("1110", "10", "10"), 4: ("1110", "10", "10"), 6: ("1110", "10", "10"), 8: ("1110", "10", "10")}
LATE = {2: ("1000", "00", "10"), 4: ("1000", "00", "10"), 6: ("1110", "10", "10"), 8: ("1111", "11", "10")}


def summary_of(space):
    return summarise(space.config, space)


# -- accuracies --------------------------------------------------------------------------------------------------------


def test_a_curve_is_the_mean_of_the_sets_and_starts_at_the_base_policy(fabricate):
    main = summary_of(fabricate()).main
    assert main.name == "influence"
    assert [point.step for point in main.curve] == [0, 2, 4, 6, 8]
    # near 1/4, far 0; then 2/4 and 1/2; 3/4 and 1/2; 1 and 1/2; 1 and 1
    assert [point.targeted.mean for point in main.curve] == [0.125, 0.5, 0.625, 0.75, 1.0]
    assert [point.untargeted.mean for point in main.curve] == [0.5] * 5
    assert main.final["near"]["greedy"].mean == 1.0
    assert set(main.final["near"]) == {"greedy"}  # nothing was sampled


def test_intervals_hold_the_mean_and_stay_within_zero_and_one(fabricate):
    for arm in summary_of(fabricate()).arms:
        for point in arm.curve:
            assert 0 <= point.targeted.low <= point.targeted.mean <= point.targeted.high <= 1


def test_differences_are_paired_by_question(fabricate):
    differences = {d.other: d for d in summary_of(fabricate()).differences}
    # near: 1111 against 1110 is 1/4, far: 11 against 10 is 1/2
    assert differences["full"].accuracy.mean == pytest.approx(0.375)
    assert (differences["full"].step, differences["full"].questions) == (8, 6)
    # near: only ever ahead, so no redraw can show the other arm ahead
    assert differences["full"].accuracy.low >= 0


def test_arms_that_answer_the_same_questions_differ_by_nothing(fabricate):
    space = fabricate(evaluations={"influence": STEADY, "full": STEADY, "random": STEADY})
    accuracy = summary_of(space).differences[0].accuracy
    assert (accuracy.mean, accuracy.low, accuracy.high) == (0.0, 0.0, 0.0)


def test_steps_to_the_target(fabricate):
    summary = summary_of(fabricate())
    assert summary.target == 0.625
    assert {arm.name: arm.steps_to_target for arm in summary.arms} == {"influence": 4, "full": 8, "random": None}


def test_without_a_finished_full_there_is_no_target(fabricate):
    unfinished = {"influence": EARLY, "full": {2: STEADY[2], 4: STEADY[4]}}
    summary = summary_of(fabricate(evaluations=unfinished))
    assert summary.target is None
    assert summary.main.steps_to_target is None
    assert summary_of_difference_steps(summary) == {"full": 4}


def summary_of_difference_steps(summary):
    return {d.other: d.step for d in summary.differences}


# -- costs -------------------------------------------------------------------------------------------------------------


def test_costs_are_charged_to_those_who_cause_them(fabricate):
    costs = {arm.name: arm.cost for arm in summary_of(fabricate()).arms}
    influence, full = costs["influence"], costs["full"]
    # two stages of 3 s scoring and 0.5 s selecting, eight steps of 2 s and 30 tokens, four evaluations of 1.5 s
    assert (influence.collect, influence.score, influence.select, influence.train) == (10.0, 6.0, 1.0, 16.0)
    assert (influence.total, influence.evaluate) == (33.0, 6.0)
    assert (influence.collect_tokens, influence.train_tokens, influence.tokens) == (144, 240, 384)
    assert influence.selection_share == pytest.approx(7 / 16)
    assert (full.collect, full.score, full.total, full.tokens) == (None, None, 17.0, 240)
    assert costs["random"].collect is None


@pytest.mark.parametrize("strategy", ["learnability", "pass_rate"])
def test_every_strategy_that_reads_the_trajectories_pays_for_them(fabricate, strategy):
    space = fabricate(strategies=("full", strategy), evaluations={})
    assert summary_of(space).arm(strategy).cost.collect == 10.0


def test_the_cost_up_to_the_target_counts_the_stages_begun(fabricate):
    summary = summary_of(fabricate())
    # influence, 4 steps: collect 10 + score 3 + select 0.5 of stage 0 + 4 x 2 s; full: all of it
    assert summary.main.seconds_to_target == 21.5
    assert summary.arm("full").seconds_to_target == 17.0
    assert summary.arm("random").seconds_to_target is None


def test_what_was_collected_for_an_arm_alone_is_charged_to_it_alone(fabricate):
    space = fabricate(
        strategies=("influence", "full", "learnability"), evaluations={"influence": EARLY, "full": STEADY}
    )
    entry = {"arm": "influence", "phase": "collect", "stage": 1, "tokens": 20, "seconds": 5.0}
    append_jsonl(space.folder / "ledger.jsonl", entry)
    summary = summary_of(space)
    assert (summary.main.cost.collect, summary.main.cost.collect_tokens) == (15.0, 164)
    assert summary.arm("learnability").cost.collect == 10.0
    assert summary.arm("full").cost.collect is None
    # The target is reached after two steps, in stage 0: 10 + 3 + 0.5 + 2 x 2, without what stage 1 collected.
    assert summary.main.seconds_to_target == 17.5


def test_shared_work_is_told_once(fabricate):
    assert summary_of(fabricate()).shared_seconds == {"collect": 10.0, "evaluate": 4.0}


# -- what the scores are worth -----------------------------------------------------------------------------------------


def test_reliability_and_drift_by_stage(fabricate):
    arms = {arm["name"]: arm for arm in summary_of(fabricate()).as_json()["arms"]}
    assert [stage["stage"] for stage in arms["influence"]["stages"]] == [0, 1]
    last = json.loads(json.dumps(arms["influence"]["stages"][1]))
    assert last["reliability"] == {
        "by_set": {"alpha": 0.5, "beta": 0.25},
        "best": 3,  # a quarter of twelve
        "expected_overlap": 0.6,
        "chance": 0.375,
    }
    assert last["drift"] == {"ratio_ess": 0.75, "clip_share": 0.125, "kl": 0.02}
    assert last["direction_reliability"] == {"alpha": 0.9, "beta": None}
    assert list(arms["full"]["stages"]) == []


def test_what_was_not_measured_is_null(fabricate):
    stages = summary_of(fabricate(errors=False)).as_json()["arms"][0]["stages"]
    assert [stage["reliability"] for stage in stages] == [None, None]
    assert stages[0]["drift"]["ratio_ess"] == 1.0


def test_fewer_prompts_with_signal_than_places(fabricate):
    settings = {"select": {"strategy": {"type": "influence"}, "fraction": 0.9}}
    stage = summary_of(fabricate(settings=settings)).main.stages[0]
    assert stage.reliability.best == 8  # of eleven places


# -- a run that is not finished ----------------------------------------------------------------------------------------


def test_an_empty_folder_has_no_numbers(fabricate):
    space = fabricate(collected=False, base=None, stages_scored=0, stages_selected=0, trained=False)
    summary = summary_of(space)
    assert (summary.base, summary.pool, summary.target, summary.differences) == (None, None, None, ())
    assert all(arm.curve == () and arm.cost.total is None for arm in summary.arms)
    assert headline(summary) == "Nothing has been evaluated yet."


def test_before_training_there_is_the_base_policy(fabricate):
    summary = summary_of(fabricate(stages_scored=0, stages_selected=0, trained=False))
    assert summary.pool == 12
    assert summary.base.targeted.mean == 0.125
    assert headline(summary).startswith("No arm has been evaluated yet; the base policy solves 0.12 [")
    assert all(arm.last is None and arm.final == {} and arm.cost.train is None for arm in summary.arms)


def test_an_arm_without_evaluations_is_named_and_nothing_is_made_up_for_it(fabricate):
    summary = summary_of(fabricate(evaluations={"influence": EARLY}))
    assert summary.arm("full").last is None
    assert summary.differences == ()
    assert "Not evaluated yet: `full` and `random`." in headline(summary)
    assert "`full` 0." not in headline(summary)


def test_json_is_plain_and_complete(fabricate):
    for space in (fabricate(), fabricate()):
        summary = summary_of(space)
        again = json.loads(json.dumps(summary.as_json(), allow_nan=False))
        assert [arm["name"] for arm in again["arms"]] == ["influence", "full", "random"]
        assert again["arms"][0]["cost"]["total"] == pytest.approx(summary.main.cost.total)
        assert again["arms"][0]["curve"][0]["targeted"]["mean"] == 0.125
        assert again["differences"][0]["accuracy"]["mean"] == pytest.approx(0.375)


# -- the paragraph -----------------------------------------------------------------------------------------------------


def test_the_paragraph_of_a_win(fabricate):
    text = headline(summary_of(fabricate(evaluations={"influence": EARLY, "full": STEADY, "random": FLAT})))
    assert text.startswith("After 8 steps `influence` (25 % of 12 prompts per stage) solves 0.62 [")
    assert (
        "`influence` reached `full`'s final accuracy of 0.62 after 2 steps, `full` after 8 (4.0× fewer steps)." in text
    )
    assert "Counting rollouts and selection, the whole run took 1.9× `full`'s time" in text
    # 10 + 3 + 0.5 + 2 x 2 = 17.5 s against 17 s
    assert "and 1.0× up to that accuracy (17.5 s against 17.0 s)." in text
    assert "One seed (3): the 95 % intervals cover the choice of questions, not of seeds." in text


def test_the_paragraph_of_a_clear_loss(fabricate):
    text = headline(summary_of(fabricate(evaluations={"influence": FLAT, "full": LATE, "random": FLAT})))
    assert "`influence` − `full` = −0.88 [" in text
    assert "`influence` did not reach `full`'s final accuracy of 1.00 in 8 steps." in text
    assert "fewer" not in text
    assert "up to that accuracy" not in text
    assert "`influence` − `random` = 0.00 [0.00, 0.00], an interval that holds 0: not told apart." in text


def test_the_paragraph_of_a_tie(fabricate):
    text = headline(summary_of(fabricate(evaluations={"influence": STEADY, "full": STEADY, "random": STEADY})))
    assert "`influence` − `full` = 0.00 [0.00, 0.00], an interval that holds 0: not told apart." in text
    assert "`influence` reached `full`'s final accuracy of 0.62 after 8 steps, as `full` did." in text
    assert "fewer" not in text


def test_the_paragraph_of_a_slower_win(fabricate):
    text = headline(summary_of(fabricate(evaluations={"influence": LATE, "full": EARLY, "random": FLAT})))
    assert "reached `full`'s final accuracy of 0.62 after 6 steps, `full` first after 2 (3.0× as many)." in text


def test_a_full_that_learns_nothing_is_no_yardstick(fabricate):
    text = headline(summary_of(fabricate(evaluations={"influence": EARLY, "full": FLAT, "random": FLAT})))
    assert "`full` ended no higher than the base policy, so there is no gain of its to reach sooner." in text
    assert "reached" not in text
    assert "up to that accuracy" not in text


def test_the_paragraph_of_an_interrupted_run(fabricate):
    evaluations = {"influence": {2: STEADY[2], 4: STEADY[4]}, "full": STEADY}
    text = headline(summary_of(fabricate(evaluations=evaluations)))
    assert "`influence` (25 % of 12 prompts per stage, after 4 of 8 steps) solves 0.25" in text
    assert "`full` (after 8 steps) 0.62" in text
    assert "`influence` − `full` = 0.00 [0.00, 0.00] after 4 steps" in text
    assert "`influence` has not yet reached `full`'s final accuracy of 0.62 in 4 of 8 steps." in text
    assert "whole run" not in text
    assert text.count("Not evaluated yet: `random`.") == 1


def test_full_as_the_main_arm_is_not_compared_with_itself(fabricate):
    text = headline(summary_of(fabricate(strategies=("full", "random"), evaluations={"full": STEADY, "random": FLAT})))
    assert text.startswith("After 8 steps `full` (all 12 prompts) solves 0.62")
    assert "`full` − `random` = +0.50" in text
    assert "final accuracy" not in text


def test_a_run_without_targeted_sets_says_so(fabricate):
    builtin = {"type": "builtin", "families": ["sum"], "count": 4}
    test = {name: {"targeted": False, "sources": [builtin]} for name in ("near", "far", "other")}
    prompts = {"train": [builtin], "validation": {"alpha": [builtin], "beta": [builtin]}, "test": test}
    summary = summary_of(fabricate(settings={"prompts": prompts}))
    text = headline(summary)
    assert text.startswith("No test set is marked as targeted")
    assert (summary.target, summary.differences) == (None, ())
    assert "On the untargeted questions: `influence` 0.83" in text
