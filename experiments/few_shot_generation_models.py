"""The models of `experiments.few_shot_generation`.

Those that learn by gradients are the models of `experiments.density` with a loss; the others take
the support set in.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from experiments import density_config, program
from experiments.density_model import Model, Shape
from experiments.density_models import MODELS
from experiments.few_shot_generation_config import Config, ModelName
from experiments.few_shot_start import check_net, check_split
from metagen_jax.evaluation.likelihood import importance_sampled_log_prob
from metagen_jax.generative.autoregressive import sample_fixed_point
from metagen_jax.generative.flow_matching import Velocity, dequantized_matching_loss
from metagen_jax.generative.likelihoods import bernoulli_log_prob, sample_bernoulli
from metagen_jax.generative.maximum_likelihood import LogProb, negative_log_likelihood_loss
from metagen_jax.generative.set_conditional import EncodeSet, Given
from metagen_jax.generative.vae import hierarchical_inference, importance_weighted_log_prob
from metagen_jax.nets.attention_pixelcnn import AttentionPixelCNN
from metagen_jax.nets.conv4 import Conv4
from metagen_jax.nets.set_vae import SetVAE
from metagen_jax.nets.velocity import VelocityUNet
from metagen_jax.training import load_params
from metagen_jax.types import Batch, LossFn, Metrics, Params, PRNGKey

IMPORTANCE_CHUNK = 50


class Adaptive(NamedTuple):
    """A model of one image that learns by gradients.

    Attributes:
      init: `(key, images) -> params`.
      loss_fn: over batches of images.
      log_prob: of one image, as validation has it.
      choice_log_prob: the same, better, by which steps are chosen.
      test_log_prob: the same, as well as it can be said.
      kind: what that is.
      sample: `(params, key) -> grey values` of one image.
    """

    init: Callable[[PRNGKey, Array], Params]
    loss_fn: LossFn
    log_prob: LogProb
    choice_log_prob: LogProb
    test_log_prob: LogProb
    kind: str
    sample: Callable[[Params, PRNGKey], Array]


class Amortised(NamedTuple):
    """A model of one image given a set, the same but for the set.

    Attributes:
      init: `(key, images) -> params`.
      encode: `(params, images) -> memory`.
      log_prob, test_log_prob: of one `Given`.
      kind: what the latter is.
      sample: `(params, memory, key) -> grey values` of one image, all of the set being given.
    """

    init: Callable[[PRNGKey, Array], Params]
    encode: EncodeSet
    log_prob: LogProb
    test_log_prob: LogProb
    kind: str
    sample: Callable[[Params, Any, PRNGKey], Array]


# What the models are called in `experiments.density`.
_DENSITY_MODELS: dict[ModelName, density_config.ModelName] = {
    "vae": "vae",
    "conv_vae": "conv_vae",
    "pixelcnn": "pixelcnn",
    "flow": "realnvp",
    "flow_matching": "flow_matching",
    "gan": "gan",
}


def density_model(config: Config, shape: Shape) -> Model:
    """A model of `experiments.density` of pixels that are 0 or 1; a GAN's are 0 or 255."""
    settings = density_config.Config(
        model=_DENSITY_MODELS[config.model],
        # Whose GAN sees them from -1 to 1, as its generator makes them.
        values="levels" if config.model == "gan" else "static",
        num_latents=config.num_latents,
        hidden_sizes=config.hidden_sizes,
        num_filters=config.num_filters,
        num_layers=config.num_layers,
        test_samples=config.test_samples,
    )
    return MODELS[settings.model](settings, shape)


def adaptive(config: Config, shape: Shape) -> Adaptive:
    """A model of `experiments.density` with a loss."""
    model = density_model(config, shape)
    fewer = replace(config, test_samples=config.choice_samples)
    choice_log_prob, test_log_prob = density_model(fewer, shape).test_log_prob, model.test_log_prob
    assert choice_log_prob is not None
    assert test_log_prob is not None
    if config.model == "flow_matching":
        loss_fn, log_prob = _matching_loss(config.num_filters, math.prod(shape)), test_log_prob
    else:
        log_prob = model.log_prob
        assert log_prob is not None
        loss_fn = negative_log_likelihood_loss(log_prob)
    return Adaptive(
        model.init, loss_fn, log_prob, choice_log_prob, test_log_prob, model.kind, model.sample
    )


