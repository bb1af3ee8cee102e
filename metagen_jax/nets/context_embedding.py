"""Full context embeddings: what Matching Networks put between embedding and attention."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from metagen_jax.errors import UserError


class FullContextEmbedding(nn.Module):
    """Embeddings of support and queries that depend on the whole support set.

    The support set is read by a bidirectional LSTM and changed by what it says,

        g_i = forward_i + backward_i + g'_i,

    appendix A.2 of Vinyals et al. 2016; each query f' by an LSTM that attends to it, K times,

        r_{k-1} = sum_i softmax_i(h_{k-1} . g_i) g_i                        (equations 5 and 6)
        h_k, c_k = LSTM(f', [h_{k-1}, r_{k-1}], c_{k-1});  h_k := h_k + f'  (equations 3 and 4)

    and its embedding is h_K. The paper leaves the start open; here h_0 = f' and c_0 = 0. The
    support set is a sequence to the LSTM: its order matters.

    Attributes:
      num_steps: processing steps K of each query.
    """

    num_steps: int = 5

    @nn.compact
    def __call__(
        self, support: Float[Array, "support features"], queries: Float[Array, "queries features"]
    ) -> tuple[Float[Array, "support features"], Float[Array, "queries features"]]:
        """Embeddings in context, each query's independent of the others.

        Args:
          support: `(support, features)`, in the order in which to read it.
          queries: `(queries, features)`.

        Returns:
          Support and queries, of the same shapes and dtypes; computed in float32 or finer.

        Raises:
          UserError: if `num_steps` is less than 1.
        """
        if self.num_steps < 1:
            raise UserError(f"num_steps is {self.num_steps}; give 1 or more processing steps")
        dtypes = support.dtype, queries.dtype
        support, queries = (
            x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (support, queries)
        )
        cell = functools.partial(nn.OptimizedLSTMCell, support.shape[-1], dtype=support.dtype)
        read = nn.Bidirectional(
            nn.RNN(cell(name="forward")), nn.RNN(cell(name="backward")), merge_fn=jnp.add
        )
        zero = jnp.zeros_like(support[0])
        blank = (zero, zero)
        _, told = read(support, initial_carry=(blank, blank), return_carry=True)
        support = support + told

        def attend(cell: nn.RNNCellBase, carry: tuple[Array, Array], _: None):
            memory, state = carry
            attention = jax.nn.softmax(state @ support.T)
            # The gates are linear: to join what is read to the input is to join it to the state.
            inputs = jnp.concatenate([queries, attention @ support], axis=-1)
            (memory, state), _ = cell((memory, state), inputs)
            return (memory, state + queries), None

        steps = nn.scan(
            attend,
            variable_broadcast="params",
            split_rngs={"params": False},
            length=self.num_steps,
        )
        start = (jnp.zeros_like(queries), queries)
        (_, in_context), _ = steps(cell(name="attention"), start, None)
        return support.astype(dtypes[0]), in_context.astype(dtypes[1])
