"""The gradient of several processes is that of the whole, by our optimiser and under torch DDP."""

import pytest
import torch

from diffusion_gym.agents.optimization import AccumulatingOptimizer, OptimizerOptions


@pytest.mark.parametrize("loss_scaling", [False, True])
def test_the_optimiser_takes_the_mean_over_uneven_shares(in_processes, loss_scaling):
    """Three processes with 4, 0 and 1 of 5 items, against AdamW on the mean loss of all; the first has the fewest."""
    generator = torch.Generator().manual_seed(0)
    x, y, start = torch.randn(5, 3, generator=generator), torch.randn(5, generator=generator), torch.ones(3)
    shares = [[], [0, 2, 3, 4], [1]]

    def step(processes):
        weight, unused = torch.nn.Parameter(start.clone()), torch.nn.Parameter(torch.ones(2))
        options = OptimizerOptions(0.1, adam_epsilon=1e-3, max_grad_norm=0.5)
        parameters = {"weight": weight, "unused": unused}
        optimizer = AccumulatingOptimizer(parameters, options, processes, loss_scaling=loss_scaling)

        def losses(items):
            error = x[items] @ weight - y[items]
            return {"loss": error**2, "error": error.detach()}

        items = torch.tensor(shares[processes.index], dtype=torch.int64)
        rows = [optimizer.step(items, losses, 5) for _ in range(3)]
        return [weight.tolist(), [{key: value.item() for key, value in row.items()} for row in rows]]

    weight = torch.nn.Parameter(start.clone())
    adam = torch.optim.AdamW([weight], 0.1, eps=1e-3, weight_decay=1e-4)
    expected = []
    for _ in range(3):
        error = x @ weight - y
        adam.zero_grad()
        error.square().mean().backward()
        norm = torch.nn.utils.clip_grad_norm_([weight], 0.5)
        adam.step()
        expected.append([error.square().mean().item(), error.mean().item(), norm.item()])
    found = in_processes(3, step)
    assert found[0] == found[1] == found[2]
    weights, rows = found[0]
    assert weights == pytest.approx(weight.tolist(), rel=1e-5)
    for row, numbers in zip(rows, expected, strict=True):
        assert [row["loss"], row["error"], row["grad_norm"]] == pytest.approx(numbers, rel=1e-5)


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_torch_ddp_around_the_policy_gives_the_gradient_of_the_whole(
    in_processes, make_env, make_policy, roll, trainable
):
    """Two processes with half of the transitions each; `forward` is the path that DDP wraps."""
    env = make_env(4, num_inference_steps=3)
    policy = make_policy(env, trainable)
    rolled = roll(env, policy)
    samples, steps = torch.arange(4).repeat(3), torch.arange(3).repeat_interleave(4)
    signs = torch.linspace(-1, 1, len(steps))

    def gradient(forward, part):
        policy.zero_grad()
        log_prob = forward(rolled.states(samples[part], steps[part]), rolled.actions(samples[part], steps[part]))
        (signs[part] * log_prob).mean().backward()
        return torch.cat([p.grad.flatten() for p in policy.trainable_parameters().values()])

    def with_ddp(processes):
        wrapped = torch.nn.parallel.DistributedDataParallel(policy)
        ddp = gradient(wrapped, slice(processes.index, None, 2))
        assert not wrapped.module.unet.training
        alone = gradient(policy, slice(processes.index, None, 2))
        return [ddp.tolist(), alone.tolist()]

    whole = gradient(policy, slice(None))
    assert whole.norm() > 0.01
    for ddp, alone in in_processes(2, with_ddp):
        assert (torch.tensor(ddp) - whole).norm() < 1e-4 * whole.norm()
        assert (torch.tensor(alone) - whole).norm() > 0.1 * whole.norm()  # half of it is something else
