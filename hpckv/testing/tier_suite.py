"""The conformance suite of the `Tier` contract. Subclass it, give `make_tier`, and pytest does the rest.

    class TestMyTier(TierSuite):
        def make_tier(self, folder):
            return MyTier(self.geometry, folder)

A tier that survives its process is looked at through a second door: another instance over the same folder.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from pathlib import Path

import pytest

from hpckv.store.block import BlockGeometry
from hpckv.store.segment import StoredBlock
from hpckv.store.tier import PutOutcome, Tier

GEOMETRY = BlockGeometry(num_kv_heads=3, num_layers=5, block_tokens=4, head_dim=6, item_bytes=2, layers_per_tile=2)


def make_block(number: int, *, salt: int = 0) -> StoredBlock:
    """A block whose bytes follow from its number."""
    key = number.to_bytes(16, "little") + salt.to_bytes(16, "little")
    pattern = bytes((number * 7 + i * 13 + salt) % 251 for i in range(GEOMETRY.block_bytes))
    return StoredBlock(key, bytes(32), number * GEOMETRY.block_tokens, pattern)


class TierSuite(ABC):
    """What every tier must do."""

    geometry = GEOMETRY

    @abstractmethod
    def make_tier(self, folder: Path) -> Tier:
        """A tier with room for at least 64 blocks of `geometry`, empty if `folder` is."""

    def read(self, tier: Tier, block: StoredBlock) -> bytes | None:
        found = tier.get(block.key)
        return None if found is None else bytes(found)

    def test_an_absent_block_is_a_miss(self, tmp_path: Path) -> None:
        tier = self.make_tier(tmp_path)
        assert tier.present([make_block(1).key]).tolist() == [False]
        assert self.read(tier, make_block(1)) is None
        assert tier.stats.misses["absent"] == 1
        tier.close()

    def test_a_put_block_is_read_back_before_and_after_flush(self, tmp_path: Path) -> None:
        tier = self.make_tier(tmp_path)
        blocks = [make_block(n) for n in range(20)]
        assert {tier.put(b) for b in blocks} == {PutOutcome.STORED}
        assert [self.read(tier, b) for b in blocks] == [b.payload for b in blocks]
        tier.flush()
        assert tier.present([b.key for b in [*blocks, make_block(99)]]).tolist() == [True] * 20 + [False]
        assert [self.read(tier, b) for b in blocks] == [b.payload for b in blocks]
        assert tier.stats.hits == 40
        assert tier.stats.read_bytes == 40 * self.geometry.block_bytes
        tier.close()

    def test_a_put_takes_a_copy(self, tmp_path: Path) -> None:
        tier = self.make_tier(tmp_path)
        wanted = make_block(3)
        payload = bytearray(wanted.payload)
        tier.put(StoredBlock(wanted.key, wanted.parent, wanted.position, memoryview(payload)))
        payload[:] = bytes(len(payload))
        assert self.read(tier, wanted) == wanted.payload
        tier.flush()
        assert self.read(tier, wanted) == wanted.payload
        tier.close()

    def test_a_payload_that_nobody_changes_needs_no_copy(self, tmp_path: Path) -> None:
        tier = self.make_tier(tmp_path)
        block = make_block(4)
        tier.put(block, keeps_payload=True)
        assert self.read(tier, block) == block.payload
        tier.flush()
        assert self.read(tier, block) == block.payload
        tier.close()

    def test_a_second_put_of_a_key_changes_nothing(self, tmp_path: Path) -> None:
        tier = self.make_tier(tmp_path)
        first = make_block(5)
        other = StoredBlock(first.key, first.parent, first.position, bytes(self.geometry.block_bytes))
        assert tier.put(first) is PutOutcome.STORED
        assert tier.put(other) is PutOutcome.DUPLICATE
        tier.flush()
        assert tier.put(other) is PutOutcome.DUPLICATE
        assert self.read(tier, first) == first.payload
        tier.close()

    def test_flushed_blocks_reach_a_second_door_if_the_tier_survives(self, tmp_path: Path) -> None:
        tier = self.make_tier(tmp_path)
        blocks = [make_block(n) for n in range(9)]
        for block in blocks:
            tier.put(block)
        tier.flush()
        other = self.make_tier(tmp_path)
        wanted = [b.payload for b in blocks] if tier.survives_process else [None] * 9
        assert [self.read(other, b) for b in blocks] == wanted
        other.close()
        tier.close()

    def test_eviction_frees_what_was_asked_for_and_spares_pinned_blocks(self, tmp_path: Path) -> None:
        tier = self.make_tier(tmp_path)
        pinned, loose = make_block(1), make_block(2)
        tier.put(pinned)
        tier.flush()
        tier.put(loose)
        tier.flush()
        tier.pin([pinned.key])
        assert tier.evict(1) >= 1
        assert self.read(tier, pinned) == pinned.payload
        assert self.read(tier, loose) is None
        assert tier.evict(1) == 0
        tier.unpin([pinned.key])
        assert tier.evict(1) >= 1
        assert self.read(tier, pinned) is None
        tier.close()

    def test_threads_may_use_it_at_once(self, tmp_path: Path) -> None:
        tier = self.make_tier(tmp_path)
        wrong: list[int] = []

        def work(salt: int) -> None:
            for number in range(8):
                block = make_block(number, salt=salt)
                tier.put(block)
                if self.read(tier, block) not in (block.payload, None):
                    wrong.append(number)

        threads = [threading.Thread(target=work, args=(salt,)) for salt in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        tier.flush()
        found = [self.read(tier, make_block(n, salt=s)) for n in range(8) for s in range(6)]
        assert found == [make_block(n, salt=s).payload for n in range(8) for s in range(6)]
        tier.close()

    def test_close_twice_is_harmless(self, tmp_path: Path) -> None:
        tier = self.make_tier(tmp_path)
        tier.put(make_block(1))
        tier.close()
        tier.close()

    @pytest.mark.parametrize("wrong_size", [0, 1])
    def test_a_payload_of_the_wrong_size_is_refused(self, tmp_path: Path, wrong_size: int) -> None:
        tier = self.make_tier(tmp_path)
        block = make_block(1)
        with pytest.raises(AssertionError):
            tier.put(StoredBlock(block.key, block.parent, 0, block.payload[:wrong_size]))
        tier.close()
