"""The block manager against a plain LRU cache of prefixes, and one test for each thing that it
promises.
"""

from __future__ import annotations

from collections import Counter
from itertools import takewhile
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh64_intdigest

from nanovllm.core.batch import ceil_div
from nanovllm.engine.block_manager import BlockManager


def ints(*token_ids: int) -> np.ndarray:
    return np.array(token_ids, np.int32)


def take(
    blocks: BlockManager, tokens: np.ndarray, hash_seed: int = 0
) -> tuple[list[int], int] | None:
    """What the scheduler does for a whole sequence: (its blocks, how many of them were hits), or
    None if it does not fit.
    """
    size = blocks.block_size
    hit = blocks.match(tokens, hash_seed)
    needed = ceil_div(len(tokens), size) - len(hit)
    if needed + blocks.num_free_in(hit) > blocks.num_free:
        return None
    used = blocks.acquire(hit) + blocks.allocate(needed)
    parent = hit[-1] if hit else None
    for i in range(len(hit), len(tokens) // size):
        parent = blocks.register(used[i], tokens[i * size : (i + 1) * size], parent, hash_seed)
    return used, len(hit)


def num_hits(blocks: BlockManager, tokens: np.ndarray, hash_seed: int = 0) -> int:
    return len(blocks.match(tokens, hash_seed))


class Page:
    """A block of the oracle. It counts the sequences that use it."""

    def __init__(self) -> None:
        self.users = 1


class PlainCache:
    """An LRU cache of whole prefixes, without hashes, ids or chains."""

    def __init__(self, num_blocks: int, size: int) -> None:
        self.num_free, self.size = num_blocks, size
        self.resident: dict[tuple[int, ...], Page] = {}
        # Resident prefixes that no sequence uses, least recently released first.
        self.idle: list[tuple[int, ...]] = []

    def hits(self, tokens: tuple[int, ...]) -> list[tuple[int, ...]]:
        ends = range(self.size, len(tokens) + 1, self.size)
        return list(takewhile(self.resident.__contains__, (tokens[:end] for end in ends)))

    def take(
        self, tokens: tuple[int, ...]
    ) -> tuple[list[tuple[tuple[int, ...], Page]], int] | None:
        hits = self.hits(tokens)
        needed = ceil_div(len(tokens), self.size) - len(hits)
        woken = [prefix for prefix in hits if prefix in self.idle]
        if needed + len(woken) > self.num_free:
            return None
        self.num_free -= needed + len(woken)
        self.idle = [prefix for prefix in self.idle if prefix not in woken]
        used = []
        for prefix in hits:
            self.resident[prefix].users += 1
            used.append((prefix, self.resident[prefix]))
        # Pages without contents are taken first, then the least recently used pages.
        while len(self.idle) > self.num_free:
            del self.resident[self.idle.pop(0)]
        for i in range(len(hits), len(hits) + needed):
            prefix, page = tokens[: (i + 1) * self.size], Page()
            used.append((prefix, page))
            if len(prefix) == (i + 1) * self.size:
                self.resident[prefix] = page
        return used, len(hits)

    def release(self, used: list[tuple[tuple[int, ...], Page]], keep: bool) -> None:
        for prefix, page in reversed(used):
            page.users -= 1
            if page.users == 0:
                self.num_free += 1
                if self.resident.get(prefix) is page:
                    if keep:
                        self.idle.append(prefix)
                    else:
                        del self.resident[prefix]

    def reset(self) -> None:
        self.resident, self.idle = {}, []


# Sequences of blocks that begin alike.
TREE = [tuple(branch >> depth & 1 for depth in range(6)) for branch in range(8)]


@given(
    size=st.integers(1, 3),
    num_blocks=st.integers(1, 14),
    keep=st.booleans(),
    actions=st.binary(min_size=8, max_size=60),
)
@settings(max_examples=600, deadline=None, derandomize=True)
def test_hits_and_evictions_are_those_of_a_plain_lru_cache(size, num_blocks, keep, actions):
    blocks, oracle = BlockManager(num_blocks, size), PlainCache(num_blocks, size)
    texts = [tuple(int(t) for t in np.repeat(branch, size)) for branch in TREE]
    used = []
    for action in actions:
        kind, argument = action % 8, action // 8
        if kind < 5:
            length = 1 + (argument * 7 + kind) % (6 * size)
            tokens = texts[argument % 8][:length]
            ours, theirs = take(blocks, ints(*tokens)), oracle.take(tokens)
            assert (ours is None) == (theirs is None)
            if ours and theirs:
                assert ours[1] == theirs[1]
                used.append((ours[0], theirs[0]))
        elif kind < 7 and used:
            ours, theirs = used.pop(argument % len(used))
            blocks.release(ours, keep)
            oracle.release(theirs, keep)
        elif argument == 31:
            blocks.reset()
            oracle.reset()
        assert blocks.num_free == oracle.num_free
        assert [num_hits(blocks, ints(*text)) for text in texts] == [
            len(oracle.hits(text)) for text in texts
        ]
        users = Counter(block_id for ours, _ in used for block_id in ours)
        assert blocks.ref_counts == [users[block_id] for block_id in range(num_blocks)]
    for ours, _ in used:
        blocks.release(ours)
    assert blocks.num_free == num_blocks
    assert sorted([*blocks.empty_blocks, *blocks.evictable]) == list(range(num_blocks))


@given(
    actions=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 7), st.integers(1, 6)), max_size=40
    )
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_hit_is_right_even_if_every_hash_is_the_same(actions):
    with mock.patch("nanovllm.engine.block_manager.xxh64_intdigest", return_value=7):
        blocks, used, contents = BlockManager(12, 1), [], {}
        for kind, branch, length in actions:
            if kind == 0 and used:
                blocks.release(used.pop(0))
            elif (taken := take(blocks, ints(*TREE[branch][:length]))) is not None:
                block_ids, hits = taken
                for i, block_id in enumerate(block_ids):
                    prefix = TREE[branch][: i + 1]
                    assert i >= hits or contents[block_id] == prefix
                    contents[block_id] = prefix
                used.append(block_ids)


