"""Muon for the matrices inside the layers, AdamW for everything else."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def orthogonalise(matrices: Tensor) -> Tensor:
    """Return (n, rows, columns) matrices near the closest semi-orthogonal ones.

    Source: Muon, Jordan et al. 2024: five Newton-Schulz steps of degree five.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.transpose(-1, -2) if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.transpose(-1, -2)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    turned: Tensor = x.transpose(-1, -2) if tall else x
    return turned


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised; matrices of one shape go together."""

    def __init__(
        self, weights: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.0
    ) -> None:
        super().__init__(weights, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure here
        """Change the weights by one step."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for weight in group["params"]:
                alike[weight.shape].append(weight)
            for weights in alike.values():
                self._step_alike(weights, group["lr"], group["momentum"], group["decay"])

    def _step_alike(
        self, weights: list[nn.Parameter], lr: float, momentum: float, decay: float
    ) -> None:
        updates = []
        for weight in weights:
            grad = weight.grad
            assert grad is not None
            state = self.state[weight]
            if not state:
                state["momentum"] = torch.zeros_like(grad)
            state["momentum"].lerp_(grad, 1 - momentum)
            updates.append(grad.lerp(state["momentum"], momentum))
        turned = orthogonalise(torch.stack(updates))
        rows, columns = weights[0].shape
        scale = lr * max(1.0, rows / columns) ** 0.5
        for weight, update in zip(weights, turned, strict=True):
            weight.mul_(1 - lr * decay).sub_(update, alpha=scale)


def make_optimizers(
    model: nn.Module, muon_lr: float, adam_lr: float
) -> list[torch.optim.Optimizer]:
    """Return the two optimizers; each group remembers its full rate as `peak`."""
    matrices: list[nn.Parameter] = []
    gentle: list[nn.Parameter] = []
    for name, weight in model.named_parameters():
        inner = weight.ndim == 2 and "embed_tokens" not in name and min(weight.shape) >= 16
        (matrices if inner else gentle).append(weight)
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, muon_lr, decay=0.05),
        torch.optim.AdamW(gentle, adam_lr, betas=(0.9, 0.97), weight_decay=0.0),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers
