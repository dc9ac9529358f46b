"""What one grid of ranks wrote every other grid reads: each rank its own share and no more, every block, with the right answers."""

import pytest

from hpckv.store import BlockGeometry
from hpckv.store.boxes import overlap
from tests.parallel.ranks import run_cases
from tests.parallel.test_topologies import GRIDS, prompts

LAYERS, KV_HEADS, HEAD_DIM, BLOCK = 5, 2, 16, 8
WHOLE = BlockGeometry(KV_HEADS, LAYERS, BLOCK, HEAD_DIM, 4)


def tile_bytes(written: list[list[int]], wanted: list[int]) -> int:
    """Of the tiles of one block, cut as the writers' boxes cut them, all that hold a part of the wanted box."""
    total = 0
    for box in written:
        for tile in WHOLE.with_box(*box).tiles:
            place = (tile.head, tile.head + 1, tile.first_layer, tile.end_layer)
            if overlap(place, tuple(wanted)):
                total += tile.span.stop - tile.span.start
    return total


@pytest.mark.mpi
@pytest.mark.parametrize("writer", GRIDS, ids=lambda grid: f"{grid[0]}x{grid[1]}")
def test_every_grid_reads_what_this_one_wrote(writer, checkpoint, tmp_path):
    folder = checkpoint(
        "llama",
        num_attention_heads=8,
        num_key_value_heads=KV_HEADS,
        num_hidden_layers=LAYERS,
        head_dim=HEAD_DIM,
        seed=4,
    )
    asked = prompts(307)
    store = {"shared": str(tmp_path / "store"), "local": "none", "host_size": 0}

    def case(grid: tuple[int, int], write: str) -> dict:
        return {
            "model": str(folder), "tp": grid[0], "pp": grid[1], "prompts": asked, "store": {**store, "write": write},
            "sampling": {"max_tokens": 3, "ignore_eos": True},
        }  # fmt: skip

    wrote, *read = run_cases(tmp_path, [case(writer, "all"), *(case(grid, "off") for grid in GRIDS)], size=4)
    distinct = {tuple(p[: BLOCK * (n + 1)]) for p in asked for n in range(len(p) // BLOCK)}
    owned = [rank["owned"] for rank in wrote["ranks"] if rank["owned"][0] < rank["owned"][1]]
    assert sum((h1 - h0) * (l1 - l0) for h0, h1, l0, l1 in owned) == KV_HEADS * LAYERS
    for grid, found in zip(GRIDS, read, strict=True):
        assert found["tokens"] == wrote["tokens"], grid
        for prompt, cached in zip(asked, found["cached"], strict=True):
            # The last token of a prompt that was found whole is computed again, for its logits.
            assert cached["shared"] + cached["device"] == min(len(prompt) // BLOCK * BLOCK, len(prompt) - 1), grid
        assert sum(cached["shared"] for cached in found["cached"]) >= BLOCK * len(distinct) - len(asked)
        for rank in found["ranks"]:
            assert not rank["misses"], grid
            assert rank["payload_bytes"] == len(distinct) * tile_bytes(owned, rank["box"]), grid
