"""What generated examples are good for: a classifier of few examples, with and without them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from metagen_jax.errors import UserError
from metagen_jax.types import Batch, Params, PredictFn, PRNGKey

Draw = Callable[[Params, Array, PRNGKey], Array]
"""`draw(params, examples of one class, keys) -> a new example of it for each key`."""


def with_generated_examples(
    predict: PredictFn, draw: Draw, *, num_ways: int, num_samples: int
) -> PredictFn:
    """`predict` from a support set to which new examples of each of its classes are added.

    With the same key and episodes as `predict` alone in `evaluate_few_shot`, the difference in
    accuracy is what the generated examples are worth to that classifier.

    Args:
      predict: `(params, (inputs, labels), inputs, key) -> logits`, such as `maml_predict` of a net
        that starts anew.
      draw: new examples of a class, given its support examples; it adapts to these once.
      num_ways: classes N. Support examples stand class by class, as many of each, labelled 0..N-1,
        as `sample_episode` gives them.
      num_samples: new examples of each class.

    Returns:
      `predict((params, params of draw), support, inputs, key)`.

    Raises:
      UserError: from the prediction, if the support examples are not a multiple of the classes.
    """

    def predict_with_more(
        params: tuple[Params, Params], support: Batch, inputs: PyTree, key: PRNGKey
    ) -> PyTree:
        classifier, generator = params
        examples, labels = support
        if len(labels) % num_ways or not len(labels):
            raise UserError(
                f"there are {len(labels)} support examples of {num_ways} classes; give as many of "
                "each, class by class"
            )
        predict_key, draw_key = jax.random.split(key)
        keys = jax.random.split(draw_key, (num_ways, num_samples))

        def new_examples(of_class: tuple[Array, Array]) -> Array:
            return draw(generator, *of_class)

        by_class = examples.reshape(num_ways, -1, *examples.shape[1:])
        drawn = jax.lax.map(new_examples, (by_class, keys)).reshape(-1, *examples.shape[1:])
        more = jnp.concatenate([examples, drawn.astype(examples.dtype)])
        new_labels = jnp.repeat(jnp.arange(num_ways, dtype=labels.dtype), num_samples)
        more_labels = jnp.concatenate([labels, new_labels])
        return predict(classifier, (more, more_labels), inputs, predict_key)

    return predict_with_more
