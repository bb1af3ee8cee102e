"""Slow and obvious versions of what the library computes, for the tests to compare it with."""

import decimal
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax


def gradient_descent(loss, params, batch, *, rate, num_steps, mask=None):
    """`[theta_0, ..., theta_K]` of plain gradient descent; `mask` is a pytree of 0s and 1s."""
    mask = jax.tree.map(jnp.ones_like, params) if mask is None else mask
    path = [params]
    for _ in range(num_steps):
        grads = jax.grad(loss)(path[-1], batch)
        path.append(jax.tree.map(lambda p, g, m: p - rate * m * g, path[-1], grads, mask))
    return path


def optimizer_loop(loss, params, batches, optimizer):
    """`[theta_0, ..., theta_K]` of an optax optimiser, one batch a step."""
    state, path = optimizer.init(params), [params]
    for batch in batches:
        updates, state = optimizer.update(jax.grad(loss)(path[-1], batch), state, path[-1])
        path.append(optax.apply_updates(path[-1], updates))
    return path


def maml_loop(loss, params, supports, queries, *, rate, num_steps, mask=None):
    """The mean over tasks of the query loss after plain gradient descent on the support set."""
    total = 0.0
    for support, query in zip(supports, queries, strict=True):
        path = gradient_descent(loss, params, support, rate=rate, num_steps=num_steps, mask=mask)
        total += loss(path[-1], query)
    return total / len(supports)


def finite_differences(f, x, step=1e-5):
    """The gradient of `f(x)`, x any pytree, by central differences of fourth order in float64."""
    leaves, treedef = jax.tree.flatten(jax.tree.map(lambda leaf: np.array(leaf, np.float64), x))
    grads = [np.zeros_like(leaf) for leaf in leaves]
    for leaf, grad in zip(leaves, grads, strict=True):
        for index in np.ndindex(leaf.shape):
            here, weighted = leaf[index], 0.0
            for steps, weight in ((-2, 1), (-1, -8), (1, 8), (2, -1)):
                leaf[index] = here + steps * step
                weighted += weight * float(
                    f(jax.tree.unflatten(treedef, [a.copy() for a in leaves]))
                )
            leaf[index] = here
            grad[index] = weighted / (12 * step)
    return jax.tree.unflatten(treedef, grads)


