"""What may go wrong while a network runs: too little memory, errors of others; and reading and writing beside computing."""

import threading

import pytest
import torch
from stage_networks import Design
from whole_pass import CPU, by_stages, collected, cut, difference, one_pass, padded_image

from nnunet_norm.errors import OutputError, TilingError
from nnunet_norm.stages import Scratch, ScratchOnDisk, make_schedule, read_network, run, scratch_folder
from nnunet_norm.stages import scratch as scratch_module
from nnunet_norm.stages.regions import extent_of, index
from nnunet_norm.stages.transfer import WRITES_UNDER_WAY, Transfer
from nnunet_norm.stages.windows import Convolution

D2 = ((1, 1), (2, 2), (2, 2))
DESIGNS = {
    "fixed": Design(D2, blocks=2),
    "image": Design(D2, norm="InstanceNorm", kind="residual encoder", blocks=2),
}


class MyError(Exception):
    """An error that nobody else raises."""


@pytest.fixture(scope="module", params=DESIGNS)
def case(request):
    """(network, image, schedule) with some ten blocks per map."""
    network = DESIGNS[request.param].build()
    graph = read_network(network)
    image = padded_image(graph, (45, 38))
    return network, image, cut(make_schedule(graph, image.shape[2:], itemsize=8), 12)


@pytest.fixture(params=["memory", "disk"])
def place(request, tmp_path):
    """Scratch in memory, or on the disk, where threads read and write."""
    if request.param == "memory":
        yield Scratch()
        return
    with scratch_folder(tmp_path) as folder:
        scratch = ScratchOnDisk(folder)
        yield scratch
        assert list(folder.iterdir()) == []  # after every test


@pytest.fixture(autouse=True)
def no_threads_left():
    """Whatever happens in a run, its threads end with it."""
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def out_of_memory_above(voxels, monkeypatch):
    """Let convolutions fail as on a full device for larger outputs; every failure is noted in the list."""
    original, noted = Convolution.apply, []

    def apply(self, inputs, place):
        result = original(self, inputs, place)
        if result[0, 0].numel() > voxels:
            noted.append(result[0, 0].numel())
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return result

    monkeypatch.setattr(Convolution, "apply", apply)
    return noted


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("voxels", [400, 60])
def test_too_little_memory_makes_smaller_blocks_and_the_same_result(case, place, monkeypatch, voxels, shift):
    """Blocks are halved until they fit; no voxel is written twice, and no moment is counted twice."""
    network, image, _ = case
    schedule = make_schedule(read_network(network), image.shape[2:], itemsize=8, shift=shift)
    expected = one_pass(network, image)
    failures, steps = out_of_memory_above(voxels, monkeypatch), []
    result = by_stages(schedule, image, scratch=place, progress=lambda: steps.append(None))
    assert failures
    assert len(steps) > schedule.steps
    assert difference(result, expected) < 1e-12


def test_blocks_of_one_voxel_are_no_reason_to_give_up(case, place, monkeypatch):
    """Where the grid of blocks is moved, slivers remain at the far end: they are left as they are, and computed once."""
    network, _, _ = case
    graph = read_network(network)
    image = padded_image(graph, (40, 40))
    schedule = cut(make_schedule(graph, (40, 40), itemsize=8, shift=True), 7)
    assert ((39, 40), (39, 40)) in schedule.blocks_of(0)
    expected = one_pass(network, image)
    failures = out_of_memory_above(30, monkeypatch)
    assert difference(by_stages(schedule, image, scratch=place), expected) < 1e-12
    assert failures


def test_memory_that_fails_now_and_then_is_tried_again(case, place, monkeypatch):
    """An error in the middle of a piece leaves what was computed before; what is left is done in smaller blocks."""
    network, image, schedule = case
    expected, original, calls = one_pass(network, image), Convolution.apply, []

    def apply(self, inputs, place):
        calls.append(None)
        if len(calls) in (1, 22, 75, 130):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(self, inputs, place)

    monkeypatch.setattr(Convolution, "apply", apply)
    assert difference(by_stages(schedule, image, scratch=place), expected) < 1e-12
    assert len(calls) > 130


def test_a_device_that_holds_no_voxel_is_refused(case, place, monkeypatch):
    """At the smallest block the run ends with one line that says what to do; nothing is left allocated."""
    _, image, schedule = case
    out_of_memory_above(0, monkeypatch)
    with pytest.raises(TilingError, match=r"memory is too small .*one voxel.*: choose -device cpu") as caught:
        by_stages(schedule, image, scratch=place)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def nth(count, function):
    """The function, which raises at that call; and the error that it raises."""
    error, calls = MyError(f"at call {count}"), []

    def called(*args):
        calls.append(None)
        if len(calls) == count:
            raise error
        return function(*args)

    return called, error


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("role", ["image", "sink", "progress"])
def test_an_error_of_the_caller_s_reaches_the_caller(case, place, role, share):
    """From whatever thread and at whatever block, as itself; the run ends, its maps are freed and its threads are gone."""
    _, image, schedule = case
    roles = {"image": lambda region: image[index(region)].clone(), "sink": collected(image.shape[2:])[1]}
    roles["progress"] = lambda: None
    calls = {
        "image": sum(len(schedule.blocks_of(n)) for n, piece in enumerate(schedule.pieces) if 0 in piece.sources),
        "sink": len(schedule.blocks_of(len(schedule.pieces) - 1)),
        "progress": schedule.steps,
    }[role]
    roles[role], error = nth(1 + round(share * (calls - 1)), roles[role])
    with pytest.raises(MyError) as caught, torch.inference_mode():
        run(schedule, roles["image"], roles["sink"], scratch=place, device=CPU, progress=roles["progress"])
    assert caught.value is error


