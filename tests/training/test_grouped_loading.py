"""Mini-batches of one group each, from nnU-Net's own loaders, in the same order on every process."""

import itertools
from collections import Counter
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from batchgenerators.dataloading.multi_threaded_augmenter import MultiThreadedAugmenter
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_norm.training.grouped_loading import GroupedDataLoader, GroupSequence, grouped_loading

GROUPS = {"case0": "a", "case1": "b", "case2": "b", "case3": "b", "case4": "c"}


def seed_globally(seed):
    np.random.seed(seed)  # noqa: NPY002 - the generator from which nnU-Net draws


def draw_globally():
    return np.random.random()  # noqa: NPY002 - the same


class Cases:
    """Stands in for nnU-Net's dataset where only identifiers are drawn."""

    identifiers = sorted(GROUPS)


def loader(cls=GroupedDataLoader, batch_size=4, **kwargs):
    labels = SimpleNamespace(all_labels=[0, 1, 2], has_ignore_label=False)
    if cls is GroupedDataLoader:
        kwargs = {"groups": GROUPS, "seed": (0,)} | kwargs
    return cls(Cases(), batch_size, (8, 8, 8), (8, 8, 8), labels, **kwargs)


def groups_of(batch):
    return {GROUPS[case] for case in batch}


def drawn(loader, number):
    return [groups_of(loader.get_indices()).pop() for _ in range(number)]


def test_all_cases_of_a_mini_batch_are_of_one_group_and_every_case_is_as_likely_as_ever():
    seed_globally(0)
    made = loader()
    batches = [made.get_indices() for _ in range(5000)]
    assert all(len(groups_of(batch)) == 1 and len(batch) == 4 for batch in batches)
    counts = Counter(itertools.chain.from_iterable(batches))
    # 1 of 5 each. Batches are whole groups, so the counts of 20000 draws spread like those of 5000.
    assert {case: pytest.approx(0.2, abs=0.02) for case in GROUPS} == {c: n / 20000 for c, n in counts.items()}


def test_sampling_probabilities_hold_for_cases_and_thus_for_groups():
    seed_globally(0)
    made = loader(sampling_probabilities=[0.1, 0.5, 0.2, 0.0, 0.2])
    counts = Counter(itertools.chain.from_iterable(made.get_indices() for _ in range(5000)))
    expected = {"case0": 0.1, "case1": 0.5, "case2": 0.2, "case4": 0.2}
    assert {case: pytest.approx(p, abs=0.02) for case, p in expected.items()} == {
        c: n / 20000 for c, n in counts.items()
    }


def test_the_groups_are_a_pure_function_of_the_step():
    """Whatever else was drawn, and from wherever one starts: what resuming a training needs."""
    whole = drawn(loader(), 50)
    assert set(whole) == {"a", "b", "c"}
    later = loader(first_step=20)
    seed_globally(99)
    assert drawn(later, 30) == whole[20:]
    assert drawn(loader(seed=(1,)), 50) != whole
    sequence = GroupSequence(["a", "b"], [0.5, 0.5], (3, 1))
    assert [sequence(step) for step in range(9)] == [sequence(step) for step in reversed(range(9))][::-1]


def test_ranks_draw_the_same_groups_and_different_cases():
    """Ranks differ in NumPy's global state, from which nnU-Net draws; the groups do not come from there."""
    batches = []
    for rank in (0, 1):
        seed_globally(rank)
        made = loader()
        batches.append([list(made.get_indices()) for _ in range(40)])
    assert [groups_of(batch) for batch in batches[0]] == [groups_of(batch) for batch in batches[1]]
    assert batches[0] != batches[1]


def test_the_global_generator_is_left_to_nnunet():
    """The group is drawn elsewhere: what follows a batch does not depend on which group it was."""
    states = []
    for seed in range(5):
        seed_globally(0)
        loader(seed=(seed,)).get_indices()
        states.append(draw_globally())
    assert len(set(states)) == 1


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_that_take_turns_give_the_steps_in_order(workers):
    expected = drawn(loader(first_step=6), 12)
    made = [loader(first_step=6) for _ in range(workers)]
    for thread, each in enumerate(made):
        each.number_of_threads_in_multithreaded, each.thread_id = workers, thread
    assert [drawn(made[step % workers], 1)[0] for step in range(12)] == expected


@pytest.mark.parametrize("probabilistic", [False, True])
def test_oversampling_of_foreground_is_nnunets(probabilistic):
    """The same decisions as nnU-Net's loader, sample by sample."""
    answers = []
    for cls in (nnUNetDataLoader, GroupedDataLoader):
        made = loader(cls, 6, oversample_foreground_percent=0.33, probabilistic_oversampling=probabilistic)
        seed_globally(4)
        answers.append([made.get_do_oversample(sample) for sample in range(6)])
    assert answers[0] == answers[1]
    assert True in answers[0]


def started(dataset, first_step=0, seed=3):
    """nnU-Net's own ``get_dataloaders``, inside the context manager."""
    trainer = dataset.trainer("nnUNetTrainerBatchNorm_1epochs", fold="all")
    trainer.initialize()
    with grouped_loading(GROUPS, seed=seed, first_steps=(first_step, first_step)):
        loaders = trainer.get_dataloaders()
    trainer_module = import_module(nnUNetTrainer.__module__)
    assert trainer_module.nnUNetDataLoader is nnUNetDataLoader
    assert trainer_module.NonDetMultiThreadedAugmenter is NonDetMultiThreadedAugmenter
    return loaders


def test_nnunets_loaders_are_grouped_each_with_a_sequence_of_its_own(dataset):
    training, validation = started(dataset)
    sequences = []
    for augmenter in (training, validation):
        groups = []
        for _ in range(15):
            batch = next(augmenter)
            (group,) = groups_of(batch["keys"])
            groups.append(group)
            assert batch["data"].shape == (2, 1, 16, 16, 16)
        sequences.append(groups)
    assert sequences[0] != sequences[1]
    # One batch of each was thrown away by nnU-Net, as it does before every training.
    assert sequences[0] == [training.data_loader.sequence(step) for step in range(1, 16)]


def test_foreground_is_oversampled_in_real_batches(dataset):
    """The last third of a batch, here the second of two samples, is centred on foreground."""
    training, _ = started(dataset)
    targets = [next(training)["target"] for _ in range(8)]
    assert all((target[0] if isinstance(target, list) else target)[1].max() > 0 for target in targets)


def test_real_workers_take_turns(dataset, monkeypatch):
    """Two processes of augmentation give the groups in the order of one, and are closed as nnU-Net closes them."""
    single, _ = started(dataset, first_step=40)
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    threads = torch.get_num_threads()
    training, validation = started(dataset, first_step=40)
    try:
        assert isinstance(training, MultiThreadedAugmenter)
        assert (training.num_processes, validation.num_processes) == (2, 1)
        batches = [next(training)["keys"] for _ in range(10)]
        expected = [next(single)["keys"] for _ in range(10)]
        assert [groups_of(batch) for batch in batches] == [groups_of(batch) for batch in expected]
        assert [groups_of(next(validation)["keys"]).pop() for _ in range(5)] == [
            validation.generator.sequence(step) for step in range(41, 46)
        ]
    finally:
        for augmenter in (training, validation):
            augmenter._finish()
    assert training._processes == []
    assert torch.get_num_threads() == threads
