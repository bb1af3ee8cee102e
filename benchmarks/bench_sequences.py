"""Sampling of sequences: what is kept from one element to the next, against computing it again.

    python -m benchmarks.bench_sequences [--smoke]

A WaveNet of 18 layers, 4000 samples of sound; anew, it runs over the samples that it can see for
each one. A causal transformer of 4 blocks, 256 tokens; anew, it runs over those before for each
one, filled up to the next of four lengths. First both must draw the same from the same key; then
they are timed in turns. Writes `benchmarks/results/bench_sequences.json`.
"""

import argparse

from benchmarks import harness

if __name__ == "__main__":
    harness.one_device_per_core()

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from metagen_jax.generative.likelihoods import sample_categorical
from metagen_jax.generative.sequences import sample_transformer, sample_wavenet
from metagen_jax.nets.transformer import Transformer
from metagen_jax.nets.wavenet import WaveNet
from metagen_jax.types import Params, PRNGKey

# Of rows that prefixes are filled up to.
NUM_LENGTHS = 4

Samplers = dict[str, Callable[[Params, PRNGKey], Array]]


def wavenet_samplers(smoke: bool) -> tuple[Params, Samplers, int]:
    """Parameters, samplers by name, and how many samples they draw."""
    dilations, length = ((1, 2), 20) if smoke else (tuple(2**i for i in range(9)) * 2, 4000)
    net = WaveNet(256, dilations=dilations)
    params = jax.jit(net.init)(jax.random.key(0), jnp.zeros(2, jnp.int32))
    start, keep = jnp.zeros(length, jnp.int32), jnp.zeros(length, bool)
    seen = net.receptive_field

    def anew(params: Params, key: PRNGKey) -> Array:
        # Until the window is full it begins with the sound, before which there is silence.
        def first(window: Array, index: Array) -> tuple[Array, Array]:
            outputs: Array = net.apply(params, window)  # pyright: ignore[reportAssignmentType]
            code = sample_categorical(jax.random.fold_in(key, index), outputs[index])
            return window.at[index].set(code), code

        def rest(window: Array, index: Array) -> tuple[Array, Array]:
            outputs: Array = net.apply(params, window)  # pyright: ignore[reportAssignmentType]
            code = sample_categorical(jax.random.fold_in(key, index), outputs[-1])
            return jnp.roll(window.at[-1].set(code), -1), code

        window = jnp.zeros(seen + 1, jnp.int32)
        window, begun = jax.lax.scan(first, window, jnp.arange(min(seen, length)))
        _, ended = jax.lax.scan(rest, window, jnp.arange(min(seen, length), length))
        return jnp.concatenate([begun, ended])

    def cached(params: Params, key: PRNGKey) -> Array:
        return sample_wavenet(key, net, params, sample_categorical, start, keep)

    return params, {"net over what it sees": anew, "activations kept": cached}, length


def transformer_samplers(smoke: bool) -> tuple[Params, Samplers, int]:
    """Parameters, samplers by name, and how many tokens they draw."""
    length = 12 if smoke else 256
    net = Transformer(2000, length, depth=1 if smoke else 4, causal=True)
    start, keep = jnp.zeros(length, jnp.int32), jnp.zeros(length, bool)
    params = jax.jit(net.init)(jax.random.key(0), start)

    def anew(params: Params, key: PRNGKey) -> Array:
        # The prefix, in rows of a few lengths: one program for each would compile for ever.
        def draw(row: Array, index: Array) -> tuple[Array, Array]:
            logits: Array = net.apply(params, row, method="predict_next")  # pyright: ignore[reportAssignmentType]
            token = sample_categorical(jax.random.fold_in(key, index), logits[index])
            return row.at[index].set(token), token

        row = jnp.zeros(0, jnp.int32)
        for first in range(0, length, length // NUM_LENGTHS):
            row = jnp.concatenate([row, jnp.zeros(length // NUM_LENGTHS, jnp.int32)])
            row, _ = jax.lax.scan(draw, row, jnp.arange(first, len(row)))
        return row

    def cached(params: Params, key: PRNGKey) -> Array:
        return sample_transformer(key, net, params, sample_categorical, start, keep)

    return params, {"net over what stands before": anew, "keys and values kept": cached}, length


def compare(name: str, params: Params, samplers: Samplers, length: int, rounds: int) -> dict:
    """Checks that all draw the same, times them, prints and gives the numbers."""
    programs = {of: jax.jit(draw) for of, draw in samplers.items()}
    drawn = [np.asarray(draw(params, jax.random.key(1))) for draw in programs.values()]
    # Noise that falls between two roundings of a logit changes all that follows.
    same = float((drawn[0] == drawn[1]).mean())
    assert same > 0.1, f"only {100 * same:.0f} % of {name} are the same"
    calls = {
        of: functools.partial(draw, params, jax.random.key(1)) for of, draw in programs.items()
    }
    timings = {of: harness.Timing([], None, None) for of in programs}
    harness.time_in_turns(calls, timings, rounds=rounds, patience=120)
    print(f"{name}: {100 * same:.1f} % of {length} are the same; medians of {rounds} rounds")
    harness.print_timings(timings, per_step=length, unit="elements", best=next(iter(programs)))
    return {**harness.as_numbers(timings), "share_that_is_the_same": same, "elements": length}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="small nets, one round")
    smoke = parser.parse_args().smoke
    rounds = 1 if smoke else 3
    results = {
        "wavenet": compare("WaveNet", *wavenet_samplers(smoke), rounds),
        "transformer": compare("transformer", *transformer_samplers(smoke), rounds),
    }
    if not smoke:
        harness.write_result("bench_sequences", results)


if __name__ == "__main__":
    main()
