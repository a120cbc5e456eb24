import json
import shutil

import pytest

from cropi.artifacts import SELECTION, finish, write_table
from cropi.curriculum.strategies import InfluenceStrategy, LearnabilityStrategy, PassRateStrategy
from cropi.errors import ArtifactError, UserError
from cropi.report.explanations import WHY_NOT, Cut, SetInfluence, Trained, as_text, explanations, outcome
from cropi.run_tables import scores_schema
from cropi.streams import append_jsonl

NAMES = ("alpha", "beta")
INFLUENCE = InfluenceStrategy(type="influence")

# Influence on alpha and its error, influence on beta (error None: two of its trajectories are missing).
# Ranks, equal values by id - alpha: p000, p001, p005, then p002 and p004 at 0, p003; beta: p005, p003, p000, ...
SCORES = {
    "p000": ("ok", 3.0, 0.5, 0.25),
    "p001": ("ok", 1.0, 0.25, -0.5),
    "p002": ("no_signal", 0.0, None, 0.0),
    "p003": ("ok", -2.0, 0.75, 1.0),
    "p004": ("gold_unparseable", 0.0, None, 0.0),
    "p005": ("ok", 1.0, 1.5, 2.0),
}
RANKED = ["p005", "p000", "p003", "p001"]  # two places


@pytest.fixture
def space(fabricate):
    """Six prompts, of which stage 0 has scores and a selection; the prompt table is the fabricated one."""
    space = fabricate(prompts=6, stages_scored=0, stages_selected=0, trained=False)
    folder = space.stages.scores(0)
    drift = {"ratio_ess": 0.75, "clip_share": 0.125, "kl": 0.02}
    rows = [
        {"prompt_id": prompt_id, "source": "sum", "status": status, "pass_rate": 0.5, "influence/alpha": alpha}
        | {"influence/beta": beta, "standard_error/alpha": error, "standard_error/beta": None}
        | (drift | {"top_probability": 0.625} if status == "ok" else dict.fromkeys(drift) | {"top_probability": 0.0})
        for prompt_id, (status, alpha, error, beta) in SCORES.items()
    ]
    write_table(folder / "scores.parquet", rows, scores_schema(NAMES))
    details = {"reliability": None, "direction_reliability": {"alpha": 0.5, "beta": 0.5}, "drift": None}
    finish(folder, "scores", inputs={}, counts={"ok": 4, "no_signal": 1, "gold_unparseable": 1}, details=details)
    write_selection(space)
    return space


def write_selection(space):
    folder = space.stages.selection(0)
    rows = [
        {"prompt_id": prompt_id, "source": "sum", "selected": place < 2, "score": 1.0, "scores": []}
        | {"rank": place + 1 if prompt_id in RANKED else None, "status": SCORES[prompt_id][0]}
        | {"pass_rate": None if SCORES[prompt_id][0] == "gold_unparseable" else 0.5}
        | {"reason": f"influence: #{place + 1}" if place < 2 else None}
        for place, prompt_id in enumerate([*RANKED, "p002", "p004"])
    ]
    write_table(folder / "selection.parquet", rows, SELECTION)
    details = {"asked_for": 2, "strategy": "influence", "stage": 0}
    finish(folder, "selection", inputs={}, counts={"selected": 2, "left_out": 4}, details=details)


def explained(space, *ids, **options):
    return {found.prompt_id: found for found in explanations(space.config, space, ids, **options)}


def test_influence_with_errors_and_ranks_by_hand(space):
    found = explained(space, "p005", "p003", "p002")
    facts = found["p005"].stages[0]
    assert facts.influence == {"alpha": SetInfluence(1.0, 1.5, 3), "beta": SetInfluence(2.0, None, 1)}
    assert found["p003"].stages[0].influence["alpha"] == SetInfluence(-2.0, 0.75, 6)
    assert found["p002"].stages[0].influence == {}  # the 0 in its row is no influence
    assert (facts.ratio_ess, facts.clip_share, facts.kl, facts.top_probability) == (0.75, 0.125, 0.02, 0.625)
    assert (facts.rank, facts.ranked, facts.selected) == (1, 4, True)


