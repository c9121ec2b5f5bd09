import errno
import os
import re
import subprocess
import sys

import pytest
import torch
from filelock import FileLock

from nnunet_norm.errors import OutputError
from nnunet_norm.stages import Scratch, ScratchOnDisk, scratch_folder
from nnunet_norm.stages import scratch as scratch_module
from nnunet_norm.stages.scratch import FOLDER, StoredMap, remove_abandoned

RUN = """
import sys, time
from pathlib import Path
import torch
from nnunet_norm.stages import ScratchOnDisk, scratch_folder

with scratch_folder(Path(sys.argv[1])) as folder:
    ScratchOnDisk(folder).allocate((1000,), torch.float32)
    print(folder.name, flush=True)
    time.sleep(600)
"""


def left_behind(parent, name="dead"):
    """A folder of scratch as a killed run leaves it: a map, and a lock file that nobody holds."""
    folder = parent / f"{FOLDER}{name}"
    folder.mkdir()
    (folder / "map_1.float32").write_bytes(b"12345678")
    folder.with_name(f"{folder.name}.lock").touch()
    return folder


@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_map_gives_back_what_was_written(tmp_path, place, dtype):
    """Regions come back as they were written, channels last; what is read is a copy."""
    with scratch_folder(tmp_path) as folder:
        scratch = Scratch() if place == "memory" else ScratchOnDisk(folder)
        assert scratch.is_on_disk == (place == "disk")
        stored = StoredMap(scratch.zeros((6, 5, 3), dtype))
        values = torch.randn(1, 3, 2, 4).to(dtype)
        stored.write(((1, 3), (0, 4)), values)
        expected = torch.zeros(1, 3, 6, 5, dtype=dtype)
        expected[:, :, 1:3, 0:4] = values
        read = stored.read(((0, 6), (0, 5)))
        assert torch.equal(read, expected)
        assert read.is_contiguous(memory_format=torch.channels_last)
        read.fill_(7)
        assert torch.equal(stored.read(((1, 4), (2, 5))), expected[:, :, 1:4, 2:5])
        scratch.free(stored.data)


def test_a_file_is_as_large_as_its_map_and_goes_with_it(tmp_path):
    """One file per map, its room reserved at once; freeing it removes it though its memory is still referred to."""
    with scratch_folder(tmp_path) as folder:
        scratch = ScratchOnDisk(folder)
        first, second = scratch.allocate((1000, 70), torch.float32), scratch.allocate((3,), torch.float64)
        sizes = sorted(path.stat().st_size for path in folder.iterdir())
        assert sizes == [24, 280_000]
        if hasattr(os, "posix_fallocate"):
            assert sum(path.stat().st_blocks for path in folder.iterdir()) * 512 >= 280_000
        scratch.free(first)
        assert [path.stat().st_size for path in folder.iterdir()] == [24]
        assert (first == 0).all()
        scratch.free(second)
        assert list(folder.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_map_is_found_again_by_its_name(tmp_path, dtype):
    """What another process left, with one extent that the file tells; maps that are made then do not take its place."""
    left = ScratchOnDisk(tmp_path)
    data = left.allocate((6, 5, 3), dtype)
    data.copy_(torch.randn(6, 5, 3))
    name = left.name_of(data)
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]
    other = ScratchOnDisk(tmp_path)
    for shape in ((6, 5, 3), (-1, 5, 3), (6, 5, -1)):
        found = other.reopen(name, shape)
        assert found.dtype == dtype
        assert torch.equal(found, data)
    new = other.allocate((2,), dtype)
    assert other.name_of(new) != other.name_of(found) == name
    found[2, 1, 0] = 7
    assert data[2, 1, 0] == 7
    other.free(found)
    other.free(new)
    assert list(tmp_path.iterdir()) == []


def test_a_map_that_is_not_as_it_was_is_refused(tmp_path):
    """One that is gone, of another size, or of a kind that there is not: in one line with its name."""
    scratch = ScratchOnDisk(tmp_path)
    name = scratch.name_of(scratch.allocate((6, 5, 3), torch.float32))
    (tmp_path / "map_2.words").write_bytes(bytes(360))
    for wrong, shape in (
        (name, (6, 5, 4)),
        (name, (-1, 7, 3)),
        ("map_2.words", (6, 5, 3)),
        ("map_2", (6, 5, 3)),
        ("map_9.float32", (6, 5, 3)),
    ):
        with pytest.raises(
            OutputError, match=rf"scratch '.*/{re.escape(wrong)}' of the prediction .* is not whole: sta"
        ):
            scratch.reopen(wrong, shape)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt, SystemExit])
