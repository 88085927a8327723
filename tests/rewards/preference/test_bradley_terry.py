"""The fit against its definition."""

import pytest
import torch

from diffusion_gym.rewards.preference.bradley_terry import chosen_precision, fit, held_out_logits


def made(number, width, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    differences = torch.randn(number, width, generator=generator, dtype=torch.float64)
    weights = scale * torch.randn(width, generator=generator, dtype=torch.float64)
    shares = (torch.rand(number, generator=generator) < (differences @ weights).sigmoid()).double()
    return differences, shares, weights


def loss(weights, differences, shares, precision):
    chances = (differences @ weights).sigmoid()
    fitted = -(shares * chances.log() + (1 - shares) * (1 - chances).log()).sum()
    return fitted + precision * weights.square().sum() / 2


@pytest.mark.parametrize("answers, width", [(60, 5), (9, 20)])
def test_the_weights_are_the_minimum_and_the_covariance_the_inverse_of_its_curvature(answers, width):
    differences, shares, _ = made(answers, width)
    shares[::7] = 0.5
    found = fit(differences, shares, 0.7)
    gradient, hessian = (
        function(lambda weights: loss(weights, differences, shares, 0.7), found.weights)
        for function in (torch.autograd.functional.jacobian, torch.autograd.functional.hessian)
    )
    assert gradient.abs().max() < 1e-5
    torch.testing.assert_close(found.covariance, torch.linalg.inv(hessian), rtol=1e-4, atol=1e-8)
    spread = found.spread(differences)
    torch.testing.assert_close(spread[3] ** 2, differences[3] @ found.covariance @ differences[3])


def test_separable_answers_and_none_at_all_are_fitted_too():
    differences, _, weights = made(40, 3)
    found = fit(differences, (differences @ weights > 0).double(), 1e-3)
    assert found.weights.isfinite().all() and ((differences @ found.weights > 0) == (differences @ weights > 0)).all()
    nothing = fit(differences[:0], torch.zeros(0, dtype=torch.float64), 2.0)
    assert nothing.weights.tolist() == [0, 0, 0] and torch.equal(nothing.covariance, torch.eye(3).double() / 2)


def test_weights_are_recovered_from_many_answers():
    differences, shares, weights = made(4000, 4, scale=1.0)
    torch.testing.assert_close(fit(differences, shares, 1e-2).weights, weights, rtol=0.15, atol=0.1)


def test_a_held_out_logit_does_not_depend_on_the_answers_of_its_group():
    differences, shares, _ = made(40, 3)
    groups = [number // 2 for number in range(40)]
    logits = held_out_logits(differences, shares, groups, 5, 1.0)
    flipped = shares.clone()
    flipped[6:8] = 1 - flipped[6:8]
    again = held_out_logits(differences, flipped, groups, 5, 1.0)
    assert torch.equal(logits[6:8], again[6:8]) and not torch.equal(logits[10:], again[10:])


def test_fewer_answers_than_features_are_predicted_as_with_all_features():
    """By the fits themselves, without the basis of fewer columns."""
    differences, shares, _ = made(12, 30)
    logits = held_out_logits(differences, shares, list(range(12)), 4, 2.0)
    for part in range(4):
        held = torch.arange(12) % 4 == part
        weights = torch.zeros(30, dtype=torch.float64)
        curve = torch.autograd.functional
        for _ in range(30):
            gradient, hessian = (
                function(lambda w, rest=~held: loss(w, differences[rest], shares[rest], 2.0), weights)
                for function in (curve.jacobian, curve.hessian)
            )
            weights = weights - torch.linalg.solve(hessian, gradient)
        torch.testing.assert_close(logits[held], differences[held] @ weights, rtol=1e-5, atol=1e-6)


def test_noise_gets_a_strong_prior_and_no_accuracy_while_a_signal_is_predicted():
    differences, shares, _ = made(300, 6, scale=3.0)
    groups = list(range(300))
    noise = shares[torch.randperm(300, generator=torch.Generator().manual_seed(1))]
    assert chosen_precision(differences, noise, groups) > chosen_precision(differences, shares, groups)
    right = [((held_out_logits(differences, s, groups, 5) > 0) == (s == 1)).double().mean() for s in (shares, noise)]
    assert right[0] > 0.8 and abs(right[1] - 0.5) < 0.1
