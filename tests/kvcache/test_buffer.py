"""Buffers of long rows, which grow where they are; what all buffers share is in test_layer.py."""

import copy
import pickle
import sys

import pytest
import torch

from hf_adaptive_sparse.kvcache import buffer as module
from hf_adaptive_sparse.kvcache.buffer import RowBuffer
from hf_adaptive_sparse.kvcache.reserve import FACTOR, Reserve

WIDTH = 2000
only_linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is reserved on Linux only")


def rows(first, count, batch=2):
    """Rows (batch, 3 heads, count, WIDTH) that tell from which on, whose head and sequence."""
    numbers = torch.arange(first, first + count)[:, None] + torch.arange(WIDTH)
    heads = torch.arange(batch * 3).view(batch, 3, 1, 1)
    return (numbers + 50 * heads).to(torch.uint8)


@pytest.fixture(params=["reserved", "refused"])
def memory(request, monkeypatch):
    """With reserved address space, and where the system gives none."""
    if request.param == "refused":

        def refuse(*arguments):
            raise OSError("Cannot allocate memory")

        monkeypatch.setattr(module, "Reserve", refuse)
    return request.param


def test_appended_rows_are_there_and_views_keep_theirs(memory):
    with torch.inference_mode():
        buffer = RowBuffer(rows(0, 0), step=1)
        buffer.append(rows(0, 5))
        held, addresses = buffer.rows, set()
        for first in range(5, 60):
            buffer.append(rows(first, 1))
            addresses.add(buffer.rows.data_ptr())
            assert buffer.capacity <= buffer.length + 1
            assert buffer.nbytes == buffer.capacity * 6 * WIDTH
    assert torch.equal(buffer.rows, rows(0, 60))
    assert torch.equal(held, rows(0, 5))
    assert not buffer.rows.is_inference()
    if memory == "reserved" and sys.platform == "linux":
        assert len(addresses) == 2  # the first space of 40 rows, and a second
    buffer.truncate(50)
    buffer.append(rows(50, 3))
    buffer.drop_front(10)
    buffer.append(rows(53, 30))
    assert torch.equal(buffer.rows, rows(10, 73))
    buffer.clear()
    assert buffer.nbytes == 0
    buffer.append(rows(7, 2))
    assert torch.equal(buffer.rows, rows(7, 2))


def test_rows_count_once_they_are_written(memory):
    buffer = RowBuffer(rows(0, 0), step=1)
    buffer.append(rows(0, 5))
    room = buffer.room(3)
    room.copy_(rows(90, 3))  # given up: nothing of it counts
    assert torch.equal(buffer.rows, rows(0, 5))
    buffer.room(3).copy_(rows(5, 3))
    assert buffer.length == 5
    buffer.extend(3)
    assert torch.equal(buffer.rows, rows(0, 8))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))])
def test_copies_grow_apart(memory, duplicate):
    buffer = RowBuffer(rows(0, 0), step=1)
    buffer.append(rows(0, 9))
    buffer.truncate(5)  # what is unused is not copied
    twin = duplicate(buffer)
    assert twin.nbytes == rows(0, 5).nbytes
    buffer.append(rows(5, 4))
    twin.append(rows(100, 4))
    assert torch.equal(buffer.rows, rows(0, 9))
    assert torch.equal(twin.rows, torch.cat([rows(0, 5), rows(100, 4)], dim=2))


def test_selections_of_the_batch_grow_on(memory):
    buffer = RowBuffer(rows(0, 0), step=1)
    buffer.append(rows(0, 5))
    buffer.transform(lambda states: states.index_select(0, torch.tensor([1, 1, 0])))
    buffer.append(rows(5, 1, batch=3))
    expected = torch.cat([rows(0, 5)[[1, 1, 0]], rows(5, 1, batch=3)], dim=2)
    assert torch.equal(buffer.rows, expected)


@only_linux
def test_only_rows_that_are_written_take_memory():
    def resident_bytes():
        with open("/proc/self/statm", encoding="ascii") as numbers:
            return int(numbers.read().split()[1]) * 4096

    before = resident_bytes()
    reserve = Reserve(32, (1 << 20,), torch.uint8)
    assert reserve.rows == FACTOR * 32  # 256 MiB of address space
    reserve.take(4).fill_(1)
    assert resident_bytes() - before < 32 << 20
    assert torch.all(reserve.take(8)[4:] == 0)
