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
        parameters: with their names, all on one device; their gradients are read in each step.
        betas: decay of the first and the second moment.
        fused: one kernel for all parameters; None: what PyTorch takes by default.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, torch.nn.Parameter]],
        betas: tuple[float, float],
        fused: bool | None = True,
    ) -> None:
        named: dict[str, torch.Tensor] = dict(parameters)
        self._parameters = list(named.values())
        self._betas, self._fused = betas, fused
        self._moments = {
            moment: {name: torch.zeros_like(parameter) for name, parameter in named.items()}
            for moment in ("exp_avg", "exp_avg_sq")
        }
        # Only the fused kernel reads them where the parameters are; the others would wait for the GPU.
        self._updates = torch.zeros(len(named), device=self._parameters[0].device if fused else "cpu")

    def state(self) -> dict[str, torch.Tensor]:
        """First and second moments, ``exp_avg.NAME`` and ``exp_avg_sq.NAME``, as the parameters are; not copies."""
        return {f"{moment}.{name}": value for moment, of in self._moments.items() for name, value in of.items()}

    @torch.no_grad()
    def step(self, updates: int, learning_rate: float) -> None:
        """Move the parameters.

        Args:
            updates: how often they have been moved before.
        """
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        means, squares = (list(values.values()) for values in self._moments.values())
        adam(
            self._parameters, gradients, means, squares, [], list(self._updates.fill_(updates).unbind()),
            amsgrad=False, beta1=self._betas[0], beta2=self._betas[1], lr=learning_rate, weight_decay=0, eps=_EPSILON,
            maximize=False, fused=self._fused,
        )  # fmt: skip
