"""Memory and speed of GPUs, from their vendors' data sheets. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from cwdpo.errors import RecipeError, nearest

USABLE = 0.9
"""Share of a GPU's memory that a plan may fill: the rest is for CUDA, its libraries, and gaps between tensors."""


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: as in :data:`GPUS`, or ``custom``.
        memory_gib: the data sheet's number; drivers report it in GiB or a few percent less.
        tflops: 10^12 operations per second in bfloat16 on dense matrices; without bfloat16 units in float32.
        link: 10^9 bytes per second that it sends to the GPUs beside it: NVLink (Infinity Fabric) where the card has it
            in its usual servers, else PCIe; half of what data sheets give for both directions. ``None``: not known.
        bf16: whether it has bfloat16 units; without, torch emulates them slowly, and a recipe computes in float32.
    """

    name: str
    memory_gib: float
    tflops: float
    link: float | None = None
    bf16: bool = True

    @property
    def dtype(self) -> str:
        """What ``tflops`` are counted in, and a recipe for it computes in."""
        return "bf16" if self.bf16 else "float32"

    @property
    def usable(self) -> int:
        """Bytes that a plan may fill."""
        return int(USABLE * self.memory_gib * 2**30)


GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        # NVIDIA, data center: data sheets of the products; where they give numbers with sparsity, half of them.
        Gpu("b200", 180, 2250, 900),
        Gpu("h200", 141, 989, 450),
        Gpu("h100", 80, 989, 450),
        Gpu("h100-pcie", 80, 756, 64),
        Gpu("h100-nvl", 94, 835, 300),
        Gpu("a100-80", 80, 312, 300),
        Gpu("a100-40", 40, 312, 300),
        Gpu("l40s", 48, 362, 32),
        Gpu("l4", 24, 121, 32),
        Gpu("a40", 48, 149.7, 32),
        Gpu("a10", 24, 125, 32),
        Gpu("t4", 16, 8.1, 16, bf16=False),
        # NVIDIA, workstation and consumer: architecture white papers (bf16 with float32 accumulation).
        Gpu("rtx6000-ada", 48, 364, 32),
        Gpu("a6000", 48, 154.8, 32),
        Gpu("5090", 32, 209.5, 64),
        Gpu("4090", 24, 165.2, 32),
        Gpu("3090", 24, 71, 32),
        # AMD: data sheets.
        Gpu("mi300x", 192, 1307, 448),
    )
}


def in_units(size: float) -> str:
    """Bytes for the user, in GiB or MiB."""
    unit, name = (2**30, "GiB") if size >= 2**30 / 10 else (2**20, "MiB")
    return f"{size / unit:.2f} {name}"


def gpu_of(
    name: str | None,
    memory_gib: float | None = None,
    tflops: float | None = None,
    link: float | None = None,
) -> Gpu:
    """A GPU of the table, or one of given numbers, or one of the table with a number replaced.

    Raises:
        RecipeError: the name is not in the table, or neither a name nor both numbers are given.
    """
    if name is None:
        if memory_gib is None or tflops is None:
            raise RecipeError(
                f"--gpu: name a GPU, or give both --gpu-memory and --tflops; known: {', '.join(GPUS)}"
            )
        return Gpu("custom", memory_gib, tflops, link)
    known = GPUS.get(name.lower())
    if known is None:
        raise RecipeError(
            f"--gpu: unknown GPU {name!r}{nearest(name.lower(), GPUS)}; known: {', '.join(GPUS)}; for another one give "
            "--gpu-memory (GiB) and --tflops (dense bf16)"
        )
    return replace(
        known,
        memory_gib=known.memory_gib if memory_gib is None else memory_gib,
        tflops=known.tflops if tflops is None else tflops,
        link=known.link if link is None else link,
    )
