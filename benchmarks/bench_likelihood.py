"""Likelihoods: MAF and spline flows against zuko and nflows, then examples a second of every model.

    python -m benchmarks.bench_likelihood [--smoke]

Part 1 needs the extra `peers` (PyTorch, zuko, nflows), and is left out without it. Five
autoregressive layers, affine or rational-quadratic splines of 8 bins, each with a masked net of two
hidden layers; 64 numbers an example, 1024 examples. All libraries hold the same weights and must
give the same log-probabilities; then they are timed in turns. Part 2 times the likelihood of each
model of `experiments.density`, with its settings for binarized MNIST or 256 levels, on one batch of
28x28 images. Writes `benchmarks/results/bench_likelihood.json`.
"""

import argparse

from benchmarks import harness

if __name__ == "__main__":
    harness.one_device_per_core()

import functools
import importlib.util
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from experiments.density_config import PRESETS, Config, ModelName, with_model
from experiments.density_models import MODELS
from metagen_jax.generative.bijectors import chain
from metagen_jax.generative.couplings import affine_transform, autoregressive, spline_transform
from metagen_jax.generative.flows import flow_log_prob
from metagen_jax.nets.made import MADE
from metagen_jax.parallel import map_over_tasks, replicate
from metagen_jax.types import Params

NUM_BINS, BOUND, MAX_LOG_SCALE, TOLERANCE = 8, 5.0, 3.0, 5e-3
# Nothing to evaluate, or the same as another's but for the number of samples.
WITHOUT = ("gan", "iwae")


