"""Masked language modelling: a net finds the tokens that are hidden from it, by both sides.

    loss_fn = masked_language_model_loss(net.apply, mask=MASK, special=SPECIAL, vocab_size=2000)

Devlin, Chang, Lee, Toutanova: BERT: Pre-training of Deep Bidirectional Transformers for Language
Understanding, 2019. Whole words: its authors' release of May 2019.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from metagen_jax.counted import counted_mean
from metagen_jax.errors import UserError
from metagen_jax.gradients import task_keys
from metagen_jax.types import AnyArray, Batch, LossFn, Metrics, Params, PRNGKey

Apply = Callable[[Params, Array, Array], Any]
"""`apply(params, tokens (n, t), documents (n, t)) -> logits (n, t, vocab)`, such as that of
`metagen_jax.nets.transformer.Transformer`."""


class Masked(NamedTuple):
    """What a net is shown of tokens, and which of them it is to find."""

    inputs: Int[Array, "*shape"]
    chosen: Bool[Array, "*shape"]


def mask_tokens(
    key: PRNGKey,
    tokens: Int[AnyArray, " t"],
    *,
    mask: int,
    special: Sequence[int],
    vocab_size: int,
    share: float = 0.15,
    kinds: tuple[float, float] = (0.8, 0.1),
    begins_word: Bool[AnyArray, " t"] | None = None,
) -> Masked:
    """Chooses tokens of ONE row, and hides most of them: section 3.1 of Devlin et al. 2019.

    Each token is chosen with probability `share`, special ones never. Of those chosen 80 % become
    the mask, 10 % any token that is not special, and 10 % stay as they are.

    Args:
      key: a typed key.
      tokens: `(t,)`.
      mask: the token that hides others.
      special: tokens that are never chosen and never put in: padding, the mask and the like.
      vocab_size: tokens are 0..vocab_size-1.
      share: the probability.
      kinds: the shares of the chosen that are masked and that are replaced; (1, 0) masks all.
      begins_word: `(t,)`, whether each token is the first of a word. If given, all tokens of a word
        are chosen or none is.

    Raises:
      UserError: for shares without sense, or if all tokens are special.
    """
    if not (0 <= share <= 1 and min(kinds) >= 0 and sum(kinds) <= 1):
        raise UserError(
            f"share is {share} and kinds {kinds}; give shares from 0 to 1, those of kinds at most "
            "1 together"
        )
    ordinary = np.setdiff1d(np.arange(vocab_size), special)
    if not len(ordinary):
        raise UserError(f"all {vocab_size} tokens are special; give some that are not")
    tokens = jnp.asarray(tokens)
    choice_key, kind_key, other_key = jax.random.split(key, 3)
    drawn = jax.random.uniform(choice_key, tokens.shape)
    if begins_word is not None:
        drawn = drawn[jnp.maximum(jnp.cumsum(jnp.asarray(begins_word)) - 1, 0)]
    chosen = (drawn < share) & ~jnp.isin(tokens, jnp.asarray(special))
    kind = jax.random.uniform(kind_key, tokens.shape)
    index = jax.random.randint(other_key, tokens.shape, 0, len(ordinary))
    others = jnp.asarray(ordinary, tokens.dtype)[index]
    replaced = jnp.where(kind < kinds[0] + kinds[1], others, tokens)
    hidden = jnp.where(kind < kinds[0], jnp.asarray(mask, tokens.dtype), replaced)
    return Masked(jnp.where(chosen, hidden, tokens), chosen)


def masked_language_model_loss(
    apply: Apply,
    *,
    mask: int,
    special: Sequence[int],
    vocab_size: int,
    share: float = 0.15,
    whole_words: bool = False,
    axis_name: str | None = None,
) -> LossFn:
    """The mean over chosen tokens of `-log p(token | what is shown)`, in nats.

    A batch without a chosen token has the loss 0.

    Args:
      apply: the net, which sees both sides.
      mask, special, vocab_size, share: as in `mask_tokens`.
      whole_words: whether the tokens of a word are chosen together.
      axis_name: of the devices over which the mean goes, see `counted_mean`; for chunks see
        `weighted_by_count`.

    Returns:
      A loss over rows `(tokens, documents, begins_word, ...)`, each `(n, t)`, or `(t,)` for one
      row, such as `metagen_jax.data.text.pack` makes. Its key may be one key, of which row `i` of
      several gets `fold_in(key, i)`, or one for each row. Metrics: `accuracy` on the chosen tokens,
      and `count`, how many they are (the mean over devices). It raises a UserError for logits of
      another shape.
    """
    hide = functools.partial(
        mask_tokens, mask=mask, special=special, vocab_size=vocab_size, share=share
    )

    def loss_fn(params: Params, batch: Batch, key: Key[Array, "..."]) -> tuple[Array, Metrics]:
        tokens, documents, begins = (jnp.asarray(x) for x in batch[:3])
        if tokens.ndim == 1:
            tokens, documents, begins, key = (x[None] for x in (tokens, documents, begins, key))
        keys = task_keys(key, len(tokens)) if key.ndim == 0 else key
        masked = jax.vmap(lambda k, x, b: hide(k, x, begins_word=b if whole_words else None))(
            keys, tokens, begins
        )
        chosen = masked.chosen & (documents != 0)
        logits = apply(params, masked.inputs, documents)
        losses, right = token_losses(logits, tokens)
        mean = functools.partial(counted_mean, counted=chosen, axis_name=axis_name)
        metrics = {"accuracy": mean(right), "count": chosen.sum().astype(losses.dtype)}
        return mean(losses), metrics

    return loss_fn


def token_losses(
    logits: Float[Array, "*of_logits"], tokens: Int[AnyArray, "*shape"]
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """Of each token `-log softmax(logits)[token]` in nats, and 1 if it has the largest logit.

    Raises:
      UserError: for logits of another shape.
    """
    if logits.shape[:-1] != tokens.shape:
        raise UserError(
            f"logits have shape {logits.shape} for tokens of shape {tokens.shape}; give one vector "
            "for each token"
        )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(tokens))
    return losses, (logits.argmax(-1) == tokens).astype(losses.dtype)
