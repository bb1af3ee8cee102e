"""Sampling of a PixelCNN: what is kept from pixel to pixel, against a pass of the net for each.

    python -m benchmarks.bench_sampling [--smoke]

A gated PixelCNN of 28x28 binary images, 7 layers of 32 channels, 64 images at once, drawn by
`sample_in_order` (784 passes of the net), `sample_fixed_point` (as many as it takes) and
`sample_pixelcnn` (the work of one). First all must draw the same images from the same keys; then
they are timed in turns. Writes `benchmarks/results/bench_sampling.json`.
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

from metagen_jax.generative.autoregressive import (
    sample_fixed_point,
    sample_in_order,
    sample_pixelcnn,
)
from metagen_jax.generative.likelihoods import sample_bernoulli
from metagen_jax.nets.pixelcnn import PixelCNN


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a small net and image, one round")
    smoke = parser.parse_args().smoke
    size, num_images, rounds = (6, 2, 1) if smoke else (28, 64, 3)
    net = PixelCNN(1, features=4, num_layers=2) if smoke else PixelCNN(1)

    shape, keep = (size, size, 1), np.zeros((size, size), bool)
    start = jnp.zeros(shape, jnp.int32)
    params = net.init(jax.random.key(0), start)
    keys = jax.random.split(jax.random.key(1), num_images)

    apply: Callable[..., jax.Array] = net.apply  # pyright: ignore[reportAssignmentType]

    samplers = {
        "a pass for each pixel": lambda params, key: sample_in_order(
            key, functools.partial(apply, params), sample_bernoulli, start, keep
        ),
        "passes until nothing changes": lambda params, key: (
            sample_fixed_point(
                key, functools.partial(apply, params), sample_bernoulli, start, keep
            ).sample
        ),
        "activations kept": lambda params, key: sample_pixelcnn(
            key, net, params, sample_bernoulli, start, keep
        ),
    }
    programs = {name: jax.jit(jax.vmap(draw, (None, 0))) for name, draw in samplers.items()}
    images = {name: np.asarray(draw(params, keys)) for name, draw in programs.items()}
    naive, *others = images.values()
    # Noise that falls between two roundings of a probability changes that image from there on.
    same = min(float((other == naive).all((1, 2, 3)).mean()) for other in others)
    assert same > 0.95, f"only {100 * same:.0f} % of the images are the same"

    calls = {name: functools.partial(draw, params, keys) for name, draw in programs.items()}
    timings = {name: harness.Timing([], None, None) for name in programs}
    # A pass for each pixel takes minutes, and once is enough of it.
    harness.time_in_turns(calls, timings, rounds=rounds, patience=60)
    print(f"{100 * same:.0f} % of {num_images} images are the same; medians of {rounds} rounds")
    harness.print_timings(timings, per_step=num_images, unit="images", best="a pass")
    if not smoke:
        harness.write_result(
            "bench_sampling", {**harness.as_numbers(timings), "share_of_same_images": same}
        )


if __name__ == "__main__":
    main()
