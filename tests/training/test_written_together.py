"""A file that several ranks write: two threads stand in for two processes, and their headers differ."""

import os
import threading
from pathlib import Path

import pytest
import torch

from saehooks.ranks.files import write_together
from saehooks.storage import locked_file, open_safetensors
from saehooks.training.checkpoint import CHECKPOINT, remove_half_written


class Side:
    """One of two ranks that split the latents; what they tell each other goes through a list and a barrier."""

    size, latents, data, data_rank = 2, 2, 1, 0

    def __init__(self, rank, told, barrier):
        self.rank = self.latent_rank = rank
        self.leads, self._told, self._barrier = rank == 0, told, barrier

    def tell(self, found):
        self._told[self.rank] = found
        self._barrier.wait(30)
        said = list(self._told)
        self._barrier.wait(30)
        return said

    def agree(self, work):
        result = work()
        self.tell(None)
        return result


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("notes", [("", "x" * 77), ("x" * 77, "")])
def test_headers_of_different_length_do_not_shift_what_is_written(tmp_path, signed, notes):
    """The file holds the rows of both, behind the header of the first."""
    table, shared = torch.randn(8, 3), torch.randn(5)
    told, barrier, failed = [None, None], threading.Barrier(2), []

    def write(rank):
        tensors = {"table": table[4 * rank : 4 * rank + 4], "turned": table[4 * rank : 4 * rank + 4].T, "all": shared}
        try:
            write_together(
                tmp_path / "a.safetensors",
                tensors,
                {"table": 0, "turned": 1},
                {"note": notes[rank]},
                Side(rank, told, barrier),
                signed=signed,
            )
        except BaseException as error:
            failed.append(error)
            barrier.abort()

    threads = [threading.Thread(target=write, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failed
    opened = open_safetensors(tmp_path / "a.safetensors")
    assert opened.metadata["note"] == notes[0]
    found = opened.read()
    assert torch.equal(found["table"], table)
    assert torch.equal(found["all"], shared)
    assert torch.equal(next(value for name, value in found.items() if name.startswith("turned")), table.T)


def test_what_is_being_written_is_not_taken_for_abandoned(tmp_path):
    """A training that starts in a folder removes what a dead process left there, not what a living one is writing."""
    pytest.importorskip("fcntl")
    handle, name = locked_file(tmp_path / CHECKPOINT)
    remove_half_written(tmp_path)
    assert Path(name).exists()
    os.close(handle)
    remove_half_written(tmp_path)
    assert not list(tmp_path.iterdir())
