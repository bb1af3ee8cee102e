"""Samplers of sequences that compute every activation once, and how boldly they draw.

Each is `sample_in_order` of its net, by a memory of what is still needed of the past: the same
sample for the same key.

Holtzman, Buys, Du, Forbes, Choi: The Curious Case of Neural Text Degeneration, 2020.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from metagen_jax.errors import UserError
from metagen_jax.generative.autoregressive import SampleElement, sample_remembering
from metagen_jax.nets.transformer import Transformer
from metagen_jax.nets.wavenet import Cache, WaveNet
from metagen_jax.types import AnyArray, Params, PRNGKey


def sample_wavenet(
    key: PRNGKey,
    net: WaveNet,
    params: Params,
    sample_element: SampleElement,
    start: Num[AnyArray, " t"],
    keep: Bool[AnyArray, " t"],
    *,
    condition: Float[AnyArray, " d"] | None = None,
) -> Num[Array, " t"]:
    """`sample_in_order` of a `WaveNet`, in the work of one pass over the sequence.

    Args:
      key: sample `i` has `fold_in(key, i)`.
      net: the module.
      params: its parameters, as `net.init` gives them.
      sample_element: draws one code of its outputs `(num_outputs,)`.
      start: `(t,)`, the given codes, and anything elsewhere; its dtype is the sample's.
      keep: `(t,)`, which ones are given.
      condition: `(d,)`, if the net has one.

    Returns:
      The codes, `(t,)`.

    Raises:
      UserError: if `keep` hasn't the shape of `start`, or a drawn code is no single number.
    """

    def remember(cache: Cache, index: Array, previous: Array) -> Any:
        return net.apply(params, cache, index, previous, condition, method="next_sample")

    cache = net.blank_cache(jnp.result_type(*jax.tree.leaves(params)))
    return sample_remembering(key, remember, cache, sample_element, start, keep)


def sample_transformer(
    key: PRNGKey,
    net: Transformer,
    params: Params,
    sample_element: SampleElement,
    start: Int[AnyArray, " t"],
    keep: Bool[AnyArray, " t"],
) -> Int[Array, " t"]:
    """`sample_in_order` of one document by a causal `Transformer`, whose keys and values are kept.

    Args:
      key: token `i` has `fold_in(key, i)`.
      net: the module; a document has at most its `max_length` tokens.
      params: its parameters, as `net.init` gives them.
      sample_element: draws one token of its logits `(vocab_size,)`.
      start: `(t,)`, the given tokens, such as a prompt, and anything elsewhere; its dtype is the
        sample's.
      keep: `(t,)`, which ones are given.

    Returns:
      The tokens, `(t,)`. Where a document should end, what comes after its end is no part of it.

    Raises:
      UserError: for more tokens than `max_length`, a net that is not causal, a `keep` of another
        shape than `start`, or a drawn token that is no single number.
    """
    if len(start) > net.max_length:
        raise UserError(
            f"start has {len(start)} tokens and max_length is {net.max_length}; give fewer"
        )

    def remember(cache: Any, index: Array, previous: Array) -> Any:
        return net.apply(params, cache, index, previous, method="next_token")

    cache = net.blank_cache(jnp.result_type(*jax.tree.leaves(params)))
    return sample_remembering(key, remember, cache, sample_element, start, keep)


def nucleus(logits: Float[Array, "*shape classes"], top_p: float) -> Float[Array, "*shape classes"]:
    """The logits of the fewest classes that together have probability `top_p`; `-inf` elsewhere.

    The most probable classes, until their sum reaches `top_p`, the last of them included: section
    3.1 of Holtzman et al. 2020. Of equally probable ones the first come first.

    Args:
      logits: `(*shape, classes)`.
      top_p: over 0; with 1 all classes stay.

    Raises:
      UserError: for a `top_p` that is no probability, or 0.
    """
    if not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}; give a probability over 0, or 1 to keep all classes")
    if top_p == 1:
        return logits
    order = jnp.argsort(-logits, axis=-1)
    probabilities = jnp.take_along_axis(jax.nn.softmax(logits), order, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    rank = jnp.argsort(order, axis=-1)
    return jnp.where(jnp.take_along_axis(before < top_p, rank, axis=-1), logits, -jnp.inf)


def draw_categorical(*, temperature: float = 1.0, top_p: float = 1.0) -> SampleElement:
    """How a class is drawn of its logits: `softmax(logits / temperature)`, cut to its nucleus.

    Args:
      temperature: 1 draws what the model says, less what it deems likelier, 0 its first choice.
      top_p: see `nucleus`; of what the temperature makes of the logits.

    Returns:
      `sample_element(key, logits (classes,)) -> class`, int32.

    Raises:
      UserError: for a negative temperature, or a `top_p` that is no probability or 0.
    """
    if not temperature >= 0:
        raise UserError(f"temperature is {temperature}; give 0 or more")
    nucleus(jnp.zeros(1), top_p)

    def sample_element(key: PRNGKey, logits: Float[Array, " classes"]) -> Int[Array, ""]:
        if temperature == 0:
            return logits.argmax(-1).astype(jnp.int32)
        kept = nucleus(logits / temperature, top_p)
        return jax.random.categorical(key, kept).astype(jnp.int32)

    return sample_element
