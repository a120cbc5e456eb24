"""Units on their way to workers and back, and what comes of it when something is wrong."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from cropi.config import PolicyConfig
from cropi.elsewhere import CarriedPolicy, pack_tensors, unpack_tensors
from cropi.errors import ConfigError, DataError, PolicyError, UserError
from cropi.ledger import Ledger
from cropi.policy import load_policy, weights_identity
from cropi.workers import Make, Order, Unit, Workers, packed, unpacked
from tests.elsewhere import Here

BUILTIN = PolicyConfig(path="builtin", cpu_threads=1)


@dataclass(frozen=True)
class Doubling:
    """An order that needs nothing."""

    broken: bool = False
    seconds: float = 0.0

    def begin(self) -> Make:
        if self.broken:
            raise DataError("it is gone", where="data.path", fix="look for it.")

        def make(unit: Unit) -> Unit:
            time.sleep(self.seconds)
            values = [2 * value for value in unit.rows.column("value").to_pylist()]
            return Unit(unit.index, pa.table({"value": values}), {"tokens": len(values)})

        return make


def units(count: int) -> Iterator[Unit]:
    return (Unit(index, pa.table({"value": list(range(index))}), {"of": count}) for index in range(count))


def test_a_unit_travels_as_one_row() -> None:
    nested = pa.table({"ids": [[1, 2], None, []]}, schema=pa.schema([("ids", pa.list_(pa.int32()))]))
    row = packed(Unit(7, nested, {"name": "part", "share": 0.5}))
    back = unpacked(row)
    assert row.num_rows == 1
    assert back.rows.equals(nested)
    assert (back.index, back.facts) == (7, {"name": "part", "share": 0.5})


def test_every_unit_comes_back_once_whatever_the_order() -> None:
    workers = Here()
    found = {unit.index: unit for unit in workers.each(Doubling(), units(5))}
    assert workers.made == [4, 3, 2, 1, 0]
    assert {index: unit.rows.column("value").to_pylist() for index, unit in found.items()} == {
        index: [2 * value for value in range(index)] for index in range(5)
    }
    assert workers.seconds == pytest.approx(sum(unit.facts["seconds"] for unit in found.values()))


def test_what_a_user_can_fix_comes_back_as_it_was_said() -> None:
    with pytest.raises(UserError, match=r"^data.path: it is gone \(on .+\)\nFix: look for it.$"):
        list(Here().each(Doubling(broken=True), units(3)))


class Careless(Here):
    """Loses a unit, or brings one twice."""

    def __init__(self, *, twice: bool) -> None:
        super().__init__()
        self.twice = twice

    def _each(self, order: Order, units: Iterable[Unit]) -> Generator[pa.Table]:
        made = list(super()._each(order, units))
        yield from [*made, made[0]] if self.twice else made[1:]


@pytest.mark.parametrize(("twice", "said"), [(True, "came back twice"), (False, r"\[2\] did not come back")])
def test_a_unit_that_is_lost_or_doubled_is_noticed(twice: bool, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        list(Careless(twice=twice).each(Doubling(), units(3)))


def test_work_elsewhere_is_charged_in_place_of_waiting(tmp_path: Path) -> None:
    workers: Workers = Here()
    ledger = Ledger(tmp_path / "ledger.jsonl")
    with ledger.charge("score", owed=lambda: workers.owed_s):
        assert len(list(workers.each(Doubling(seconds=0.05), units(4)))) == 4
        workers.seconds += 100  # of others at the same time
        time.sleep(0.02)
    (entry,) = ledger.entries()
    assert 100.2 < entry["seconds"] < 101
    ledger.add("collect", 3.5, tokens=7)
    assert ledger.entries()[1] == {"phase": "collect", "stage": None, "tokens": 7, "seconds": 3.5}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_tensors_travel_bit_by_bit(dtype: torch.dtype) -> None:
    tensors = {"matrix": torch.randn(3, 4).mul(9).to(dtype).T, "number": torch.tensor(3, dtype=dtype)}
    back = unpack_tensors(pack_tensors(tensors))
    assert all(torch.equal(back[name], tensor) and back[name].dtype == dtype for name, tensor in tensors.items())


def test_a_policy_is_loaded_by_name_or_with_the_weights_that_it_has_come_to() -> None:
    model = load_policy(BUILTIN).model
    named = CarriedPolicy.of(BUILTIN, model, named=True)
    assert named.weights is None
    assert weights_identity(named.load().model) == weights_identity(model)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    trained = CarriedPolicy.of(BUILTIN, model, named=False)
    assert weights_identity(trained.load().model) == weights_identity(model) != named.identity
    with pytest.raises(PolicyError, match="a worker has loaded other weights"):
        CarriedPolicy.of(BUILTIN, model, named=True).load()


def test_a_worker_of_another_version_is_refused() -> None:
    carried = CarriedPolicy(BUILTIN.model_dump_json(), "", None, "/", "0.0.0")
    with pytest.raises(ConfigError, match="install the same version on all nodes"):
        carried.load()