def flow_log_probs(
    kind: str, *, num_features: int, num_units: int, num_layers: int, num_examples: int
) -> dict[str, Callable[[], Any]]:
    """Calls that give the log-probabilities of one batch, by library."""
    import torch  # pyright: ignore[reportMissingImports]

    from benchmarks import likelihood_peers

    torch.set_num_threads(os.cpu_count() or 1)
    splines = kind == "spline"
    transform = (
        spline_transform(num_bins=NUM_BINS, bound=BOUND)
        if splines
        else affine_transform(max_log_scale=MAX_LOG_SCALE)
    )
    nets = [
        MADE(
            (num_units, num_units),
            num_params=transform.num_params,
            order="reversed" if i % 2 else "natural",
        )
        for i in range(num_layers)
    ]
    bijector = chain(*(autoregressive(net, transform) for net in nets))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(num_examples, num_features)).astype(np.float32)
    params = bijector.init(jax.random.key(0), jnp.asarray(x[:2]))
    params = jax.tree.map(lambda p: p + 0.05 * rng.normal(size=p.shape).astype(np.float32), params)
    spec = likelihood_peers.Spec(
        num_features,
        num_units,
        NUM_BINS if splines else None,
        BOUND,
        MAX_LOG_SCALE,
        [
            layers_of(net, params[f"layer{i}"], num_features, likelihood_peers.Layer)
            for i, net in enumerate(nets)
        ],
    )

    log_prob = flow_log_prob(bijector)

    def of_one(params: Params, example: jax.Array) -> jax.Array:
        return log_prob(params, example, jax.random.key(0))

    devices = jax.devices()
    spread = jax.jit(map_over_tasks(of_one, devices=devices, chunk=num_examples // len(devices)))
    calls: dict[str, Callable[[], Any]] = {
        "metagen_jax": functools.partial(jax.jit(jax.vmap(of_one, (None, 0))), params, x),
        f"metagen_jax, {len(devices)} devices": functools.partial(
            spread, replicate(params, devices=devices), x
        ),
    }
    tensor = torch.tensor(x)
    for name, of_tensor in likelihood_peers.peers(spec).items():
        calls[name] = functools.partial(torch.inference_mode()(of_tensor), tensor)
    return calls


def layers_of(net: MADE, params: Params, num_features: int, layer: Callable) -> list:
    """The dense layers of a net, `(out, in)`; the head's outputs by number, not by parameter."""
    x = np.random.default_rng(1).normal(size=(64, num_features)).astype(np.float32)
    smooth: Callable[..., jax.Array] = net.clone(activation=jnp.tanh).apply  # pyright: ignore[reportAssignmentType]

    def total(params: Params) -> jax.Array:
        outputs = smooth(params, x)
        return jnp.vdot(outputs, jax.random.normal(jax.random.key(0), outputs.shape))

    # A weight that is masked has no gradient, and with tanh no other has none.
    slopes = jax.grad(total)(params)["params"]
    layers = []
    for name in ("hidden0", "hidden1", "head"):
        kernel, bias = (np.asarray(params["params"][name][part]) for part in ("kernel", "bias"))
        weight, mask = kernel.T, np.asarray(slopes[name]["kernel"]).T != 0
        if name == "head":
            order = np.arange(len(bias)).reshape(-1, num_features).T.ravel()
            weight, mask, bias = weight[order], mask[order], bias[order]
        layers.append(layer(weight, bias, mask))
    return layers


def compare_flows(smoke: bool) -> dict[str, Any]:
    """Part 1: checks that libraries agree, times them, prints; the numbers by kind of flow."""
    sizes = (
        {"num_features": 4, "num_units": 16, "num_layers": 2, "num_examples": 32}
        if smoke
        else {"num_features": 64, "num_units": 256, "num_layers": 5, "num_examples": 1024}
    )
    numbers = {}
    for kind in ("affine", "spline"):
        calls = flow_log_probs(kind, **sizes)
        first, *others = (np.asarray(call()) for call in calls.values())
        difference = max(float(np.abs(other - first).max()) for other in others)
        assert difference < TOLERANCE, f"{kind}: log-probabilities differ by {difference:.1e} nats"
        timings = {name: harness.Timing([], None, None) for name in calls}
        harness.time_in_turns(calls, timings, rounds=1 if smoke else 15)
        print(f"\nautoregressive flow, {kind}: log-probabilities agree to {difference:.1e} nats")
        harness.print_timings(timings, per_step=sizes["num_examples"], unit="examples", best="peer")
        numbers[kind] = {**harness.as_numbers(timings), "difference_nats": difference}
    return numbers


def model_log_prob(
    name: ModelName, preset: Config, size: int, num_images: int
) -> Callable[[], jax.Array]:
    """A call that gives the log-probabilities of one batch of images."""
    config = with_model(preset, Config(model=name))
    model = MODELS[name](config, (size, size, 1))
    log_prob = model.log_prob or model.test_log_prob
    assert log_prob is not None
    high = 256 if config.values == "levels" else 2
    images = jax.random.randint(jax.random.key(0), (num_images, size, size, 1), 0, high)
    params = jax.jit(model.init)(jax.random.key(1), images)
    keys = jax.random.split(jax.random.key(2), num_images)
    return functools.partial(jax.jit(jax.vmap(log_prob, (None, 0, 0))), params, images, keys)


def time_models(smoke: bool) -> dict[str, Any]:
    """Part 2: the likelihood of each model, one after the other, in turns."""
    preset, size, num_images = PRESETS["binarized-mnist"], 28, 64
    names: list[Any] = [name for name in get_args(ModelName) if name not in WITHOUT]
    if smoke:
        preset = replace(preset, hidden_sizes=(8, 8), num_filters=4, num_layers=2)
        names, size, num_images = ["vae", "made", "pixelcnn"], 8, 2
    calls = {name: model_log_prob(name, preset, size, num_images) for name in names}
    for name, call in calls.items():
        assert np.isfinite(np.asarray(call())).all(), f"{name} gives no finite likelihood"
    timings = {name: harness.Timing([], None, None) for name in calls}
    harness.time_in_turns(calls, timings, rounds=1 if smoke else 5)
    print(f"\nlikelihood of {num_images} images of {size}x{size}, one sample where it is a bound")
    harness.print_timings(timings, per_step=num_images, unit="images", best="vae")
    return harness.as_numbers(timings)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="small flows and nets, one round")
    smoke = parser.parse_args().smoke
    numbers: dict[str, Any] = {}
    missing = [name for name in ("torch", "zuko", "nflows") if not importlib.util.find_spec(name)]
    if missing:
        print(f"not compared with others: {', '.join(missing)} not installed (the extra `peers`)")
    else:
        numbers["flows"] = compare_flows(smoke)
    numbers["models"] = time_models(smoke)
    if not smoke:
        harness.write_result("bench_likelihood", numbers)


if __name__ == "__main__":
    main()
