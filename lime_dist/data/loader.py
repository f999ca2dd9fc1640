"""Micro-batches of (tokens, labels) for the engine: a training stream that resumes exactly, and a fixed validation set."""

from __future__ import annotations

import queue
import threading
import weakref
import zlib
from collections import deque
from collections.abc import Iterator

import numpy as np
import torch

from lime_dist.data.answers import CountedLabels
from lime_dist.data.dataset import Samples
from lime_dist.data.order import Order, rank_positions
from lime_dist.data.ramp import BatchSizes
from lime_dist.errors import LimeError

Batch = tuple[torch.Tensor, torch.Tensor]
_Read = tuple[Batch, int]
"""A micro-batch and the CRC-32 of its tokens."""
_Group = list[_Read | BaseException]
PREFETCH = 4
"""Number of groups of micro-batches that are read ahead."""
GROUP_SAMPLES = 32
"""Samples per group. Groups pass from thread to thread as one, so that small micro-batches do not cost a wake-up each."""
ORDER_BLOCK = 1024
"""Samples whose order is computed at once: the overhead of a call is that of about 700 samples."""


def read_batch(
    split: Samples, samples: np.ndarray, sequence_length: int, counted: CountedLabels | None = None
) -> Batch:
    """Tokens and labels, int64 [b, T] each, of ``samples`` [b]. Labels are the tokens shifted by one; those that
    are not ``counted`` are IGNORED_LABEL."""
    return _read(split, samples, sequence_length, counted, None)[0]


def _read(
    split: Samples,
    samples: np.ndarray,
    sequence_length: int,
    counted: CountedLabels | None,
    pinned_for: torch.device | None,
) -> _Read:
    """A micro-batch and its checksum, which covers tokens as they are stored: a quarter of the bytes of int64."""
    stored = np.concatenate([split.sample(sample, sequence_length) for sample in samples.tolist()])
    rows = stored.reshape(len(samples), sequence_length + 1)
    checksum = zlib.crc32(rows.data)
    labels = rows[:, 1:].astype(np.int64) if counted is None else counted.labels(rows.astype(np.int64))
    batch = torch.from_numpy(rows[:, :-1].astype(np.int64)), torch.from_numpy(labels).contiguous()
    return (batch if pinned_for is None else _pinned(batch, pinned_for)), checksum


def _pinned(batch: Batch, device: torch.device) -> Batch:
    """The batch in pinned memory, from which a GPU copies while its host goes on. (A thread's current device is GPU 0 unless it
    says otherwise, and pinning memory makes a context there.)"""
    with torch.get_device_module(device).device(device):
        return batch[0].pin_memory(), batch[1].pin_memory()


class _ReadAhead:
    """Runs an iterator in a thread, PREFETCH groups ahead. An exception of the iterator is raised at the item where it occurred."""

    def __init__(self, items: Iterator[_Read], group_size: int) -> None:
        self._groups: queue.Queue[_Group] = queue.Queue(maxsize=PREFETCH)
        self._group: deque[_Read | BaseException] = deque()
        self._stop = threading.Event()
        # The thread has no reference to the reader, so that an abandoned reader is collected; its finalizer stops the thread.
        self._thread = threading.Thread(
            target=_fill, args=(items, group_size, self._groups, self._stop), name="read-ahead", daemon=True
        )
        self._thread.start()
        weakref.finalize(self, self._stop.set)

    def close(self) -> None:
        """Stop the thread and wait for its end. A thread inside torch can abort the process while the interpreter shuts down."""
        self._stop.set()
        self._thread.join()

    def get(self) -> _Read:
        if not self._group:
            self._group.extend(self._groups.get())
        item = self._group.popleft()
        if isinstance(item, BaseException):
            raise item
        return item


