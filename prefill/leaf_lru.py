"""Which chunk goes first: the one unused longest among those that no stored chunk continues. Pure.

A chunk is of no use without the chunks before it, so a chain of them is taken apart from its end. The leaves stand in a
heap by the number of their last use. Its entries are not moved when a chunk is used or continued: a newer one is added
or the old one is passed over when it comes up, and the heap is made anew when most of it is stale.
"""

from __future__ import annotations

import heapq
from collections.abc import Container


class LeafLru:
    """Keys with their parents and the number of their last use (`seq`, ever increasing)."""

    def __init__(self) -> None:
        self._nodes: dict[bytes, tuple[int, bytes | None]] = {}
        self._num_children: dict[bytes, int] = {}  # by parent, whether that is here or not
        self._heap: list[tuple[int, bytes]] = []

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, key: bytes) -> bool:
        return key in self._nodes

    def add(self, key: bytes, parent: bytes | None, seq: int) -> None:
        assert key not in self._nodes and parent != key
        self._nodes[key] = seq, parent
        if parent is not None:
            self._num_children[parent] = self._num_children.get(parent, 0) + 1
        self._push(key, seq)

    def touch(self, key: bytes, seq: int) -> None:
        self._nodes[key] = seq, self._nodes[key][1]
        self._push(key, seq)

    def remove(self, key: bytes) -> None:
        _, parent = self._nodes.pop(key)
        if parent is None:
            return
        self._num_children[parent] -= 1
        if not self._num_children[parent]:
            del self._num_children[parent]
            if parent in self._nodes:
                self._push(parent, self._nodes[parent][0])

    def oldest(self, skip: Container[bytes]) -> tuple[int, bytes] | None:
        """(seq, key) of the leaf unused longest that is not in `skip`; None if there is none."""
        passed, found = [], None
        while self._heap and found is None:
            seq, key = self._heap[0]
            if not self._is_leaf(key, seq):
                heapq.heappop(self._heap)
            elif key in skip:
                passed.append(heapq.heappop(self._heap))
            else:
                found = seq, key
        for entry in passed:
            heapq.heappush(self._heap, entry)
        return found

    def _is_leaf(self, key: bytes, seq: int) -> bool:
        node = self._nodes.get(key)
        return node is not None and node[0] == seq and key not in self._num_children

    def _push(self, key: bytes, seq: int) -> None:
        if key in self._num_children:
            return  # pushed when its last child leaves
        heapq.heappush(self._heap, (seq, key))
        if len(self._heap) > 2 * len(self._nodes) + 64:
            self._heap = [(node[0], name) for name, node in self._nodes.items() if name not in self._num_children]
            heapq.heapify(self._heap)

    def check_integrity(self) -> None:
        children: dict[bytes, int] = {}
        for _, parent in self._nodes.values():
            if parent is not None:
                children[parent] = children.get(parent, 0) + 1
        assert children == self._num_children
        leaves = {(seq, key) for key, (seq, _) in self._nodes.items() if key not in children}
        assert leaves <= set(self._heap), "a leaf that would never be found"
