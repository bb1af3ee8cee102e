"""The methods of `experiments.representation`, by name: those that compare, and all others."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
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
)
from metagen_jax.gradients import gradients
from metagen_jax.nets.mlp import MLP
from metagen_jax.nets.row_context import RowContext
from metagen_jax.self_supervised.adjacent_patch import adjacent_features_loss
from metagen_jax.self_supervised.byol import BYOLParams, byol_loss, byol_optimizer, move_target
from metagen_jax.self_supervised.byol import init_byol as start_byol
from metagen_jax.self_supervised.context_prediction import (
    DIRECTIONS,
    context_prediction_loss,
    drop_colours,
)
from metagen_jax.self_supervised.cpc import cpc_loss
from metagen_jax.self_supervised.simclr import simclr_loss
from metagen_jax.types import Params, PRNGKey

PATCH_SIZE, STRIDE, NUM_STEPS = 8, 4, 3


def simclr(config: Config) -> Method:
    """Two views of an image find each other."""
    net, head = encoder(config), MLP((config.num_hidden,), config.num_projected)
    apply_net, apply_head = apply_to(net, "net"), apply_to(head, "head")

    def features(params: Params, images: Array) -> Array:
        return apply_net(params, centre(images))

    loss_fn = simclr_loss(
        lambda params, images: apply_head(params, features(params, images)),
        view_of(config),
        temperature=config.temperature,
        axis_name=AXIS,
    )
    return Method(
        init=lambda key, images: init_chain(key, centre(images), net=net, head=head),
        grad_fn=gradients(loss_fn),
        features=features,
    )


def byol(config: Config) -> Method:
    """A view predicts how a slow average of the net sees the other one."""
    net, head = encoder(config), MLP((config.num_hidden,), config.num_projected)
    predictor = MLP((config.num_hidden,), config.num_projected)
    apply_net, apply_head = apply_to(net, "net"), apply_to(head, "head")

    def project(params: Params, images: Array) -> Array:
        return apply_head(params, apply_net(params, centre(images)))

    def init(key: PRNGKey, images: Array) -> BYOLParams:
        parts = init_chain(key, centre(images), net=net, head=head, predictor=predictor)
        return start_byol({"net": parts["net"], "head": parts["head"]}, parts["predictor"])

    def predict(params: Params, z: Array) -> Array:
        outputs = predictor.apply(params, z)
        assert isinstance(outputs, jax.Array)
        return outputs

    return Method(
        init=init,
        grad_fn=gradients(byol_loss(project, predict, view_of(config))),
        features=lambda params, images: apply_net(params.online, centre(images)),
        optimizer=byol_optimizer,
        update_slow=move_target(0.99),
    )


def context_prediction(config: Config) -> Method:
    """Where one patch lies from another."""
    net, head = encoder(config), MLP((config.num_hidden,), len(DIRECTIONS))
    apply_net = apply_to(net, "net")
    loss_fn = context_prediction_loss(
        apply_net,
        apply_to(head, "head"),
        **_places(config),
        augment=None if is_characters(config) else drop_colours,
    )
    return _of_patches(
        loss_fn,
        apply_net,
        lambda key, z: init_chain(key, jnp.concatenate([z, z], 1), head=head),
        net,
    )


def adjacent_patch(config: Config) -> Method:
    """What the neighbouring patch holds: its projection is found among others'."""
    net, head = encoder(config), MLP((config.num_hidden,), config.num_projected)
    predictor = MLP((config.num_hidden,), config.num_projected)
    apply_net, apply_head = apply_to(net, "net"), apply_to(head, "head")

    def init(key: PRNGKey, z: Array) -> dict[str, Params]:
        head_key, key = jax.random.split(key)
        params = init_chain(head_key, z, head=head)
        inputs = jnp.zeros((len(z), config.num_projected + len(DIRECTIONS)))
        return params | init_chain(key, inputs, predictor=predictor)

    loss_fn = adjacent_features_loss(
        lambda params, patches: apply_head(params, apply_net(params, patches)),
        apply_to(predictor, "predictor"),
        temperature=config.temperature,
        **_places(config),
        augment=None if is_characters(config) else drop_colours,
        axis_name=AXIS,
    )
    return _of_patches(loss_fn, apply_net, init, net)


def cpc(config: Config) -> Method:
    """Patches further down are predicted from those above."""
    net, context = encoder(config), RowContext(config.num_hidden)
    width = 4 * config.num_filters
    predictor = MLP((), NUM_STEPS * width)
    apply_net, apply_predictor = apply_to(net, "net"), apply_to(predictor, "predictor")

    def init(key: PRNGKey, z: Array) -> dict[str, Params]:
        return init_chain(key, z[:, None, None], context=context, predictor=predictor)

    loss_fn = cpc_loss(
        apply_net,
        apply_to(context, "context"),
        lambda params, c: apply_predictor(params, c).reshape(len(c), NUM_STEPS, width),
        patch_size=PATCH_SIZE,
        stride=STRIDE,
        num_steps=NUM_STEPS,
        augment=None if is_characters(config) else drop_colours,
        axis_name=AXIS,
        block_size=512,
    )
    return _of_patches(loss_fn, apply_net, init, net)


def _places(config: Config) -> dict[str, int]:
    """Patches of 8 pixels that fill pictures of 28, or of 32."""
    wide = 1 if is_characters(config) else 2
    return {"patch_size": PATCH_SIZE, "gap": wide, "jitter": wide}


def _of_patches(loss_fn, apply_net, init_heads, net) -> Method:
    """A method whose net sees patches in training and whole images later."""

    def init(key: PRNGKey, images: Array) -> dict[str, Params]:
        net_key, key = jax.random.split(key)
        z, params = net.init_with_output(net_key, centre(images))
        return {"net": params, **init_heads(key, z)}

    return Method(
        init=init,
        grad_fn=gradients(lambda params, images, key: loss_fn(params, centre(images), key)),
        features=lambda params, images: apply_net(params, centre(images)),
    )


METHODS: dict[MethodName, Callable[[Config], Method]] = {
    "simclr": simclr,
    "byol": byol,
    "cpc": cpc,
    "context_prediction": context_prediction,
    "adjacent_patch": adjacent_patch,
    "inpainting": inpainting,
    "mae": mae,
    "colorization": colorization,
}
