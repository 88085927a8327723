"""A step whose items are in parts: micro-batches that fit the memory, and items of other processes."""

import json
from dataclasses import dataclass, field

import pytest
import torch

from diffusion_gym.agents.optimization import AccumulatingOptimizer, recomputed
from diffusion_gym.agents.processes import Processes
from regression import ITEMS, Problem, options, plain

OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 16.00 GiB"


# --- the micro-batch that fits ---------------------------------------------------------------------------------------


def running_out(problem, limit, kind=RuntimeError, backward=False):
    """Losses for which more than `limit` items are too many, in the forward pass or only in the backward pass."""

    class TooMuch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss):
            return loss.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise kind(OUT_OF_MEMORY)

    def losses(items):
        rows = problem.losses(items)
        if len(items) <= limit:
            return rows
        if backward:
            return {**rows, "loss": TooMuch.apply(rows["loss"])}
        raise kind(OUT_OF_MEMORY)

    return losses


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("kind", [RuntimeError, torch.OutOfMemoryError])
def test_the_micro_batch_is_halved_until_it_fits(kind, backward):
    problem = Problem(options(micro_batch_size=0))
    losses = running_out(problem, 5, kind, backward)
    metrics = [problem.step(losses=losses)]
    assert problem.sizes == [40, 20, 10, *[5] * 8]
    problem.sizes.clear()
    metrics += [problem.step(losses=losses) for _ in range(2)]
    assert problem.sizes == [5] * 16  # it is remembered
    weights, norms = plain()
    torch.testing.assert_close(problem.weights(), weights, rtol=1e-12, atol=1e-12)
    assert [row["grad_norm"].item() for row in metrics] == pytest.approx(norms, rel=1e-12)


def test_what_was_added_up_before_the_memory_ran_out_does_not_count():
    problem = Problem(options(micro_batch_size=0))
    problem.optimizer.micro_batch_size = 10
    fit = running_out(problem, 5)

    def losses(items):
        return problem.losses(items) if items[0] == 0 else fit(items)

    metrics = problem.step(losses=losses)
    assert problem.sizes == [10, 10, *[5] * 8]
    weights, norms = plain(steps=1)
    torch.testing.assert_close(problem.weights(), weights, rtol=1e-12, atol=1e-12)
    assert metrics["grad_norm"].item() == pytest.approx(norms[0], rel=1e-12)
    assert metrics["loss"].item() == pytest.approx(Problem().losses(torch.arange(ITEMS))["loss"].mean().item())


def test_the_size_that_fits_survives_a_checkpoint():
    problem = Problem(options(micro_batch_size=0))
    problem.step(losses=running_out(problem, 5))
    restored = Problem(options(micro_batch_size=0))
    restored.optimizer.load_state(json.loads(json.dumps(problem.optimizer.state())))
    restored.step(losses=running_out(restored, 5))
    assert restored.sizes == [5] * 8


def test_a_single_item_that_does_not_fit_is_an_error():
    problem = Problem(options(micro_batch_size=0))
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        problem.step(losses=running_out(problem, 0))
    assert problem.sizes == [40, 20, 10, 5, 2, 1]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_chosen_micro_batch_is_never_changed(backward):
    problem = Problem(options(micro_batch_size=8))
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        problem.step(losses=running_out(problem, 5, backward=backward))
    assert problem.sizes == [8] and problem.optimizer.micro_batch_size == 8
    found = Problem(options(micro_batch_size=0))
    found.step(losses=running_out(found, 5))
    problem.optimizer.load_state(found.optimizer.state())
    assert problem.optimizer.micro_batch_size == 8


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), RuntimeError(), ValueError(OUT_OF_MEMORY)])
def test_other_errors_pass(error):
    problem = Problem(options(micro_batch_size=0))
    before = problem.weights()

    def losses(items):
        problem.sizes.append(len(items))
        raise error

    with pytest.raises(type(error)) as caught:
        problem.step(losses=losses)
    assert caught.value is error and problem.sizes == [ITEMS]
    assert torch.equal(problem.weights(), before)


