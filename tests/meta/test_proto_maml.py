"""Proto-MAML against a plain loop, and its two ends: ProtoNet and MAML."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references

from metagen_jax.errors import UserError
from metagen_jax.meta.metric import prototypical_logits
from metagen_jax.meta.proto_maml import proto_maml_loss, proto_maml_predict
from metagen_jax.nets.conv4 import BatchNorm
from metagen_jax.types import Episode

RATE, WAYS, FEATURES = 0.1, 3, 4
KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def assert_close(actual, expected, rtol=1e-10, atol=1e-11):
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=atol)


def features(params, inputs):
    """Smooth, so that finite differences mean something."""
    return jnp.tanh(inputs @ params["kernel"] + params["bias"])


def normalised(params, inputs, num_reference=None):
    norm = {"scale": jnp.ones(FEATURES), "bias": jnp.zeros(FEATURES)}
    return BatchNorm().apply({"params": norm}, features(params, inputs), num_reference)


def example(seed=0):
    """Parameters and an episode with classes of unequal size."""
    rng = np.random.default_rng(seed)
    params = {"kernel": rng.normal(size=(2, FEATURES)), "bias": rng.normal(size=FEATURES)}
    labels, targets = np.array([2, 0, 1, 1, 0, 1]), np.array([1, 0, 2, 2])
    task = Episode((rng.normal(size=(6, 2)), labels), (rng.normal(size=(4, 2)), targets))
    return jax.tree.map(jnp.asarray, (params, task))


def options(num_steps, num_ways=WAYS, **others):
    return {
        "num_ways": num_ways,
        "inner_optimizer": optax.sgd(RATE),
        "num_steps": num_steps,
        **others,
    }


def logits_of(classifier, inputs, features=features):
    return features(classifier["body"], inputs) @ classifier["kernel"] + classifier["bias"]


def cross_entropy(classifier, batch, features=features):
    inputs, labels = batch
    log_probs = jax.nn.log_softmax(logits_of(classifier, inputs, features))
    return -jnp.mean(jnp.stack([log_probs[i, label] for i, label in enumerate(labels)]))


def from_prototypes(params, support, features=features):
    inputs, labels = support
    embedded = features(params, inputs)
    centres = jnp.stack([embedded[np.asarray(labels) == k].mean(0) for k in range(WAYS)])
    return {"body": params, "kernel": 2 * centres.T, "bias": -jnp.sum(centres**2, axis=1)}


def path_of(params, support, num_steps, features=features):
    """The classifiers before the first and after each step."""

    @jax.jit
    def path(params):
        return references.gradient_descent(
            lambda classifier, batch: cross_entropy(classifier, batch, features),
            from_prototypes(params, support, features),
            support,
            rate=RATE,
            num_steps=num_steps,
        )

    return path(params)


@pytest.mark.parametrize(
    ("num_steps", "gradient"), [(0, "reverse"), (1, "remat"), (3, "reverse"), (3, "mixed")]
)
def test_meta_gradient_equals_a_plain_loop_and_finite_differences(num_steps, gradient):
    params, task = example()
    loss_fn = proto_maml_loss(features, **options(num_steps, gradient=gradient))
    (loss, metrics), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params, task, KEY)

    def loop(params):
        return cross_entropy(path_of(params, task.support, num_steps)[-1], task.query)

    assert_close((loss, grads), jax.jit(jax.value_and_grad(loop))(params))
    value = jax.jit(lambda params: loss_fn(params, task, KEY)[0])
    numerical = references.finite_differences(value, params)
    assert_close(grads, numerical, rtol=1e-7, atol=1e-9)
    logits = logits_of(path_of(params, task.support, num_steps)[-1], task.query[0])
    assert_close(metrics, {"accuracy": (logits.argmax(1) == task.query[1]).mean()})


def test_to_first_order_the_outer_gradient_still_passes_the_prototypes():
    """`d theta_K / d theta_0` is taken for the identity, theta_0's head is still the features'."""
    params, task = example()
    loss_fn = proto_maml_loss(features, **options(2, gradient="first_order"))
    grads, _ = jax.jit(jax.grad(loss_fn, has_aux=True))(params, task, KEY)
    at_end = path_of(params, task.support, 2)[-1]

    @jax.jit
    def loop(params):
        at_end_slope = jax.grad(cross_entropy)(at_end, task.query)
        _, through_start = jax.vjp(lambda p: from_prototypes(p, task.support), params)
        return through_start(at_end_slope)[0], at_end_slope["body"]

    expected, of_the_body = loop(params)
    assert_close(grads, expected)
    assert jnp.abs(grads["kernel"] - of_the_body["kernel"]).max() > 1e-2


def test_without_steps_it_is_the_prototypical_classifier_also_of_classes_without_support():
    params, task = example()
    inputs = task.query[0]
    predict = proto_maml_predict(features, **options(0, num_ways=5))
    logits = predict(params, task.support, inputs, KEY)
    expected = prototypical_logits(
        features(params, task.support[0]), task.support[1], features(params, inputs), num_ways=5
    )
    assert_close(jax.nn.softmax(logits), jax.nn.softmax(expected))
    assert (logits[:, 3:] == -jnp.inf).all()
    loss, _ = proto_maml_loss(features, **options(0, num_ways=5))(params, task, KEY)
    assert_close(loss, -jax.nn.log_softmax(expected)[jnp.arange(4), task.query[1]].mean())


@pytest.mark.parametrize("optimizer", [optax.sgd(RATE), optax.adamw(RATE, eps_root=1e-8)])
def test_classes_without_support_change_neither_answers_nor_gradient(optimizer):
    params, task = example()

    def value_and_grad(num_ways):
        loss_fn = proto_maml_loss(
            features, num_ways=num_ways, inner_optimizer=optimizer, num_steps=2
        )
        return jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params, task, KEY)

    assert_close(value_and_grad(5), value_and_grad(WAYS))


@pytest.mark.parametrize("inductive", [False, True])
def test_predicts_at_every_step_as_a_loop_does(inductive):
    params, ((inputs, labels), (queries, _)) = example()

    def predict(num_steps, **others):
        learner = proto_maml_predict(
            normalised, **options(num_steps, inductive=inductive, **others)
        )
        return jax.jit(learner)(params, (inputs, labels), queries, KEY)

    def answer(classifier):
        if not inductive:
            return logits_of(classifier, queries, normalised)
        reference = np.asarray(features(classifier["body"], inputs))
        centred = features(classifier["body"], queries) - reference.mean(0)
        embedded = centred / np.sqrt(reference.var(0) + 1e-3)
        return embedded @ classifier["kernel"] + classifier["bias"]

    path = path_of(params, (inputs, labels), 3, normalised)
    expected = jnp.stack([answer(classifier) for classifier in path])
    assert_close(predict(3, every_step=True), expected)
    assert_close(predict(2), expected[2])


def test_only_inductive_answers_do_not_depend_on_the_other_queries():
    params, (support, (queries, _)) = example()
    for inductive in (True, False):
        predict = jax.jit(proto_maml_predict(normalised, **options(1, inductive=inductive)))
        together = predict(params, support, queries, KEY)[:2]
        difference = jnp.abs(predict(params, support, queries[:2], KEY) - together).max()
        assert (difference < 1e-12) if inductive else (difference > 1e-3)


@pytest.mark.slow
def test_jit_and_vmap_change_nothing():
    params, first = example()
    tasks = [first, example(1)[1]]
    loss_fn = proto_maml_loss(features, **options(2))
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    jitted = jax.jit(grad_fn)
    loop = [jitted(params, task, KEY) for task in tasks]
    assert_close(loss_fn(params, first, KEY), loop[0][0])
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *tasks)
    vmapped = jax.jit(jax.vmap(grad_fn, (None, 0, None)))(params, stacked, KEY)
    assert_close(vmapped, jax.tree.map(lambda *x: jnp.stack(x), *loop))


@pytest.mark.parametrize("scale", [0.0, 1e3])
def test_finite_loss_and_meta_gradient_where_features_vanish_or_are_large(scale):
    params, task = example()
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)

    def scaled(params, inputs):
        return scale * features(params, inputs.astype(jnp.float32))

    loss_fn = proto_maml_loss(scaled, **options(2))
    value, grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params, task, KEY)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((value, grads)))


def test_refuses_what_are_no_features_and_no_labels():
    params, task = example()
    (inputs, labels), query = task

    def images(params, inputs):
        return features(params, inputs).reshape(-1, 2, 2)

    with pytest.raises(UserError, match=r"shape \(6, 2, 2\); give one vector for each"):
        proto_maml_loss(images, **options(1))(params, task, KEY)
    one_hot = Episode((inputs, jax.nn.one_hot(labels, WAYS, dtype=int)), query)
    with pytest.raises(UserError, match=r"give one integer for each, shape \(6,\)"):
        proto_maml_loss(features, **options(1))(params, one_hot, KEY)
    with pytest.raises(UserError, match="num_steps is -1"):
        proto_maml_predict(features, **options(-1))(params, task.support, query[0], KEY)
