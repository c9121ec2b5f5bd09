"""A run that is stopped at any block and resumed by another process gives the same bits; and outputs that overlap."""

import json
from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stage_networks import Design
from whole_pass import CPU, by_stages, collected, cut, one_pass, padded_image

from nnunet_norm.errors import OutputError
from nnunet_norm.layers.moments import Moments
from nnunet_norm.stages import Scratch, ScratchOnDisk, make_schedule, read_network, run
from nnunet_norm.stages.journal import Progress, moments_as_numbers, moments_of_numbers
from nnunet_norm.stages.moments import ChannelMoments
from nnunet_norm.stages.regions import index
from nnunet_norm.stages.windows import Convolution

D2, D3 = ((1, 1), (2, 2)), ((1, 1, 1), (2, 2, 2))
DESIGNS = {
    f"{kind} {norm}": Design(D2, kind=kind, norm=norm)
    for kind, norm in product(("plain", "residual encoder"), ("BatchNorm", "InstanceNorm", "GroupNorm"))
} | {"plain InstanceNorm 3d": Design(D3, norm="InstanceNorm")}
SHAPES = {2: (19, 7), 3: (11, 6, 7)}
EDGE = 8

in_short = pytest.mark.parametrize("case", ["plain InstanceNorm", "residual encoder GroupNorm"], indirect=True)
"""Where two networks tell as much as all."""


class Stopped(BaseException):
    """The process is no more."""


class Case:
    """A network, an image and blocks for it; every process reads the network anew."""

    def __init__(self, name):
        self.network = DESIGNS[name].build()
        self.image = padded_image(read_network(self.network), SHAPES[DESIGNS[name].ndim])
        self.expected = by_stages(self.schedule(), self.image)
        self.steps = self.schedule().steps

    def schedule(self):
        graph = read_network(self.network)
        return cut(make_schedule(graph, self.image.shape[2:], itemsize=8, in_place=False), EDGE)


class Points:
    """A journal that keeps the last point as JSON, as a manifest would; like ``RunJournal`` it removes what none names."""

    def __init__(self, folder, last=None, due=lambda: True):
        self.folder, self.last, self.is_due, self.noted = folder, last, due, 0
        named = set(self.resumed.maps.values()) if last is not None else set()
        for path in folder.iterdir():
            if path.name not in named:
                path.unlink()
        assert {path.name for path in folder.iterdir()} == named  # a point never names what is not there

    @property
    def resumed(self):
        return None if self.last is None else Progress.from_dict(json.loads(self.last))

    def needs(self, name):
        return self.last is not None and name in self.resumed.maps.values()

    def note(self, progress):
        self.last, self.noted = json.dumps(progress.as_dict()), self.noted + 1
        assert self.resumed == progress


class Output:
    """The output of several processes: whatever is written again must be the same bits."""

    def __init__(self, shape):
        self.shape, self.values = shape, None

    def __call__(self, block, region, values):
        assert block == region
        if self.values is None:
            self.values = torch.full((1, values.shape[1], *self.shape), torch.nan, dtype=values.dtype)
        there = self.values[index(region)]
        assert (there.isnan() | (there == values)).all()
        self.values[index(region)] = values


def process(case, output, journal, *, stop=None):
    """Run, until after so many blocks the process is no more; how many were told to be done."""
    steps = 0

    def progress():
        nonlocal steps
        if steps == stop:
            raise Stopped
        steps += 1

    with torch.inference_mode():
        run(
            case.schedule(),
            lambda region: case.image[index(region)].clone(),
            output,
            scratch=ScratchOnDisk(journal.folder),
            device=CPU,
            progress=progress,
            journal=journal,
        )
    return steps


def resumed(case, journal, output, *, due=lambda: True):
    """Another process goes on where the journal says, to the end, and leaves no file."""
    journal = Points(journal.folder, journal.last, due)
    assert process(case, output, journal) == case.steps
    assert torch.equal(output.values, case.expected)
    assert list(journal.folder.iterdir()) == []


@cache
def case_of(name):
    return Case(name)


@pytest.fixture(params=DESIGNS)
def case(request):
    """Made once, but in a test: with the threads of tests, on which the last bits depend."""
    return case_of(request.param)


def test_a_run_that_is_noted_gives_the_bits_of_one_that_is_not(case, tmp_path):
    """After every block and every piece there is a point; at the end no file."""
    journal, output = Points(tmp_path), Output(case.image.shape[2:])
    steps = process(case, output, journal)
    assert steps == journal.noted == case.steps  # the last block of a piece is noted with the piece
    assert torch.equal(output.values, case.expected)
    assert journal.resumed.piece == len(case.schedule().pieces)
    assert journal.resumed.maps == {}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("due", "every"), [(True, 1), (False, 5)], ids=["every block", "every piece"])