# --- several processes -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WithPeer(Processes):
    """This process and one more, whose part of the sums is known."""

    count: int = 2
    gradients: list = field(default_factory=list)
    totals: dict = field(default_factory=dict)

    def sum_(self, tensors):
        for tensor, other in zip(tensors, self.gradients, strict=True):
            tensor += other

    def gather_json(self, value):
        return [json.loads(json.dumps(value)), self.totals]


@pytest.mark.parametrize("own", [ITEMS, 13, 0])
def test_the_items_may_be_anywhere(own):
    """All, some or none of the items are this process's; the step is the same."""
    mine, others = torch.arange(ITEMS).split([own, ITEMS - own])
    peer = Problem()
    rows = peer.losses(others)
    totals = {key: value.sum().item() / ITEMS for key, value in rows.items()} if len(others) else {}
    gradients = [gradient / ITEMS for gradient in peer.gradients(others)]
    problem = Problem(options(), WithPeer(gradients=gradients, totals=totals))
    metrics = problem.step(mine, count=ITEMS)
    weights, norms = plain(steps=1)
    torch.testing.assert_close(problem.weights(), weights, rtol=1e-12, atol=1e-12)
    assert metrics["grad_norm"].item() == pytest.approx(norms[0], rel=1e-12)
    everything = Problem().losses(torch.arange(ITEMS))
    for key in ("loss", "error"):
        assert metrics[key].item() == pytest.approx(everything[key].mean().item(), rel=1e-6)


def test_a_process_without_items_scales_losses_too():
    peer = Problem(dtype=torch.float32)
    gradients = [2.0**16 * gradient / ITEMS for gradient in peer.gradients(torch.arange(ITEMS))]
    problem = Problem(options(), WithPeer(gradients=gradients), dtype=torch.float32, loss_scaling=True)
    metrics = problem.step(torch.arange(0), count=ITEMS)
    alone = Problem(options(), dtype=torch.float32)
    wanted = alone.step()["grad_norm"].item()
    assert metrics["grad_norm"].item() == pytest.approx(wanted, rel=1e-5)
    torch.testing.assert_close(problem.weights(), alone.weights(), rtol=1e-5, atol=1e-6)


# --- what a library's algorithm takes through a network at once ------------------------------------------------------


def through(size, problem, number=10):
    """Outputs, gradients and saved numbers of a pass in parts of `size`."""
    saved, observation = [], {"latents": problem.x[:number]}
    problem.net.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        function = lambda states, y: (problem.net(states["latents"]).squeeze(1) - y, y + 1)  # noqa: E731
        errors, others = recomputed(function, size, observation, problem.y[:number])
    stored = sum(saved)
    (errors * torch.arange(number)).sum().backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in problem.net.parameters()])
    return errors.detach(), others, gradients, stored


@pytest.mark.parametrize("size", [1, 4, 9])
def test_parts_that_are_recomputed_give_the_same_and_save_no_activations(size):
    problem = Problem()
    *whole, everything = through(0, problem)
    *parts, stored = through(size, problem)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)
    assert stored < everything / 2
    assert through(10, problem)[-1] == everything  # one part


# --- an optimiser of somebody else's ---------------------------------------------------------------------------------


def test_a_given_optimiser_takes_the_step_at_its_own_rate():
    problem = Problem()
    parameters = dict(problem.net.named_parameters())
    problem.optimizer = AccumulatingOptimizer(parameters, options(), adam=torch.optim.SGD(parameters.values(), 0.5))
    before, gradient = problem.weights(), torch.cat([part.flatten() for part in problem.gradients(torch.arange(ITEMS))])
    metrics = problem.step()
    gradient = gradient / ITEMS
    expected = before - 0.5 * gradient * min(1.0, 1 / gradient.norm().item())  # clipped to a norm of 1
    torch.testing.assert_close(problem.weights(), expected, rtol=1e-5, atol=1e-5)
    assert metrics["learning_rate"] == 0.5


def test_a_step_may_be_left_out_for_its_means():
    problem, seen = Problem(options()), []
    before = problem.weights()
    items = torch.arange(ITEMS)
    means = problem.optimizer.step(items, problem.losses, ITEMS, unless=lambda row: seen.append(row) or True)
    assert torch.equal(problem.weights(), before) and not problem.optimizer.tensors()
    assert seen[0]["loss"] == means["loss"] > 0 and means["grad_norm"] > 0
