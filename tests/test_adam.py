"""Adam against the optimiser that PyTorch ships, bit for bit.

Run: pytest tests/test_adam.py
"""

import pytest
import torch

from autopainter.adam import Adam

SHAPES = (3,), (8, 4, 3, 3), (2, 16, 4, 4)


def parameters() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    made = [torch.randn(shape) for shape in SHAPES]
    made[2] = made[2].contiguous(memory_format=torch.channels_last)
    return [torch.nn.Parameter(tensor) for tensor in made]


def named(moved: list[torch.nn.Parameter]) -> list[tuple[str, torch.nn.Parameter]]:
    return [(str(number), parameter) for number, parameter in enumerate(moved)]


@pytest.mark.parametrize("fused", [True, None])
def test_it_moves_as_torchs_own_does(fused: bool | None) -> None:
    mine, others = parameters(), parameters()
    optimizer = Adam(named(mine), (0.5, 0.999), fused)
    other = torch.optim.Adam(others, betas=(0.5, 0.999), fused=fused)
    for updates, rate in enumerate((0.1, 0.02, 0.02)):
        for one, two in zip(mine, others, strict=True):
            one.grad = torch.randn_like(one)
            two.grad = one.grad.clone()
        optimizer.step(updates, rate)
        other.param_groups[0]["lr"] = rate
        other.step()
    for number, (one, two) in enumerate(zip(mine, others, strict=True)):
        state = other.state[two]
        assert torch.equal(one, two)
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state()[f"{moment}.{number}"], state[moment])


def test_no_memory_of_its_own_beside_the_moments() -> None:
    """One that is given the moments of another, and told how often that one moved, goes on as it would."""
    whole, halves = parameters(), parameters()
    first, second, rest = (Adam(named(moved), (0.5, 0.9)) for moved in (whole, halves, halves))
    for parameter in (*whole, *halves):
        parameter.grad = torch.ones_like(parameter)
    for updates in range(4):
        first.step(updates, 0.1)
    second.step(0, 0.1)
    second.step(1, 0.1)
    for name, moment in rest.state().items():
        moment.copy_(second.state()[name])
    rest.step(2, 0.1)
    rest.step(3, 0.1)
    assert all(torch.equal(one, two) for one, two in zip(whole, halves, strict=True))