def convolve_same(images, kernel, strides):
    """The "SAME" convolution `(n, h, w, c) * (kh, kw, c, f)`, one product at a time."""
    n, height, width, _ = images.shape
    kernel_h, kernel_w, _, features = kernel.shape
    rows, columns = -(-height // strides[0]), -(-width // strides[1])
    # As many zeros as the last window overhangs; an odd one goes below and to the right.
    top = max((rows - 1) * strides[0] + kernel_h - height, 0) // 2
    left = max((columns - 1) * strides[1] + kernel_w - width, 0) // 2
    out = np.zeros((n, rows, columns, features))
    for row, column, i, j in itertools.product(
        range(rows), range(columns), range(kernel_h), range(kernel_w)
    ):
        y, x = row * strides[0] + i - top, column * strides[1] + j - left
        if 0 <= y < height and 0 <= x < width:
            out[:, row, column] += images[:, y, x] @ kernel[i, j]
    return out


def max_pool_2x2(images):
    """The maximum of each whole 2x2 block, and the index (y, x) of the first to attain it."""
    n, height, width, channels = images.shape
    shape = (n, height // 2, width // 2, channels)
    values, first = np.zeros(shape), np.zeros((*shape, 2), int)
    for b, y, x, c in np.ndindex(shape):
        block = images[b, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2, c]
        values[b, y, x, c] = block.max()
        first[b, y, x, c] = np.unravel_index(block.argmax(), (2, 2)) + 2 * np.array([y, x])
    return values, first


def batch_norm(x, scale, bias, *, epsilon, num_reference=None):
    """Batch normalisation of `(n, ..., c)` by the statistics of the first `num_reference`."""
    flat = x[:num_reference].reshape(-1, x.shape[-1])
    return (x - flat.mean(0)) / np.sqrt(flat.var(0) + epsilon) * scale + bias


def discretized_logistic(level, mean, log_scale, num_levels):
    """The log-mass of a level as a difference of two distribution functions, in 60 digits."""
    with decimal.localcontext(prec=60, Emin=decimal.MIN_EMIN, Emax=decimal.MAX_EMAX):
        mean, scale = decimal.Decimal(float(mean)), decimal.Decimal(float(log_scale)).exp()
        upper, lower = (
            (decimal.Decimal(2 * int(level) + side) / (num_levels - 1) - 1 - mean) / scale
            for side in (1, -1)
        )
        if lower > 0:  # By symmetry the same in the other tail, where 60 digits do not round to 1.
            upper, lower, level = -lower, -upper, num_levels - 1 - level
        above = 1 if level == num_levels - 1 else 1 / (1 + (-upper).exp())
        below = 0 if level == 0 else 1 / (1 + (-lower).exp())
        return float((above - below).ln())


def sample_distinct(key, population, count):
    """Takes the `d_i`-th of the numbers that are left, d_i the same draws as the library's."""
    left = list(range(population))
    draws = jax.random.randint(key, (count,), 0, population - np.arange(count), jnp.int32)
    return np.array([left.pop(draw) for draw in np.asarray(draws)], int)


def sample_episode(key, examples, labels, *, num_ways, num_shots, num_queries, num_rotations):
    """An episode of arrays `examples` with the library's draws, in NumPy."""
    classes = np.unique(labels)
    class_key, example_key = jax.random.split(key)
    drawn = sample_distinct(class_key, len(classes) * num_rotations, num_ways)
    support, query = [], []
    for way_key, number in zip(jax.random.split(example_key, num_ways), drawn, strict=True):
        of_class = examples[labels == classes[number // num_rotations]]
        chosen = of_class[sample_distinct(way_key, len(of_class), num_shots + num_queries)]
        if num_rotations > 1:
            chosen = np.rot90(chosen, number % num_rotations, axes=(1, 2))
        support.append(chosen[:num_shots])
        query.append(chosen[num_shots:])
    ways = np.arange(num_ways)
    return (
        (np.concatenate(support), np.repeat(ways, num_shots)),
        (np.concatenate(query), np.repeat(ways, num_queries)),
    )


def rational_quadratic_spline(x, widths, heights, slopes, bound):
    """One number by its bin, equation 4 of Durkan et al. 2019, from unbounded parameters."""
    if abs(x) >= bound:
        return x

    def knots(logits):
        weights = np.exp(logits - np.max(logits))
        sizes = 1e-3 + (1 - 1e-3 * len(logits)) * weights / weights.sum()
        return bound * (2 * np.concatenate([[0], np.cumsum(sizes)]) - 1)

    xs, ys = knots(widths), knots(heights)
    offset = np.log(np.exp(1 - 1e-3) - 1)
    ds = np.concatenate([[1], 1e-3 + np.log1p(np.exp(slopes + offset)), [1]])
    k = sum(x >= xs[1:-1])
    s = (ys[k + 1] - ys[k]) / (xs[k + 1] - xs[k])
    t = (x - xs[k]) / (xs[k + 1] - xs[k])
    above = (ys[k + 1] - ys[k]) * (s * t**2 + ds[k] * t * (1 - t))
    return ys[k] + above / (s + (ds[k + 1] + ds[k] - 2 * s) * t * (1 - t))


def cosines(z):
    """All cosines of rows, one pair at a time; 0 with a row of zeros."""
    norms = [np.sqrt((row * row).sum()) or 1.0 for row in np.asarray(z, np.float64)]
    return np.array(
        [
            [(a * b).sum() / (p * q) for b, q in zip(z, norms, strict=True)]
            for a, p in zip(z, norms, strict=True)
        ]
    )


def supervised_contrastive(z, labels, temperature):
    """Khosla et al. 2020, equation 2, one embedding and one positive at a time."""
    scores = cosines(z) / temperature
    losses = []
    for i in range(len(z)):
        others = [k for k in range(len(z)) if k != i]
        positives = [p for p in others if labels[p] == labels[i]]
        normalizer = np.logaddexp.reduce([scores[i, k] for k in others]) if others else 0
        losses.append(np.mean([normalizer - scores[i, p] for p in positives]) if positives else 0.0)
    return np.array(losses)
