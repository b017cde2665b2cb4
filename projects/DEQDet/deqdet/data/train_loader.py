"""The loader of training batches, which can start at any iteration as if all earlier batches had been loaded."""

import itertools
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, build_detection_train_loader
from detectron2.utils import comm

from .mapper import build_mapper
from .randomness import mix_seed, seeded


class Ticket(NamedTuple):
    """A sample to load."""

    index: int  # of the record in the data set
    position: int  # in this rank's infinite stream of samples


class Samples(Dataset):
    """The mapped samples of a data set. The mapper's random numbers depend only on seed, rank and position.

    The augmentation of a sample is therefore the same in any dataloader worker, and in a resumed training.
    """

    def __init__(self, records: Sequence[dict], mapper: Callable[[dict], dict], *, seed: int, rank: int):
        self._records = records
        self._mapper = mapper
        self._seed = seed
        self._rank = rank

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, ticket: Ticket) -> dict:
        with seeded(mix_seed(self._seed, self._rank, ticket.position)):
            return self._mapper(self._records[ticket.index])


class BatchStream(Sampler):
    """One rank's infinite stream of batches, from the batch of iteration `start` on.

    Earlier batches are computed and discarded. They consist of indices only, so skipping a hundred thousand iterations
    takes about a second.
    """

    def __init__(self, sampler: Sampler, batch_size: int, groups: Sequence[int] | None = None):
        """
        Args:
            sampler: a training sampler of detectron2: an infinite stream of indices, the same in every pass over it.
            batch_size: images per batch on this rank.
            groups: the group number of each record; all records in a batch are of the same group. None: one group.
        """
        self.start = 0
        self._sampler = sampler
        self._batch_size = batch_size
        self._groups = groups

    def __iter__(self) -> Iterator[list[Ticket]]:
        return itertools.islice(self._batches(), self.start, None)

    def _batches(self) -> Iterator[list[Ticket]]:
        waiting: dict[int, list[Ticket]] = {}
        for position, index in enumerate(self._sampler):
            group = 0 if self._groups is None else self._groups[index]
            batch = waiting.setdefault(group, [])
            batch.append(Ticket(index, position))
            if len(batch) == self._batch_size:
                yield waiting.pop(group)


class TrainLoader(DataLoader):
    """A loader of lists of samples from a BatchStream."""

    def start_at(self, iteration: int) -> None:
        """Make the next iterator over the loader begin with the batch of this training iteration."""
        self.batch_sampler.start = iteration


def build_train_loader(cfg: CfgNode) -> DataLoader:
    """Build the training loader of a config; the order of the data follows from SEED.

    The batches do not depend on DATALOADER.NUM_WORKERS. For a torch IterableDataset, which has no positions, the result
    is detectron2's own loader: a resumed training then reads it from its beginning.
    """
    seed = max(cfg.SEED, 0)
    with seeded(mix_seed(seed)):  # detectron2's samplers draw their seeds, the same on all ranks, from NumPy
        parts = build_detection_train_loader.from_config(cfg, mapper=build_mapper(cfg, is_train=True))
    if isinstance(parts["dataset"], IterableDataset):
        return build_detection_train_loader(**parts)
    return assemble_train_loader(parts, seed)


def assemble_train_loader(parts: Mapping, seed: int) -> TrainLoader:
    """Build a loader from the arguments of detectron2's build_detection_train_loader: dataset, sampler, mapper, etc."""
    records = parts["dataset"]
    # The two groups of detectron2's AspectRatioGroupedDataset, by the size that the data set states.
    groups = [int(x["width"] <= x["height"]) for x in records] if parts["aspect_ratio_grouping"] else None
    batch_size = parts["total_batch_size"] // comm.get_world_size()
    if isinstance(records, list):
        records = DatasetFromList(records, copy=False)
    workers = parts["num_workers"]
    return TrainLoader(
        Samples(records, parts["mapper"], seed=seed, rank=comm.get_rank()),
        batch_sampler=BatchStream(parts["sampler"], batch_size, groups),
        num_workers=workers,
        prefetch_factor=2 if workers > 0 else None,
        collate_fn=_as_list,
        worker_init_fn=_ignore_interrupts,
        # Each iterator draws a number from this generator; from torch's default one, that would shift training's draws.
        generator=torch.Generator().manual_seed(seed),
    )


def _ignore_interrupts(worker: int) -> None:
    """Let a dataloader worker survive a Ctrl-C, which it receives too, so that the current iteration can finish.

    Reset an inherited handler of SIGTERM: when the main process exits, it ends its workers with SIGTERM, and waits for
    them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _as_list(samples: list[dict]) -> list[dict]:
    """Collate samples into a list, as detectron2's models expect; images differ in size, so they are not stacked."""
    return samples
