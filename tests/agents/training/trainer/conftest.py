"""What the trainer's tests share."""

from functools import cache

import pytest

from diffusion_gym.agents.training.trainer import Schedule, Trainer
from trainer_runs import BATCH, SAMPLES, Snapshot, brightness


@pytest.fixture(scope="session")
def build(make_env, make_agent, perturb):
    """`build(out, iterations, reward, ...)`: every call builds all anew, as a new process would."""

    def make(out, iterations=4, *, reward=brightness, trainable="lora", pictures=False, seed=0, init=0, **schedule):
        env = make_env(BATCH, num_inference_steps=2, reward=reward, autoreset_mode="Disabled")
        # batches of 4 of 8 samples, two passes: the order of the samples and Adam's memory both matter
        agent = make_agent(
            env, trainable, scale=0.02, batch_size=4, inner_epochs=2, normalization="prompt", statistics_min_count=2
        )
        if init:  # other weights than those of the run: a resumed run must not depend on them
            perturb(agent.policy, 0.1, seed=init)
        schedule = {"checkpoint_every": 1, "pictures_every": 0, **schedule}
        return Trainer(
            env,
            agent,
            out,
            Schedule(total_reward_queries=iterations * SAMPLES, samples_per_iteration=SAMPLES, **schedule),
            seed=seed,
            pictures_env=make_env(4, num_inference_steps=2) if pictures else None,
            progress=False,
        )

    return make


@pytest.fixture
def make_trainer(build, tmp_path):
    """`make_trainer(iterations, folder, ...)`: a trainer with its run folder in this test's own folder."""

    def make(iterations=4, folder="run", **options):
        return build(tmp_path / folder, iterations, **options)

    return make


@pytest.fixture(scope="session")
def uninterrupted(build, tmp_path_factory):
    """`uninterrupted(trainable)`: the snapshot of a run of 4 iterations."""

    @cache
    def finished(trainable="lora"):
        trainer = build(tmp_path_factory.mktemp("uninterrupted"), trainable=trainable)
        trainer.run()
        return Snapshot.of(trainer)

    return finished
