"""What drawing a batch of episodes costs, beside the MAML step that learns from it.

    python -m benchmarks.bench_episodes [--smoke]

5-way 1-shot, 1 query a class, 32 tasks, 4112 classes (1028 characters with their rotations), 20
pictures each; Conv4-64 strided, second order, 1 inner step: the step of `omniglot-5w1s`. Beside our
sampler stands one that draws classes and examples by `jax.random.choice(replace=False)`, which
sorts them all. First both must give classes and examples that are distinct; then sampler, sorting
sampler and step are timed in turns. Writes `benchmarks/results/bench_episodes.json`.
"""

import argparse
import functools

from benchmarks import harness

if __name__ == "__main__":
    harness.one_device_per_core()

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metagen_jax.data.episodes import ClassData, group_by_class, sample_episode
from metagen_jax.gradients import gradients, mean_over_tasks, task_keys
from metagen_jax.meta.maml import maml_loss
from metagen_jax.nets.conv4 import Conv4
from metagen_jax.parallel import data_parallel, replicate
from metagen_jax.supervised import cross_entropy_loss
from metagen_jax.types import Episode, PRNGKey

WAYS, PER_CLASS, ROTATIONS = 5, 20, 4


def sample(key: PRNGKey, data: ClassData) -> Episode:
    """An episode as training draws it."""
    return sample_episode(
        key, data, num_ways=WAYS, num_shots=1, num_queries=1, num_rotations=ROTATIONS
    )


def sample_by_sorting(key: PRNGKey, data: ClassData) -> Episode:
    """The same by `jax.random.choice`, for classes of one size."""
    class_key, example_key = jax.random.split(key)
    num_classes = len(data.sizes) * ROTATIONS
    drawn = jax.random.choice(class_key, num_classes, (WAYS,), replace=False)

    def draw_class(key, index):
        chosen = jax.random.choice(key, PER_CLASS, (2,), replace=False)
        images = data.examples[data.starts[index // ROTATIONS] + chosen]
        turns = [lambda x, k=k: jnp.rot90(x, k, (1, 2)) for k in range(ROTATIONS)]
        return jax.lax.switch(index % ROTATIONS, turns, images)

    images = jax.vmap(draw_class)(jax.random.split(example_key, WAYS), drawn)
    labels = jnp.arange(WAYS)
    return Episode((images[:, 0], labels), (images[:, 1], labels))


def make_data(num_classes: int) -> ClassData:
    """Pictures of which no two are alike, so that a repeat is seen."""
    labels = np.repeat(np.arange(num_classes), PER_CLASS)
    images = np.zeros((len(labels), 28, 28, 1), np.uint8)
    images[:, 0, 0, 0] = 1 + np.arange(len(labels)) % PER_CLASS
    images[:, 0, 1, 0], images[:, 0, 2, 0] = labels % 256, labels // 256
    return group_by_class(images, labels)


def check_distinct(episodes: Episode) -> None:
    """No class twice in an episode, and no picture in both support and query."""
    support, query = (np.asarray(part[0]) for part in episodes)
    for own, other in zip(support, query, strict=True):
        names = {image.tobytes() for image in np.concatenate([own, other])}
        assert len(names) == 2 * WAYS, "an episode has a picture twice"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a few classes and tasks, one round")
    smoke = parser.parse_args().smoke
    num_classes, num_tasks, num_filters, rounds = (10, 4, 8, 1) if smoke else (1028, 32, 64, 15)

    net = Conv4(WAYS, num_filters)
    loss_fn = maml_loss(cross_entropy_loss(net.apply), inner_optimizer=optax.sgd(0.4), num_steps=1)
    grad_fn = data_parallel(mean_over_tasks(gradients(loss_fn), chunk=1))
    data = make_data(num_classes)
    params = net.init(jax.random.key(0), jnp.float32(data.examples[:1]))
    params, data, key = replicate((params, data, jax.random.key(1)))

    def batch(sampler):
        return jax.jit(
            lambda data, key: jax.vmap(sampler, (0, None))(task_keys(key, num_tasks), data)
        )

    def step(params, data, key):
        episodes = jax.vmap(sample, (0, None))(task_keys(key, num_tasks), data)
        episodes = jax.tree.map(
            lambda x: x.astype(jnp.float32) / 255 if x.dtype == jnp.uint8 else x, episodes
        )
        return grad_fn(params, episodes, key)

    programs = {
        "our sampler": (batch(sample), (data, key)),
        "sampler that sorts": (batch(sample_by_sorting), (data, key)),
        "whole step": (jax.jit(step), (params, data, key)),
    }
    for name, (program, arguments) in programs.items():
        result = jax.block_until_ready(program(*arguments))
        if name != "whole step":
            check_distinct(result)
    calls = {
        name: functools.partial(program, *arguments)
        for name, (program, arguments) in programs.items()
    }
    timings = {name: harness.Timing([], None, None) for name in programs}
    harness.time_in_turns(calls, timings, rounds=rounds)
    whole = timings["whole step"].median
    print(f"{num_tasks} episodes of {num_classes * ROTATIONS} classes; medians of {rounds} rounds")
    for name, timing in timings.items():
        share = 100 * timing.median / whole
        print(f"{name:20} {1000 * timing.median:8.2f} ms {share:7.2f} %")
    if not smoke:
        harness.write_result("bench_episodes", harness.as_numbers(timings))


if __name__ == "__main__":
    main()
