"""A regression to minimise in float64, by our optimiser and by PyTorch alone."""

import torch
from torch import nn

from diffusion_gym.agents.optimization import AccumulatingOptimizer, OptimizerOptions

ITEMS = 40


class Problem:
    """A regression in float64: the loss of item i is (f(x_i) - y_i)^2."""

    def __init__(self, options=None, processes=None, dtype=torch.float64, **keywords):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(ITEMS, 5, generator=generator, dtype=dtype)
        self.y = 3 * torch.randn(ITEMS, generator=generator, dtype=dtype)
        self.net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).to(dtype)
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=dtype))
        if options is not None:
            self.optimizer = AccumulatingOptimizer(dict(self.net.named_parameters()), options, processes, **keywords)
        self.sizes = []

    def losses(self, items):
        self.sizes.append(len(items))
        error = self.net(self.x[items]).squeeze(1) - self.y[items]
        return {"loss": error**2, "error": error.detach().abs()}

    def step(self, items=None, losses=None, count=None):
        items = torch.arange(ITEMS) if items is None else items
        return self.optimizer.step(items, losses or self.losses, count or len(items))

    def gradients(self, items):
        """By autograd, of the sum of the losses."""
        return torch.autograd.grad(self.losses(items)["loss"].sum(), list(self.net.parameters()))

    def weights(self):
        return torch.cat([parameter.detach().flatten() for parameter in self.net.parameters()])


def options(**changed):
    return OptimizerOptions(**{"learning_rate": 0.01, "micro_batch_size": 7, **changed})


def plain(steps=3, norm=1.0, **adam):
    """The same with PyTorch alone: weights, and the gradient norms before clipping."""
    problem, norms = Problem(), []
    optimizer = torch.optim.AdamW(problem.net.parameters(), **{"lr": 0.01, "weight_decay": 1e-4, **adam})
    for _ in range(steps):
        optimizer.zero_grad()
        problem.losses(torch.arange(ITEMS))["loss"].mean().backward()
        norms.append(torch.nn.utils.clip_grad_norm_(problem.net.parameters(), norm).item())
        optimizer.step()
    return problem.weights(), norms
