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


class Method(NamedTuple):
    """A method, of images `(n, h, w, c)` from 0 to 1.

    Attributes:
      init: `(key, images) -> params`.
      grad_fn: over batches of images.
      features: `(params, images) -> (n, features)`, what is kept for later tasks.
      optimizer: makes the optimiser of the method's parameters from one of a net's.
      update_slow: see `metagen_jax.training.train_step`.
      draw: `(params, images, key) -> rows of pictures (r, n, h, w, c)`, for methods that draw.
      rows: what each of these rows shows.
    """

    init: Callable[[PRNGKey, Array], Params]
    grad_fn: GradFn
    features: Callable[[Params, Array], Array]
    optimizer: Callable[[optax.GradientTransformation], optax.GradientTransformation] = lambda x: x
    update_slow: Callable[[Params, Batch, PRNGKey], Params] | None = None
    draw: Callable[[Params, Array, PRNGKey], Array] | None = None
    rows: tuple[str, ...] = ()


def encoder(config: Config, *, pooled: bool = True) -> nn.Module:
    """The net whose features are learned; each image is by itself."""
    if config.net == "conv4":
        return Conv4(None, num_filters=config.num_filters, strided=False, norm="group")
    sizes = tuple(factor * config.num_filters for factor in (1, 2, 4))
    return ResNet(None, num_filters=sizes, pooled=pooled)


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


def centre(images: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """From 0..1 to -1..1."""
    return 2 * jnp.asarray(images) - 1
