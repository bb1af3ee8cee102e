"""What `experiments.representation` asks of a method of learning features, and what all share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Float

from experiments.representation_config import Config
from metagen_jax.nets.conv4 import Conv4
from metagen_jax.nets.resnet import ResNet
from metagen_jax.types import Batch, GradFn, Params, PRNGKey

AXIS = "tasks"
"""Of the devices, as `metagen_jax.parallel.data_parallel` calls it."""


Features = Callable[..., Array]


class Method(NamedTuple):
    """A method, of images `(n, h, w, c)` from 0 to 1.

    Attributes:
      init: `(key, images) -> params`.
      grad_fn: over batches of images.
      features: `(params, images, num_reference=None) -> (n, features)`, what is kept for later
        tasks; a norm by the batch takes its statistics from the first so many images, without
        which it goes by those of all devices, and works inside `data_parallel` alone.
      net: `params -> those of the net`.
      optimizer: makes the optimiser of the method's parameters from one of a net's.
      update_slow: see `metagen_jax.training.train_step`.
      draw: `(params, images, key) -> rows of pictures (r, n, h2, w2, c)`, for methods that draw, or
        see patches.
      rows: what each of these rows shows.
    """

    init: Callable[[PRNGKey, Array], Params]
    grad_fn: GradFn
    features: Features
    net: Callable[[Params], Params] = lambda params: params["net"]
    optimizer: Callable[[optax.GradientTransformation], optax.GradientTransformation] = lambda x: x
    update_slow: Callable[[Params, Batch, PRNGKey], Params] | None = None
    draw: Callable[[Params, Array, PRNGKey], Array] | None = None
    rows: tuple[str, ...] = ()


def encoder(config: Config, *, num_stages: int = 3, pooled: bool = True) -> nn.Module:
    """The net whose features are learned; with four blocks that of `experiments.few_shot`."""
    if config.net == "conv4":
        return Conv4(None, num_filters=config.num_filters, norm=config.norm, axis_name=AXIS)
    sizes = tuple(2**stage * config.num_filters for stage in range(num_stages))
    return ResNet(None, num_filters=sizes, pooled=pooled)


def goes_by_batch(config: Config) -> bool:
    """Whether the encoder normalises by the images that it is given together."""
    return config.method != "mae" and config.net == "conv4" and config.norm == "batch"


def rate_of(config: Config, *, steps: int, peak: float | None = None) -> optax.Schedule:
    """The learning rate: warms up in a twentieth of the steps, then decays along a cosine."""
    warmup = max(1, steps // 20)
    peak = config.rate if peak is None else peak
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1))


def apply_to(net: nn.Module, part: str) -> Callable[..., Any]:
    """`apply(params, inputs)`, where the net's own parameters are `params[part]`."""

    def apply(params: Params, *inputs: Any) -> Any:
        return net.apply(params[part], *inputs)

    return apply


def init_chain(key: PRNGKey, x: Array, **nets: nn.Module) -> dict[str, Params]:
    """Parameters of nets of which each takes what the one before gives."""
    params = {}
    for i, (name, net) in enumerate(nets.items()):
        x, params[name] = net.init_with_output(jax.random.fold_in(key, i), x)
    return params


def prepare(config: Config, images: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Images as the encoder takes them: the four blocks from 0 to 1, as in few-shot learning."""
    return images if config.net == "conv4" else centre(images)


def centre(images: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """From 0..1 to -1..1."""
    return 2 * jnp.asarray(images) - 1
