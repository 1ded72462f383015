"""Micro-batches of rows of like length: little padding, the same for the same seed and epoch, resumable."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence

from torch.utils.data import BatchSampler, Sampler

from cwdpo.data.encode.encoder import EncodedExample
from cwdpo.errors import DataError

_GROUP = 50  # micro-batches among whose rows a batch's companions are found


def row_lengths(example: EncodedExample, *, shared: bool) -> tuple[int, int]:
    """(number of rows, tokens of the longest) that an example adds to a micro-batch."""
    rows = example.row_tokens(shared=shared)
    return len(rows), max(rows)


def optimizer_steps(steps: int | None, epochs: float, batches: int, accumulation: int) -> int:
    """Optimizer steps of a stage, as transformers counts them.

    Args:
        steps: the number that was asked for; wins over ``epochs``.
        epochs: passes over the data.
        batches: micro-batches of a pass on one process.
        accumulation: micro-batches of an optimizer step.
    """
    return steps or math.ceil(epochs * max(math.ceil(batches / accumulation), 1))


class LengthGrouped(Sampler[int]):
    """Indices in an order whose consecutive batches hold rows of like length, in random order of batches.

    Lengths are asked when an epoch begins, because the rows of an epoch may be new.

    Args:
        length: tokens of row ``i``.
        rows: number of rows.
        batch: rows per batch.
        seed: with the epoch, decides everything.
    """

    def __init__(self, length: Callable[[int], int], rows: int, batch: int, seed: int) -> None:
        self.length, self.rows, self.batch, self.seed = length, rows, batch, seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.rows

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate when an epoch begins."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"{self.seed} {self.epoch}")
        order = draw.sample(range(self.rows), self.rows)
        size = self.batch * max(1, min(self.rows // (self.batch * 4), _GROUP))
        batches: list[list[int]] = []
        for start in range(0, self.rows, size):
            # Stable: rows of one length keep their random order.
            group = sorted(order[start : start + size], key=self.length)
            batches += [group[i : i + self.batch] for i in range(0, len(group), self.batch)]
        short = [b for b in batches if len(b) < self.batch]
        whole = [b for b in batches if len(b) == self.batch]
        draw.shuffle(whole)
        for batch in (*whole, *short):  # a short one anywhere else would shift all that follow
            yield from batch


class TokenBatches(BatchSampler):
    """Batches of as many rows as fit a number of tokens, padding included; in random order.

    Rows are sorted by length, ties in an order of the epoch's own, and cut greedily: every epoch has as many batches.

    Args:
        lengths: (rows, tokens of the longest) of each example, see :func:`row_lengths`.
        max_tokens: most tokens of a batch, rows times longest.
        seed: with the epoch, decides everything.
        processes: the number of batches is a multiple of it.

    Raises:
        DataError: an example alone has more tokens.
    """

    def __init__(
        self, lengths: Sequence[tuple[int, int]], max_tokens: int, seed: int, processes: int = 1
    ) -> None:
        over = [i for i, (rows, longest) in enumerate(lengths) if rows * longest > max_tokens]
        if over:
            rows, longest = lengths[over[0]]
            raise DataError(
                f"train.max_tokens_per_batch = {max_tokens}: {len(over)} of {len(lengths)} examples are longer alone, "
                f"the first (number {over[0]}) has {rows * longest} tokens; raise it, or set data.max_length"
            )
        self.lengths, self.max_tokens, self.seed, self.processes = lengths, max_tokens, seed, processes
        self.batch_size = None  # accelerate: batches differ in size
        self.drop_last = False
        self.epoch = 0
        self._count = len(self._cut(range(len(lengths))))

    @property
    def sampler(self) -> TokenBatches:
        """Where accelerate looks for ``set_epoch`` when it shards batches over processes."""
        return self

    @sampler.setter
    def sampler(self, value: object) -> None:
        raise AttributeError("the batches are their own sampler")

    def __len__(self) -> int:
        return self._count

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate when an epoch begins."""
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
        """Split the fullest batches until every process has as many."""
        while len(batches) % self.processes:
            fullest = max(range(len(batches)), key=lambda i: len(batches[i]))
            batch = batches[fullest]
            if len(batch) < 2:
                batches.append([])  # that process runs a silent row
                continue
            batches[fullest : fullest + 1] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
        return batches
