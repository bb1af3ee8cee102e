"""The work of an outer step on paper: every matrix product that second-order MAML must take; and
that of a program, which may take some twice.

XLA's own count takes the body of a scan once, however often it runs. Here a convolution is the
bilinear map `outputs(images, kernel)` and its two transposes, each as many FLOPs as the first: a
gradient takes the three of them, and a gradient of the gradient six more, for each of the three
operations' two operands. The first layer has images for inputs, which take no gradient. Norms,
ReLUs, patches and what is computed again to save memory do not count.
"""

import itertools
import math
from typing import Any, NamedTuple

from jax.extend import core

from benchmarks.rows import Row

BYTES = 4


class Layer(NamedTuple):
    """A layer as one matrix product of `(rows, inner)` by `(inner, columns)`.

    Attributes:
      rows: positions of one example.
      inner: inputs of an output.
      columns: output features.
      inputs: numbers of one example that the layer reads, each once.
    """

    rows: int
    inner: int
    columns: int
    inputs: int

    def flops(self, examples: int) -> int:
        return 2 * examples * self.rows * self.inner * self.columns

    def moved_bytes(self, examples: int) -> int:
        """Inputs, weights and outputs, each once."""
        per_example = self.inputs + self.rows * self.columns
        return BYTES * (examples * per_example + self.inner * self.columns)


class Work(NamedTuple):
    """FLOPs, and bytes that products read and write at least, of the tasks of a step."""

    flops: int
    moved_bytes: int


def layers_of(row: Row) -> list[Layer]:
    """The layers of the net of a row of MAML, first to last."""
    if row.net == "mlp":
        sizes = (1, *row.hidden_sizes, 1)
        return [Layer(1, a, b, a) for a, b in itertools.pairwise(sizes)]
    layers, side, channels = [], 28, 1
    for _ in range(4):
        after = -(-side // 2) if row.net == "strided" else side
        layers.append(Layer(after**2, 9 * channels, row.num_filters, side**2 * channels))
        side, channels = (after if row.net == "strided" else side // 2), row.num_filters
    features = channels if row.net == "strided" else channels * side**2
    return [*layers, Layer(1, features, row.ways, features)]


def num_params(row: Row) -> int:
    """Weights, biases, and of a Conv4 scales and shifts of its norms."""
    layers = layers_of(row)
    norms = 0 if row.net == "mlp" else 4 * 2 * row.num_filters
    return norms + sum(layer.inner * layer.columns + layer.columns for layer in layers)


def outer_step(row: Row) -> Work:
    """The work of the second-order MAML step of a row, over all its tasks."""
    classes = 1 if row.net == "mlp" else row.ways
    support, query = row.shots * classes, row.queries * classes
    flops = moved = 0
    for i, layer in enumerate(layers_of(row)):
        gradient, derivative = (3, 6) if i else (2, 2)
        inner = row.num_steps * (gradient + derivative)
        flops += inner * layer.flops(support) + gradient * layer.flops(query)
        moved += inner * layer.moved_bytes(support) + gradient * layer.moved_bytes(query)
    return Work(row.num_tasks * flops, row.num_tasks * moved)


def count_flops(jaxpr: Any) -> int:
    """FLOPs of all matrix products and convolutions that a program takes, scans in full."""
    total = 0
    for equation in jaxpr.eqns:
        name, repeats = equation.primitive.name, equation.params.get("length", 1)
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * inner * equation.outvars[0].aval.size
        elif name.startswith("convolution_"):
            total += 2 * _convolved(equation)
        for inner in core.jaxprs_in_params(equation.params):
            total += repeats * count_flops(inner)
    return total


def _convolved(equation: Any) -> int:
    """Products in a convolution or one of its transposes: those of its outputs' positions."""
    first, second = (v.aval.shape for v in equation.invars)
    result = equation.outvars[0].aval.shape
    outputs, kernel = {
        "convolution_outputs": (result, second),
        "convolution_images": (first, second),
        "convolution_kernel": (second, result),
    }[equation.primitive.name]
    return math.prod(outputs[:-1]) * math.prod(kernel)
