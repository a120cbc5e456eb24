"""Scenarios drawn at random from a population of prompt pools, and the rule that rejects degenerate draws.

`drawn_scenario(7)` is the config `drawn-7`. The seed decides the settings below; the seed of a run decides the problems
and the training. The trainer, the policy and the 96 steps are those of the scenario suite.

- Wanted: 1 to 3 validation sets. Each has a style of its own and 1 or 2 families of that style.
- Relevant prompts: 2 to 30 % of the pool, log-uniform. They are of the wanted families (`own`), of other families of
  their styles (`kin`), or half of each (`both`).
- Label noise: none with probability 1/2, else 10 to 50 %, uniform; among relevant and among other prompts separately.
- Look-alikes: none with probability 1/2, else 5 to 30 % of the pool. All their answers stop one item early. They are of
  the wanted families if no right prompt is, else of families of the wanted styles that have no right prompts.
- Solved prompts (the whole working is shown) and impossible ones (11 or 12 items): each like the look-alikes.
- Other prompts fill the pool, at least 10 % of it: 2 to 6 families of the styles that are not wanted.
- Pool size: 600 to 1500 prompts, log-uniform.
- Lengths: the families' default ranges, moved by -1, 0 or 1 items; for the wanted styles and the others separately.
- Two levels (*shift*), in 1 draw of 5: validation and tests, and half of the relevant prompts, are 1 or 2 items longer
  than the default range; the other half have the range moved by -2 (parity: the default). First the short ones help,
  since they teach the style; then they are solved, and the long ones do. Look-alikes are long, impossible prompts have
  12 items.
- Plain words, in 1 draw of 5: every prompt has 40 distractors behind its family's name, so that similarity of texts
  tells nothing. The name itself stays: the built-in policy cannot work on prompts without it. Its hidden states still
  tell families apart.

Look-alikes, solved and impossible prompts are scaled down in proportion where they would leave less than 10 % to
others.

The rule, fixed before any comparison on these draws: the base policy answers 32 held-out prompts of each validation
set's families 4 times at temperature 1, once as they are and once with the right style, the first word of the worked
steps, at their end. The second pass rate is what finding the style alone would reach. With every set at the same
weight, a draw is rejected
- as "too few to practise" if fewer than 16 relevant prompts have right answers: two batches of training;
- as "solved already" if the pass rate is above 0.7;
- as "nothing in reach" if it would rise by less than 0.25.
The rule never looks at training, so it favours no strategy. Of the 60 development
draws 900 to 959 it rejects 11: 5, 2 and 4.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from cropi.builtin.families import STYLES, WITHOUT_RUNNING_ANSWER, difficulty

DRAWN = "drawn"  # names the population; `drawn-SEED` is one scenario
SHARE_OF_RELEVANT = (0.02, 0.30)
SHARE_OF_GROUP = (0.05, 0.30)  # look-alikes, solved, impossible
NOISE = (0.1, 0.5)
POOL = (600, 1500)
LEAST_OTHERS = 0.1
IMPOSSIBLE = {"min_length": 11, "max_length": 12}
TWO_LEVELS, PLAIN, DISTRACTORS = 1 / 5, 1 / 5, 40
VALIDATION, TEST, UNTARGETED = 24, 128, 32  # prompts: of a validation set, of all targeted tests, of another family
CHECKED_PROMPTS, CHECKED_SAMPLES = 32, 4
MIN_RELEVANT, MAX_RATE, MIN_RISE = 16, 0.7, 0.25
MAX_DRAWS_PER_SCENARIO = 50
CHECK_SEED = 2_000_000_011  # of the checked prompts: none that runs use by habit

Lengths = int | Literal["short", "long"]
# A validation set's name -> the base policy's pass rate, and the one with the right style.
Checked = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Draw:
    """The make-up of one scenario of the population; shares are of the pool, noises of their group."""

    wanted: dict[str, tuple[str, ...]]  # families by validation set, which has the name of its style
    practice: str  # own, kin or both
    pool: int
    relevant: float
    look_alikes: float
    solved: float
    impossible: float
    relevant_noise: float
    other_noise: float
    wanted_shift: int
    other_shift: int
    kin: tuple[str, ...]  # families of the wanted styles that practise them
    decoys: tuple[str, ...]  # families of the look-alikes
    others: tuple[str, ...]
    solved_families: tuple[str, ...]
    impossible_families: tuple[str, ...]
    two_levels: bool
    plain: bool

    @property
    def wanted_lengths(self) -> Lengths:
        """Of validation and test prompts."""
        return "long" if self.two_levels else self.wanted_shift

    @property
    def right_and_relevant(self) -> float:
        """Number of relevant prompts with right answers."""
        return self.relevant * self.pool * (1 - self.relevant_noise)

    @property
    def wanted_families(self) -> tuple[str, ...]:
        return tuple(family for families in self.wanted.values() for family in families)


def draw(seed: int) -> Draw:
    """Draw the facts of a scenario; the same seed gives the same draw in any process."""
    rng = random.Random(f"{DRAWN}-{seed}")
    styles = sorted(set(STYLES.values()))
    wanted = {}
    for style in rng.sample(styles, rng.randint(1, 3)):
        families = [family for family, own in STYLES.items() if own == style]
        wanted[style] = tuple(rng.sample(families, rng.randint(1, 2)))
    practice, kin, decoys = _practice(rng, wanted)
    rest = [family for family, style in STYLES.items() if style not in wanted]
    others = tuple(rng.sample(rest, min(len(rest), rng.randint(2, 6))))
    relevant = _log_uniform(rng, SHARE_OF_RELEVANT)
    look_alikes, solved, impossible = (_sometimes(rng, SHARE_OF_GROUP) for _ in range(3))
    look_alikes = look_alikes if decoys else 0.0
    extra = look_alikes + solved + impossible
    scale = min(1.0, (1 - LEAST_OTHERS - relevant) / extra) if extra else 1.0
    return Draw(
        wanted=wanted,
        practice=practice,
        pool=round(_log_uniform(rng, POOL)),
        relevant=relevant,
        look_alikes=scale * look_alikes,
        solved=scale * solved,
        impossible=scale * impossible,
        relevant_noise=round(_sometimes(rng, NOISE), 2),
        other_noise=round(_sometimes(rng, NOISE), 2),
        wanted_shift=rng.randint(-1, 1),
        other_shift=rng.randint(-1, 1),
        kin=kin,
        decoys=decoys,
        others=others,
        solved_families=tuple(rng.sample(list(STYLES), 4)),
        impossible_families=tuple(rng.sample([family for family in STYLES if family != "parity"], 4)),
        two_levels=rng.random() < TWO_LEVELS,
        plain=rng.random() < PLAIN,
    )


def _practice(rng: random.Random, wanted: Mapping[str, Sequence[str]]) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """Which families practise the wanted skills, and which look like them with wrong answers."""
    own = [family for families in wanted.values() for family in families]
    alike = {style: [f for f, s in STYLES.items() if s == style and f not in own] for style in wanted}
    practice = rng.choice(["own", "kin", "both"])
    kin = [rng.choice(families) for families in alike.values()] if practice != "own" else []
    left = own if practice == "kin" else [f for families in alike.values() for f in families if f not in kin]
    decoys = [family for family in left if family not in WITHOUT_RUNNING_ANSWER]
    return practice, tuple(kin), tuple(rng.sample(decoys, min(len(decoys), rng.randint(1, 3))))


def _log_uniform(rng: random.Random, bounds: tuple[float, float]) -> float:
    return math.exp(rng.uniform(math.log(bounds[0]), math.log(bounds[1])))


def _sometimes(rng: random.Random, bounds: tuple[float, float]) -> float:
    """Nothing with probability 1/2, else uniform."""
    value = rng.uniform(*bounds)
    return value if rng.random() < 0.5 else 0.0


def drawn_scenario(seed: int) -> dict[str, Any]:
    """The config of the scenario `drawn-SEED`, as plain values."""
    made = draw(seed)
    used = [*made.wanted_families, *made.kin, *made.decoys]
    longest = [_most_words(family, made.wanted_lengths) for family in used]
    longest += [_most_words(family, made.other_shift) for family in made.others]
    return {
        "name": f"{DRAWN}-{seed}",
        "seed": 0,
        "policy": {"path": "builtin", "cpu_threads": 1},
        "prompts": {"train": _pool(made), "validation": _validation(made), "test": _tests(made)},
        "verifier": {"type": "exact", "marker": "answer"},
        "collect": {
            "num_generations": 8,
            "validation_num_generations": 16,
            "max_completion_length": max(16, *longest),
            "batch_size": 512,
        },
        "select": {"strategy": {"type": "cropi"}, "fraction": 0.1},
        "train": {"stages": 6, "steps_per_stage": 16},
        "trainer": {
            "num_generations": 8,
            "per_device_train_batch_size": 64,
            "learning_rate": 4e-5,
            "lr_scheduler_type": "constant",
            "loss_type": "dr_grpo",
            "beta": 0.0,
        },
        "evaluate": {"every": 8, "samples": 2},
    }


def _pool(made: Draw) -> list[dict[str, Any]]:
    """Sources of the training pool."""
    practice = {"own": 1.0, "both": 0.5, "kin": 0.0}[made.practice]
    others = 1 - made.relevant - made.look_alikes - made.solved - made.impossible
    noise, other_noise = {"label_noise": made.relevant_noise}, {"label_noise": made.other_noise}
    levels: list[Lengths] = ["short", "long"] if made.two_levels else [made.wanted_shift]
    impossible = IMPOSSIBLE | ({"min_length": 12} if made.two_levels else {})
    groups: list[tuple[Sequence[str], float, Lengths, dict[str, Any]]] = [
        *((made.wanted_families, practice * made.relevant / len(levels), level, noise) for level in levels),
        *((made.kin, (1 - practice) * made.relevant / len(levels), level, noise) for level in levels),
        (made.decoys, made.look_alikes, made.wanted_lengths, {"label_rule": "stop_early"}),
        (made.solved_families, made.solved, 0, {"hint": 1.0}),
        (made.impossible_families, made.impossible, 0, impossible),
        (made.others, others, made.other_shift, other_noise),
    ]
    sources = []
    for families, share, lengths, settings in groups:
        if families and share > 0:
            count = max(1, round(share * made.pool / len(families)))
            sources += [_source(family, count, lengths) | settings | _distractors(made) for family in families]
    return sources


def _source(family: str, count: int, lengths: Lengths) -> dict[str, Any]:
    low, high = _lengths(family, lengths)
    return {"type": "builtin", "families": [family], "count": count, "min_length": low, "max_length": high}


def _distractors(made: Draw) -> dict[str, int]:
    return {"distractors": DISTRACTORS} if made.plain else {}


def _lengths(family: str, lengths: Lengths) -> tuple[int, int]:
    """The default range of lengths, moved, or a level of two. Parity has too few problems below its default."""
    level = difficulty(family)
    if lengths == "long":
        return level.max_length + 1, level.max_length + 2
    shift = -2 if lengths == "short" else lengths
    moved = max(shift, 0) if family == "parity" else shift
    return max(2, level.min_length + moved), level.max_length + moved


def _most_words(family: str, lengths: Lengths) -> int:
    """Words of the longest worked answer: style, steps, `answer`, the answer, the end; and two to spare."""
    _, high = _lengths(family, lengths)
    return high + (high if family == "reverse" else 1) + 5


def _validation(made: Draw) -> dict[str, list[dict[str, Any]]]:
    return {name: _wanted(made, families, VALIDATION) for name, families in made.wanted.items()}


def _wanted(made: Draw, families: Sequence[str], count: int) -> list[dict[str, Any]]:
    """So many held-out prompts of a validation set's families."""
    return [_source(family, count // len(families), made.wanted_lengths) | _distractors(made) for family in families]


def _tests(made: Draw) -> dict[str, Any]:
    """A targeted test set for each validation set; the others: a family of every style that is not wanted itself."""
    tests: dict[str, Any] = {
        name: {"targeted": True, "sources": _wanted(made, families, TEST // len(made.wanted))}
        for name, families in made.wanted.items()
    }
    spare: dict[str, str] = {}
    for family, style in STYLES.items():
        if family not in made.wanted_families:
            spare.setdefault(style, family)
    sources = [{"type": "builtin", "families": list(spare.values()), "count": UNTARGETED} | _distractors(made)]
    return tests | {"others": {"targeted": False, "sources": sources}}


# -- the rule ----------------------------------------------------------------------------------------------------------


def rejection(made: Draw, checked: Checked) -> str | None:
    """The reason to reject a draw; None: it is accepted."""
    alone, with_style = (sum(rates[place] for rates in checked.values()) / len(checked) for place in (0, 1))
    if made.right_and_relevant < MIN_RELEVANT:
        return "too few to practise"
    if alone > MAX_RATE:
        return "solved already"
    return "nothing in reach" if with_style - alone < MIN_RISE else None


def accepted(count: int, first: int, check: Callable[[int], Checked]) -> Iterator[int]:
    """The first `count` seeds from `first` on whose draws are accepted. `check` asks the base policy."""
    seed, found = first, 0
    while found < count:
        if rejection(draw(seed), check(seed)) is None:
            yield seed
            found += 1
        seed += 1
        assert seed - first < MAX_DRAWS_PER_SCENARIO * count, "the rule rejects nearly every draw"


def seed_of(name: str) -> int | None:
    """The seed in a scenario's name; None if the name is not `drawn-SEED`."""
    match = re.fullmatch(rf"{DRAWN}-([0-9]{{1,9}})", name)
    return int(match[1]) if match else None


def base_policy_check() -> Callable[[int], Checked]:
    """A function that asks the built-in policy the checked prompts of a draw. The policy is loaded once."""
    from cropi.builtin import generate
    from cropi.config import PolicyConfig
    from cropi.policy import load_policy
    from cropi.prompts.encoding import encode_prompts
    from cropi.rollouts.generation import Sampling, TransformersGenerator

    policy = load_policy(PolicyConfig(path="builtin"))
    sampler = TransformersGenerator(policy, 512)

    def check(seed: int) -> Checked:
        config = drawn_scenario(seed)
        rows = {name: _checked_rows(sources, generate) for name, sources in config["prompts"]["validation"].items()}
        prompts, answers = zip(*(row for own in rows.values() for row in own), strict=True)
        encoded = [ids for ids in encode_prompts(policy.tokenizer, prompts) for _ in range(CHECKED_SAMPLES)]
        sampling = Sampling(config["collect"]["max_completion_length"], 1.0)
        texts = policy.tokenizer.batch_decode(sampler(encoded, sampling, seed=seed), skip_special_tokens=True)
        right = iter(
            text.rpartition("answer")[2].strip() == answers[place // CHECKED_SAMPLES]
            for place, text in enumerate(texts)
        )
        halves = {name: len(own) * CHECKED_SAMPLES // 2 for name, own in rows.items()}
        return {name: [sum(islice(right, half)) / half for _ in range(2)] for name, half in halves.items()}

    return check


def _checked_rows(sources: Sequence[Mapping[str, Any]], generate: Callable[..., Any]) -> list[tuple[str, str]]:
    """Held-out problems of a validation set, as (prompt, answer): as they are, then with the right style."""
    rows: list[dict[str, Any]] = []
    for source in sources:
        (family,) = source["families"]
        level = difficulty(family, min_length=source["min_length"], max_length=source["max_length"])
        count, distractors = CHECKED_PROMPTS // len(sources), source.get("distractors", 0)
        rows += generate(family, split="validation", count=count, seed=CHECK_SEED, level=level, distractors=distractors)
    alone = [(row["prompt"], row["answer"]) for row in rows]
    return alone + [(f"{row['prompt']} {STYLES[row['source']]}", row["answer"]) for row in rows]
