"""The runs of a comparison, and the folder that is claimed for them.

DIR/  drawn.json                       base pass rates of drawn scenarios, and which were rejected
      plan.json  results.parquet  compare.json  compare.html  compare.md  lock
      step-N/                          the same four files of what runs had reached after N steps, finished or not
      SCENARIO/seed-S/STRATEGY/        an ordinary run, with begun.json and, at its end, finished.json
      SCENARIO/seed-S/STRATEGY.log     its console output
      SCENARIO/seed-S/shared-HASH/     prompts, trajectories and base evaluation of runs that have them in common
"""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from cropi.artifacts import is_finished, remove_parts, write_json
from cropi.config import SAMPLED_BY, Config, config_difference, config_hash
from cropi.config.loading import Patch, config_of, load_config, merged, preset, suite_names, validate_config
from cropi.config.yaml_text import parse_yaml
from cropi.errors import ArtifactError, ConfigError
from cropi.lab.compare.drawn import drawn_scenario, seed_of
from cropi.run_folder import first_changes

PLAN = "plan.json"
BEGUN = "begun.json"
FINISHED = "finished.json"
BEFORE_PLAN = ("lock", "drawn.json")  # files that a folder may hold before it is claimed
MOST_SEEDS = 10_000  # in a range

SUITE = "suite"  # names all recipes of the scenario suite
SHARED_TABLES = (*SAMPLED_BY, "evaluate")
COMMON = ("name", "run_dir", "seed", "policy", "prompts", "verifier", "verification", "evaluate")  # of all strategies
PATCH_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
PER_RUN = ("name", "run_dir", "seed")  # what a comparison sets itself


@dataclass(frozen=True)
class Run:
    """One strategy on one scenario with one seed."""

    scenario: str
    seed: int
    strategy: str
    config: Config
    shared: Config  # of the folder with what the run shares with others

    @property
    def label(self) -> str:
        return f"{self.scenario} · seed {self.seed} · {self.strategy}"

    @property
    def finished(self) -> bool:
        """Whether training and evaluation have ended."""
        return (self.config.folder / FINISHED).is_file()

    @property
    def begun(self) -> bool:
        """Whether training has begun."""
        return (self.config.folder / BEGUN).is_file()


@dataclass(frozen=True)
class Plan:
    """The runs of this call, and all runs that were ever asked for in the folder."""

    folder: Path
    wanted: tuple[Run, ...]
    all: tuple[Run, ...]

    @property
    def strategies(self) -> list[str]:
        """Names in the order of the first call for each."""
        return list(dict.fromkeys(run.strategy for run in self.all))


def collected(shared: Config) -> bool:
    """Whether a shared folder is complete."""
    folder = shared.folder
    return is_finished(folder / "trajectories") and is_finished(folder / "evaluations")


def make_plan(
    configs: Sequence[str], overrides: Sequence[str], strategies: Sequence[str], seeds: Sequence[int], folder: Path
) -> Plan:
    """Read and validate everything, and claim the folder.

    Raises ConfigError for an unknown strategy, a patch that does not fit a config, anything named twice, and a scenario
    or strategy that the folder holds with other settings.
    """
    _refuse_own_keys(overrides)
    patches = read_patches(strategies)
    scenarios: dict[str, dict[str, Any]] = {}
    own: dict[str, dict[str, Any]] = {}
    for name in [n for word in configs for n in (suite_names() if word == SUITE else [word])]:
        base = _scenario(name, overrides)
        if base.name in scenarios:
            raise ConfigError(f"two configs have the name {base.name}", where=name, fix="rename one of them.")
        own[base.name] = scenarios[base.name] = _common(base)
        if base.select.name is not None:  # a preset, none of whose settings reach the other strategies
            others = [o for o in overrides if not o.startswith(("select.strategy", "select.name"))]
            scenarios[base.name] = _common(_scenario(name, [*others, "select.strategy=full"]))
    wanted = [(c, s, p) for s in seeds for c in scenarios for p in patches]
    asked = {"scenarios": scenarios, "own": own, "strategies": patches, "runs": wanted}
    for scenario, values in scenarios.items():
        for strategy in patches:
            _check(_config(asked, scenario, 0, strategy, folder), values, f"strategy {strategy}")
    before = _read_claim(folder)
    claim = _added(before, asked, folder)
    plan = _plan(folder, claim, wanted)  # before it is written: a plan with a run that is refused spoils the folder
    if claim != before:
        write_json(folder / PLAN, claim)
    return plan


