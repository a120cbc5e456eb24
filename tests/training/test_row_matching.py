"""Rows of a loss are found again by their tokens, and what is ambiguous is not guessed."""

import torch

from cropi.training.group_evidence import LossRow, SampledRow, loss_rows, match_rows

PAD = 0


def sampled(*rows: tuple[tuple[int, ...], tuple[int, ...], int]) -> list[SampledRow]:
    return [SampledRow(*row) for row in rows]


def test_equal_completions_of_two_prompts_are_told_apart() -> None:
    known = sampled(((1, 2), (7, 8), 0), ((3,), (7, 8), 1))
    rows = [LossRow((3,), (7, 8), False), LossRow((1, 2), (7, 8), False)]
    assert match_rows(known, rows, PAD) == [1, 0]


def test_duplicate_prompts_share_what_differs_and_lose_what_does_not() -> None:
    known = sampled(((1,), (5,), 0), ((1,), (6,), 0), ((1,), (5,), 1), ((1,), (7,), 1))
    rows = [LossRow((1,), (completion,), False) for completion in (5, 6, 5, 7)]
    assert match_rows(known, rows, PAD) == [None, 1, None, 3]


def test_equal_completions_of_one_group_belong_to_it() -> None:
    known = sampled(((1,), (5,), 4), ((1,), (5,), 4))
    assert match_rows(known, [LossRow((1,), (5,), False)] * 2, PAD) == [0, 1]


def test_unknown_tokens_match_nothing() -> None:
    assert match_rows(sampled(((1,), (5,), 0)), [LossRow((1,), (9,), False), LossRow((2,), (9,), False)], PAD) == [
        None,
        None,
    ]


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
