"""A policy of two steps and two weights in float64, for gradients worked by hand: step k predicts theta_k x_t."""

import torch

from diffusion_gym.agents.algorithms.forward_process import NoisedPictures
from diffusion_gym.agents.renoising import prediction_targets
from diffusion_gym.scheduling import StepTable, add_noise, predict_x0

THETA, BEHAVIOUR, REFERENCE = [0.7, -0.3], [0.55, -0.1], [0.4, 0.2]
SIGNAL = {"flow": [0.2, 0.6], "epsilon": [0.28, 0.8], "v_prediction": [0.28, 0.8], "sample": [0.28, 0.8]}


class ToyPolicy:
    """`prediction` and `estimates` of `DenoisingPolicy`; `behaviour` gives another policy's predictions."""

    def __init__(self, prediction="flow"):
        signal = torch.tensor(SIGNAL[prediction], dtype=torch.float64)
        noise = 1 - signal if prediction == "flow" else (1 - signal**2).sqrt()
        none = torch.zeros(2, dtype=torch.float64)
        steps = torch.tensor([800, 400])
        self.table = StepTable(steps, steps, signal, noise, none, none, none, none, steps, prediction, None)
        self.theta = torch.tensor(THETA, dtype=torch.float64, requires_grad=True)

    def prediction(self, observation, *, reference=False, theta=None):
        weights = torch.tensor(REFERENCE, dtype=torch.float64) if reference else self.theta
        weights = weights if theta is None else torch.tensor(theta, dtype=torch.float64)
        return weights[observation["step"]].view(-1, 1, 1, 1) * observation["latents"]

    def estimates(self, output, observation):
        steps = observation["step"]
        signal, noise = (column[steps].view(-1, 1, 1, 1) for column in (self.table.signal, self.table.noise))
        return predict_x0(output, observation["latents"], signal, noise, self.table.prediction)


def toy_agent(kind, prediction="flow", **options):
    """An agent of the class on such a policy; its `losses` alone works."""
    agent = object.__new__(kind)
    agent.policy, agent.config = ToyPolicy(prediction), kind.Config(**options)
    return agent


def toy_batch(policy, advantages, number=6, seed=0):
    """`number` noised pictures of 1 x 1 x 3, at both steps in turn."""
    generator = torch.Generator().manual_seed(seed)
    clean, eps = torch.randn(2, number, 1, 1, 3, generator=generator, dtype=torch.float64)
    steps = torch.arange(number) % 2
    signal, noise = (column[steps].view(-1, 1, 1, 1) for column in (policy.table.signal, policy.table.noise))
    observation = {"latents": add_noise(clean, eps, signal, noise), "step": steps}
    target = prediction_targets(policy.table, steps, clean, eps)
    fixed = {
        "behaviour": policy.prediction(observation, theta=BEHAVIOUR),
        "reference": policy.prediction(observation, theta=REFERENCE),
    }
    advantages = torch.tensor(advantages, dtype=torch.float64)
    return NoisedPictures(observation, clean, target, advantages, noise, fixed)


def arrays(policy, batch):
    """By item: step, x_t, x_0, target and level as NumPy, and the (a, b) of x_0 estimate = a x_t + b prediction."""
    rows = []
    for index, step in enumerate(batch.observation["step"].tolist()):
        s, n = float(policy.table.signal[step]), float(policy.table.noise[step])
        line = {"flow": (1, -n), "epsilon": (1 / s, -n / s), "v_prediction": (s, -n), "sample": (0, 1)}
        values = (part[index].flatten().numpy() for part in (batch.observation["latents"], batch.clean, batch.target))
        rows.append((step, *values, n, *line[policy.table.prediction]))
    return rows
