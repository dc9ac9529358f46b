"""Past the page cache or through it, in pieces or whole: the same bytes; and a lent buffer is nobody else's."""

import gc
import os
import random
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpckv.store.block import BlockGeometry
from hpckv.store.direct_io import ALIGNMENT, BufferPool, aligned_buffer, is_aligned, open_direct, read_past_cache
from hpckv.store.durable import publish
from hpckv.store.foreign_file import UnusableFileError
from hpckv.store.segment import Segment, SegmentContext, StoredBlock, build_segment
from tests.store.faults import KINDS, Faults

PAGES = BlockGeometry(num_kv_heads=2, num_layers=4, block_tokens=16, head_dim=32, item_bytes=4, layers_per_tile=2)
CONTEXT = SegmentContext(b"\x07" * 32, 0, b"k" * 32, b"{}", PAGES)


def aligned(data: bytes) -> memoryview:
    view = aligned_buffer(len(data))
    view[:] = data
    return view


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([1, 7, 4095, 4096, 8192, 12288, 20000]), max_size=8), where=st.integers(0, 2**8 - 1)
)
def test_any_mixture_of_parts_is_written_as_it_is(tmp_path_factory, sizes, where):
    folder = tmp_path_factory.mktemp("parts")
    rng = random.Random(1)
    data = [rng.randbytes(size) for size in sizes]
    parts = [aligned(d) if where >> n & 1 else d for n, d in enumerate(data)]
    publish(folder / "file", parts, is_direct=True)
    assert (folder / "file").read_bytes() == b"".join(data)


@pytest.mark.parametrize("folder", ["disk", "/dev/shm"])
def test_a_segment_of_whole_pages_is_the_same_file_and_reads_the_same(tmp_path, folder):
    path = (tmp_path if folder == "disk" else tmp_path.__class__(folder)) / f"direct-{os.getpid()}.h5"
    rng = np.random.default_rng(3)
    blocks = [StoredBlock(bytes([n]) * 32, bytes(32), n, aligned(rng.bytes(PAGES.block_bytes))) for n in range(3)]
    parts = build_segment(CONTEXT, blocks)
    assert len(parts[0]) % ALIGNMENT == 0
    try:
        publish(path, parts, is_direct=True)
        assert path.read_bytes() == b"".join(parts)
        fd = os.open(path, os.O_RDONLY)
        segment = Segment(path, CONTEXT)
        for is_cached in (True, False, True):
            if not is_cached:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            for into in (aligned_buffer(PAGES.block_bytes), memoryview(bytearray(PAGES.block_bytes + 1))[1:]):
                segment.read(2, into)
                assert into == blocks[2].payload
        half = PAGES.with_box(1, 2, 0, 4)
        into = aligned_buffer(half.block_bytes)
        segment.read(1, into, half)
        assert into == blocks[1].payload[PAGES.block_bytes // 2 :]
        os.close(fd)
    finally:
        path.unlink(missing_ok=True)


def test_the_end_of_a_file_is_an_error_whichever_way_it_is_reached(tmp_path):
    (tmp_path / "short").write_bytes(b"x" * (ALIGNMENT + 100))
    fd = os.open(tmp_path / "short", os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    for direct_fd in (open_direct(fd), -1):
        with pytest.raises(UnusableFileError):
            read_past_cache(fd, direct_fd, aligned_buffer(2 * ALIGNMENT), 0)
    os.close(fd)


@pytest.mark.parametrize("kind", KINDS)
def test_every_call_of_a_direct_write_may_fail(tmp_path, kind):
    content = os.urandom(4 * ALIGNMENT)
    nth, outcomes = 1, []
    while True:
        path = tmp_path / f"{nth}"
        path.mkdir()
        child = os.fork()
        if child == 0:
            faults = Faults(path, nth, kind)
            faults.install()
            try:
                publish(path / "file", [b"h" * ALIGNMENT, aligned(content), b"tail"], is_direct=True)
                os._exit(0 if faults.spoiled else 9)
            except OSError:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 9:
            break
        outcomes.append(code)
        if (path / "file").exists():
            assert (path / "file").read_bytes() == b"h" * ALIGNMENT + content + b"tail"
        else:
            assert code != 0, "published, it says"
        nth += 1
    assert len(outcomes) >= 7


def test_a_buffer_is_lent_again_only_after_its_last_view_is_gone():
    made = []
    pool = BufferPool(2 * ALIGNMENT, on_new=lambda address, size: made.append((address, size)))
    first = pool.take()
    first[:3] = b"abc"
    part = np.frombuffer(first[:3], np.uint8)
    del first
    second = pool.take()
    assert len(made) == 2
    second[:3] = b"xyz"
    assert bytes(part) == b"abc"
    del part, second
    gc.collect()
    third, fourth = pool.take(), pool.take()
    assert len(made) == 2
    assert is_aligned(third, 0)
    assert is_aligned(fourth, 0)
    assert all(size == 2 * ALIGNMENT for _, size in made)


def test_what_was_done_to_new_memory_is_undone_before_its_address_is_free():
    """Memory that a GPU's driver still took for pinned could not be pinned when it came back at the same address."""
    known = set()

    def note(address: int, size: int):
        assert address not in known
        known.add(address)
        return lambda: (mmap_of(address, size), known.remove(address))

    def mmap_of(address: int, size: int) -> None:
        mapped = Path("/proc/self/maps").read_text()
        spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in mapped.splitlines()]
        assert any(low <= address and address + size <= high for low, high in spans), "undone too late"

    for _ in range(10):  # the kernel gives the same addresses out again
        pool = BufferPool(64 * ALIGNMENT, max_idle_bytes=192 * ALIGNMENT, on_new=note)
        pool.reserve()
        held = pool.take()
        del pool
        gc.collect()
        assert len(known) == 3  # a lent buffer goes back to its pool
        held[:1] = b"x"
        del held
        gc.collect()
        assert not known


def test_idle_buffers_are_bounded_and_threads_share_a_pool():
    pool = BufferPool(ALIGNMENT, max_idle_bytes=3 * ALIGNMENT)
    pool.reserve()
    assert len(pool._idle) == 3
    views = [pool.take() for _ in range(10)]
    del views
    assert len(pool._idle) == 3
    wrong = []

    def work(mark: int) -> None:
        for _ in range(300):
            view = pool.take()
            view[:] = bytes([mark]) * ALIGNMENT
            if bytes(view[:8]) != bytes([mark]) * 8 or view[-1] != mark:
                wrong.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
