"""`nt_xent` against optax's and against a plain softmax over one matrix product.

    python -m benchmarks.bench_contrastive [--smoke]

Value and gradient of the mean, B = 2048 pairs of D = 128 features, float32, one device. First all
variants must give the same loss and gradient to 1e-5; then they are timed in turns, several
rounds, and the table holds medians. Then the temporaries of B = 16384 in blocks, compiled and not
run. optax's takes several GiB. Writes `benchmarks/results/bench_contrastive.json`.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from benchmarks import harness
from metagen_jax.gradients import gradients
from metagen_jax.self_supervised.contrastive import nt_xent
from metagen_jax.types import GradFn

TEMPERATURE, BLOCK_SIZE = 0.5, 256


def plain_softmax(
    z_a: Float[Array, "n features"], z_b: Float[Array, "n features"]
) -> Float[Array, " views"]:
    """What one writes down: cosines in one product, the diagonal masked, a softmax."""
    views = jnp.concatenate([z_a, z_b])
    views = views / jnp.linalg.norm(views, axis=-1, keepdims=True)
    logits = views @ views.T / TEMPERATURE
    logits = jnp.where(jnp.eye(len(views), dtype=bool), -jnp.inf, logits)
    others = jnp.roll(jnp.arange(len(views)), len(z_a))
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, others)


def optax_ntxent(
    z_a: Float[Array, "n features"], z_b: Float[Array, "n features"]
) -> Float[Array, ""]:
    """optax's own, with one label for both views of an example."""
    labels = jnp.tile(jnp.arange(len(z_a)), 2)
    return optax.losses.ntxent(jnp.concatenate([z_a, z_b]), labels, temperature=TEMPERATURE)


def variants() -> dict[str, GradFn]:
    """Every way of computing loss and gradient, by name."""
    ours = functools.partial(nt_xent, temperature=TEMPERATURE)
    losses = {
        "metagen_jax": ours,
        f"metagen_jax, blocks of {BLOCK_SIZE}": functools.partial(ours, block_size=BLOCK_SIZE),
        "plain softmax": plain_softmax,
        "optax": optax_ntxent,
    }

    def gradient(loss) -> GradFn:
        return gradients(lambda views, batch, key: (loss(*views).mean(), {}))

    return {name: gradient(loss) for name, loss in losses.items()}


def temporaries_of_blocks(num_pairs: int, num_features: int) -> float:
    """MiB that value and gradient in blocks take beside arguments and results."""
    z = jax.ShapeDtypeStruct((num_pairs, num_features), jnp.float32)
    grad_fn = variants()[f"metagen_jax, blocks of {BLOCK_SIZE}"]
    compiled = jax.jit(grad_fn).lower((z, z), jnp.zeros(1), jax.random.key(0)).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None, "this backend does not tell"
    return analysis.temp_size_in_bytes / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a few pairs, one round")
    smoke = parser.parse_args().smoke
    num_pairs, num_features, rounds = (160, 8, 1) if smoke else (2048, 128, 7)

    views = tuple(jax.random.normal(jax.random.key(0), (2, num_pairs, num_features)))
    batch, key = jnp.zeros(1), jax.random.key(0)
    every = variants()
    # After optax's gibibytes the next call waits for the system to clear them: it has turns of its
    # own, with the plain softmax.
    own = {name: every[name] for name in ("plain softmax", "optax")}
    others = {name: grad_fn for name, grad_fn in every.items() if name != "optax"}
    compare = functools.partial(harness.time_compiled, rounds=rounds, tolerance=1e-5)
    compared, own_compared = compare(others, views, batch, key), compare(own, views, batch, key)
    timings = {**compared.of, "optax": own_compared.of["optax"]}
    difference = max(compared.difference, own_compared.difference)
    print(f"gradients agree to {difference:.1e} of their norm; medians of {rounds} rounds")
    for best in ("plain softmax", "optax"):
        harness.print_timings(timings, per_step=num_pairs, unit="pairs", best=best)
    many = 8 * num_pairs
    temporaries = temporaries_of_blocks(many, num_features)
    print(f"{many} pairs in blocks of {BLOCK_SIZE}: {temporaries:.1f} MiB of temporaries")
    if not smoke:
        harness.write_result(
            "bench_contrastive",
            {
                **harness.as_numbers(timings),
                "num_pairs": num_pairs,
                "num_features": num_features,
                "relative_difference": difference,
                "blocks_num_pairs": many,
                "blocks_temporaries_mib": temporaries,
            },
        )


if __name__ == "__main__":
    main()