def test_an_error_at_any_block_frees_every_map(case, tmp_path):
    """Also in a piece that takes over the memory of another map: no error of the freeing hides the first."""
    _, image, schedule = case
    for count in range(1, schedule.steps + 1, 5):
        progress, error = nth(count, lambda: None)
        with scratch_folder(tmp_path) as folder:
            with pytest.raises(MyError) as caught:
                by_stages(schedule, image, scratch=ScratchOnDisk(folder), progress=progress)
            assert caught.value is error
            assert list(folder.iterdir()) == []


def test_a_disk_that_fills_up_ends_the_run(case, tmp_path, monkeypatch):
    """The refusal of a map in the middle of a run is what the caller gets, and the maps before it are removed."""
    _, image, schedule = case
    reserve, made = scratch_module.reserve, []

    def full(descriptor, size):
        made.append(size)
        if len(made) == 3:
            raise OSError(28, "No space left on device")
        reserve(descriptor, size)

    monkeypatch.setattr(scratch_module, "reserve", full)
    with scratch_folder(tmp_path) as folder:
        with pytest.raises(OutputError, match=r"scratch of \d+ bytes cannot be made .*No space left on device"):
            by_stages(schedule, image, scratch=ScratchOnDisk(folder))
        assert list(folder.iterdir()) == []


def test_a_schedule_can_be_run_again(case, place):
    """A second image, after the first and after an error, has its own statistics."""
    network, image, schedule = case
    by_stages(schedule, image * 3 + 1, scratch=place)
    progress, _ = nth(schedule.steps // 2, lambda: None)
    with pytest.raises(MyError):
        by_stages(schedule, image - 5, scratch=place, progress=progress)
    assert difference(by_stages(schedule, image, scratch=place), one_pass(network, image)) < 1e-12


def test_what_the_caller_gives_is_not_changed(case, place):
    """The image is only read, and what the sink was given stays as it was when later blocks are computed."""
    _, image, schedule = case
    before, given, copies = image.clone(), [], []

    def sink(_, region, values):
        assert tuple(values.shape[2:]) == extent_of(region)
        given.append(values)
        copies.append(values.clone())

    with torch.inference_mode():
        run(schedule, lambda region: image[index(region)].clone(), sink, scratch=place, device=CPU)
    assert torch.equal(image, before)
    assert all(torch.equal(a, b) for a, b in zip(given, copies, strict=True))


@pytest.mark.parametrize("overlap", [False, True])
def test_transfer_reads_and_writes_in_order(overlap):
    """What was fetched is what is read, each key once; writes come in the order in which they were given."""
    written, reads = [], []

    def reading(number):
        def read():
            reads.append((number, threading.current_thread()))
            return {0: torch.full((1,), float(number))}

        return read

    with Transfer(CPU, overlap=overlap) as transfer:
        for number in range(6):
            values = transfer.read(number, reading(number))
            transfer.fetch(number + 1, reading(number + 1))
            assert values[0].item() == number
            transfer.write(lambda where, value: written.append((where, value.item())), number, values[0] * 2)
            assert len(written) >= number - WRITES_UNDER_WAY
        transfer.forget()
        assert transfer.read(6, reading(-1))[0].item() == -1
        transfer.flush()
        assert written == [(number, 2.0 * number) for number in range(6)]
    own = threading.current_thread()
    assert [number for number, thread in reads if thread is own] == ([0, -1] if overlap else [0, 1, 2, 3, 4, 5, -1])


def test_transfer_hands_errors_on():
    """An error of the reading thread comes with the read, one of the writing thread with a later write or the flush."""

    def failing(*_):
        raise MyError("there")

    with Transfer(CPU, overlap=True) as transfer:
        transfer.fetch("a", failing)
        with pytest.raises(MyError, match="there"):
            transfer.read("a", failing)
        transfer.write(failing, 0, torch.zeros(1))
        with pytest.raises(MyError, match="there"):
            transfer.flush()
        for _ in range(WRITES_UNDER_WAY):
            transfer.write(failing, 0, torch.zeros(1))
        with pytest.raises(MyError, match="there"):
            transfer.write(failing, 0, torch.zeros(1))
        transfer.fetch("b", failing)
        transfer.forget()  # nobody asks for it any more
