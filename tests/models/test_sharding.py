"""What FSDP2 gathers at once, by hand arithmetic; measured bytes are in docs/distributed.md."""

from __future__ import annotations

import pytest
from torch import nn

from cwdpo.models.sharding import most_gathered


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width, bias=False)


class Model(nn.Module):
    _no_split_modules = ("Layer", "Linear")  # a list may name what lies inside of another entry

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.layers = nn.ModuleList([Layer(4), Layer(5), Layer(2)])
        self.head = nn.Parameter(self.embed.weight)  # another one, of the same size
        self.tied = self.embed.weight


@pytest.mark.parametrize(("trained", "times"), [(False, 2), (True, 3)])
def test_three_layers_and_what_is_in_none(trained: bool, times: int) -> None:
    rest, largest = 2 * 7 * 3 * 4, 5 * 5 * 4
    assert most_gathered(Model(), trained=trained) == times * rest + 3 * largest


def test_a_model_that_names_no_layers_is_gathered_whole() -> None:
    model = nn.Linear(3, 2)
    assert most_gathered(model, trained=False) == 2 * (3 * 2 + 2) * 4
