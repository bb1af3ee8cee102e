"""The tasks of `experiments.learned_optimizer`, and how fast optimisers learn them."""

import functools
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from metagen_jax.data.classes import ClassSplit
from metagen_jax.data.episodes import ClassData, group_by_class, sample_episode
from metagen_jax.evaluation.estimates import Estimate, estimate
from metagen_jax.gradients import gradients, task_keys
from metagen_jax.meta.adapt import adapt
from metagen_jax.meta.learned_optimizer import learned_optimizer
from metagen_jax.meta.update_rules import Rule
from metagen_jax.nets.mlp import MLP
from metagen_jax.parallel import map_over_tasks
from metagen_jax.supervised import cross_entropy_loss
from metagen_jax.types import Batch, Episode, LossFn, Metrics, Params, PRNGKey

NUM_CLASSES, EXAMPLES_PER_CLASS = 10, 20
NUM_EXAMPLES = NUM_CLASSES * EXAMPLES_PER_CLASS
TEACHER_INPUTS, TEACHER_HIDDEN = 16, 32
LEARNED = "learned"
NUM_RATES = 20
RIVALS: dict[str, tuple[Rule, np.ndarray]] = {
    "Adam": (optax.adam, np.geomspace(1e-3, 1, NUM_RATES)),
    "SGD, momentum 0.9": (
        functools.partial(optax.sgd, momentum=0.9),
        np.geomspace(1e-2, 10, NUM_RATES),
    ),
}


@dataclass(frozen=True)
class Family:
    """Tasks of one kind of data and one classifier.

    Attributes:
      source: letters of the glyphs' training, validation or test classes, or "teacher": Gaussian
        points and what a random network says of them.
      hidden_sizes: of the classifier; ReLU.
      side: of the pictures in pixels, a divisor of 28.
    """

    source: Literal["train", "val", "test", "teacher"]
    hidden_sizes: tuple[int, ...]
    side: int = 7

    @property
    def name(self) -> str:
        data = "teacher" if self.source == "teacher" else f"{self.source} glyphs {self.side}px"
        return f"{data}, hidden {'-'.join(map(str, self.hidden_sizes))}"

    @property
    def net(self) -> MLP:
        return MLP(self.hidden_sizes, NUM_CLASSES)

    @property
    def loss_fn(self) -> LossFn:
        return cross_entropy_loss(self.net.apply)


def task_data(glyphs: ClassSplit, family: Family) -> ClassData | None:
    """What tasks are drawn from: pictures as vectors of ink from 0 to 1; None for a teacher's."""
    if family.source == "teacher":
        return None
    images, labels, _ = getattr(glyphs, family.source)
    side, block = family.side, images.shape[1] // family.side
    paper = images.reshape(-1, side, block, side, block).mean((2, 4)) / 255
    return group_by_class(np.float32(1 - paper).reshape(len(images), -1), labels)


def sample_task(family: Family, data: ClassData | None, key: PRNGKey) -> tuple[Params, Episode]:
    """An initialised classifier and its training set, which is support and query at once."""
    init_key, data_key = jax.random.split(key)
    examples = sample_teacher(data_key) if data is None else sample_letters(data, data_key)
    return family.net.init(init_key, examples[0]), Episode(examples, examples)


def sample_letters(
    data: ClassData, key: PRNGKey
) -> tuple[Float[Array, "n pixels"], Int[Array, " n"]]:
    """All pictures of a few letters."""
    episode = sample_episode(
        key, data, num_ways=NUM_CLASSES, num_shots=EXAMPLES_PER_CLASS, num_queries=0
    )
    return episode.support


