"""Micro-batches of examples of similar length, to save padding; they depend on seed and epoch only."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence

from torch.utils.data import BatchSampler, Sampler

from cwdpo.data.encode.encoded_rows import EncodedRows
from cwdpo.data.encode.encoder import EncodedExample
from cwdpo.errors import DataError

_GROUP = 50  # number of batches whose examples are sorted by length together


def row_lengths(example: EncodedExample, *, shared: bool) -> tuple[int, int]:
    """``(number of rows, tokens of the longest row)`` that an example adds to a micro-batch."""
    rows = example.row_tokens(shared=shared)
    return len(rows), max(rows)


def all_row_lengths(examples: Sequence[EncodedExample], *, shared: bool) -> list[tuple[int, int]]:
    """:func:`row_lengths` of each example."""
    if not isinstance(examples, EncodedRows):
        return [row_lengths(example, shared=shared) for example in examples]
    rows, longest, _ = examples.row_sizes(shared=shared)
    return list(zip(rows.tolist(), longest.tolist(), strict=True))


def optimizer_steps(steps: int | None, epochs: float, batches: int, accumulation: int) -> int:
    """Number of optimizer steps of a stage, counted as transformers does.

    Args:
        steps: the number set in the recipe, if any; then ``epochs`` is not used.
        epochs: passes over the data.
        batches: micro-batches per epoch on one process.
        accumulation: micro-batches per optimizer step.
    """
    return steps or math.ceil(epochs * max(math.ceil(batches / accumulation), 1))


class LengthGrouped(Sampler[int]):
    """Orders examples so that each batch has examples of similar length, with the batches in random order.

    Lengths are computed at the start of each epoch, because a round may bring new examples.

    Args:
        length: number of tokens of example ``i``.
        rows: number of examples.
        batch: examples per batch.
        seed: together with the epoch, decides the order.
    """

    def __init__(self, length: Callable[[int], int], rows: int, batch: int, seed: int) -> None:
        self.length, self.rows, self.batch, self.seed = length, rows, batch, seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.rows

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate at the start of an epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"{self.seed} {self.epoch}")
        order = draw.sample(range(self.rows), self.rows)
        size = self.batch * max(1, min(self.rows // (self.batch * 4), _GROUP))
        batches: list[list[int]] = []
        for start in range(0, self.rows, size):
            # The sort is stable: examples of the same length keep their random order.
            group = sorted(order[start : start + size], key=self.length)
            batches += [group[i : i + self.batch] for i in range(0, len(group), self.batch)]
        short = [b for b in batches if len(b) < self.batch]
        whole = [b for b in batches if len(b) == self.batch]
        draw.shuffle(whole)
        for batch in (*whole, *short):  # a short batch elsewhere would shift the borders of all later batches
            yield from batch


class TokenBatches(BatchSampler):
    """Batches with as many examples as fit into a number of tokens, including padding; in random order.

    Examples are sorted by length (ties in random order) and added to a batch until it is full. Every epoch has the same
    number of batches.

    Args:
        lengths: (number of rows, tokens of the longest row) of each example, see :func:`row_lengths`.
        max_tokens: largest number of tokens in a batch: rows times the longest row.
        seed: together with the epoch, decides the order.
        processes: the number of batches is a multiple of this.

    Raises:
        DataError: a single example has more tokens.
    """

    def __init__(
        self, lengths: Sequence[tuple[int, int]], max_tokens: int, seed: int, processes: int = 1
    ) -> None:
        over = [i for i, (rows, longest) in enumerate(lengths) if rows * longest > max_tokens]
        if over:
            rows, longest = lengths[over[0]]
            raise DataError(
                f"train.max_tokens_per_batch = {max_tokens}: {len(over)} of {len(lengths)} examples have more tokens, "
                f"the first (number {over[0]}) has {rows * longest} tokens; raise it, or set data.max_length"
            )
        self.lengths, self.max_tokens, self.seed, self.processes = lengths, max_tokens, seed, processes
        self.batch_size = None  # accelerate: batches differ in size
        self.drop_last = False
        self.epoch = 0
        self._count = len(self._cut(range(len(lengths))))

    @property
    def sampler(self) -> TokenBatches:
        """accelerate calls ``set_epoch`` on this attribute when it distributes batches over processes."""
        return self

    @sampler.setter
    def sampler(self, value: object) -> None:
        raise AttributeError("TokenBatches is its own sampler; it cannot be replaced")

    def __len__(self) -> int:
        return self._count

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate at the start of an epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        draw = random.Random(f"{self.seed} {self.epoch}")
        batches = self._cut(draw.sample(range(len(self.lengths)), len(self.lengths)))
        draw.shuffle(batches)
        yield from batches

    def _cut(self, order: Sequence[int]) -> list[list[int]]:
        batches: list[list[int]] = []
        rows = 0
        for index in sorted(order, key=lambda i: self.lengths[i][::-1], reverse=True):  # the longest first
            own, longest = self.lengths[index]
            most = self.lengths[batches[-1][0]][1] if batches else longest
            if batches and max(most, longest) * (rows + own) <= self.max_tokens:
                batches[-1].append(index)
                rows += own
            else:
                batches.append([index])
                rows = own
        return self._even(batches)

    def _even(self, batches: list[list[int]]) -> list[list[int]]:
        """Split the largest batches until the number of batches is a multiple of the number of processes."""
        while len(batches) % self.processes:
            fullest = max(range(len(batches)), key=lambda i: len(batches[i]))
            batch = batches[fullest]
            if len(batch) < 2:
                batches.append([])  # the process that gets it runs a silent row, see processes.together
                continue
            batches[fullest : fullest + 1] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
        return batches
