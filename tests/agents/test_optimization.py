"""One step on the mean loss of many items, against plain PyTorch; schedule and averaging against hand formulas."""

import json
import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import nn

from diffusion_gym.agents.optimization import AccumulatingOptimizer, OptimizerOptions, WeightAverage, learning_rate_at
from diffusion_gym.agents.processes import Processes

ITEMS = 40
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 16.00 GiB"


class Problem:
    """A regression in float64: the loss of item i is (f(x_i) - y_i)^2."""

    def __init__(self, options=None, processes=None, dtype=torch.float64):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(ITEMS, 5, generator=generator, dtype=dtype)
        self.y = 3 * torch.randn(ITEMS, generator=generator, dtype=dtype)
        self.net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).to(dtype)
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=dtype))
        if options is not None:
            self.optimizer = AccumulatingOptimizer(dict(self.net.named_parameters()), options, processes)
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


# --- the step --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch_size", [1, 7, ITEMS, 1000])
@pytest.mark.parametrize("norm", [0.5, 1e9])
def test_it_is_adamw_on_the_clipped_gradient_of_the_mean_loss(micro_batch_size, norm):
    adam = {"betas": (0.8, 0.95), "weight_decay": 0.3}
    problem = Problem(options(micro_batch_size=micro_batch_size, max_grad_norm=norm, epsilon=1e-3, **adam))
    first = problem.losses(torch.arange(ITEMS))
    metrics = [problem.step() for _ in range(3)]
    weights, norms = plain(norm=norm, eps=1e-3, **adam)
    assert norms[0] > 0.5  # the tighter bound clips
    torch.testing.assert_close(problem.weights(), weights, rtol=1e-12, atol=1e-12)
    assert [row["grad_norm"].item() for row in metrics] == pytest.approx(norms, rel=1e-12)
    assert metrics[0]["loss"].item() == pytest.approx(first["loss"].mean().item(), rel=1e-12)
    assert metrics[0]["error"].item() == pytest.approx(first["error"].mean().item(), rel=1e-12)
    assert problem.sizes[1] == min(micro_batch_size, ITEMS)


def test_metrics_carry_no_gradient():
    assert not any(value.requires_grad for value in Problem(options()).step().values())


# --- the learning rate -----------------------------------------------------------------------------------------

THESIS = {
    "learning_rate": 3.75e-6,
    "schedule": "warmup_cosine",
    "warmup_fraction": 0.25,
    "first_learning_rate": 9e-8,
    "last_learning_rate": 9e-9,
}


@pytest.mark.parametrize(
    "done, expected",
    [
        (0.0, 9e-8),
        (0.125, (9e-8 + 3.75e-6) / 2),
        (0.25, 3.75e-6),
        (0.4375, 9e-9 + (3.75e-6 - 9e-9) * (1 + math.sqrt(0.5)) / 2),  # a quarter of the half cosine
        (0.625, (9e-9 + 3.75e-6) / 2),
        (1.0, 9e-9),
        (1.2, 9e-9),
    ],
)
def test_warm_up_and_half_cosine_of_the_thesis(done, expected):
    """Thesis, table A.2 and figure 5.7."""
    assert learning_rate_at(OptimizerOptions(**THESIS), done) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("done", [0.0, 0.125, 0.25, 0.625, 1.0])
def test_a_constant_learning_rate(done):
    constant = OptimizerOptions(learning_rate=2e-5, first_learning_rate=1e-9, last_learning_rate=1e-10)
    assert learning_rate_at(constant, done) == 2e-5


def test_the_step_takes_the_scheduled_learning_rate():
    """Adam's first step moves each weight by the learning rate, but for epsilon."""
    for done in (0.0, 0.125, 0.625):
        problem = Problem(options(**{**THESIS, "weight_decay": 0.0, "epsilon": 1e-20}))
        before, problem.optimizer.fraction_done = problem.weights(), done
        metrics = problem.step()
        rate = learning_rate_at(problem.optimizer.options, done)
        torch.testing.assert_close((problem.weights() - before).abs(), torch.full_like(before, rate), rtol=1e-6, atol=0)
        assert metrics["learning_rate"].item() == rate


# --- the micro-batch that fits ---------------------------------------------------------------------------------


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


# --- several processes -----------------------------------------------------------------------------------------


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
    problem = Problem(options(loss_scaling=True), WithPeer(gradients=gradients), dtype=torch.float32)
    metrics = problem.step(torch.arange(0), count=ITEMS)
    alone = Problem(options(), dtype=torch.float32)
    wanted = alone.step()["grad_norm"].item()
    assert metrics["grad_norm"].item() == pytest.approx(wanted, rel=1e-5)
    torch.testing.assert_close(problem.weights(), alone.weights(), rtol=1e-5, atol=1e-6)


# --- loss scaling, state ---------------------------------------------------------------------------------------


def test_loss_scaling_changes_nothing_but_the_range():
    results = []
    for scaling in (False, True):
        problem = Problem(options(loss_scaling=scaling), dtype=torch.float32)
        metrics = [problem.step() for _ in range(3)]
        results.append((problem.weights(), torch.stack([row["grad_norm"] for row in metrics])))
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-7)
    assert "overflow" in metrics[0] and not any(row["overflow"] for row in metrics)


