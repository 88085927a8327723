"""Sizes and options of DPOK's tests."""

NUMBER, STEPS = 6, 4
ALL = NUMBER * STEPS

# One update on every transition, without value function and penalty: each test adds what it is about.
PLAIN = {
    "value_function": False,
    "kl_weight": 0.0,
    "reward_weight": 1.0,
    "updates": 1,
    "batch_size": ALL,
    "micro_batch_size": 1000,
    "max_grad_norm": 1e9,
    "normalization": "none",
}

VALUE = {"value_function": True, "value_updates": 1, "value_batch_size": ALL, "value_learning_rate": 1e-2}