def test_stopped_at_any_block_it_is_resumed_to_the_same_bits(case, tmp_path, due, every):
    """Whatever was computed after the last point is computed again; every block is told once, done before or not."""
    for stop in range(0, case.steps, every):
        journal, output = Points(tmp_path, due=lambda: due), Output(case.image.shape[2:])
        with pytest.raises(Stopped):
            process(case, output, journal, stop=stop)
        resumed(case, journal, output, due=lambda: due)


@in_short
@pytest.mark.parametrize("moment", ["before", "after"])
def test_stopped_at_any_point_it_is_resumed_to_the_same_bits(case, tmp_path, moment):
    """While a point is taken: it is there or the one before is, and files that neither needs are no obstacle."""

    class Stopping(Points):
        stop = 0

        def note(self, progress):
            if moment == "after":
                super().note(progress)
            if self.noted == self.stop:
                raise Stopped
            if moment == "before":
                super().note(progress)

    for stop in range(1, case.steps, 2):
        journal, output = Stopping(tmp_path), Output(case.image.shape[2:])
        journal.stop = stop
        with pytest.raises(Stopped):
            process(case, output, journal)
        resumed(case, journal, output)


@in_short
def test_a_run_that_gets_on_by_one_block_at_a_time_is_finished(case, tmp_path):
    """Every process computes one block more than the one before, and is stopped when it has computed another."""
    journal, output = Points(tmp_path), Output(case.image.shape[2:])
    for processes in range(1, case.steps):
        with pytest.raises(Stopped):
            process(case, output, journal, stop=processes)
        assert journal.noted == 1
        journal = Points(tmp_path, journal.last)
    assert process(case, output, journal) == case.steps
    assert torch.equal(output.values, case.expected)
    assert list(tmp_path.iterdir()) == []


@in_short
def test_a_finished_run_that_is_resumed_computes_nothing(case, tmp_path):
    """All that was done is told."""
    journal, output = Points(tmp_path), Output(case.image.shape[2:])
    process(case, output, journal)

    def never(*_):
        raise AssertionError("computed again")

    assert process(case, never, Points(tmp_path, journal.last)) == case.steps


def test_a_map_that_is_not_whole_is_refused(tmp_path):
    """A file that was cut short, and one that is gone: in one line with its name."""
    case = case_of("plain InstanceNorm")
    journal = Points(tmp_path)
    with pytest.raises(Stopped):
        process(case, Output(case.image.shape[2:]), journal, stop=case.steps // 2)
    victim = tmp_path / next(iter(journal.resumed.maps.values()))
    taken_up = Points(tmp_path, journal.last)
    for spoil in (lambda: victim.write_bytes(victim.read_bytes()[:-8]), victim.unlink):
        spoil()
        with pytest.raises(OutputError, match=rf"scratch '.*{victim.name}' of the prediction .* not whole: start it a"):
            process(case, Output(case.image.shape[2:]), taken_up)


def test_blocks_that_were_halved_stay_halved(tmp_path, monkeypatch):
    """A device that held only small blocks is not asked to hold the large ones again, and the bits are the same."""
    case = case_of("residual encoder InstanceNorm")
    original, failures = Convolution.apply, []

    def apply(self, inputs, place):
        result = original(self, inputs, place)
        if result[0, 0].numel() > 40:
            failures.append(result[0, 0].numel())
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return result

    monkeypatch.setattr(Convolution, "apply", apply)
    expected = Output(case.image.shape[2:])
    (tmp_path / "whole").mkdir()
    whole = Points(tmp_path / "whole")
    steps = process(case, expected, whole)
    assert failures
    assert whole.resumed.halvings > 0
    (tmp_path / "again").mkdir()
    for stop in range(1, steps, 5):
        journal, output = Points(tmp_path / "again"), Output(case.image.shape[2:])
        with pytest.raises(Stopped):
            process(case, output, journal, stop=stop)
        before = journal.resumed.halvings
        failures.clear()
        journal = Points(tmp_path / "again", journal.last)
        process(case, output, journal)
        assert len(failures) == whole.resumed.halvings - before
        assert torch.equal(output.values, expected.values)
        assert list(journal.folder.iterdir()) == []


# --- points as JSON ---

FINITE = st.floats(allow_nan=False, allow_infinity=False)
NUMBERS = st.lists(FINITE, max_size=3)
INTERVALS = st.tuples(st.integers(0, 2**40), st.integers(0, 2**40))


@given(
    st.builds(
        Progress,
        piece=st.integers(0, 1000),
        todo=st.none() | st.lists(st.tuples(INTERVALS, INTERVALS), max_size=4).map(tuple),
        moments=st.none() | st.tuples(FINITE, NUMBERS, NUMBERS),
        maps=st.dictionaries(st.integers(0, 1000), st.text(), max_size=3),
        statistics=st.dictionaries(st.integers(0, 1000), st.tuples(NUMBERS, NUMBERS), max_size=3),
        halvings=st.integers(0, 60),
    )
)
@settings(max_examples=100, deadline=None)
def test_a_point_goes_through_json_unchanged(progress):
    """To the last bit of every number."""
    assert Progress.from_dict(json.loads(json.dumps(progress.as_dict()))) == progress


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("piece", "first"),
        ("piece", None),
        ("todo", [[1, 2]]),
        ("todo", 3),
        ("moments", [1.0]),
        ("moments", ["many", [], []]),
        ("maps", [1]),
        ("statistics", {"3": [[0.0]]}),
        ("halvings", {}),
    ],
)
def test_what_is_no_point_is_not_taken_for_one(part, value):
    """The errors are those that a manifest's reader expects; so is that of a part that is missing."""
    content = Progress().as_dict() | {part: value}
    with pytest.raises((KeyError, TypeError, ValueError)):
        Progress.from_dict(content)
    del content[part]
    with pytest.raises(KeyError, match=part):
        Progress.from_dict(content)


