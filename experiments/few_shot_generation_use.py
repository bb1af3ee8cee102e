"""What samples are good for: a classifier of classes that it has few images of."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from experiments.few_shot_generation_config import USE_QUERIES, Config
from experiments.few_shot_generation_learners import Learner
from experiments.few_shot_generation_report import Row
from metagen_jax.data.episodes import ClassData, sample_episode
from metagen_jax.evaluation.estimates import estimate, percent
from metagen_jax.evaluation.few_shot import Sample, evaluate_few_shot, transductive
from metagen_jax.evaluation.generated_examples import with_generated_examples
from metagen_jax.meta.maml import maml_predict
from metagen_jax.nets.conv4 import Conv4
from metagen_jax.supervised import cross_entropy_loss
from metagen_jax.types import Episode, Params, PRNGKey

NUM_STEPS, RATE, NUM_FILTERS = 60, 3e-3, 16


def use_and_report(
    config: Config, learner: Learner, row: Row, test: ClassData, seed: int
) -> dict[str, Any]:
    """Prints and gives the accuracy of a net trained on few images, without and with samples.

    The net is Conv4 without normalisation, from one random start, trained by Adam for so many
    steps; its settings were not tuned for either side.
    """
    shape: dict[str, Any] = {
        "num_ways": config.use_ways,
        "num_shots": config.use_shots,
        "num_queries": USE_QUERIES,
    }
    net = Conv4(config.use_ways, NUM_FILTERS, norm="none")
    alone = maml_predict(
        cross_entropy_loss(net.apply),
        transductive(net.apply),
        inner_optimizer=optax.adam(RATE),
        num_steps=NUM_STEPS,
    )
    draw = learner.draw(row.num_steps)

    def new_images(params: Params, shown: Array, keys: Array) -> Array:
        # Real pixels are 0 and 1, and grey ones would tell the net what is real.
        draw_keys, pixel_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        grey = draw(params, shown.astype(jnp.int32), draw_keys)
        return jax.vmap(jax.random.bernoulli)(pixel_keys, jnp.clip(grey, 0, 1))

    more = with_generated_examples(
        alone,
        new_images,
        num_ways=config.use_ways,
        num_samples=config.use_samples,
    )
    params = net.init(jax.random.key(seed), jnp.zeros((1, *test.examples.shape[1:])))
    evaluate = functools.partial(
        evaluate_few_shot,
        sample=_labelled(config, shape),
        data=test,
        key=jax.random.key(seed),
        num_tasks=config.use_tasks,
        chunk=config.chunk,
        devices=jax.local_devices()[: config.num_devices],
    )
    real, both = evaluate(alone, params), evaluate(more, (params, row.params))
    gain = estimate(both.per_task - real.per_task)
    print(
        f"a net trained on {config.use_shots} images of each of {config.use_ways} classes: "
        f"{percent(real)}, with {config.use_samples} samples of each as well: {percent(both)}"
    )
    return {
        "use_accuracy_real": float(real.mean),
        "use_interval_real": float(real.interval),
        "use_accuracy_with_samples": float(both.mean),
        "use_interval_with_samples": float(both.interval),
        "use_gain": float(gain.mean),
        "use_gain_interval": float(gain.interval),
    }


def _labelled(config: Config, shape: dict[str, Any]) -> Sample:
    """Episodes of several classes, pixels 0 and 1 as floats."""

    def sample(key: PRNGKey, data: ClassData) -> Episode:
        episode_key, *value_keys = jax.random.split(key, 3)
        episode = sample_episode(episode_key, data, **shape)
        parts = []
        for value_key, (images, labels) in zip(value_keys, episode, strict=True):
            if config.values == "bernoulli":
                images = jax.random.bernoulli(value_key, images / 255)
            parts.append((images.astype(jnp.float32), labels))
        return Episode(*parts)

    return sample
