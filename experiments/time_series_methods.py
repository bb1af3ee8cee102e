"""The net of `experiments.time_series`, and what it learns by: CPC, order, the arrow, labels."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from experiments import program
from experiments.time_series_config import SOUNDS, Config, DatasetName, MethodName
from metagen_jax.gradients import gradients
from metagen_jax.nets.gru import GRU
from metagen_jax.nets.strided_conv import StridedConv
from metagen_jax.nets.time_statistics import time_statistics
from metagen_jax.self_supervised.cpc import cpc_sequence_loss
from metagen_jax.self_supervised.temporal import arrow_of_time_loss, order_verification_loss
from metagen_jax.supervised import cross_entropy_loss
from metagen_jax.types import Batch, GradFn, LossFn, Params, PRNGKey

AXIS = "tasks"
"""Of the devices, as `metagen_jax.parallel.data_parallel` calls it."""
# Pieces of a series that are put in order.
NUM_PIECES = 5

Excerpts = tuple[Array, Array]
"""`(values (n, t, c), lengths (n,))`."""


class Net(NamedTuple):
    """Frames of a sequence, and a state of each that knows all before."""

    encoder: StridedConv
    context: GRU


class Method(NamedTuple):
    """What a net learns by.

    Attributes:
      init: `(key, values) -> params`; the net's own are `params["encoder"]`, `params["context"]`.
      grad_fn: over batches `(excerpts, labels)`; only `supervised` looks at the latter.
    """

    init: Callable[[PRNGKey, Array], Params]
    grad_fn: GradFn


def entries_seen(config: Config, length: int) -> int:
    """Entries of what the net sees at once, of excerpts of so many."""
    return length // NUM_PIECES if config.method == "order_verification" else length


def first_step(net: Net) -> int:
    """Frames ahead of which CPC is asked first, that nothing of them has been seen."""
    return -(-net.encoder.window // net.encoder.stride)


def check_length(config: Config, name: DatasetName, length: int) -> None:
    """Raises a UserError if excerpts of so many entries are too short for what is learned."""
    net = make_net(config, name, length)
    frames = int(net.encoder.num_frames(np.array(entries_seen(config, length))))
    last_step = first_step(net) + config.num_steps - 1 if config.method == "cpc" else 0
    program.require(
        (
            frames > last_step,
            f"an excerpt of {name} has {frames} frames, too few for {config.method}"
            f"{f' with num_steps {config.num_steps}' if last_step else ''}; give a larger crop"
            f"{' or fewer steps' if last_step else ''}, or leave the set out",
        )
    )


def make_net(config: Config, name: DatasetName, length: int) -> Net:
    """The net for excerpts of so many entries, of which some methods see pieces."""
    seen = entries_seen(config, length)
    if name in SOUNDS:
        # A frame each 10 ms, of 8000 samples a second: half the published one's of 16,000.
        windows, strides = (10, 8, 4, 4), (5, 4, 2, 2)
    elif seen >= 64:
        windows, strides = (8, 5, 3), (2, 2, 1)
    elif seen >= 5:
        windows, strides = (3, 3), (1, 1)
    else:
        windows, strides = (2, 2), (1, 1)
    return Net(StridedConv(config.num_features, windows, strides), GRU(config.num_context))


def init_net(net: Net, key: PRNGKey, values: Array) -> dict[str, Params]:
    """Parameters of the net, the same whatever it is to learn by."""
    encoder_key, context_key = jax.random.split(key)
    frames, encoder = net.encoder.init_with_output(encoder_key, values)
    return {"encoder": encoder, "context": net.context.init(context_key, frames)}


def features(net: Net, params: Params, excerpts: Excerpts) -> Float[Array, "n features"]:
    """Mean, deviation and maximum over time of frames and states."""
    values, lengths = excerpts
    frames = _frames(net, params, values)
    states: Any = net.context.apply(params["context"], frames)
    valid = jnp.arange(frames.shape[1]) < net.encoder.num_frames(lengths)[:, None]
    return time_statistics(jnp.concatenate([frames, states], axis=-1), valid)


def _frames(net: Net, params: Params, values: Array) -> Array:
    frames = net.encoder.apply(params["encoder"], values)
    assert isinstance(frames, jax.Array)
    return frames


def cpc(config: Config, net: Net) -> Method:
    """Frames to come are found from the state."""
    head = nn.Dense(config.num_steps * config.num_features, use_bias=False)

    def predict(params: Params, states: Array) -> Array:
        outputs: Any = head.apply(params["head"], states)
        return outputs.reshape(len(states), config.num_steps, config.num_features)

    loss_fn = cpc_sequence_loss(
        lambda params, values: _frames(net, params, values),
        lambda params, frames: net.context.apply(params["context"], frames),
        predict,
        num_steps=config.num_steps,
        first_step=first_step(net),
        num_frames=net.encoder.num_frames,
        negatives=config.negatives,
        axis_name=AXIS,
    )
    return _method(net, head, config.num_context, _of_excerpts(loss_fn))


def order_verification(config: Config, net: Net) -> Method:
    """Whether three pieces of a series are in order."""
    head = nn.Dense(2)

    def embed(params: Params, pieces: Array) -> Array:
        return features(net, params, (pieces, jnp.full(len(pieces), pieces.shape[1])))

    def loss_fn(params: Params, excerpts: Batch, key: Array):
        values, _ = excerpts
        size = values.shape[1] // NUM_PIECES
        pieces = values[:, : size * NUM_PIECES].reshape(len(values), NUM_PIECES, size, -1)
        return order_verification_loss(embed, _classify(head))(params, pieces, key)

    width = 9 * (config.num_features + config.num_context)
    return _method(net, head, width, _of_excerpts(loss_fn))


def arrow_of_time(config: Config, net: Net) -> Method:
    """Whether a series runs backward."""
    head = nn.Dense(2)

    def classify(params: Params, values: Array) -> Array:
        lengths = jnp.full(len(values), values.shape[1])
        return _classify(head)(params, features(net, params, (values, lengths)))

    loss_fn = arrow_of_time_loss(classify)
    width = 3 * (config.num_features + config.num_context)
    return _method(
        net, head, width, _of_excerpts(lambda params, of, key: loss_fn(params, of[0], key))
    )


def supervised(config: Config, net: Net, num_classes: int) -> Method:
    """The classes of excerpts, from their features."""
    head = nn.Dense(num_classes)

    def logits(params: Params, excerpts: Excerpts) -> Array:
        return _classify(head)(params, features(net, params, excerpts))

    width = 3 * (config.num_features + config.num_context)
    return _method(net, head, width, cross_entropy_loss(logits))


def _classify(head: nn.Module) -> Callable[[Params, Array], Any]:
    return lambda params, x: head.apply(params["head"], x)


def _of_excerpts(loss_fn: LossFn) -> LossFn:
    """The loss over `(excerpts, labels)` that leaves labels alone."""
    return lambda params, batch, key: loss_fn(params, batch[0], key)


def _method(net: Net, head: nn.Module, width: int, loss_fn: LossFn) -> Method:
    """A method whose head takes so many numbers."""

    def init(key: PRNGKey, values: Array) -> dict[str, Params]:
        net_key, head_key = jax.random.split(key)
        head_params = head.init(head_key, jnp.zeros((1, width)))
        return init_net(net, net_key, values) | {"head": head_params}

    return Method(init, gradients(loss_fn))


METHODS: dict[MethodName, Callable[[Config, Net], Method]] = {
    "cpc": cpc,
    "order_verification": order_verification,
    "arrow_of_time": arrow_of_time,
}
