"""The methods of `experiments.representation`, by name: those that compare, and all others."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.representation_config import Config, MethodName
from experiments.representation_data import is_characters, view_of
from experiments.representation_drawing import colorization, inpainting, mae
from experiments.representation_method import (
    AXIS,
    Method,
    apply_to,
    centre,
    encoder,
    init_chain,
    prepare,
)
from metagen_jax.gradients import gradients
from metagen_jax.nets.mlp import MLP
from metagen_jax.nets.row_context import RowContext
from metagen_jax.self_supervised import decorrelation
from metagen_jax.self_supervised.adjacent_patch import (
    adjacent_features_loss,
    adjacent_pixels_loss,
)
from metagen_jax.self_supervised.byol import BYOLParams, byol_loss, byol_optimizer, move_target
from metagen_jax.self_supervised.byol import init_byol as start_byol
from metagen_jax.self_supervised.context_prediction import (
    DIRECTIONS,
    context_prediction_loss,
    drop_colours,
    sample_patch_pairs,
)
from metagen_jax.self_supervised.contrastive import nt_xent
from metagen_jax.self_supervised.cpc import cpc_loss, patch_grid
from metagen_jax.self_supervised.simclr import Augment, Compare, two_view_loss
from metagen_jax.types import Params, PRNGKey

# Of CPC: the second row below is the first that shares no pixel with the context's own.
PATCH_SIZE, STRIDE, FIRST_STEP, NUM_STEPS = 8, 4, 2, 3
# Of residual nets that see whole views.
VIEW_STAGES = 4


def simclr(config: Config, images: np.ndarray) -> Method:
    """Two views of an image find each other."""
    del images
    return _of_two_views(
        config, functools.partial(nt_xent, temperature=config.temperature, axis_name=AXIS)
    )


def barlow_twins(config: Config, images: np.ndarray) -> Method:
    """Each feature of a view correlates with itself in the other one, and with no other."""
    del images
    return _of_two_views(config, functools.partial(decorrelation.barlow_twins, axis_name=AXIS))


def vicreg(config: Config, images: np.ndarray) -> Method:
    """Two views of an image agree, in features that vary and don't repeat."""
    del images
    return _of_two_views(config, functools.partial(decorrelation.vicreg, axis_name=AXIS))


def byol(config: Config, images: np.ndarray) -> Method:
    """A view predicts how a slow average of the net sees the other one."""
    del images
    net = encoder(config, num_stages=VIEW_STAGES)
    head, predictor = _head(config), _head(config)
    apply_net, apply_head = apply_to(net, "net"), apply_to(head, "head")

    def features(params: Params, images: Array, num_reference: int | None = None) -> Array:
        return apply_net(params, prepare(config, images), num_reference)

    def project(params: Params, images: Array) -> Array:
        return apply_head(params, features(params, images))

    def init(key: PRNGKey, images: Array) -> BYOLParams:
        inputs = prepare(config, images)
        parts = init_chain(key, inputs, net=net, head=head, predictor=predictor)
        return start_byol({"net": parts["net"], "head": parts["head"]}, parts["predictor"])

    def predict(params: Params, z: Array) -> Array:
        outputs = predictor.apply(params, z)
        assert isinstance(outputs, jax.Array)
        return outputs

    return Method(
        init=init,
        grad_fn=gradients(byol_loss(project, predict, view_of(config))),
        features=lambda params, *inputs, **options: features(params.online, *inputs, **options),
        net=lambda params: params.online["net"],
        optimizer=byol_optimizer,
        update_slow=move_target(0.99),
    )


def context_prediction(config: Config, images: np.ndarray) -> Method:
    """Where one patch lies from another."""
    del images
    net, head = encoder(config), MLP((config.num_hidden,), len(DIRECTIONS))
    seen = {**_places(config), "augment": _dropping(config)}
    return _of_pairs(
        context_prediction_loss(apply_to(net, "net"), apply_to(head, "head"), **seen),
        net,
        lambda key, z: init_chain(key, jnp.concatenate([z, z], 1), head=head),
        seen,
    )


def adjacent_patch(config: Config, images: np.ndarray) -> Method:
    """What the neighbouring patch holds: its projection is found among others'."""
    del images
    net, head = encoder(config), MLP((config.num_hidden,), config.num_projected)
    predictor = MLP((config.num_hidden,), config.num_projected)
    apply_net, apply_head = apply_to(net, "net"), apply_to(head, "head")
    seen = {**_places(config), "augment": _dropping(config)}

    def init(key: PRNGKey, z: Array) -> dict[str, Params]:
        head_key, key = jax.random.split(key)
        params = init_chain(head_key, z, head=head)
        inputs = jnp.zeros((len(z), config.num_projected + len(DIRECTIONS)))
        return params | init_chain(key, inputs, predictor=predictor)

    loss_fn = adjacent_features_loss(
        lambda params, patches: apply_head(params, apply_net(params, patches)),
        apply_to(predictor, "predictor"),
        temperature=config.temperature,
        axis_name=AXIS,
        **seen,
    )
    return _of_pairs(loss_fn, net, init, seen)


