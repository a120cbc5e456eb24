"""`cropi verify` and `cropi audit-rewards`: check that verifiers judge right answers as right."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from cropi.cli.shell import AsJson, ConfigArgument, Overrides, print_result, quiet_libraries, read_own_config
from cropi.errors import DataError

BATCH = 1024  # rows that are judged together, so that a long file does not have to fit into memory
TEXTS = ("completion", "answer", "source")

Options = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="key=value", help="A setting of the verifier; repeatable.", show_default=False),
]


def verify(
    verifier: Annotated[str, typer.Option(help="Its type: exact, numeric, gsm8k, boxed, math, …")],
    options: Options = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes that judge.")] = 2,
    seconds: Annotated[float, typer.Option(min=0.001, help="Wall-clock time for one answer.")] = 5.0,
    memory_mb: Annotated[int, typer.Option(min=1, help="MiB that judging may take beyond the start-up's.")] = 1024,
) -> None:
    """Judge JSONL rows {"completion", "answer"} from standard input; one verdict a line, in order.

    Rows may have `source`, `prompt` (text or chat messages) and `extra` (an object), for verifiers that need them.
    """
    from cropi.config.loading import parse_verifier, verification_of
    from cropi.rewards.pool import Pool
    from cropi.rewards.verifier import Answered

    config = parse_verifier(verifier, options or [])
    limits = verification_of({"processes": processes, "seconds": seconds, "memory_mb": memory_mb}, "command line")
    with Pool(config, limits) as pool:
        batch: list[Answered] = []

        def flush() -> None:
            rows, batch[:] = batch[:], []
            for judgement in pool(rows):
                row = {"verdict": judgement.verdict, "seconds": round(judgement.seconds, 6)}
                row |= {"reward": judgement.reward} if config.gives_grades else {}
                row |= {"note": judgement.note} if judgement.note else {}
                print(json.dumps(row))
            sys.stdout.flush()

        try:
            for row in _rows():
                batch.append(row)
                if len(batch) == BATCH:
                    flush()
        except DataError:  # judge the rows before the one that cannot be read
            flush()
            raise
        flush()
        counts = ", ".join(f"{count} {verdict}" for verdict, count in pool.counts.most_common())
        print(f"{counts or 'no rows'}; {pool.kills} processes ended", file=sys.stderr)


def _rows() -> Iterator[Any]:
    from cropi.rewards.verifier import Answered

    for number, line in enumerate(sys.stdin.buffer, start=1):
        if not line.strip():
            continue
        where = f"standard input, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"not JSON ({error})", where=where, fix="correct that line.") from None
        if not isinstance(row, dict) or not all(isinstance(row.get(name, ""), str) for name in TEXTS):
            raise DataError("is not an object of texts", where=where, fix='write {"completion": "…", "answer": "…"}.')
        if "completion" not in row or "answer" not in row:
            raise DataError("lacks completion or answer", where=where, fix='write {"completion": "…", "answer": "…"}.')
        prompt, extra = row.get("prompt"), row.get("extra")
        yield Answered(
            row["completion"],
            row["answer"],
            row.get("source", ""),
            "" if prompt is None else json.dumps(prompt),
            "" if extra is None else json.dumps(extra),
        )


def audit_rewards(
    config: ConfigArgument,
    overrides: Overrides = None,
    against: Annotated[
        str | None, typer.Option(help="A second verifier, by type: where do the two disagree?", show_default=False)
    ] = None,
    options: Options = None,
    prompts: Annotated[int, typer.Option(min=1, help="Training prompts that completions are sampled for.")] = 64,
    as_json: AsJson = False,
) -> None:
    """Check gold answers against themselves, formats, pass rates and a second verifier; say what to fix.

    The completions are those that the run has collected; otherwise they are sampled now. Nothing is written.
    """
    loaded = read_own_config(config, overrides)
    quiet_libraries()
    from cropi.config.loading import parse_verifier
    from cropi.inspection import completions_of
    from cropi.prompts import checked_prompts
    from cropi.rewards.reward_audit import audit_of

    other = None if against is None else parse_verifier(against, options or [])
    table = checked_prompts(loaded).rows
    rows, texts, origin = completions_of(loaded, table, prompts)
    result = audit_of(loaded, table, rows, texts, origin, other)
    print_result(result.as_json(), as_json, result.as_text())