def test_the_folder_vanishes_on_any_exit(tmp_path, error):
    """With everything in it and its lock; an error is not replaced by another."""
    raised = error and error("the reason")
    try:
        with scratch_folder(tmp_path / "made" / "on demand") as folder:
            ScratchOnDisk(folder).allocate((10,), torch.float32)
            assert folder.is_dir()
            if raised is not None:
                raise raised
    except BaseException as caught:
        if caught is not raised:
            raise
    assert list((tmp_path / "made" / "on demand").iterdir()) == []


def test_scratch_of_a_living_run_is_left_alone_and_that_of_a_killed_one_removed(tmp_path):
    """A process that makes scratch is killed: the next run removes what it left, and not before it is dead."""
    process = subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        folder = tmp_path / process.stdout.readline().strip()
        assert (folder / "map_1.float32").stat().st_size == 4000
        with scratch_folder(tmp_path) as own:
            assert own != folder
            assert (folder / "map_1.float32").exists()
        assert remove_abandoned(tmp_path) == []
    finally:
        process.kill()
        process.communicate()
    assert (folder / "map_1.float32").exists()
    with scratch_folder(tmp_path) as own:
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([own.name, f"{own.name}.lock"])
    assert list(tmp_path.iterdir()) == []


def test_two_runs_of_one_process_do_not_remove_each_other(tmp_path):
    """A second folder beside one that is in use, in the same process."""
    with scratch_folder(tmp_path) as first:
        with scratch_folder(tmp_path) as second:
            assert first.is_dir()
            assert second.is_dir()
        assert first.is_dir()


def test_nothing_else_is_removed(tmp_path):
    """What does not bear the name of scratch stays, and so does a folder whose lock is held."""
    (tmp_path / "results").mkdir()
    (tmp_path / f"{FOLDER}file").touch()
    held, dead = left_behind(tmp_path, "held"), left_behind(tmp_path, "dead")
    with FileLock(held.with_name(f"{held.name}.lock")):
        assert remove_abandoned(tmp_path) == [dead]
    assert held.is_dir()
    assert (tmp_path / "results").is_dir()
    assert (tmp_path / f"{FOLDER}file").exists()


def test_scratch_of_another_user_is_no_obstacle(tmp_path, monkeypatch):
    """Where several users share a folder, a lock that may not be opened is not ours to remove, and no reason to stop."""
    foreign = left_behind(tmp_path, "foreign")

    class Lock(FileLock):
        def _acquire(self):
            if "foreign" in self.lock_file:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), self.lock_file)
            super()._acquire()

    monkeypatch.setattr(scratch_module, "FileLock", Lock)
    with scratch_folder(tmp_path) as folder:
        assert folder.is_dir()
    assert (foreign / "map_1.float32").exists()


def test_a_full_disk_is_refused_at_once(tmp_path, monkeypatch):
    """No room: folder and bytes are named before anything is computed, and no file is left."""

    def full(descriptor, offset, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with scratch_folder(tmp_path) as folder:
        scratch = ScratchOnDisk(folder)
        monkeypatch.setattr(scratch_module.os, "posix_fallocate", full)
        reason = rf"scratch of 240 bytes cannot be made in '{re.escape(str(folder))}' \(No space left on device\)"
        with pytest.raises(OutputError, match=reason) as caught:
            scratch.allocate((10, 6), torch.float32)
        assert "\n" not in str(caught.value)
        assert list(folder.iterdir()) == []
        monkeypatch.undo()
        scratch.free(scratch.allocate((10, 6), torch.float32))


def test_a_map_that_cannot_be_mapped_is_refused(tmp_path, monkeypatch):
    """torch's own error on mapping a file is the same refusal, and leaves no file either."""

    def unmappable(*args, **kwargs):
        raise RuntimeError("unable to mmap 240 bytes from file: Cannot allocate memory (12)")

    with scratch_folder(tmp_path) as folder:
        monkeypatch.setattr(torch, "from_file", unmappable)
        with pytest.raises(OutputError, match=r"scratch of 240 bytes .*unable to mmap 240 bytes"):
            ScratchOnDisk(folder).allocate((10, 6), torch.float32)
        assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_used_is_refused(tmp_path):
    """A file in the place of the folder, or above it: the folder is named, and what is wrong."""
    (tmp_path / "file").touch()
    for parent, reason in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "below", "Not a directory")):
        with (
            pytest.raises(OutputError, match=rf"scratch folder '{re.escape(str(parent))}' cannot be used \({reason}\)"),
            scratch_folder(parent),
        ):
            pass


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
    """A read-only folder: the folder is named, and what is wrong."""
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="cannot be used \\(Permission denied\\)"), scratch_folder(tmp_path):
            pass
    finally:
        tmp_path.chmod(0o700)
