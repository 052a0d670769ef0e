"""Pages of KV cache ("blocks"): who holds which, and which prefixes of token ids they hold (prefix caching).

It deals in block ids and token ids only; it knows neither sequences nor the device.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from xxhash import xxh64_intdigest


@dataclass(eq=False, slots=True)
class Prefix:
    """The contents of one full block, and through `parent` of all before it.

    The hash of a block covers every token from the start of the sequence: it is seeded with the parent's hash. Equal
    hashes are not proof (they may collide), so a hit also needs equal tokens and the very same parent object.
    """

    hash: int
    tokens: bytes
    parent: Prefix | None
    block_id: int


class BlockManager:
    """Invariant: a block is free (no holder) or counted once by each sequence that holds it.

    A free block keeps its contents until it is handed out again, so later prompts may still hit it. Blocks without
    contents worth keeping are handed out first, then the least recently used.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.ref_counts = [0] * num_blocks
        self.prefixes: list[Prefix | None] = [None] * num_blocks  # what a block is registered for
        self.cached: dict[int, Prefix] = {}  # hash -> prefix
        self.blank = list(range(num_blocks - 1, -1, -1))  # free, nothing to keep
        self.evictable: OrderedDict[int, None] = OrderedDict()  # free, but may be hit; least recently used first

    @property
    def num_free(self) -> int:
        return len(self.blank) + len(self.evictable)

    def match(self, token_ids: np.ndarray, root: int) -> list[Prefix]:
        """The longest chain of cached full blocks that `token_ids` begins with. Takes no reference.

        A block can be hit as soon as the tokens that fill it are scheduled, even before the device computed them:
        every layer writes the whole batch's K/V before it attends, and later steps run later.
        `root` seeds the chain: sequences share blocks only under the same root.
        """
        chain: list[Prefix] = []
        parent, parent_hash = None, root
        for end in range(self.block_size, len(token_ids) + 1, self.block_size):
            tokens = token_ids[end - self.block_size : end].tobytes()
            parent_hash = xxh64_intdigest(tokens, parent_hash)
            found = self.cached.get(parent_hash)
            if found is None or found.tokens != tokens or found.parent is not parent:
                break
            chain.append(found)
            parent = found
        return chain

    def num_free_in(self, chain: list[Prefix]) -> int:
        """How many blocks of a chain are free at present: to hold them takes that many out of `num_free`."""
        return sum(self.ref_counts[prefix.block_id] == 0 for prefix in chain)

    def hold(self, chain: list[Prefix]) -> list[int]:
        """Takes a reference to every block of a chain that `match` found."""
        for prefix in chain:
            if self.ref_counts[prefix.block_id] == 0:
                del self.evictable[prefix.block_id]
            self.ref_counts[prefix.block_id] += 1
        return [prefix.block_id for prefix in chain]

    def allocate(self, count: int) -> list[int]:
        """`count` blocks for new contents, one reference each; the caller has checked `num_free`."""
        block_ids = []
        for _ in range(count):
            if self.blank:
                block_id = self.blank.pop()
            else:
                block_id, _ = self.evictable.popitem(last=False)
                self.forget(block_id)
            self.ref_counts[block_id] = 1
            block_ids.append(block_id)
        return block_ids

    def register(self, block_id: int, tokens: np.ndarray, parent: Prefix | None, root: int) -> Prefix:
        """Makes a full block findable. Of two blocks with equal contents the first stays the one to be hit."""
        contents = tokens.tobytes()
        digest = xxh64_intdigest(contents, root if parent is None else parent.hash)
        found = self.cached.get(digest)
        if found is not None and found.tokens == contents and found.parent is parent:
            return found
        prefix = Prefix(digest, contents, parent, block_id)
        self.cached[digest] = self.prefixes[block_id] = prefix
        return prefix

    def forget(self, block_id: int) -> None:
        """A block's contents can no longer be hit."""
        prefix, self.prefixes[block_id] = self.prefixes[block_id], None
        if prefix is not None and self.cached.get(prefix.hash) is prefix:
            del self.cached[prefix.hash]

    def release(self, block_ids: list[int], keep: bool = True) -> None:
        """Drops one reference to each block of a sequence, tail first, so that its beginning is evicted last.

        With `keep` False the contents of blocks that nobody else holds are forgotten.
        """
        for block_id in reversed(block_ids):
            self.ref_counts[block_id] -= 1
            if self.ref_counts[block_id] == 0:
                if not keep:
                    self.forget(block_id)
                if self.prefixes[block_id] is None:
                    self.blank.append(block_id)
                else:
                    self.evictable[block_id] = None

    def reset(self) -> None:
        """Forgets all contents: after it nothing can be hit until it is computed anew."""
        for block_id in range(self.num_blocks):
            self.forget(block_id)
        self.blank.extend(self.evictable)
        self.evictable.clear()