def test_why_and_why_not(space):
    found = explained(space, *SCORES)
    outcomes = {prompt_id: found[prompt_id].stages[0].outcome for prompt_id in SCORES}
    assert outcomes == {
        "p000": "selected (influence: #2)",
        "p001": "ranked 4, cut at 2",
        "p002": "no signal: its completions were all rewarded alike, or masked",
        "p003": "ranked 3, cut at 2",
        "p004": "gold answer unparseable",
        "p005": "selected (influence: #1)",
    }
    facts = found["p004"].stages[0]
    assert (facts.status, facts.pass_rate) == ("gold_unparseable", None)
    assert found["p001"].stages[0].pass_rate == 0.5


def test_training_by_stage(space):
    batches = [
        (0, ["p000", "p000", "p001", "p001"], [1.0, 0.0, 1.0, 1.0]),
        (3, ["p000", "p000", "p005", "p005"], [1.0, 1.0, 0.0, 0.0]),
        (4, ["p000", "p000", "p001", "p001"], [0.0, None, 1.0, 1.0]),  # the second stage begins at step 4
    ]
    for step, ids, rewards in batches:
        append_jsonl(space.stages.rewards, {"step": step, "prompt_ids": ids, "rewards": rewards})
    found = explained(space, "p000", "p003")
    assert found["p000"].trained == Trained(3, 6, pytest.approx(3 / 5))
    assert found["p000"].stages[0].trained == Trained(2, 4, 0.75)
    assert found["p003"].trained == Trained(0, 0, None)
    assert "trained on in 3 batches (6 completions, mean reward 0.60)" in as_text([found["p000"]])


def test_the_best_of_a_stage(space):
    assert list(explained(space, top=3)) == ["p005", "p000", "p003"]
    assert len(explained(space, top=100)) == 6


def test_one_stage_or_all_that_are_there(fabricate):
    space = fabricate(trained=False)
    assert [facts.stage for facts in explained(space, "p000")["p000"].stages] == [0, 1]
    assert [facts.stage for facts in explained(space, "p000", stage=1)["p000"].stages] == [1]
    # Without ids: of the last stage, in which the selection begins one prompt further on.
    assert list(explained(space, top=2)) == ["p001", "p002"]
    assert list(explained(space, top=2, stage=0)) == ["p000", "p001"]


def test_scores_without_a_selection_are_told(space):
    shutil.rmtree(space.stages.selection(0))
    facts = explained(space, "p000")["p000"].stages[0]
    assert (facts.selected, facts.rank, facts.outcome) == (None, None, "scored, nothing selected yet")
    assert facts.influence["alpha"].rank == 1
    with pytest.raises(UserError, match="nothing has been selected yet"):
        explained(space, top=1)


def test_strategies_without_influence_are_explained(fabricate):
    space = fabricate(strategy="random", trained=False)
    facts = explained(space, "p000", stage=0)["p000"].stages[0]
    assert (facts.outcome, facts.influence, facts.top_probability) == ("selected (random: #1)", {}, None)


def test_a_static_strategy_is_explained_by_the_scores_of_its_first_stage(fabricate):
    settings = {"select": {"strategy": {"type": "influence", "static": True}, "fraction": 0.25}}
    space = fabricate(settings=settings, stages_scored=1, trained=False)
    first, second = explained(space, "p003")["p003"].stages
    assert first.influence
    assert second.influence == first.influence