def _matching_loss(num_filters: int, num_elements: int) -> LossFn:
    """Flow matching of images of 0 and 1, the squared error of all elements of an image.

    A sum, as the nats of other models are, so that rates of steps on a support set compare.
    """
    velocity: Velocity = VelocityUNet(  # pyright: ignore[reportAssignmentType]
        num_filters=num_filters
    ).apply
    of_images = dequantized_matching_loss(velocity, num_levels=2)

    def loss_fn(params: Params, images: Batch, key: Array) -> tuple[Array, Metrics]:
        loss, metrics = of_images(params, (images, None), key)
        return num_elements * loss, metrics

    return loss_fn


def set_vae(config: Config, shape: Shape) -> Amortised:
    """The set VAE."""
    units = config.hidden_sizes[0]
    net = SetVAE(
        shape,
        num_context=2 * config.num_latents,
        num_latents=config.num_latents,
        num_features=units,
        num_units=units,
        embed=None if config.encoder_from is None else learned_features(config, shape),
    )
    apply: Callable[..., Any] = net.apply

    def log_likelihood(given: Given, decoded: Array) -> Array:
        return bernoulli_log_prob(given.example, decoded[..., 0]).sum()

    def draw(params: Params, given: Given, key: PRNGKey) -> tuple[Array, Any]:
        image = given.example.astype(jnp.float32)
        return apply(params, image, given.memory, given.present, key)

    def encode(params: Params, images: Array) -> Array:
        return apply(params, images.astype(jnp.float32), method="encode")

    def sample(params: Params, memory: Array, key: PRNGKey) -> Array:
        present = jnp.ones(len(memory), bool)
        return jax.nn.sigmoid(apply(params, memory, present, key, method="sample")[..., 0])

    def init(key: PRNGKey, images: Array) -> Params:
        images = images.astype(jnp.float32)

        def whole(module: SetVAE) -> Any:
            return module(images[0], module.encode(images), jnp.ones(len(images), bool), key)

        return net.init(key, method=whole)

    infer = hierarchical_inference(draw, log_likelihood)
    return Amortised(
        init,
        encode,
        importance_weighted_log_prob(infer, num_samples=config.train_samples),
        importance_sampled_log_prob(infer, num_samples=config.test_samples, chunk=IMPORTANCE_CHUNK),
        f"lower bound, {config.test_samples} importance samples",
        sample,
    )


def learned_features(config: Config, shape: Shape) -> Callable[[Array], Array]:
    """Features of images by the net of a run of `experiments.representation`.

    Its norm is in groups: by the batch, those of one image would depend on others.
    """
    folder = config.encoder_from
    assert folder is not None
    advice = "give the --run-dir of a run of experiments.representation as --encoder-from"
    learned = program.read_settings(folder, advice=advice)
    check_net(folder, learned, {"norm": "group"}, advice=advice)
    check_split(folder, learned, config.dataset, config.split, advice=advice)
    net = Conv4(None, learned["num_filters"], norm="group")
    params = load_params(folder / "net", net.init(jax.random.key(0), jnp.zeros((1, *shape))))
    return functools.partial(net.apply, params)  # pyright: ignore[reportReturnType]


def attention_pixelcnn(config: Config, shape: Shape) -> Amortised:
    """The PixelCNN that attends to the support set."""
    net = AttentionPixelCNN(
        shape,
        num_outputs=shape[2],
        features=config.num_filters,
        num_layers=config.num_layers,
        attention_layers=config.attention_layers,
        stride=config.attention_stride,
    )
    apply: Callable[..., Any] = net.apply

    def encode(params: Params, images: Array) -> Any:
        return apply(params, images, method="encode")

    def log_prob(params: Params, given: Given, key: PRNGKey) -> Array:
        del key
        logits = apply(params, given.example, given.memory, given.present)
        return bernoulli_log_prob(given.example, logits).sum()

    def sample(params: Params, memory: Any, key: PRNGKey) -> Array:
        present = jnp.ones(len(memory.maps), bool)
        start, keep = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool)

        def predict(image: Array) -> Array:
            return apply(params, image, memory, present)

        drawn = sample_fixed_point(key, predict, sample_bernoulli, start, keep)
        return drawn.sample.astype(jnp.float32)

    def init(key: PRNGKey, images: Array) -> Params:
        def whole(module: AttentionPixelCNN) -> Any:
            return module(images[0], module.encode(images), jnp.ones(len(images), bool))

        return net.init(key, method=whole)

    return Amortised(init, encode, log_prob, log_prob, "exact", sample)
