"""A transformer over tokens, which sees both sides or only what came before.

    net = Transformer(vocab_size=2000, max_length=128, causal=True)
    logits = net.apply(params, tokens, documents, method="predict_next")

Several documents may stand in one row, see `metagen_jax.data.text`; none sees another, and each
counts its positions from 0.

Vaswani, Shazeer, Parmar, Uszkoreit, Jones, Gomez, Kaiser, Polosukhin: Attention Is All You Need,
2017. Devlin, Chang, Lee, Toutanova: BERT: Pre-training of Deep Bidirectional Transformers for
Language Understanding, 2019. Xiong et al.: On Layer Normalization in the Transformer Architecture,
2020. Press, Smith, Lewis: Train Short, Test Long: Attention with Linear Biases Enables Input Length
Extrapolation, 2022.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from metagen_jax.errors import UserError
from metagen_jax.types import AnyArray

Cache = list[tuple[Array, Array]]
"""Of one sequence: the keys and the values of each block, `(max_length, heads, width / heads)`."""


def attend(
    queries: Float[Array, "*batch q heads d"],
    keys: Float[Array, "*batch k heads d"],
    values: Float[Array, "*batch k heads d"],
    mask: Bool[Array, "*#batch q k"],
    bias: Float[Array, "heads q k"] | None = None,
) -> Float[Array, "*batch q heads d"]:
    """`softmax(Q K^T / sqrt(d) + b) V` over what the mask allows; zeros where it allows nothing.

    Equation 1 of Vaswani et al. 2017, with the bias of Press et al. 2022.

    Args:
      queries: `(*batch, q, heads, d)`.
      keys, values: `(*batch, k, heads, d)`.
      mask: `(*batch, q, k)`, which query sees which key.
      bias: `(heads, q, k)`, zeros by default; minus infinity for what a head does not see, of what
        the mask allows a query not all.
    """
    scores = jnp.einsum("...qhd,...khd->...hqk", queries, keys) / queries.shape[-1] ** 0.5
    scores = scores if bias is None else scores + bias.astype(scores.dtype)
    seen = mask[..., None, :, :]
    # A row of nothing but minus infinity would have no softmax, and no gradient either.
    scores = jnp.where(seen, scores, jnp.finfo(scores.dtype).min)
    weights = jnp.where(seen, nn.softmax(scores), 0)
    return jnp.einsum("...hqk,...khd->...qhd", weights, values)


def document_mask(documents: Int[Array, "*batch t"], *, causal: bool) -> Bool[Array, "*batch t t"]:
    """Which token sees which: those of its own document, and padding nothing.

    Args:
      documents: the number of each token's document, 0 for padding.
      causal: whether a token sees none that come later.
    """
    mask = documents[..., :, None] == documents[..., None, :]
    mask &= (documents != 0)[..., None]
    return jnp.tril(mask) if causal else mask


def distance_bias(
    num_heads: int, queries: Int[Array, " q"], keys: Int[Array, " k"], *, causal: bool
) -> Float[Array, "heads q k"]:
    """`-16^-i |q - k|`, so that heads see the nearer the more; minus infinity on their other side.

    `i` is 0, 1, ... over the heads that look back, and again over those that look ahead, half of
    all where a net is not causal. All see the token itself. After section 3 of Press et al. 2022,
    whose slopes are gentler and whose nets are causal.

    Args:
      num_heads: even, unless causal.
      queries, keys: places in the row.
      causal: whether all heads look back.
    """
    gap = queries[:, None] - keys
    backward = num_heads if causal else num_heads // 2
    slopes = 16.0 ** -jnp.arange(backward)
    falling = -slopes[:, None, None] * jnp.abs(gap)
    back, ahead = (jnp.where(side, falling, -jnp.inf) for side in (gap >= 0, gap <= 0))
    return back if causal else jnp.concatenate([back, ahead])


def positions_within(documents: Int[Array, "*batch t"]) -> Int[Array, "*batch t"]:
    """The place of each token in its document, which lies in one piece, from 0."""
    place = jnp.arange(documents.shape[-1])
    return place - jax.lax.cummax(jnp.where(begins(documents), place, 0), axis=documents.ndim - 1)


def begins(documents: Int[Array, "*batch t"]) -> Bool[Array, "*batch t"]:
    """Whether a token is the first of its document."""
    changes = documents[..., 1:] != documents[..., :-1]
    return jnp.concatenate([jnp.ones_like(documents[..., :1], bool), changes], axis=-1)


class Block(nn.Module):
    """Attention, then two dense layers, each added to what came in, and normalised.

    Attributes:
      num_heads: of the attention.
      hidden_width: units between the dense layers.
      norm: "pre" normalises what goes in, "post" what comes out.
      epsilon: added to variances.
    """

    num_heads: int
    hidden_width: int
    norm: Literal["pre", "post"]
    epsilon: float

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*batch t width"],
        mask: Bool[Array, "*#batch t seen"],
        bias: Float[Array, "heads t seen"] | None = None,
        cache: tuple[Array, Array] | None = None,
        index: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "*batch t width"], tuple[Array, Array]]:
        """The tokens after the block, and the keys and values that the attention has seen.

        With a `cache` of earlier keys and values those of `x`, one token, are put in at `index`.
        """
        width = x.shape[-1]
        layer_norm = functools.partial(nn.LayerNorm, self.epsilon, use_fast_variance=False)
        attention_norm = layer_norm(name="attention_norm")
        dense_norm = layer_norm(name="dense_norm")
        pre = self.norm == "pre"
        normed = attention_norm(x) if pre else x
        query, *new = (
            nn.Dense(width, name=name)(normed).reshape(*x.shape[:-1], self.num_heads, -1)
            for name in ("query", "key", "value")
        )
        if cache is not None:
            put = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=-3)
            new = [put(old, entry, index) for old, entry in zip(cache, new, strict=True)]
        keys, values = new
        attended = attend(query, keys, values, mask, bias)
        x = x + nn.Dense(width, name="out")(attended.reshape(x.shape))
        x = x if pre else attention_norm(x)
        hidden = nn.Dense(self.hidden_width, name="dense0")(dense_norm(x) if pre else x)
        x = x + nn.Dense(width, name="dense1")(nn.gelu(hidden, approximate=False))
        return x if pre else dense_norm(x), (keys, values)


class Transformer(nn.Module):
    """A transformer over tokens, with the head of BERT for the words that stand somewhere.

    `x_0 = tokens + positions + types`, then blocks, then logits
    `E norm(gelu(W x + b)) + c` with the tokens' embeddings E: Devlin et al. 2019.

    Attributes:
      vocab_size: tokens 0..vocab_size-1.
      max_length: tokens of the longest document, and of a row that is sampled.
      width: features of a token, a multiple of the heads.
      depth: blocks.
      num_heads: of every attention.
      hidden_width: units between the dense layers of a block.
      causal: whether a token sees none that come later.
      norm: "pre" normalises what goes into each part of a block, and what comes out of the last
        one; "post" the embeddings and what comes out of each part, as BERT does. The first learns
        at high rates without a warm-up (Xiong et al. 2020).
      by_distance: whether what is near is seen the more from the start, by `distance_bias`: a net
        of little text learns sooner what neighbours tell (dialogues, 250 steps of
        `experiments.text_generation`: 3.95 nats a token against 4.35). A BERT has none.
      num_types: kinds of tokens, such as those of a first and a second sentence.
      begin: the token that stands before the first one of a document for `predict_next`.
      epsilon: added to variances.
    """

    vocab_size: int
    max_length: int
    width: int = 128
    depth: int = 4
    num_heads: int = 4
    hidden_width: int = 512
    causal: bool = False
    norm: Literal["pre", "post"] = "pre"
    by_distance: bool = False
    num_types: int = 1
    begin: int = 0
    epsilon: float = 1e-6

    def setup(self):
        self._check()
        embed = functools.partial(
            nn.Embed, features=self.width, embedding_init=nn.initializers.normal(0.02)
        )
        layer_norm = functools.partial(nn.LayerNorm, self.epsilon, use_fast_variance=False)
        self.tokens = embed(self.vocab_size)
        self.positions = embed(self.max_length)
        self.types = embed(self.num_types)
        # Of the embeddings where each block normalises its outputs, otherwise of the last outputs.
        self.outer_norm = layer_norm()
        self.blocks = [
            Block(self.num_heads, self.hidden_width, self.norm, self.epsilon)
            for _ in range(self.depth)
        ]
        self.head_dense = nn.Dense(self.width)
        self.head_norm = layer_norm()
        self.head_bias = self.param(
            "head_bias", nn.initializers.zeros, (self.vocab_size,), jnp.float32
        )

    def _check(self) -> None:
        if self.width % self.num_heads:
            raise UserError(
                f"width is {self.width} for {self.num_heads} heads; give a multiple of num_heads"
            )
        if self.by_distance and not self.causal and self.num_heads % 2:
            raise UserError(
                f"num_heads is {self.num_heads}; by_distance half of the heads look back and half "
                "ahead: give an even number"
            )
        if self.norm not in ("pre", "post"):
            raise UserError(f'norm is {self.norm!r}; give "pre" or "post"')
        if not 0 <= self.begin < self.vocab_size:
            raise UserError(
                f"begin is {self.begin}; give a token, 0 to {self.vocab_size - 1}, that no "
                "document has"
            )

    def __call__(
        self,
        tokens: Int[AnyArray, "*batch t"],
        documents: Int[AnyArray, "*batch t"] | None = None,
        types: Int[AnyArray, "*batch t"] | None = None,
    ) -> Float[Array, "*batch t vocab"]:
        """`logits` of what `encode` makes of the tokens."""
        return self.logits(self.encode(tokens, documents, types))

    def encode(
        self,
        tokens: Int[AnyArray, "*batch t"],
        documents: Int[AnyArray, "*batch t"] | None = None,
        types: Int[AnyArray, "*batch t"] | None = None,
    ) -> Float[Array, "*batch t width"]:
        """The features of each token among those of its document that it sees.

        Args:
          tokens: `(*batch, t)`.
          documents: `(*batch, t)`, the number of each token's document, each in one piece, and 0
            for padding, which sees nothing and is not seen; by default one document a row.
          types: `(*batch, t)`, the kind of each token; by default all are of kind 0.

        Returns:
          `(*batch, t, width)`.

        Raises:
          UserError: for a row longer than `max_length` without `documents`, a width that is no
            multiple of the heads, an unknown `norm`, or a `begin` that is no token.
        """
        tokens = jnp.asarray(tokens)
        if documents is None:
            if tokens.shape[-1] > self.max_length:
                raise UserError(
                    f"a row has {tokens.shape[-1]} tokens and max_length is {self.max_length}; "
                    "give shorter ones, or documents"
                )
            documents = jnp.ones_like(tokens)
        documents = jnp.asarray(documents)
        types = jnp.zeros_like(tokens) if types is None else jnp.asarray(types)
        x = self._embed(tokens, positions_within(documents), types)
        mask = document_mask(documents, causal=self.causal)
        place = jnp.arange(tokens.shape[-1])
        bias = self._bias(place, place)
        for block in self.blocks:
            x, _ = block(x, mask, bias)
        return self.outer_norm(x) if self.norm == "pre" else x

    def _bias(self, queries: Array, keys: Array) -> Array | None:
        if not self.by_distance:
            return None
        return distance_bias(self.num_heads, queries, keys, causal=self.causal)

    def _embed(self, tokens: Array, positions: Array, types: Array) -> Array:
        # What lies beyond a table would be NaN; rows of padding may be longer than it.
        x = self.tokens(tokens) + self.positions(jnp.minimum(positions, self.max_length - 1))
        x = x + self.types(types)
        return self.outer_norm(x) if self.norm == "post" else x

    def logits(self, features: Float[Array, "*shape width"]) -> Float[Array, "*shape vocab"]:
        """The logits of all tokens, from features of `encode`."""
        hidden = nn.gelu(self.head_dense(features), approximate=False)
        return self.tokens.attend(self.head_norm(hidden)) + self.head_bias

    def predict_next(
        self,
        tokens: Int[AnyArray, "*batch t"],
        documents: Int[AnyArray, "*batch t"] | None = None,
    ) -> Float[Array, "*batch t vocab"]:
        """The logits of each token given those before it in its document; of a causal net.

        Args:
          tokens: `(*batch, t)`.
          documents: as in `encode`.

        Raises:
          UserError: of a net that is not causal, and as `encode`.
        """
        self._check_causal()
        tokens = jnp.asarray(tokens)
        documents = jnp.ones_like(tokens) if documents is None else jnp.asarray(documents)
        previous = jnp.roll(tokens, 1, axis=-1)
        return self(jnp.where(begins(documents), self.begin, previous), documents)

    def _check_causal(self) -> None:
        if not self.causal:
            raise UserError("a net that sees later tokens predicts none of them; give causal=True")

    def blank_cache(self, dtype: jnp.dtype) -> Cache:
        """What `next_token` takes for the first one."""
        shape = self.max_length, self.num_heads, self.width // self.num_heads
        return [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(self.depth)]

    def next_token(
        self, cache: Cache, index: Int[Array, ""], previous: Int[Array, ""]
    ) -> tuple[Cache, Float[Array, " vocab"]]:
        """The logits that `predict_next` gives for token `index` of one document.

        Args:
          cache: after the token before, or `blank_cache`.
          index: 0, 1, 2, ..., max_length - 1 in turn.
          previous: the token at `index - 1`; for the first anything.

        Returns:
          The cache for the next one, and the logits.

        Raises:
          UserError: of a net that is not causal.
        """
        self._check_causal()
        token = jnp.where(index > 0, previous, self.begin)[None]
        x = self._embed(token, index[None], jnp.zeros_like(token))
        place = jnp.arange(self.max_length)
        mask, bias = (place <= index)[None], self._bias(index[None], place)
        kept = []
        for block, old in zip(self.blocks, cache, strict=True):
            x, new = block(x, mask, bias, old, index)
            kept.append(new)
        return kept, self.logits(self.outer_norm(x) if self.norm == "pre" else x)[0]