def sample_teacher(key: PRNGKey) -> tuple[Float[Array, "n inputs"], Int[Array, " n"]]:
    """Gaussian points and the classes that a random network finds the likeliest."""
    points_key, teacher_key = jax.random.split(key)
    points = jax.random.normal(points_key, (NUM_EXAMPLES, TEACHER_INPUTS))
    teacher = MLP((TEACHER_HIDDEN,), NUM_CLASSES, activation=jnp.tanh)
    logits: Any = teacher.apply(teacher.init(teacher_key, points), points)
    return points, logits.argmax(-1)


def draw_batch(examples: Batch, key: PRNGKey, batch_size: int) -> Batch:
    """Some of a task's examples, with replacement."""
    indices = jax.random.randint(key, (batch_size,), 0, NUM_EXAMPLES)
    return jax.tree.map(lambda x: x[indices], examples)


@functools.partial(
    jax.jit, static_argnames=("family", "rule", "batch_size", "num_tasks", "num_steps")
)
def loss_curves(
    rule_params: PyTree,
    data: ClassData | None,
    key: PRNGKey,
    *,
    family: Family,
    rule: Rule,
    batch_size: int,
    num_tasks: int,
    num_steps: int,
) -> Float[Array, "tasks steps_and_1"]:
    """Training loss, over the whole of each task, before the first and after each step of a rule.

    Tasks and mini-batches are those of the key, whatever the rule. A loss that is not finite is
    given as infinite.
    """
    loss_fn = family.loss_fn

    def grad_fn(params: Params, batch: Episode, key: PRNGKey) -> tuple[Params, Metrics]:
        direction, _ = gradients(loss_fn)(params, batch.support, key)
        return direction, {"loss": loss_fn(params, batch.query, key)[0]}

    def batch_at(examples: Batch, step: Array, key: PRNGKey) -> Episode:
        return Episode(draw_batch(examples, key, batch_size), examples)

    def of_task(rule_params: PyTree, key: PRNGKey) -> Float[Array, " steps_and_1"]:
        task_key, adapt_key = jax.random.split(key)
        params, task = sample_task(family, data, task_key)
        # The loss is that before a step: one step more shows it after the last.
        return adapt(
            grad_fn,
            params,
            task.support,
            adapt_key,
            optimizer=rule(rule_params),
            num_steps=num_steps + 1,
            batch_at=batch_at,
        ).metrics["loss"]

    over_tasks = map_over_tasks(of_task, devices=jax.local_devices())
    losses = over_tasks(rule_params, task_keys(key, num_tasks))
    return jnp.where(jnp.isfinite(losses), losses, jnp.inf)


class Comparison(NamedTuple):
    """Loss curves `(tasks, steps + 1)` of every optimiser on one kind of tasks.

    Attributes:
      curves: by the name of the optimiser.
      rates: those of the rivals.
    """

    curves: dict[str, Estimate]
    rates: dict[str, float]


def compare(
    rule_params: Params,
    data: ClassData | None,
    key: PRNGKey,
    *,
    family: Family,
    batch_size: int,
    num_tasks: int,
    num_steps: int,
    beyond: int,
) -> Comparison:
    """The learned optimiser and its rivals on the same tasks, initialisations and mini-batches.

    A rival's rate is the one with the smallest mean loss after `num_steps` on these very tasks; the
    curves go on to `beyond` steps.
    """
    measure = functools.partial(
        loss_curves, data=data, key=key, family=family, batch_size=batch_size, num_tasks=num_tasks
    )
    curves = {LEARNED: estimate(measure(rule_params, rule=learned_optimizer, num_steps=beyond))}
    rates = {}
    for name, (rule, grid) in RIVALS.items():
        # Means on the host: with many of them in a queue, the devices of a CPU may wait for one
        # another for ever.
        losses = [
            np.asarray(measure(jnp.float32(rate), rule=rule, num_steps=num_steps))[:, -1].mean()
            for rate in grid
        ]
        rates[name] = float(grid[np.argmin(losses)])
        curves[name] = estimate(measure(jnp.float32(rates[name]), rule=rule, num_steps=beyond))
    return Comparison(curves, rates)