def read_plan(folder: Path) -> Plan:
    """Read the plan of a folder, without runs to do. ArtifactError if there is none."""
    if not (folder / PLAN).is_file():
        raise ArtifactError("there is no comparison here", where=str(folder), fix="name the folder of one.")
    return _plan(folder, _read_claim(folder), [])


def lock(folder: Path) -> TextIOWrapper:
    """Lock a folder against other comparisons until the returned file is closed."""
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise ArtifactError(
            "another comparison is working in this folder", where=str(folder), fix="wait for it, or stop it."
        ) from None
    remove_parts(folder)
    return file


def parse_seeds(text: str) -> list[int]:
    """Parse `0-4`, `0,1,7` or both, in this order. ConfigError for anything else, and for a seed named twice."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,10})(?:-([0-9]{1,10}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < min(first + MOST_SEEDS, 2**32):
            fix = "give 0-4 or 0,1,7, all below 2**32."
            raise ConfigError(f"{part!r} is no seed and no range of seeds", where="--seeds", fix=fix)
        seeds += range(first, last + 1)
    twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
    if twice:
        raise ConfigError(f"seed {twice[0]} is given twice", where="--seeds", fix="give it once.")
    return seeds


def _refuse_own_keys(overrides: Iterable[str]) -> None:
    own = {"seed": "--seeds", "run_dir": "--folder"}
    for override in overrides:
        key = override.partition("=")[0].split(".")[0]
        if key in own:
            raise ConfigError(f"a comparison sets {key} itself", where=f"override {override!r}", fix=f"use {own[key]}.")


def _scenario(name: str, overrides: Sequence[str]) -> Config:
    """The config of a drawn scenario, or of a recipe or file."""
    seed = seed_of(name)
    return load_config(name, overrides) if seed is None else config_of(drawn_scenario(seed), name, overrides)


def _common(base: Config) -> dict[str, Any]:
    """The settings that all runs of a scenario share, with the same evaluation steps for all."""
    values = {key: value for key, value in base.resolved().items() if key not in PER_RUN}
    return values | {"evaluate": values["evaluate"] | {"every": base.evaluate_every}}


def run_folder(folder: Path, scenario: str, seed: int, strategy: str) -> Path:
    """The folder of a run."""
    return folder / scenario / f"seed-{seed}" / strategy


def _config(claim: Mapping[str, Any], scenario: str, seed: int, strategy: str, folder: Path) -> Config:
    """The config of a run. A patch without a strategy keeps the config's own, with the preset that it names."""
    patch: Patch = claim["strategies"][strategy]
    select = patch.get("select")  # as it is in the file: validated below
    values = claim["scenarios" if isinstance(select, Mapping) and "strategy" in select else "own"][scenario]
    run_dir = str(run_folder(folder, scenario, seed, strategy).parent)
    per_run = {"name": strategy, "run_dir": run_dir, "seed": seed}
    return validate_config(patched(values, patch, strategy) | per_run, f"strategy {strategy} on {scenario}")


def _check(config: Config, values: Mapping[str, Any], where: str) -> None:
    steps, own = (t["stages"] * t["steps_per_stage"] for t in (values["train"], config.resolved()["train"]))
    if own != steps:
        raise ConfigError(
            f"trains {own} steps, the config {steps}: strategies are compared at the same number of steps",
            where=where,
            fix="change train.stages and train.steps_per_stage together.",
        )


def _shared(config: Config) -> Config:
    """The config that makes what a run shares with others: the same for all runs that can share it."""
    values = config.resolved()
    strategy = {"type": "pass_rate" if config.select.strategy.collects else "full"}  # stands for all that collect
    tables = {key: values[key] for key in SHARED_TABLES} | {"select": {"strategy": strategy}}
    generations = config.collect.num_generations
    return validate_config(
        tables
        | {
            "name": f"shared-{config_hash(tables)[:8]}",
            "run_dir": config.run_dir,
            "train": {"stages": 1, "steps_per_stage": 1},
            "trainer": {"num_generations": generations, "per_device_train_batch_size": generations},
        },
        f"what the strategies of {config.run_dir} share",
    )


