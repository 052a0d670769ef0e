"""Blocks (pages) of KV cache: who uses which, and which prefixes of token ids they hold.

It deals in block ids and token ids only. It knows neither sequences nor the device.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from xxhash import xxh64_intdigest

from nanovllm.core.sequence import Prefix


class BlockManager:
    """Invariant: `ref_counts[block]` is the number of sequences that use the block; 0 is
    free.

    A free block keeps its contents until it is handed out again, so later prompts may
    still hit it. Blocks without contents are handed out first, then the least recently
    used.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.ref_counts = [0] * num_blocks
        self.prefixes: list[Prefix | None] = [None] * num_blocks  # what a block is registered for
        self.cached: dict[int, Prefix] = {}  # hash -> prefix
        self.empty_blocks = list(range(num_blocks - 1, -1, -1))  # free, without contents
        self.evictable: OrderedDict[int, None] = OrderedDict()  # free; least recently used first

    @property
    def num_free(self) -> int:
        return len(self.empty_blocks) + len(self.evictable)

    def match(self, token_ids: np.ndarray, hash_seed: int) -> list[Prefix]:
        """The longest chain of cached full blocks that `token_ids` begins with. Acquires
        nothing.

        A block can be hit as soon as the tokens that fill it are scheduled, even before
        the device computed them: every layer writes the K/V of the whole batch before it
        attends, and later steps run later. Sequences share blocks only under the same
        `hash_seed`.
        """
        chain: list[Prefix] = []
        parent: Prefix | None = None
        digest = hash_seed
        for end in range(self.block_size, len(token_ids) + 1, self.block_size):
            tokens = token_ids[end - self.block_size : end].tobytes()
            digest = xxh64_intdigest(tokens, digest)
            found = self.cached.get(digest)
            if found is None or found.tokens != tokens or found.parent is not parent:
                break
            if found.hash_seed != hash_seed:
                break
            chain.append(found)
            parent = found
        return chain

    def num_free_in(self, chain: list[Prefix]) -> int:
        """How many blocks of a chain are free. Acquiring the chain takes them out of `num_free`."""
        return sum(self.ref_counts[prefix.block_id] == 0 for prefix in chain)

    def acquire(self, chain: list[Prefix]) -> list[int]:
        """Adds a reference to every block of a chain that `match` found."""
        for prefix in chain:
            if self.ref_counts[prefix.block_id] == 0:
                del self.evictable[prefix.block_id]
            self.ref_counts[prefix.block_id] += 1
        return [prefix.block_id for prefix in chain]

    def allocate(self, count: int) -> list[int]:
        """`count` blocks for new contents, one reference each. The caller checks `num_free`."""
        block_ids = []
        for _ in range(count):
            if self.empty_blocks:
                block_id = self.empty_blocks.pop()
            else:
                block_id, _ = self.evictable.popitem(last=False)
                self.unregister(block_id)
            self.ref_counts[block_id] = 1
            block_ids.append(block_id)
        return block_ids

    def register(
        self, block_id: int, tokens: np.ndarray, parent: Prefix | None, hash_seed: int
    ) -> Prefix:
        """Makes a full block findable. Of two blocks with equal contents the first stays so."""
        contents = tokens.tobytes()
        digest = xxh64_intdigest(contents, hash_seed if parent is None else parent.hash)
        found = self.cached.get(digest)
        is_equal = (
            found is not None
            and found.tokens == contents
            and found.parent is parent
            and found.hash_seed == hash_seed
        )
        if found is not None and is_equal:
            return found
        prefix = Prefix(digest, contents, parent, block_id, hash_seed)
        self.cached[digest] = prefix
        self.prefixes[block_id] = prefix
        return prefix

    def unregister(self, block_id: int) -> None:
        """A block's contents can no longer be hit."""
        prefix = self.prefixes[block_id]
        self.prefixes[block_id] = None
        if prefix is not None and self.cached.get(prefix.hash) is prefix:
            del self.cached[prefix.hash]

    def release(self, block_ids: list[int], keep: bool = True) -> None:
        """Drops one reference to each block of a sequence.

        The last block comes first, so that the sequence's beginning is evicted last. With
        `keep` False the contents of blocks that become free are unregistered.
        """
        for block_id in reversed(block_ids):
            self.ref_counts[block_id] -= 1
            if self.ref_counts[block_id] == 0:
                if not keep:
                    self.unregister(block_id)
                if self.prefixes[block_id] is None:
                    self.empty_blocks.append(block_id)
                else:
                    self.evictable[block_id] = None

    def reset(self) -> None:
        """Unregisters all blocks: nothing can be hit until it is computed again."""
        for block_id in range(self.num_blocks):
            self.unregister(block_id)
        self.empty_blocks.extend(self.evictable)
        self.evictable.clear()
