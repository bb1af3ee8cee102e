"""The rows of `bench_peers`: which outer step, on which tasks, how many times as fast is asked."""

from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from metagen_jax.nets.conv4 import Conv4
from metagen_jax.nets.mlp import MLP
from metagen_jax.types import Episode, Params


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison.

    Attributes:
      asked: how many times as fast as the best peer that it names the step is to be.
      against: the beginning of the names of the peers that count.
      learner: what is trained.
      net: strided or max-pooled Conv4 on 28x28 images, or an MLP on points of sinusoids.
      num_tasks: in an outer step.
      ways: classes of a task.
      shots: examples of a class in the support set, or points.
      queries: of a class, or points.
      num_steps: inner steps of SGD.
      rate: of these.
      inner_batch: examples of each inner step, the next ones of the support set; 0 takes all.
      num_filters: of a Conv4.
      hidden_sizes: of the MLP.
      torch_chunks: tasks at once for torch.func, beside all of them.
      rounds: how often each variant is timed.
    """

    asked: float
    against: str = ""
    learner: Literal["maml", "prototypical", "reptile"] = "maml"
    net: Literal["strided", "pooled", "mlp"] = "strided"
    num_tasks: int = 32
    ways: int = 5
    shots: int = 1
    queries: int = 15
    num_steps: int = 5
    rate: float = 0.1
    inner_batch: int = 0
    num_filters: int = 64
    hidden_sizes: tuple[int, ...] = (40, 40)
    torch_chunks: tuple[int, ...] = (2, 4, 8, 16)
    rounds: int = 5


ROWS = {
    "5-steps": Row(asked=3.5),
    "1-step": Row(asked=2.5, num_steps=1),
    "20-way": Row(asked=2.5, against="torch.func", ways=20, num_tasks=8, torch_chunks=(1, 2, 4)),
    "sinusoid": Row(
        asked=2.5,
        against="torch.func",
        net="mlp",
        num_tasks=1000,
        shots=10,
        queries=10,
        num_steps=10,
        rate=0.01,
        torch_chunks=(25, 50, 100, 250),
    ),
    "max-pooled": Row(asked=2.0, net="pooled"),
    "protonet": Row(asked=1.5, learner="prototypical", rounds=9),
    "reptile": Row(asked=2.5, learner="reptile", shots=10, inner_batch=10),
}


def small(row: Row) -> Row:
    """The row in a second."""
    sizes = {"ways": 3, "num_tasks": 4, "num_filters": 4, "hidden_sizes": (5, 5), "rounds": 1}
    steps = {"num_steps": min(2, row.num_steps), "queries": 2, "torch_chunks": (2,)}
    return replace(row, **sizes, **steps, inner_batch=min(row.inner_batch, 4))


def make_example(row: Row, dtype: type) -> tuple[Params, Episode]:
    """Parameters and tasks: random images, or sinusoids."""
    rng = np.random.default_rng(0)
    tasks = _sinusoids(row, rng) if row.net == "mlp" else _images(row, rng)
    inputs = jnp.asarray(tasks.support[0][0])
    params = make_net(row).init(jax.random.key(0), inputs)
    return jax.tree.map(
        lambda x: jnp.asarray(x, dtype if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype),
        (params, tasks),
    )


def make_net(row: Row) -> Conv4 | MLP:
    """Our net of a row."""
    if row.net == "mlp":
        return MLP(row.hidden_sizes, 1)
    outputs = None if row.learner == "prototypical" else row.ways
    return Conv4(outputs, row.num_filters, strided=row.net == "strided")


def _images(row: Row, rng: np.random.Generator) -> Episode:
    def part(shots: int):
        images = rng.random((row.num_tasks, shots * row.ways, 28, 28, 1))
        # One of each class after another, so that every mini-batch of Reptile has all.
        labels = np.tile(np.arange(row.ways, dtype=np.int32), (row.num_tasks, shots))
        # A class is a brightness, so that there is something to learn.
        return np.float32(images * (0.5 + labels[..., None, None, None] / row.ways)), labels

    return Episode(part(row.shots), part(row.queries))


def _sinusoids(row: Row, rng: np.random.Generator) -> Episode:
    each = (row.num_tasks, 1, 1)
    amplitude, phase = rng.uniform(0.1, 5, each), rng.uniform(0, np.pi, each)

    def part(points: int):
        x = rng.uniform(-5, 5, (row.num_tasks, points, 1))
        return np.float32(x), np.float32(amplitude * np.sin(x - phase))

    return Episode(part(row.shots), part(row.queries))