def _read_claim(folder: Path) -> dict[str, Any]:
    path = folder / PLAN
    if not path.is_file():
        return {"scenarios": {}, "own": {}, "strategies": {}, "runs": []}
    try:
        claim = json.loads(path.read_text(encoding="utf-8"))
        return {key: claim[key] for key in ("scenarios", "own", "strategies", "runs")}
    except (OSError, ValueError, KeyError, TypeError):
        raise ArtifactError("is damaged", where=str(path), fix="choose another --folder.") from None


def _added(before: Mapping[str, Any], asked: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Add to a claim. ConfigError for a scenario or strategy that it holds with other settings."""
    if not before["runs"] and folder.exists() and any(path.name not in BEFORE_PLAN for path in folder.iterdir()):
        raise ArtifactError("exists and is no comparison", where=str(folder), fix="choose another --folder.")
    asked = json.loads(json.dumps(asked))  # tuples become lists, as in the file
    # Settings that are newer than the folder have their defaults there.
    scenarios = {name: _common(validate_config(v | {"name": name}, name)) for name, v in before["scenarios"].items()}
    before = {**before, "scenarios": scenarios}
    for place, kind in ((0, "scenarios"), (2, "strategies")):
        for name in before[kind].keys() & asked[kind].keys():
            changed = config_difference(before[kind][name], asked[kind][name])
            begun = [
                path for run in before["runs"] if run[place] == name and (path := run_folder(folder, *run)).exists()
            ]
            if changed and begun:
                raise ConfigError(
                    f"{name} was begun here with other settings: {first_changes(changed)}",
                    where=str(begun[0]),
                    fix="use the same settings again, choose another --folder, or delete its runs.",
                )
    runs = [*before["runs"], *(run for run in asked["runs"] if run not in before["runs"])]
    return {kind: {**before[kind], **asked[kind]} for kind in ("scenarios", "own", "strategies")} | {"runs": runs}


def _plan(folder: Path, claim: Mapping[str, Any], wanted: Iterable[tuple[str, int, str]]) -> Plan:
    runs: dict[tuple[str, int, str], Run] = {}
    for scenario, seed, strategy in claim["runs"]:
        config = _config(claim, scenario, seed, strategy, folder)
        runs[scenario, seed, strategy] = Run(scenario, seed, strategy, config, _shared(config))
    return Plan(folder, tuple(runs[key] for key in wanted), tuple(runs.values()))


def read_patches(names: Sequence[str]) -> dict[str, Patch]:
    """Read patches of presets by name, and of YAML files by path (named by their stem)."""
    patches = dict[str, Patch]()
    for given in names:
        in_file = given.endswith((".yaml", ".yml"))
        name, patch = _from_file(Path(given)) if in_file else (given, preset(given, "--strategies"))
        if name in patches:
            raise ConfigError(f"{name} is named twice", where="--strategies", fix="name it once.")
        patches[name] = patch
    return patches


def _from_file(path: Path) -> tuple[str, Patch]:
    try:
        patch = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read ({error})", where=str(path), fix="check the path.") from None
    if not isinstance(patch, dict):
        raise ConfigError("a strategy is a mapping of settings", where=str(path), fix="see docs/compare.md.")
    if not PATCH_NAME.fullmatch(path.stem) or path.stem.startswith("shared-"):
        raise ConfigError(
            "the file's name cannot name a strategy",
            where=str(path),
            fix="use letters, digits, '.', '_' and '-', and do not begin with shared-.",
        )
    return path.stem, patch


def patched(values: Mapping[str, Any], patch: Patch, name: str) -> dict[str, Any]:
    """Patch a config with a strategy. Raises ConfigError for a setting that must be the same in all runs."""
    for key in COMMON:
        if key in patch:
            raise ConfigError(
                f"a strategy cannot set {key}: it is the same for all that are compared",
                where=f"strategy {name}",
                fix="leave it out, or give it as key=value for all.",
            )
    return merged(values, patch)