def test_moments_are_taken_up_to_the_last_bit():
    """Moments that go on from numbers are those that never were numbers."""
    first, second = (torch.randn(1, 3, 7, 5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    straight, stopped, other = ChannelMoments(), ChannelMoments(), ChannelMoments()
    for part in (first, second):
        straight.add(part)
    stopped.add(first)
    other.moments = moments_of_numbers(json.loads(json.dumps(moments_as_numbers(stopped.moments))))
    assert isinstance(other.moments, Moments)
    other.add(second)
    assert all(torch.equal(a, b) for a, b in zip(other.mean_and_var(), straight.mean_and_var(), strict=True))
    assert moments_as_numbers(None) is None
    assert moments_of_numbers(None) is None


# --- overlap: what comes with a block ---


@pytest.mark.parametrize("overlap", [(1, 1), (0, 3), (5, 0), (40, 40)])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("name", ["plain BatchNorm", "residual encoder InstanceNorm"])
def test_a_block_comes_with_the_overlap_after_it(name, shift, overlap):
    """Clipped at the end of the image; the blocks cover the output once, and all values are those of one pass."""
    case = case_of(name)
    extents = case.image.shape[2:]
    schedule = replace(case.schedule(), overlap=overlap, shift=shift)
    result, put = collected(extents)
    expected, given = one_pass(case.network, case.image), []

    def sink(block, region, values):
        put(block, block, values[index(tuple((0, stop - start) for start, stop in block))])
        given.append((block, region))
        assert (values - expected[index(region)]).abs().max() < 1e-12

    with torch.inference_mode():
        run(schedule, lambda region: case.image[index(region)].clone(), sink, scratch=Scratch(), device=CPU)
    last = len(schedule.pieces) - 1
    assert [block for block, _ in given] == schedule.blocks_of(last) == replace(schedule, overlap=()).blocks_of(last)
    for block, region in given:
        assert region == tuple(
            (start, min(stop + more, n)) for (start, stop), more, n in zip(block, overlap, extents, strict=True)
        )
    assert (result[0] - expected).abs().max() < 1e-12


def test_the_overlap_is_counted():
    """As work and as memory of the last piece alone; other pieces, what is stored, and the number of blocks stay."""
    plain = case_of("plain BatchNorm").schedule()
    more = replace(plain, overlap=(4, 4))
    assert more.passes > plain.passes
    assert more.scratch_bytes == plain.scratch_bytes
    assert more.steps == plain.steps
    last = len(plain.pieces) - 1
    assert more._bytes_of_block(last) > plain._bytes_of_block(last)
    assert [more._bytes_of_block(n) for n in range(last)] == [plain._bytes_of_block(n) for n in range(last)]


def test_an_overlap_is_resumed_to_the_same_bits(tmp_path):
    """What a killed process handed on is handed on again with the same overlap."""
    case = Case("plain InstanceNorm")
    plain = case.schedule
    case.schedule = lambda: replace(plain(), overlap=(2, 3))

    def output_of(seen):
        def output(block, region, values):
            assert seen.setdefault((block, region), values).equal(values)

        return output

    expected, seen = {}, {}
    journal = Points(tmp_path)
    steps = process(case, output_of(expected), journal)
    for stop in range(steps - 6, steps):
        journal = Points(tmp_path)
        with pytest.raises(Stopped):
            process(case, output_of(seen), journal, stop=stop)
        process(case, output_of(seen), Points(tmp_path, journal.last))
    assert seen.keys() == expected.keys()
    assert all(torch.equal(values, expected[where]) for where, values in seen.items())
