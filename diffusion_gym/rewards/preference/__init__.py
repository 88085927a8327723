"""People as the reward: their choices between two pictures of a prompt, and a score fitted to them."""
