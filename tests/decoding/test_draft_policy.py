"""Drafts grow as far as they pay, by what the run has measured."""

import numpy as np
import pytest

from utils.decoding.draft import DraftTree
from utils.decoding.draft_policy import LONGEST_WAIT, N_FIRST, WHOLE_EVERY, DraftPolicy

# A branch of which the LM accepts all, and one of which it accepts nothing.
TREE = DraftTree([1, 9, 2, 3, 4], [-1, -1, 0, 2, 3], [0.6, 0.4, 0.5, 0.45, 0.4])
BRANCH = [0, 2, 3, 4]


def drafted(
    costs: DraftPolicy, n_steps: int, seconds, accepts: bool, search_seconds: float = 0.0, hint: float = 0.5
) -> list[DraftTree | None]:
    """What is drafted step by step (None: not looked for), where a pass over n tokens takes seconds(n)."""
    drafts: list[DraftTree | None] = []
    for _ in range(n_steps):
        asked = costs.should_draft(hint)
        tree = costs.paying_parts([TREE])[0] if asked else DraftTree([], [], [])
        n_tokens = 1 + len(tree.token_ids)
        costs.record_pass(1, n_tokens, seconds(n_tokens))
        accepted = [i for i, token in enumerate(tree.token_ids) if accepts and token != 9]
        if tree.token_ids:
            costs.record_draft(tree, accepted)
        if asked:
            costs.record_search(hint, 1, n_tokens, len(accepted), search_seconds)
        drafts.append(tree if asked else None)
    return drafts


def test_whole_trees_are_verified_where_longer_passes_cost_nothing():
    late = drafted(DraftPolicy(), 100, lambda n: 1.0, accepts=True)[N_FIRST:]
    assert all(draft == TREE for draft in late)


def test_only_the_accepted_branch_is_verified_where_tokens_cost():
    late = drafted(DraftPolicy(), 400, lambda n: 1 + 0.3 * (n - 1), accepts=True)[300:]
    kept = [draft.token_ids for i, draft in enumerate(late, 300) if i % WHOLE_EVERY and draft is not None]
    assert kept
    assert all(token_ids == [1, 2, 3, 4] for token_ids in kept)


def test_rejected_drafts_are_given_up_and_tried_now_and_then():
    late = drafted(DraftPolicy(), 1000, lambda n: 1 + 0.3 * (n - 1), accepts=False, search_seconds=0.1)[200:]
    asked = [draft for draft in late if draft is not None]
    assert len(asked) == pytest.approx(800 / LONGEST_WAIT, abs=1)
    assert np.mean([len(draft.token_ids) for draft in asked]) < 1


def test_drafts_are_searched_for_only_where_the_hint_says_they_pay():
    costs, n_asked = DraftPolicy(), {0.05: 0, 0.5: 0}
    for _ in range(500):
        for hint in n_asked:
            drafts = drafted(costs, 1, lambda n: 1 + 0.1 * (n - 1), accepts=hint > 0.1, search_seconds=0.1, hint=hint)
            n_asked[hint] += drafts[0] is not None
    assert n_asked[0.5] > 490
    assert n_asked[0.05] < 50


def test_drafts_come_back_when_they_are_accepted_again():
    costs = DraftPolicy()
    drafted(costs, 200, lambda n: 1 + 0.1 * (n - 1), accepts=False, search_seconds=0.1)
    late = drafted(costs, 600, lambda n: 1 + 0.1 * (n - 1), accepts=True, search_seconds=0.1)[500:]
    assert all(draft is not None and len(draft.token_ids) >= len(BRANCH) for draft in late)


def test_a_batch_drafts_as_far_as_pays_for_all_rows_together():
    costs, weak = DraftPolicy(), DraftTree([7, 8], [-1, 0], [0.01, 0.005])
    for step in range(300):
        trees = costs.paying_parts([TREE, weak])
        n_tokens = 1 + max(len(tree.token_ids) for tree in trees)
        costs.record_pass(2, n_tokens, 1 + 0.2 * (n_tokens - 1))
        for tree in trees:
            if tree.token_ids:
                costs.record_draft(tree, [i for i, token in enumerate(tree.token_ids) if token < 5])
        if step > 200 and step % WHOLE_EVERY:
            # The second row's nodes would not pay, but beside the first row's they cost nothing.
            assert [tree.token_ids for tree in trees] == [[1, 2, 3, 4], [7, 8]]
