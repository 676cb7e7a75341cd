"""torch.compile for networks whose results must not depend on the process that compiles them."""

import torch
from torch import nn

from autopainter.errors import UserError


def check() -> None:
    """Compile something small.

    Raises:
        UserError: that cannot be done here.
    """
    try:
        torch.compile(lambda x: (x * 2).sum())(torch.ones(8))
    except Exception as error:  # whatever the compiler's absence, or its files' or headers', makes of it
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise UserError(
            f"train.compile: nothing can be compiled here ({lines[0][:200]}): install a C++ compiler and Python's"
            " headers (Debian: g++ python3-dev), or set it to false"
        ) from None


def compile_network(network: nn.Module) -> None:
    """Compile the forward and backward pass of a network, when it is first used; its parameters stay what they are."""
    # Without it, kernels are chosen by timing them, and sums add up in another order in each process.
    torch._inductor.config.deterministic = True
    network.compile(dynamic=False)