def test_an_overflow_leaves_the_update_out_and_halves_the_scale():
    problem = Problem(options(loss_scaling=True), dtype=torch.float32)
    before = problem.weights()
    metrics = problem.step(losses=lambda items: {"loss": 1e38 * problem.losses(items)["loss"]})
    assert torch.equal(problem.weights(), before)
    assert metrics["overflow"] == 1 and metrics["grad_norm"] == 0
    assert problem.optimizer.state()["loss_scale"]["scale"] == 2.0**15
    assert problem.step()["overflow"] == 0 and not torch.equal(problem.weights(), before)


@pytest.mark.parametrize("scaling", [False, True])
def test_moments_and_scale_survive_a_checkpoint(scaling):
    """The restored optimiser goes on bit for bit."""
    problem, restored = (Problem(options(loss_scaling=scaling), dtype=torch.float32) for _ in range(2))
    problem.step(losses=lambda items: {"loss": (1e38 if scaling else 1) * problem.losses(items)["loss"]})
    problem.step()
    restored.net.load_state_dict(problem.net.state_dict())
    tensors = {name: value.clone() for name, value in problem.optimizer.tensors().items()}
    state = json.loads(json.dumps(problem.optimizer.state()))
    restored.optimizer.load_tensors(tensors)
    restored.optimizer.load_state(state)
    assert restored.optimizer.state() == state
    for _ in range(2):
        problem.step()
        restored.step()
    assert torch.equal(restored.weights(), problem.weights())
    assert restored.optimizer.state() == problem.optimizer.state()


def test_a_state_without_a_scale_fits_an_optimizer_with_one():
    problem = Problem(options(loss_scaling=True), dtype=torch.float32)
    problem.optimizer.load_state(Problem(options()).optimizer.state())
    assert problem.optimizer.state()["loss_scale"]["scale"] == 2.0**16


# --- the average of the weights --------------------------------------------------------------------------------


def walk(average, parameters, steps=5):
    """Move the parameters about, and return all their values."""
    seen = [[parameter.detach().clone() for parameter in parameters]]
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
        average.update()
        seen.append([parameter.detach().clone() for parameter in parameters])
    return seen


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_the_average_is_a_geometric_sum(decay):
    """decay^n w_0 + (1 - decay) sum_k decay^(n - k) w_k."""
    parameters = list(Problem().net.parameters())
    average = WeightAverage(parameters, decay)
    seen = walk(average, parameters)
    last = len(seen) - 1
    powers = [decay**last, *((1 - decay) * decay ** (last - step) for step in range(1, last + 1))]
    assert sum(powers) == pytest.approx(1)
    for index, found in enumerate(average.average):
        wanted = sum(power * row[index] for power, row in zip(powers, seen, strict=True))
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fails", [False, True])
def test_the_average_stands_in_for_the_weights_for_a_while(fails):
    parameters = list(Problem(dtype=torch.float32).net.parameters())
    average = WeightAverage(parameters, 0.7)
    own = walk(average, parameters)[-1]
    kept = [value.clone() for value in average.average]
    assert not any(map(torch.equal, own, kept))
    try:
        with average.applied():
            assert all(map(torch.equal, parameters, kept))
            if fails:
                raise KeyError("on purpose")
    except KeyError:
        assert fails
    assert all(map(torch.equal, parameters, own))
    assert all(map(torch.equal, average.average, kept))


def test_without_decay_there_is_no_average():
    parameters = list(Problem().net.parameters())
    average = WeightAverage(parameters, 0.0)
    own = walk(average, parameters)[-1]
    assert average.average == []
    with average.applied():
        assert all(map(torch.equal, parameters, own))


@pytest.fixture
def averaging(make_env, make_agent, roll):
    """An agent that averages, and one that does not, after the same three updates; their weights after each."""
    env = make_env(6)
    agents, seen = [], [[] for _ in range(2)]
    for decay, values in zip((0.6, 0.0), seen, strict=True):
        agent = make_agent(env, ema_decay=decay, batch_size=2)
        minimize = agent.minimize

        def noted(*arguments, minimize=minimize, values=values, agent=agent):
            metrics = minimize(*arguments)
            values.append([parameter.detach().clone() for parameter in agent.parameters])
            return metrics

        values.append([parameter.detach().clone() for parameter in agent.parameters])
        agent.minimize = noted
        agent.update(roll(env, agent.policy), np.random.default_rng(0))
        agents.append(agent)
    return (*agents, *seen)


def test_an_agent_averages_over_its_updates(averaging):
    agent, plain_agent, seen, plain_seen = averaging
    assert len(seen) == 4 and all(map(torch.equal, seen[-1], plain_seen[-1]))  # averaging does not touch the training
    wanted = seen[0]
    for values in seen[1:]:
        wanted = [0.6 * old + 0.4 * new for old, new in zip(wanted, values, strict=True)]
    with agent.averaged():
        inside = [parameter.detach().clone() for parameter in agent.policy.trainable_parameters().values()]
    torch.testing.assert_close(inside, wanted, rtol=1e-6, atol=1e-8)
    assert not all(map(torch.equal, inside, seen[-1]))
    assert all(map(torch.equal, agent.parameters, seen[-1]))
    with plain_agent.averaged():
        assert all(map(torch.equal, plain_agent.parameters, plain_seen[-1]))


def test_a_checkpoint_holds_the_average(averaging, make_agent):
    agent, plain_agent, _, _ = averaging
    tensors = {name: value.clone() for name, value in agent.tensors().items()}
    restored = make_agent(ema_decay=0.6, batch_size=2, scale=0.5)
    restored.load_tensors(tensors)
    assert all(map(torch.equal, restored.average.average, agent.average.average))
    assert all(map(torch.equal, restored.parameters, agent.parameters))
    assert not any(name.startswith("average") for name in plain_agent.tensors())