def adjacent_pixels(config: Config, images: np.ndarray) -> Method:
    """What the neighbouring patch holds: its pixels are drawn."""
    places = {**_places(config), "gap": 0, "jitter": 0}
    net = encoder(config)
    predictor = MLP((config.num_hidden,), places["patch_size"] ** 2 * images.shape[-1])

    def init(key: PRNGKey, z: Array) -> dict[str, Params]:
        inputs = jnp.zeros((len(z), z.shape[1] + len(DIRECTIONS)))
        return init_chain(key, inputs, predictor=predictor)

    loss_fn = adjacent_pixels_loss(apply_to(net, "net"), apply_to(predictor, "predictor"), **places)
    return _of_pairs(loss_fn, net, init, places)


def cpc(config: Config, images: np.ndarray) -> Method:
    """Patches further down are predicted from those above."""
    del images
    net, context = encoder(config), RowContext(config.num_hidden)
    width = 4 * config.num_filters
    predictor = MLP((), NUM_STEPS * width)
    apply_predictor = apply_to(predictor, "predictor")

    def init(key: PRNGKey, z: Array) -> dict[str, Params]:
        return init_chain(key, z[:, None, None], context=context, predictor=predictor)

    loss_fn = cpc_loss(
        apply_to(net, "net"),
        apply_to(context, "context"),
        lambda params, c: apply_predictor(params, c).reshape(len(c), NUM_STEPS, width),
        patch_size=PATCH_SIZE,
        stride=STRIDE,
        num_steps=NUM_STEPS,
        first_step=FIRST_STEP,
        augment=_dropping(config),
        axis_name=AXIS,
        block_size=512,
    )
    return _of_patches(loss_fn, net, init, patch_size=PATCH_SIZE, stride=STRIDE)


def _of_two_views(config: Config, compare: Compare) -> Method:
    """A method that compares two views of an image."""
    net, head = encoder(config, num_stages=VIEW_STAGES), _head(config)
    apply_net, apply_head = apply_to(net, "net"), apply_to(head, "head")

    def features(params: Params, images: Array, num_reference: int | None = None) -> Array:
        return apply_net(params, prepare(config, images), num_reference)

    def project(params: Params, images: Array) -> Array:
        return apply_head(params, features(params, images))

    return Method(
        init=lambda key, images: init_chain(key, prepare(config, images), net=net, head=head),
        grad_fn=gradients(two_view_loss(project, view_of(config), compare)),
        features=features,
    )


def _head(config: Config) -> MLP:
    """What follows the net where views are compared."""
    return MLP((config.num_hidden,), config.num_projected, batch_norm=True, axis_name=AXIS)


def _places(config: Config) -> dict[str, int]:
    """Patches whose neighbours leave the first one a few places, in pictures of 28, or of 32."""
    if is_characters(config):
        return {"patch_size": 6, "gap": 1, "jitter": 1}
    return {"patch_size": 7, "gap": 2, "jitter": 2}


def _dropping(config: Config) -> Augment | None:
    """Of every second patch the colours are dropped, so that features still know of colours.

    A lens' fringes then still tell the direction in every fourth pair: to close that shortcut all
    colours must go, as published. `experiments.representation_shortcut` shows it.
    """
    return None if is_characters(config) else functools.partial(drop_colours, probability=0.5)


def _of_pairs(loss_fn, net, init_heads, seen: dict[str, Any]) -> Method:
    """A method of pairs of patches, as `seen` says, which it also draws."""

    def draw(params: Params, images: Array, key: PRNGKey) -> Array:
        del params
        pair = sample_patch_pairs(key, centre(images), **seen)
        return jnp.stack([pair.centre, pair.neighbour]) / 2 + 0.5

    # 16 patches of 28 or 32 pixels a side take as many multiplications as the whole picture.
    size = seen["patch_size"]
    method = _of_patches(loss_fn, net, init_heads, patch_size=size, stride=size + 1)
    return method._replace(draw=draw, rows=("patch", "neighbour"))


def _of_patches(loss_fn, net, init_heads, *, patch_size: int, stride: int) -> Method:
    """A method whose net sees patches; the features of an image are the mean of its patches'."""

    def init(key: PRNGKey, images: Array) -> dict[str, Params]:
        net_key, key = jax.random.split(key)
        z, params = net.init_with_output(net_key, centre(images))
        return {"net": params, **init_heads(key, z)}

    def features(params: Params, images: Array, num_reference: int | None = None) -> Array:
        del num_reference
        patches = patch_grid(centre(images), patch_size=patch_size, stride=stride)
        z = net.apply(params["net"], patches.reshape(-1, *patches.shape[3:]))
        return z.reshape(len(images), -1, z.shape[-1]).mean(1)

    return Method(
        init=init,
        grad_fn=gradients(lambda params, images, key: loss_fn(params, centre(images), key)),
        features=features,
    )


METHODS: dict[MethodName, Callable[[Config, np.ndarray], Method]] = {
    "simclr": simclr,
    "byol": byol,
    "barlow_twins": barlow_twins,
    "vicreg": vicreg,
    "cpc": cpc,
    "context_prediction": context_prediction,
    "adjacent_patch": adjacent_patch,
    "adjacent_pixels": adjacent_pixels,
    "inpainting": inpainting,
    "mae": mae,
    "colorization": colorization,
}
"""`method(config, images of training)`."""