def test_a_hit_needs_equal_tokens_from_the_start():
    blocks = BlockManager(8, 2)
    take(blocks, ints(1, 2, 3, 4, 5, 6, 7))
    assert num_hits(blocks, ints(1, 2, 3, 4, 5, 6, 7, 8)) == 3, "the last block is not full"
    assert num_hits(blocks, ints(1, 2, 3, 4, 5)) == 2
    assert num_hits(blocks, ints(1, 2, 3)) == 1, "half a block is no hit"
    assert num_hits(blocks, ints(1, 2, 9, 4, 5, 6)) == 1
    assert num_hits(blocks, ints(3, 4, 5, 6)) == 0, "equal tokens after another beginning"
    assert num_hits(blocks, ints(1, 2, 3, 4), hash_seed=1) == 0


@pytest.mark.parametrize("bits", [0, 1, 2])
def test_colliding_hashes_are_told_apart_by_tokens_and_by_parent(bits):
    with mock.patch(
        "nanovllm.engine.block_manager.xxh64_intdigest",
        lambda data, seed: xxh64_intdigest(data, seed) % 2**bits,
    ):
        blocks = BlockManager(8, 1)
        take(blocks, ints(1, 2))
        assert num_hits(blocks, ints(3)) == 0
        assert num_hits(blocks, ints(2)) == 0, "the same tokens, but not at the beginning"


def test_contents_whose_hash_another_took_are_forgotten_without_it():
    with mock.patch("nanovllm.engine.block_manager.xxh64_intdigest", return_value=7):
        blocks = BlockManager(2, 1)
        for token in (1, 2):
            blocks.release(take(blocks, ints(token))[0])
        assert [num_hits(blocks, ints(token)) for token in (1, 2)] == [0, 1]
        blocks.allocate(1)
        assert num_hits(blocks, ints(2)) == 1


def test_least_recently_used_contents_go_first_and_a_sequence_loses_its_tail_first():
    blocks = BlockManager(6, 1)
    old, _ = take(blocks, ints(1, 2, 3))
    new, _ = take(blocks, ints(4, 5, 6))
    blocks.release(old)
    blocks.release(new)
    assert blocks.allocate(1) == [old[2]]
    assert [num_hits(blocks, t) for t in (ints(1, 2, 3), ints(4, 5, 6))] == [2, 3]
    blocks.release(blocks.acquire(blocks.match(ints(1, 2), 0)))  # a use: now the other is the older
    assert blocks.allocate(3) == [new[2], new[1], new[0]]
    assert [num_hits(blocks, t) for t in (ints(1, 2, 3), ints(4, 5, 6))] == [2, 0]


def test_pages_without_contents_are_handed_out_before_any_contents_are_lost():
    blocks = BlockManager(5, 2)
    blocks.release(take(blocks, ints(1, 2, 3, 4, 5))[0])  # two full blocks, one begun
    blocks.allocate(3)
    assert num_hits(blocks, ints(1, 2, 3, 4)) == 2
    blocks.allocate(1)
    assert num_hits(blocks, ints(1, 2, 3, 4)) == 1


def test_a_block_is_not_handed_out_while_somebody_holds_it():
    blocks = BlockManager(3, 1)
    first, _ = take(blocks, ints(1, 2))
    second, hits = take(blocks, ints(1, 2))
    assert second == first
    assert hits == 2
    blocks.release(first)
    assert blocks.num_free == 1
    assert take(blocks, ints(3, 4)) is None
    blocks.release(second)
    assert blocks.num_free == 3
    assert num_hits(blocks, ints(1, 2)) == 2


def test_of_blocks_with_equal_contents_the_first_is_hit_and_the_others_are_empty_when_free():
    blocks = BlockManager(4, 1)
    (first,), (second,) = blocks.allocate(1), blocks.allocate(1)
    prefix = blocks.register(first, ints(1), None, 0)
    assert blocks.register(second, ints(1), None, 0) is prefix
    assert [p.block_id for p in blocks.match(ints(1), 0)] == [first]
    blocks.release([second])
    assert blocks.allocate(1) == [second]
    blocks.release([first])
    assert num_hits(blocks, ints(1)) == 1


def test_a_block_released_without_keeping_is_unregistered_after_its_last_user():
    blocks = BlockManager(4, 1)
    first, _ = take(blocks, ints(1, 2))
    second, _ = take(blocks, ints(1, 3))
    blocks.release(first, keep=False)
    assert num_hits(blocks, ints(1, 2)) == 1, "the sibling still holds the first block"
    blocks.release(second, keep=False)
    assert num_hits(blocks, ints(1, 3)) == 0
    assert not blocks.cached


def test_after_a_reset_nothing_is_hit_and_what_is_held_stays_held():
    blocks = BlockManager(4, 1)
    blocks.release(take(blocks, ints(1, 2))[0])
    used, _ = take(blocks, ints(3))
    blocks.reset()
    assert [num_hits(blocks, t) for t in (ints(1, 2), ints(3))] == [0, 0]
    assert blocks.num_free == 3
    assert used[0] not in blocks.allocate(3)
    blocks.release(used)
    assert num_hits(blocks, ints(3)) == 0
    assert blocks.num_free == 1
