"""A reward behind HTTP: `app` serves it, `wire` says what travels; the client is `diffusion_gym.rewards.remote`."""
