"""The generator and discriminator of pictures: shapes, classes, each example by itself."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metagen_jax.errors import UserError
from metagen_jax.generative.gan import HINGE, GANParams, gan_gradients, r1_penalty
from metagen_jax.nets.gan import Discriminator, Generator

KEY = jax.random.key(0)
SMALL = (8, 7, 1)


def labels_of(num_classes, num=3):
    return None if num_classes is None else jnp.arange(num) % num_classes


@pytest.mark.slow
@pytest.mark.parametrize("num_classes", [None, 2])
def test_each_image_depends_on_its_own_vector_and_each_score_on_its_own_image(num_classes):
    generator = Generator(SMALL, num_filters=8, num_classes=num_classes)
    discriminator = Discriminator(num_filters=4, num_classes=num_classes)
    latents, labels = jax.random.normal(KEY, (3, 5)), labels_of(num_classes)
    of_generator = jax.jit(generator.init)(KEY, latents, labels)
    images = generator.apply(of_generator, latents, labels)
    of_discriminator = jax.jit(discriminator.init)(KEY, images, labels)
    scores = discriminator.apply(of_discriminator, images, labels)
    assert images.shape == (3, *SMALL)
    assert (jnp.abs(images) < 1).all()
    assert scores.shape == (3,)
    one = None if labels is None else labels[1:2]
    np.testing.assert_allclose(
        generator.apply(of_generator, latents[1:2], one), images[1:2], rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        discriminator.apply(of_discriminator, images[1:2], one), scores[1:2], rtol=1e-4, atol=1e-5
    )
    if labels is not None:
        others = 1 - labels
        assert jnp.abs(generator.apply(of_generator, latents, others) - images).max() > 1e-3
        changed = discriminator.apply(of_discriminator, images, others)
        assert jnp.abs(changed - scores).min() > 1e-6


@pytest.mark.slow
def test_score_of_a_class_is_the_plain_one_plus_a_projection():
    """With an embedding of zeros for one class, and ones for the other."""
    images = jax.random.normal(KEY, (2, *SMALL))
    net = Discriminator(num_filters=4, num_classes=2)
    params = net.init(KEY, images, jnp.zeros(2, int))["params"]
    plain = {name: leaf for name, leaf in params.items() if name != "classes"}
    size = params["head"]["kernel"].shape[0]
    params = {**params, "classes": {"embedding": jnp.stack([jnp.zeros(size), jnp.ones(size)])}}
    scores = net.apply({"params": params}, images, jnp.array([0, 1]))
    expected = Discriminator(num_filters=4).apply({"params": plain}, images)
    ones = {**plain, "head": {"kernel": jnp.ones((size, 1)), "bias": jnp.zeros(1)}}
    projected = Discriminator(num_filters=4).apply({"params": ones}, images)
    np.testing.assert_allclose(scores, expected + jnp.array([0, 1]) * projected, rtol=1e-4)


def test_sizes_are_those_of_mnist_and_cifar():
    for shape in ((28, 28, 1), (32, 32, 3)):
        images, _ = jax.eval_shape(
            lambda: Generator(shape).init_with_output(KEY, jnp.zeros((2, 64)))  # noqa: B023
        )
        assert images.shape == (2, *shape)


@pytest.mark.slow
def test_a_map_in_place_of_a_vector_is_enlarged_where_it_is():
    """What differs in one corner of the map differs there alone, but for the norms."""
    net = Generator((16, 16, 3), num_filters=8)
    maps = jax.random.normal(KEY, (2, 4, 4, 24))
    params = jax.jit(net.init)(KEY, maps)
    assert "from_latents" not in params["params"]
    # A vector's pixels are spread over the whole; a permuted map's are permuted.
    flipped = net.apply(params, maps[:, ::-1])
    kernels = jax.tree_util.tree_map_with_path(
        lambda path, x: x[::-1] if x.ndim == 4 else x, params
    )
    np.testing.assert_allclose(net.apply(kernels, maps)[:, ::-1], flipped, atol=1e-4)
    with pytest.raises(UserError, match=r"give vectors, or maps \(n, 4, 4, filters\)"):
        net.init(KEY, maps[:, :3])


@pytest.mark.slow
def test_field_with_a_penalty_over_tasks_of_parameters_equals_a_loop():
    """The convolutions under vmap over examples, within one over tasks."""
    generator, discriminator = Generator(SMALL, num_filters=8), Discriminator(num_filters=4)

    def generate(params, batch, keys):
        return generator.apply(params, jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys))

    def task(seed):
        key = jax.random.key(seed)
        images = jax.random.normal(key, (2, *SMALL))
        return GANParams(
            jax.jit(generator.init)(key, jnp.zeros((1, 3))),
            jax.jit(discriminator.init)(key, images),
        ), images

    field = gan_gradients(
        generate,
        discriminator.apply,
        losses=HINGE,
        penalty=lambda score, real, fake, key: r1_penalty(score, real),
    )
    tasks = [task(seed) for seed in range(2)]
    keys = jax.random.split(KEY, 2)
    together = jax.jit(jax.vmap(field))(*jax.tree.map(lambda *x: jnp.stack(x), *tasks), keys)
    one = jax.jit(field)
    alone = [one(*t, key) for t, key in zip(tasks, keys, strict=True)]
    chex.assert_trees_all_close(
        together, jax.tree.map(lambda *x: jnp.stack(x), *alone), rtol=1e-3, atol=1e-4
    )


def test_says_what_is_needed():
    with pytest.raises(UserError, match="num_filters is 12; give a multiple of 8"):
        Generator(SMALL, num_filters=12).init(KEY, jnp.zeros((1, 3)))
    with pytest.raises(UserError, match="num_classes is 2 and there are no labels; give them"):
        Discriminator(num_classes=2).init(KEY, jnp.zeros((1, *SMALL)))
    with pytest.raises(UserError, match="there are labels and num_classes is None; give the"):
        Discriminator().init(KEY, jnp.zeros((1, *SMALL)), jnp.zeros(1, int))