def _fill(items: Iterator[_Read], group_size: int, ready: queue.Queue[_Group], stop: threading.Event) -> None:
    def hand_over(group: _Group) -> bool:
        while not stop.is_set():
            try:
                ready.put(group, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    group: _Group = []
    try:
        for item in items:
            group.append(item)
            if len(group) == group_size:
                if not hand_over(group):
                    return
                group = []
    except BaseException as error:  # passed on to the consumer, which raises it
        hand_over([*group, error])


class TrainBatches:
    """The endless training stream of one replica: (tokens, labels), int64 [micro_batch_size, T] each.

    The stream is a function of ``consumed_samples``, which counts the samples of all replicas: it grows by the batch size of a
    step when the last micro-batch of the step is returned. Setting it jumps to the step that starts there. A thread reads a
    few micro-batches ahead.

    Args:
        pinned_for: the thread puts micro-batches into pinned memory for copies to this GPU; None: it does not.

    Attributes:
        checksums: CRC-32 of the tokens of each micro-batch returned in the newest step. The first and the last stage of a
            replica read the same tokens, so their checksums are equal.

    Raises:
        LimeError: the global batch size is no multiple of micro-batch size times replicas.
    """

    def __init__(
        self,
        split: Samples,
        order: Order,
        sequence_length: int,
        batch_sizes: BatchSizes | int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        consumed_samples: int = 0,
        counted: CountedLabels | None = None,
        pinned_for: torch.device | None = None,
    ) -> None:
        available = split.num_samples(sequence_length)
        if order.num_samples != available:
            raise ValueError(f"the order is over {order.num_samples} samples, but the split has {available}")
        self._split, self._order, self._sequence_length, self._counted = split, order, sequence_length, counted
        self._pinned_for = pinned_for
        self._batch_sizes = BatchSizes(batch_sizes) if isinstance(batch_sizes, int) else batch_sizes
        self._layout = (micro_batch_size, data_parallel_rank, data_parallel_size)
        rank_positions(consumed_samples, self._batch_sizes.at(consumed_samples), *self._layout)  # check the batch size
        self._reader: _ReadAhead | None = None
        self.checksums: list[int] = []
        self.consumed_samples = consumed_samples

    @property
    def consumed_samples(self) -> int:
        """Number of samples that all replicas have consumed in finished steps."""
        return self._consumed_samples

    @consumed_samples.setter
    def consumed_samples(self, value: int) -> None:
        if value < 0:
            raise ValueError(f"consumed_samples is {value}, it cannot be negative")
        self.close()
        self._consumed_samples, self._handed_out = value, 0

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches of this replica in the current step."""
        micro_batch_size, _, data_parallel_size = self._layout
        return self._batch_sizes.at(self._consumed_samples) // (micro_batch_size * data_parallel_size)

    def close(self) -> None:
        """Stop reading ahead. The next micro-batch is the first of the current step."""
        if self._reader is not None:
            self._reader.close()
        self._reader, self._handed_out = None, 0

    def __iter__(self) -> TrainBatches:
        return self

    def __next__(self) -> Batch:
        if self._reader is None:
            place = (self._consumed_samples, self._batch_sizes, self._layout)
            stream = _stream(self._split, self._order, self._sequence_length, *place, self._counted, self._pinned_for)
            self._reader = _ReadAhead(stream, max(1, GROUP_SAMPLES // self._layout[0]))
        try:
            batch, checksum = self._reader.get()
        except BaseException:
            self.close()
            raise
        self.checksums = [checksum] if self._handed_out == 0 else [*self.checksums, checksum]
        self._handed_out += 1
        if self._handed_out == self.micro_batches:
            self._consumed_samples += self._batch_sizes.at(self._consumed_samples)
            self._handed_out = 0
        return batch


def _stream(
    split: Samples,
    order: Order,
    sequence_length: int,
    consumed: int,
    batch_sizes: BatchSizes,
    layout: tuple[int, int, int],
    counted: CountedLabels | None,
    pinned_for: torch.device | None,
) -> Iterator[_Read]:
    while True:
        positions: list[np.ndarray] = []
        while sum(map(len, positions)) * layout[0] < ORDER_BLOCK:
            size = batch_sizes.at(consumed)
            positions.append(rank_positions(consumed, size, *layout))
            consumed += size
        for samples in order.samples_at(np.concatenate(positions)):
            yield _read(split, samples, sequence_length, counted, pinned_for)


class ValidationBatches:
    """Samples 0 … evaluation_samples − 1 of a split, in order, divided among replicas as in a training step.

    Iterating yields this replica's (tokens, labels), int64 [micro_batch_size, T], the same every time; ``len`` is its number of
    micro-batches.

    Raises:
        LimeError: the samples do not divide evenly among the replicas, or the split has too few.
    """

    def __init__(
        self,
        split: Samples,
        sequence_length: int,
        evaluation_samples: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        counted: CountedLabels | None = None,
        pinned_for: torch.device | None = None,
    ) -> None:
        wide = micro_batch_size * data_parallel_size
        available = split.num_samples(sequence_length)
        if evaluation_samples < 1 or evaluation_samples % wide:
            below = max(0, evaluation_samples) // wide * wide
            nearest = f"{below} or {below + wide}" if below else f"{wide}, or 0 for no validation"
            raise LimeError(
                f"train.evaluation_samples={evaluation_samples} is no multiple of train.micro_batch_size="
                f"{micro_batch_size} times the data-parallel width {data_parallel_size}; give {nearest}"
            )
        if evaluation_samples > available:
            raise LimeError(
                f"train.evaluation_samples={evaluation_samples}, but {split.path} has {available} {split.split} "
                f"samples of {sequence_length} tokens; use at most {available // wide * wide}, or give more validation text "
                "(--validation-fraction of data_tools.pretokenize, data.validation_fraction of a .bin/.idx pair)"
            )
        self._split, self._sequence_length, self._counted = split, sequence_length, counted
        self._pinned_for = pinned_for
        self._samples = rank_positions(0, evaluation_samples, micro_batch_size, data_parallel_rank, data_parallel_size)

    def __len__(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[Batch]:
        for samples in self._samples:
            yield _read(self._split, samples, self._sequence_length, self._counted, self._pinned_for)[0]
