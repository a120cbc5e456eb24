import numpy as np
import pytest

from cropi.curriculum.stale_trajectories import drift_warning, prompts_to_refresh

NAN = float("nan")
#        status,            drawn, reused, ratio_ess
GROUPS = {
    "a": ("no_signal", -1, False, NAN),
    "b": ("no_signal", 1, False, NAN),
    "c": ("no_signal", -1, False, NAN),
    "d": ("ok", -1, False, 0.9),
    "e": ("ok", 0, False, 0.2),
    "f": ("ok", 1, False, NAN),
    "g": ("ok", -1, False, NAN),
    "h": ("gold_unparseable", -1, False, NAN),
    "i": ("prompt_too_long", -1, False, NAN),
    "j": ("no_signal", 1, True, NAN),
    "k": ("ok", 1, True, 0.1),
}


def chosen(count: int, only: str = "".join(GROUPS), *, stage: int = 2, seed: int = 0) -> list[str]:
    statuses, drawn, reused, ess = zip(*(GROUPS[i] for i in only), strict=True)
    return prompts_to_refresh(
        list(only), statuses, np.array(drawn), np.array(reused), np.array(ess), count, seed=seed, stage=stage
    )


def test_both_kinds_get_half_and_the_oldest_and_the_most_drifted_come_first() -> None:
    four = chosen(4)
    assert set(four[:2]) == {"a", "c"}  # without signal, from before all stages; b is younger
    assert four[2:] == ["e", "d"]  # by ratio_ess; k was sampled by training just now
    assert set(chosen(3)) == {"a", "c", "e"}  # the odd place goes to those without signal
    six = chosen(6)
    assert (set(six[:2]), six[2:]) == ({"a", "c"}, ["b", "e", "d", "g"])  # g is older than f, both unknown


def test_places_that_one_kind_leaves_go_to_the_other() -> None:
    assert chosen(4, "bdefg") == ["b", "e", "d", "g"]
    assert set(chosen(4, "abcde")) == {"a", "c", "d", "e"}
    assert set(chosen(4, "abce")) == {"a", "b", "c", "e"}
    assert set(chosen(2, "abc")) == {"a", "c"}


def test_what_training_just_sampled_comes_last_and_what_cannot_be_trained_on_never() -> None:
    everything = chosen(99)
    assert set(everything[:7]) == set("abcdefg")
    assert set(everything[7:]) == {"j", "k"}
    assert chosen(1, "hi") == []
    assert set(chosen(3, "djk")) == {"d", "j", "k"}
    assert chosen(1, "djk") == ["d"]


def test_every_prompt_without_signal_gets_its_turn() -> None:
    ids = [f"p{n:02}" for n in range(40)]
    drawn_N, seen = np.full(40, -1), []
    for stage in range(1, 5):
        taken = prompts_to_refresh(
            ids, ["no_signal"] * 40, drawn_N, np.zeros(40, bool), np.full(40, NAN), 10, seed=3, stage=stage
        )
        drawn_N[[ids.index(i) for i in taken]] = stage
        seen += taken
    assert sorted(seen) == ids


def test_ties_are_drawn_by_seed_and_stage() -> None:
    assert chosen(1, "ac", stage=5) == chosen(1, "ca", stage=5)
    assert {chosen(1, "ac", stage=stage)[0] for stage in range(20)} == {"a", "c"}
    assert {chosen(1, "ac", seed=seed)[0] for seed in range(20)} == {"a", "c"}


def test_rounding_orders_no_prompt() -> None:
    """At the policy that sampled them all ratios are 1, but for the noise of the arithmetic."""
    ids = [f"p{n:02}" for n in range(40)]
    ess_N = 1 - 1e-6 * np.random.default_rng(0).random(40)

    def first(noisy_N: np.ndarray) -> list[str]:
        return prompts_to_refresh(ids, ["ok"] * 40, np.full(40, -1), np.zeros(40, bool), noisy_N, 10, seed=0, stage=1)

    assert first(ess_N) == first(ess_N[::-1]) == first(np.ones(40))


@pytest.mark.parametrize(
    ("drift", "said"),
    [
        (None, None),
        ({"ratio_ess": 0.5, "clip_share": 0.3, "kl": 0.1}, None),
        ({"ratio_ess": 0.49, "clip_share": 0.0, "kl": 0.0}, "keeps 49% of its effective"),
        ({"ratio_ess": 1.0, "clip_share": 0.31, "kl": 0.0}, "31% of the importance ratios"),
        ({"ratio_ess": 1.0, "clip_share": 0.0, "kl": 0.25}, "0.25 nats a token"),
    ],
)
def test_drift_is_told_beyond_its_limits_only(drift: dict[str, float] | None, said: str | None) -> None:
    text = drift_warning(drift, 2, refreshing=False)
    if said is None:
        assert text is None
        return
    assert text is not None
    assert text.startswith("stage 2: ")
    assert said in text
    assert "Set refresh.fraction or refresh.reuse_rollouts" in text
    assert "Raise refresh.fraction" in str(drift_warning(drift, 2, refreshing=True))
