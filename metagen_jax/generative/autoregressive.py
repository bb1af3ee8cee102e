"""Autoregressive models of ONE example: log-probability, and samplers that all draw the same.

A model is a function from an example to the parameters of each element's distribution given the
elements before it. Sampling undoes that one element at a time, unless less is enough. An element is
what is drawn at once: a number, or a pixel with all its channels.

- Element `i`, counted in the order of reading, is drawn with `fold_in(key, i)` by every sampler.
  So they give the same sample, but where two of them round an element's parameters apart and its
  noise lies between the two, a chance of about 1e-7 in float32.
- `keep` tells which elements of `start` are given: none to draw from nothing, some to complete or
  restore. Its shape is how many elements there are, `(h, w)` for the pixels of `(h, w, c)`. Given
  elements are what the model sees from there on; elements before them do not know of them.
- Conditions are bound in `predict`.

Song, Meng, Liao, Ermon: Accelerating Feedforward Computation via Parallel Nonlinear Equation
Solving, 2021.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num, PyTree

from metagen_jax.errors import UserError
from metagen_jax.generative.maximum_likelihood import LogProb
from metagen_jax.gradients import task_keys
from metagen_jax.nets.causal import scale_levels
from metagen_jax.nets.pixelcnn import PixelCNN
from metagen_jax.types import AnyArray, Params, PRNGKey

Predict = Callable[[Array], Array]
"""`predict(x) -> outputs` of ONE example, `(*elements, *event)` to `(*elements, ...)`: of each
element what its distribution is made of, which depends on none but the elements before it."""

SampleElement = Callable[[PRNGKey, Array], Array]
"""`sample_element(key, outputs) -> value` of ONE element, such as `sample_bernoulli`."""

Remember = Callable[[Any, Array, Array], tuple[Any, Array]]
"""`remember(memory, index, previous) -> (memory, outputs)` of element `index`, whose outputs are
those of `predict`: the memory holds what matters of the elements before the previous one."""


class FixedPoint(NamedTuple):
    """A sample, and how many passes of the net it took."""

    sample: Num[Array, "*shape"]
    num_passes: Int[Array, ""]


def autoregressive_log_prob(
    apply: Callable[..., Array], element_log_prob: Callable[[Any, Array], Array]
) -> LogProb:
    """`log p(x | c) = sum_i log p(x_i | x_1, ..., x_{i-1}, c)`, exact.

    Args:
      apply: `(params, x) -> outputs`, or `(params, x, condition) -> outputs`.
      element_log_prob: `(x, outputs) -> nats` of all elements, of any shape, such as
        `bernoulli_log_prob`; 0 for elements that are padding, of which x may tell.

    Returns:
      `log_prob(params, example, key) -> nats`, ready for `negative_log_likelihood_loss`; an
      example is `x`, or a tuple `(x, condition)`. The key is not used.
    """

    def log_prob(params: Params, example: Any, key: PRNGKey) -> Float[Array, ""]:
        value, *condition = example if isinstance(example, tuple) else (example,)
        return element_log_prob(value, apply(params, value, *condition)).sum()

    return log_prob


def sample_in_order(
    key: PRNGKey,
    predict: Predict,
    sample_element: SampleElement,
    start: Num[AnyArray, "*shape"],
    keep: Bool[AnyArray, "*elements"],
) -> Num[Array, "*shape"]:
    """One element after the other, each by a pass of the whole net.

    Args:
      key: element `i` has `fold_in(key, i)`.
      predict: whose elements depend on those before in the order of reading. For a model of another
        order take `sample_fixed_point`, which needs none.
      sample_element: draws one element.
      start: `(*elements, *event)`, the given elements, and anything elsewhere; its dtype is the
        sample's.
      keep: `(*elements)`, which ones are given.

    Returns:
      The sample, of the shape of `start`.

    Raises:
      UserError: if `start` doesn't begin with the shape of `keep`, or a drawn element has another
        shape than one of `start`.
    """
    update = _updates(key, sample_element, start, keep)

    def step(value: Array, index: Array) -> tuple[Array, None]:
        drawn = update(index, predict(value))
        return _flat(value, keep).at[index].set(drawn).reshape(value.shape), None

    value, _ = jax.lax.scan(step, jnp.asarray(start), jnp.arange(keep.size))
    return value


def sample_fixed_point(
    key: PRNGKey,
    predict: Predict,
    sample_element: SampleElement,
    start: Num[AnyArray, "*shape"],
    keep: Bool[AnyArray, "*elements"],
) -> FixedPoint:
    """All elements at once, until nothing changes: Jacobi's iteration, exact.

    `x^{k+1}_i = draw_i(predict(x^k)_i)` with noise that is fixed: Song et al. 2021.
    After pass k the first k elements are final, whatever the order in which they depend on one
    another; often many more are. As many passes as there are elements are enough, and the
    iteration ends after the first that changes nothing.

    Args:
      key, predict, sample_element, keep: as in `sample_in_order`, but any order will do.
      start: as there; what stands elsewhere is the first guess.

    Returns:
      The sample and the number of passes. Under vmap all go on until the last one ends.

    Raises:
      UserError: as `sample_in_order`.
    """
    update = _updates(key, sample_element, start, keep)
    start = jnp.asarray(start)
    indices = jnp.arange(keep.size)

    def again(state: tuple[Array, Array, Array]) -> Array:
        return state[2] & (state[1] < keep.size)

    def step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        value, passes, _ = state
        drawn = jax.vmap(update, (0, None))(indices, predict(value)).reshape(start.shape)
        return drawn, passes + 1, jnp.any(drawn != value)

    value, passes, _ = jax.lax.while_loop(again, step, (start, jnp.int32(0), jnp.bool(True)))
    return FixedPoint(value, passes)


def _updates(key: PRNGKey, sample_element: SampleElement, start, keep) -> Callable:
    """`(index, outputs) -> element`: the given one, or a draw from its entry of all outputs."""
    _check_keep(start, keep)
    given, kept = _flat(jnp.asarray(start), keep), jnp.asarray(keep).ravel()

    def update(index: Array, outputs: Array) -> Array:
        drawn = sample_element(jax.random.fold_in(key, index), _flat(outputs, keep)[index])
        return _chosen(kept[index], given[index], drawn)

    return update


def _check_keep(start, keep) -> None:
    if start.shape[: keep.ndim] != keep.shape:
        raise UserError(
            f"keep has shape {keep.shape} for values of shape {start.shape}; give one truth value "
            "for each element, in the leading axes"
        )


def _flat(x: Array, keep) -> Array:
    return x.reshape(keep.size, *x.shape[keep.ndim :])


def _chosen(keep: Array, given: Array, drawn: Array) -> Array:
    if drawn.shape != given.shape:
        raise UserError(
            f"a drawn element has shape {drawn.shape} and one of the values {given.shape}; let "
            "sample_element give the latter"
        )
    return jnp.where(keep, given, drawn.astype(given.dtype))


def sample_remembering(
    key: PRNGKey,
    remember: Remember,
    memory: PyTree,
    sample_element: SampleElement,
    start: Num[AnyArray, "t *event"],
    keep: Bool[AnyArray, " t"],
) -> Num[Array, "t *event"]:
    """`sample_in_order` of a model that computes each element's outputs from a memory.

    Args:
      key: element `i` has `fold_in(key, i)`.
      remember: from one element to the next, such as `metagen_jax.generative.sequences` has them.
      memory: before the first element; any pytree of arrays.
      sample_element: draws one element.
      start: `(t, *event)`, the given elements, and anything elsewhere; its dtype is the sample's.
      keep: `(t,)`, which ones are given.

    Returns:
      The sample, of the shape of `start`.

    Raises:
      UserError: if `start` doesn't begin with the shape of `keep`, or a drawn element has another
        shape than one of `start`.
    """
    _check_keep(start, keep)

    def step(state: tuple[PyTree, Array], element) -> tuple[tuple[PyTree, Array], Array]:
        memory, previous = state
        index, given, kept = element
        memory, outputs = remember(memory, index, previous)
        value = _chosen(kept, given, sample_element(jax.random.fold_in(key, index), outputs))
        return (memory, value), value

    start = jnp.asarray(start)
    elements = jnp.arange(len(start)), start, jnp.asarray(keep)
    _, values = jax.lax.scan(step, (memory, jnp.zeros_like(start[0])), elements)
    return values


def sample_pixelcnn(
    key: PRNGKey,
    net: PixelCNN,
    params: Params,
    sample_pixel: SampleElement,
    start: Num[AnyArray, "h w c"],
    keep: Bool[AnyArray, "h w"],
    *,
    condition: Float[AnyArray, " d"] | Float[AnyArray, "h w d"] | None = None,
) -> Num[Array, "h w c"]:
    """`sample_in_order` of a `PixelCNN`, of which every activation is computed once.

    The work of one pass of the net for the whole image: the vertical stack row by row, the
    horizontal one pixel by pixel, with what each layer still needs of its inputs carried along.

    Args:
      key: pixel `i`, in the order of reading, has `fold_in(key, i)`.
      net: the module.
      params: its parameters, as `net.init` gives them.
      sample_pixel: draws one pixel's channels `(c,)` of its outputs `(num_outputs,)`.
      start: `(h, w, c)`, the given pixels, and anything elsewhere; its dtype is the sample's.
      keep: `(h, w)`, which ones are given.
      condition: `(d,)`, or `(h, w, d)`, if the net has one.

    Returns:
      The sample, `(h, w, c)`.

    Raises:
      UserError: if `keep` hasn't the height and width of `start`, or a drawn pixel its channels.
    """
    if keep.shape != start.shape[:2]:
        raise UserError(
            f"keep has shape {keep.shape} for an image of shape {start.shape}; give "
            f"{start.shape[:2]}"
        )

    def apply(method: str, *inputs) -> Any:
        return net.apply(params, *inputs, method=method)

    def draw_pixel(left: list[Array], pixel) -> tuple[list[Array], Array]:
        told, key, given, keep = pixel
        seen, outputs = apply("next_pixel", left, told)
        value = _chosen(keep, given, sample_pixel(key, outputs))
        return _pushed(left, [scale_levels(value, net.num_levels)[None], *seen]), value

    def draw_row(above: list[Array], row) -> tuple[list[Array], Array]:
        condition, *pixels = row
        seen, told = apply("next_row", above, condition)
        left = [jnp.zeros_like(rows[:, 0]) for rows in above]
        _, values = jax.lax.scan(draw_pixel, left, (told, *pixels))
        return _pushed(above, [scale_levels(values, net.num_levels)[None], *seen]), values

    keys = task_keys(key, math.prod(keep.shape)).reshape(keep.shape)
    height, width, channels = start.shape
    if condition is not None and condition.ndim == 1:
        condition = jnp.broadcast_to(condition, (height, 1, len(condition)))
    blank = net.blank_rows(width, channels, jnp.result_type(*jax.tree.leaves(params)))
    rows = condition, keys, jnp.asarray(start), jnp.asarray(keep)
    _, values = jax.lax.scan(draw_row, blank, rows)
    return values


def _pushed(buffers: list[Array], entries: list[Array]) -> list[Array]:
    """Buffers without their first entry, and with a new last one."""
    return [
        jnp.concatenate([buffer[1:], entry.astype(buffer.dtype)])
        for buffer, entry in zip(buffers, entries, strict=True)
    ]
