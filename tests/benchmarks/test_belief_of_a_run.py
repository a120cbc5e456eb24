"""The benchmark of the belief, on a run made by hand whose errors and wrong answers are known."""

from pathlib import Path

import belief
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mislabelled import wrong_answers

from cropi.artifacts import REPRESENTATIONS, write_json
from cropi.config.loading import load_config
from cropi.curriculum.belief import InfluenceBelief
from cropi.curriculum.curriculum import Curriculum
from cropi.stages.online_loop import save_state
from cropi.streams import append_jsonl

SETTINGS = [
    "prompts.train=[{type: builtin, families: [sum, parity, count], count: 40, seed: 1, label_noise: 0.3}]",
    "prompts.validation={one: [{type: builtin, families: [sum], count: 8, seed: 2}]}",
    "prompts.test={one: {sources: [{type: builtin, families: [sum], count: 8, seed: 3}]}}",
]
STEPS, BATCH, GENERATIONS = 24, 12, 8


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """24 steps of 12 random prompts: slopes are linear in the representations, wrong answers earn nothing."""
    config, generator = load_config("quickstart", SETTINGS), np.random.default_rng(0)
    wrong = wrong_answers(config)
    ids = sorted(wrong)
    states = {("train", each): generator.standard_normal(8) for each in ids}
    states |= {("validation/one", f"v{n}"): generator.standard_normal(8) for n in range(8)}
    _write(tmp_path, states)
    write_json(tmp_path / "config.json", config.resolved())
    points_NE = np.stack([states["train", each] for each in ids])
    held_out_ME = np.stack([states["validation/one", f"v{n}"] for n in range(8)])
    curriculum = Curriculum(points_NE, {"one": held_out_ME}, seed=0, observe_only=True)
    for step in range(STEPS):
        choices = curriculum.next(BATCH, step)
        places = [choice.place for choice in choices]
        rewards_BK = (generator.random((BATCH, GENERATIONS)) < 0.6) * np.array([[not wrong[ids[p]]] for p in places])
        line = {"step": step, "prompt_ids": [ids[place] for place in places for _ in range(GENERATIONS)]}
        append_jsonl(tmp_path / "rewards.jsonl", line | {"rewards": rewards_BK.astype(float).ravel().tolist()})
        for choice, rewards in zip(choices, rewards_BK.astype(float), strict=True):
            error = generator.lognormal(sigma=0.3)  # that of the sum of the halves, and their difference
            slope = points_NE[choice.place, 0] + error * generator.standard_normal()
            halves = rewards.std(ddof=1) * (slope + np.array([[error], [-error]])) / 2
            told = {"one": np.repeat(halves, 2, axis=1).tolist()}  # both halves of the direction agree
            curriculum.observe(choice, rewards.tolist(), step=step, group=f"{step}-{choice.place}", influence=told)
    last = tmp_path / "checkpoints" / f"checkpoint-{STEPS}"
    last.mkdir(parents=True)
    save_state(last, {"curriculum": curriculum.state_dict()})
    return tmp_path


def _write(folder: Path, states: dict[tuple[str, str], np.ndarray]) -> None:
    rows = [{"set": name, "prompt_id": each, "representation": values} for (name, each), values in states.items()]
    (folder / "representations").mkdir()
    table = pa.Table.from_pylist(rows, schema=REPRESENTATIONS)
    pq.write_table(table, folder / "representations" / "representations.parquet")


def test_foretells_better_than_a_constant_and_finds_wrong_answers(run, capsys):
    belief.main([str(run)])
    row = capsys.readouterr().out.splitlines()[-1]
    count, _, _, log, constant, of_trained, of_all, *out = (float(cell) for cell in row.split("|")[2:-1])
    seen = belief.load_state(next(run.glob("checkpoints/*")))["curriculum"]["influence/one/seen"]
    assert count == sum(observed[4] >= belief.FIRST_STEP for observed in seen) > 40
    assert log > constant  # a normal distribution of all slopes knows nothing of the prompts
    assert of_trained > 0.9
    assert of_all > 0.8
    assert len(out) == len(belief.TIMES)


def test_the_area_counts_pairs_in_order() -> None:
    scores = np.array([0.9, 0.5, 0.5, 0.1])
    assert belief.area(scores, np.array([True, True, False, False])) == (1 + 1 + 0.5 + 1) / 4
    assert np.isnan(belief.area(scores, np.ones(4, dtype=bool)))


def test_each_step_is_predicted_from_those_before_it() -> None:
    def fresh() -> InfluenceBelief:
        return InfluenceBelief(np.eye(3, dtype=np.float32), np.ones((1, 3), dtype=np.float32) / 2, np.zeros(4))

    first, last = belief.FIRST_STEP - 1, belief.FIRST_STEP
    seen_O5 = np.array([[0, 1.0, 0.1, 0.2, first], [1, -1.0, 0.1, 0.4, first], [0, 2.0, 0.1, 0.3, last]])
    known = fresh()
    for point, slope, half_difference, error, step in seen_O5[:2]:
        known.observe(int(point), slope, error, int(step), half_difference)
    posterior = known.posterior()
    expected = (2.0 - posterior.means()[0], posterior.variances()[0] + 0.3, 2.0, 1.0)  # the others' mean error
    assert belief.foretold(fresh(), seen_O5, 3) == [pytest.approx(expected)]


def test_relevant_prompts_stand_out_once_they_were_seen() -> None:
    made = InfluenceBelief(np.eye(4, dtype=np.float32), np.ones((1, 4), dtype=np.float32) / 2, np.zeros(5))
    seen_O5 = np.array([[0, -1.0, 0.0, 0.1, 3], [1, 1.0, 0.0, 0.1, 3], [0, 4.0, 0.0, 0.1, 90]])
    relevant = np.array([True, False, False, False])
    first, *between, last = belief.standing_out(made, seen_O5, relevant)
    assert (first, last) == (0.0, 1.0)
    assert between == [0.0] * (len(belief.TIMES) - 2)
