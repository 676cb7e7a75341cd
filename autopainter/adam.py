"""Adam on all parameters of a network, with moments that are there from the start."""

from collections.abc import Iterable

import torch
from torch.optim.adam import adam

_EPSILON = 1e-8


class Adam:
    """Adam (Kingma and Ba, arXiv 1412.6980, algorithm 1) by PyTorch's own function.

    Not ``torch.optim.Adam``: to make one imports all of torch.compile, 2 s of a core in every start of every worker,
    and it counts its steps, which here follow from the step of the run.

    Args:
        parameters: all on one device; their gradients are read in each step.
        betas: decay of the first and the second moment.
        fused: one kernel for all parameters; None: what PyTorch takes by default.

    Attributes:
        means: float32, first moments, as the parameters are; ``squares``: second moments.
    """

    def __init__(
        self, parameters: Iterable[torch.nn.Parameter], betas: tuple[float, float], fused: bool | None = True
    ) -> None:
        self._parameters: list[torch.Tensor] = list(parameters)
        self._betas, self._fused = betas, fused
        self.means = [torch.zeros_like(parameter) for parameter in self._parameters]
        self.squares = [torch.zeros_like(mean) for mean in self.means]
        # Only the fused kernel reads them where the parameters are; the others would wait for the GPU.
        self._updates = torch.zeros(len(self._parameters), device=self._parameters[0].device if fused else "cpu")

    @torch.no_grad()
    def step(self, updates: int, learning_rate: float) -> None:
        """Move the parameters.

        Args:
            updates: how often they have been moved before.
        """
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        adam(
            self._parameters, gradients, self.means, self.squares, [], list(self._updates.fill_(updates).unbind()),
            amsgrad=False, beta1=self._betas[0], beta2=self._betas[1], lr=learning_rate, weight_decay=0, eps=_EPSILON,
            maximize=False, fused=self._fused,
        )  # fmt: skip
