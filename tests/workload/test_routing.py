"""A run is cut into whole subtrees, each goes where its prefix is, and nobody is left without work."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hpckv.comm.parallel_dims import RoutingConfig
from hpckv.store import ROOT_KEY, block_key
from hpckv.workload.plan import PlannedPrompt, plan_run
from hpckv.workload.routing import Placement, Subtree, cut_subtrees

BLOCK = 4
KEY = bytes(32)


def planned(tokens: list[int]) -> PlannedPrompt:
    keys, parent = [], ROOT_KEY
    for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
        parent = block_key(KEY, KEY, parent, tokens[start : start + BLOCK])
        keys.append(parent)
    return PlannedPrompt(tokens, keys)


# Few tokens, so that prompts share beginnings of every length.
prompts_of_few_tokens = st.lists(
    st.lists(st.sampled_from([1, 1, 1, 2]), min_size=1, max_size=20).map(planned), min_size=1, max_size=30
)


def common_blocks(group: list[PlannedPrompt]) -> list[bytes]:
    return [
        keys[0] for keys in itertools.takewhile(lambda k: len(set(k)) == 1, zip(*(p.keys for p in group), strict=False))
    ]


@given(prompts_of_few_tokens, st.integers(1, 5), st.integers(1, 6))
def test_every_prompt_is_in_one_subtree_whose_prefix_all_its_prompts_have(prompts, replicas, output):
    plan = plan_run(prompts, BLOCK)
    outputs = [output] * len(prompts)
    subtrees = cut_subtrees(prompts, plan.order, outputs, BLOCK, replicas)
    assert [n for subtree in subtrees for n in subtree.prompts] == plan.order
    limit = sum(sum(subtree.costs) for subtree in subtrees) // (8 * replicas)
    for subtree in subtrees:
        assert list(subtree.prefix) == common_blocks([prompts[n] for n in subtree.prompts])
        assert len(subtree.prompts) == 1 or replicas == 1 or sum(subtree.costs) <= limit
    if replicas == 1:
        assert len(subtrees) == 1
    # What has to be computed, but for the last token of a prompt whose blocks are all known.
    exact = sum(sum(subtree.costs) for subtree in subtrees) - sum(outputs)
    assert 0 <= plan.least_prefill_tokens - exact <= len(prompts)


@given(prompts_of_few_tokens, st.integers(2, 4))
def test_a_cut_goes_between_children_of_a_prefix_never_through_one_that_is_small(prompts, replicas):
    plan = plan_run(prompts, BLOCK)
    subtrees = cut_subtrees(prompts, plan.order, [1] * len(prompts), BLOCK, replicas)
    limit = sum(sum(subtree.costs) for subtree in subtrees) // (8 * replicas)
    for before, after in itertools.pairwise(subtrees):
        # Whoever shares more with a neighbour than its own group has in common was too much for one group.
        shared = len(common_blocks([prompts[before.prompts[-1]], prompts[after.prompts[0]]]))
        if shared > len(before.prefix) or shared > len(after.prefix):
            assert sum(before.costs) + sum(after.costs) > limit


def leaves(number: int, cost: int = 10) -> list[Subtree]:
    return [Subtree((n,), tuple(bytes([n, b]) for b in range(4)), (cost,)) for n in range(number)]


def placement(subtrees: list[Subtree], replicas: int, *, sessions=None, **weights) -> Placement:
    return Placement(subtrees, sessions or [None] * len(subtrees), replicas, RoutingConfig(**weights), BLOCK)


def test_without_anything_held_work_is_handed_out_in_the_plans_order():
    choice = placement(leaves(4), 2)
    assert [choice.take(replica) for replica in (0, 1, 1, 0)] == [0, 1, 2, 3]
    assert choice.num_left == 0


def test_a_replica_gets_what_it_holds_and_leaves_to_others_what_they_hold():
    choice = placement(leaves(4), 2)
    nothing = [0, 0, 0]
    choice.note_held(0, [nothing, nothing, [2, 0, 0], nothing])
    choice.note_held(1, [[0, 0, 4], nothing, nothing, [0, 3, 0]])
    assert choice.take(0) == 2  # its own
    assert choice.take(0) == 1  # nobody's
    assert choice.take(1) == 0  # 0.7 x 4 blocks on its SSD are more than 0.9 x 3 in memory
    assert choice.take(1) == 3
    held = placement(leaves(2), 2)
    held.note_held(1, [[4, 0, 0], [4, 0, 0]])
    assert held.take(0) == 0  # no replica is left without work


def test_scores_are_tokens_saved_less_tokens_queued():
    choice = placement(leaves(2), 2, device=1.0, host=0.5, local=0.25, load=2.0)
    choice.note_held(0, [[1, 2, 4], [0, 0, 0]])
    assert choice.scores().tolist() == [[BLOCK * (1 + 1 + 1), 0], [0, 0]]
    assert choice.take(0) == 0
    assert choice.scores().tolist() == [[-20], [0]]
    assert choice.by_queue() == [1, 0]
    choice.note_done(0, 10)
    assert choice.scores().tolist() == [[0], [0]]


def test_a_conversation_stays_where_it_began():
    choice = placement(leaves(4), 2, sessions=["a", "b", "b", "a"])
    assert [choice.take(0), choice.take(1)] == [0, 1]
    assert [choice.take(0), choice.take(1)] == [3, 2]


@given(st.integers(2, 5), st.data())
def test_whatever_is_held_every_subtree_is_handed_out_once(replicas, data):
    subtrees = leaves(12)
    choice = placement(subtrees, replicas)
    blocks = st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=12, max_size=12)
    for replica in range(replicas):
        choice.note_held(replica, data.draw(blocks))
    taken = [choice.take(data.draw(st.integers(0, replicas - 1))) for _ in subtrees]
    assert sorted(taken) == list(range(12))
    assert np.isfinite(choice.scores()).all()
