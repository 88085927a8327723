"""One step on the mean loss of many items, against plain PyTorch; learning rates, loss scaling, state."""

import json
import math

import pytest
import torch

from diffusion_gym.agents.optimization import OptimizerOptions, learning_rate_at
from regression import ITEMS, Problem, options, plain

# --- the step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch_size", [1, 7, ITEMS, 1000])
@pytest.mark.parametrize("norm", [0.5, 1e9])
def test_it_is_adamw_on_the_clipped_gradient_of_the_mean_loss(micro_batch_size, norm):
    betas = {"adam_beta1": 0.8, "adam_beta2": 0.95}
    problem = Problem(
        options(micro_batch_size=micro_batch_size, max_grad_norm=norm, adam_epsilon=1e-3, weight_decay=0.3, **betas)
    )
    first = problem.losses(torch.arange(ITEMS))
    metrics = [problem.step() for _ in range(3)]
    weights, norms = plain(norm=norm, eps=1e-3, betas=(0.8, 0.95), weight_decay=0.3)
    assert norms[0] > 0.5  # the tighter bound clips
    torch.testing.assert_close(problem.weights(), weights, rtol=1e-12, atol=1e-12)
    assert [row["grad_norm"].item() for row in metrics] == pytest.approx(norms, rel=1e-12)
    assert metrics[0]["loss"].item() == pytest.approx(first["loss"].mean().item(), rel=1e-12)
    assert metrics[0]["error"].item() == pytest.approx(first["error"].mean().item(), rel=1e-12)
    assert problem.sizes[1] == min(micro_batch_size, ITEMS)


def test_metrics_carry_no_gradient():
    assert not any(value.requires_grad for value in Problem(options()).step().values())


# --- the learning rate -----------------------------------------------------------------------------------------------


THESIS = {
    "learning_rate": 3.75e-6,
    "learning_rate_schedule": "warmup_cosine",
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
        problem = Problem(options(**{**THESIS, "weight_decay": 0.0, "adam_epsilon": 1e-20}))
        before, problem.optimizer.fraction_done = problem.weights(), done
        metrics = problem.step()
        rate = learning_rate_at(problem.optimizer.options, done)
        torch.testing.assert_close((problem.weights() - before).abs(), torch.full_like(before, rate), rtol=1e-6, atol=0)
        assert metrics["learning_rate"].item() == rate


# --- loss scaling, state ---------------------------------------------------------------------------------------------


def test_loss_scaling_changes_nothing_but_the_range():
    results = []
    for scaling in (False, True):
        problem = Problem(options(), dtype=torch.float32, loss_scaling=scaling)
        metrics = [problem.step() for _ in range(3)]
        results.append((problem.weights(), torch.stack([row["grad_norm"] for row in metrics])))
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-7)
    assert "overflow" in metrics[0] and not any(row["overflow"] for row in metrics)


def test_an_overflow_leaves_the_update_out_and_halves_the_scale():
    problem = Problem(options(), dtype=torch.float32, loss_scaling=True)
    before = problem.weights()
    metrics = problem.step(losses=lambda items: {"loss": 1e38 * problem.losses(items)["loss"]})
    assert torch.equal(problem.weights(), before)
    assert metrics["overflow"] == 1 and metrics["grad_norm"] == 0
    assert problem.optimizer.state()["loss_scale"]["scale"] == 2.0**15
    assert problem.step()["overflow"] == 0 and not torch.equal(problem.weights(), before)


@pytest.mark.parametrize("scaling", [False, True])
def test_moments_and_scale_survive_a_checkpoint(scaling):
    """The restored optimiser goes on bit for bit."""
    problem, restored = (Problem(options(), dtype=torch.float32, loss_scaling=scaling) for _ in range(2))
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
    problem = Problem(options(), dtype=torch.float32, loss_scaling=True)
    problem.optimizer.load_state(Problem(options()).optimizer.state())
    assert problem.optimizer.state()["loss_scale"]["scale"] == 2.0**16
