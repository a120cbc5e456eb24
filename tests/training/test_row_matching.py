"""Rows of a loss are found again by their tokens, and what is ambiguous is not guessed."""

import pytest
import torch

from cropi.training.group_evidence import LossRow, SampledRow, loss_rows, match_rows

PAD = 0


def sampled(*rows: tuple[tuple[int, ...], tuple[int, ...], int]) -> list[SampledRow]:
    return [SampledRow(*row) for row in rows]


@pytest.mark.parametrize(
    ("known", "rows", "expected"),
    [
        ([((1, 2), (7, 8), 0), ((3,), (7, 8), 1)], [((3,), (7, 8)), ((1, 2), (7, 8))], [1, 0]),
        (  # duplicate prompts share what differs and lose what does not
            [((1,), (5,), 0), ((1,), (6,), 0), ((1,), (5,), 1), ((1,), (7,), 1)],
            [((1,), (completion,)) for completion in (5, 6, 5, 7)],
            [None, 1, None, 3],
        ),
        ([((1,), (5,), 4), ((1,), (5,), 4)], [((1,), (5,))] * 2, [0, 1]),  # equal completions of one group
        ([((1,), (5,), 0)], [((1,), (9,)), ((2,), (9,))], [None, None]),
    ],
)
def test_rows_are_found_by_prompt_and_completion_and_nothing_is_guessed(known, rows, expected):
    assert match_rows(sampled(*known), [LossRow(*row, False) for row in rows], PAD) == expected


def test_a_prompt_that_an_environment_changed_is_found_by_its_completion_alone() -> None:
    known = sampled(((1,), (5,), 0), ((1,), (6,), 0), ((2,), (6,), 1), ((2,), (7,), 1))
    rows = [LossRow((1, 8), (5,), False), LossRow((1, 9), (6,), False), LossRow((2, 8), (7,), False)]
    assert match_rows(known, rows, PAD) == [0, None, 3]


def test_masks_and_not_ids_tell_padding_so_an_end_token_that_pads_is_kept() -> None:
    inputs = {
        "prompt_ids": torch.tensor([[PAD, 4], [3, 4]]),
        "prompt_mask": torch.tensor([[0, 1], [1, 1]]),
        "completion_ids": torch.tensor([[7, PAD, PAD], [7, 8, 9]]),
        "completion_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
    }
    assert loss_rows(inputs, PAD) == [LossRow((4,), (7, PAD), False), LossRow((3, 4), (7, 8, 9), False)]


def test_masked_and_empty_completions_are_found_by_their_ids() -> None:
    inputs = {
        "prompt_ids": torch.tensor([[4], [5]]),
        "prompt_mask": torch.ones(2, 1, dtype=torch.long),
        "completion_ids": torch.tensor([[7, 8, PAD], [PAD, PAD, PAD]]),
        "completion_mask": torch.zeros(2, 3, dtype=torch.long),
    }
    rows = loss_rows(inputs, PAD)
    assert all(row.masked for row in rows)
    assert match_rows(sampled(((4,), (7, 8), 2), ((5,), (), 3)), rows, PAD) == [0, 1]