def test_scores_without_errors_say_so(fabricate):
    space = fabricate(errors=False, trained=False)
    found = explained(space, "p000", stage=0)
    assert found["p000"].stages[0].influence["alpha"].standard_error is None
    text = as_text(list(found.values()))
    assert "± not measured" in text
    assert "nan" not in text


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (["p0001"], {}, "did you mean 'p001'"),
        (["p000", "q"], {}, "no training prompt 'q'"),
        (["v-alpha"], {}, "is a prompt of validation/alpha"),
        (["seed=1"], {}, "name the run's folder"),
        (["p000"], {"stage": 2}, "give 0 to 1"),
        (["p000"], {"stage": 1}, "stage 1 has neither"),
    ],
)
def test_mistakes_are_named_with_a_way_out(space, ids, options, message):
    with pytest.raises(UserError) as caught:
        explained(space, *ids, **options)
    assert message in str(caught.value)
    assert "Fix: " in str(caught.value)


def test_nothing_made_yet(fabricate):
    space = fabricate(stages_scored=0, stages_selected=0, trained=False)
    with pytest.raises(ArtifactError, match="neither scores nor a selection"):
        explained(space, "p000")


@pytest.mark.parametrize(
    ("status", "pass_rate", "strategy", "reason"),
    [
        ("ok", 0.9, PassRateStrategy(type="pass_rate"), "pass rate 0.90 outside 0.2 to 0.8"),
        ("gold_unparseable", None, PassRateStrategy(type="pass_rate"), "gold answer unparseable"),
        ("no_signal", 1.0, LearnabilityStrategy(type="learnability"), WHY_NOT["no_signal"]),
        ("ok", 0.5, LearnabilityStrategy(type="learnability"), "its newest training rewards are all alike"),
        ("prompt_too_long", None, INFLUENCE, "too long for the policy's context: no trajectories"),
    ],
)
def test_why_a_prompt_has_no_rank(status, pass_rate, strategy, reason):
    row = {"selected": False, "rank": None, "status": status, "pass_rate": pass_rate}
    assert outcome(row, Cut(3, 6), strategy) == reason


# -- text and JSON -----------------------------------------------------------------------------------------------------


def test_the_text_of_a_prompt(space):
    text = as_text(list(explained(space, "p005").values()))
    lines = text.splitlines()
    assert lines[0] == "p005  source sort, not trained on so far"
    assert lines[1] == "  prompt  what is 1 + 1 ?"
    assert lines[2] == "  answer  2"
    assert lines[4] == (
        "  0      ok      0.50       1 of 4  0.62     1 ± 1.5 #3  2 ± not measured #1  0.75  12.5 %  0.020  "
        "selected (influence: #1)"
    )
    told = lines[-1]
    assert all(f"{name}: " in told for name in ("P(best)", "ESS", "Clip", "KL"))
    assert "Trained:" not in told  # no such column
    assert "Drawn:" not in told


HOSTILE = "\x1b[31mred\x1b[0m\n  0      selected\r\x00<script>\u202e\ud800 " + "long " * 200


def test_hostile_text_stays_on_its_line_and_moves_no_cursor(fabricate):
    space = fabricate(prompt_text=HOSTILE, source_names=("\x1b]0;x\x07", "b\nc", "d"), trained=False)
    found = list(explained(space, "p000", "p001").values())
    text = as_text(found)
    assert all(character.isprintable() for character in text.replace("\n", ""))
    assert text.count("\n") == as_text(list(explained_plain(fabricate).values())).count("\n")
    assert max(len(line) for line in text.splitlines() if line.startswith("  prompt")) < 400
    again = json.loads(json.dumps([each.as_json() for each in found]))
    assert again[0]["prompt"] == HOSTILE


def explained_plain(fabricate):
    return explained(fabricate(trained=False), "p000", "p001")


def test_chat_prompts_are_told_with_their_roles(fabricate):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1 + 1 ?"}]
    found = explained(fabricate(prompt_text=messages, trained=False), "p000")["p000"]
    assert "  prompt  [system] be brief [user] 1 + 1 ?" in as_text([found])
    assert found.as_json()["prompt"] == messages
