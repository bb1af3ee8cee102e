"""The flows of `benchmarks.bench_likelihood` in zuko and nflows, with the same weights.

Their masks, and what they make of a net's outputs, are set to those of metagen_jax: the widths,
heights and slopes of a spline, the shift and the scale of an affine map. All else is theirs: masked
layers, search for the bin, spline, sums. Needs the extra `peers`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
import zuko  # pyright: ignore[reportMissingImports]
from nflows import distributions, flows, transforms  # pyright: ignore[reportMissingImports]
from torch.distributions import Transform  # pyright: ignore[reportMissingImports]

from metagen_jax.generative.splines import MIN_BIN_SIZE, MIN_SLOPE

_SLOPE_OFFSET = math.log(math.expm1(1 - MIN_SLOPE))


class Layer(NamedTuple):
    """A masked dense layer: weight and mask `(out, in)`, bias `(out,)`."""

    weight: np.ndarray
    bias: np.ndarray
    mask: np.ndarray


class Spec(NamedTuple):
    """A flow of autoregressive layers; `num_bins` is None for affine ones.

    Attributes:
      num_features: of an example.
      num_units: of each of two hidden layers.
      num_bins: of each spline.
      bound: of each spline.
      max_log_scale: of each affine map.
      nets: the three layers of the net of each, from data to noise; of its outputs those of the
        first number come first.
    """

    num_features: int
    num_units: int
    num_bins: int | None
    bound: float
    max_log_scale: float
    nets: Sequence[Sequence[Layer]]


def peers(spec: Spec) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """`log_prob(x (n, d)) -> (n,)` of each peer."""
    return {"peer zuko": _zuko(spec), "peer nflows": _nflows(spec)}


def _copy(nets: Sequence[Sequence[Any]], spec: Spec) -> None:
    with torch.no_grad():
        for modules, layers in zip(nets, spec.nets, strict=True):
            for module, layer in zip(modules, layers, strict=True):
                module.weight.copy_(torch.tensor(layer.weight))
                module.bias.copy_(torch.tensor(layer.bias))
                module.mask.copy_(torch.tensor(layer.mask))


def _zuko(spec: Spec) -> Callable:
    class Affine(zuko.transforms.MonotonicAffineTransform):
        def __init__(self, shift, raw):
            Transform.__init__(self)
            self.log_scale = -spec.max_log_scale * torch.tanh(raw / spec.max_log_scale)
            self.scale = self.log_scale.exp()
            self.shift = -shift * self.scale

    class Spline(zuko.transforms.MonotonicRQSTransform):
        def __init__(self, widths, heights, slopes):
            Transform.__init__(self)
            self.horizontal, self.vertical = self.knots(widths), self.knots(heights)
            inner = MIN_SLOPE + F.softplus(slopes + _SLOPE_OFFSET)
            self.derivatives = F.pad(inner, (1, 1), value=1)

        @staticmethod
        def knots(logits):
            free = 1 - MIN_BIN_SIZE * logits.shape[-1]
            shares = torch.cumsum(MIN_BIN_SIZE + free * F.softmax(logits, dim=-1), dim=-1)
            return spec.bound * (2 * F.pad(shares, (1, 0)) - 1)

    bins = spec.num_bins
    flow = zuko.flows.MAF(
        spec.num_features,
        transforms=len(spec.nets),
        hidden_features=(spec.num_units, spec.num_units),
        univariate=Affine if bins is None else Spline,
        shapes=((), ()) if bins is None else ((bins,), (bins,), (bins - 1,)),
    )
    nets = [[m for m in layer.hyper if hasattr(m, "mask")] for layer in flow.transform.transforms]
    _copy(nets, spec)
    return lambda x: flow().log_prob(x)


def _nflows(spec: Spec) -> Callable:
    class Affine(transforms.MaskedAffineAutoregressiveTransform):
        def _elementwise_forward(self, inputs, parameters):
            shift, raw = parameters.view(-1, self.features, 2).unbind(-1)
            log_scale = spec.max_log_scale * torch.tanh(raw / spec.max_log_scale)
            return (inputs - shift) * torch.exp(-log_scale), -log_scale.sum(-1)

    net: dict[str, Any] = {
        "features": spec.num_features,
        "hidden_features": spec.num_units,
        "num_blocks": 1,
        "use_residual_blocks": False,
    }

    def make_layer():
        if spec.num_bins is None:
            return Affine(**net)
        return transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
            **net, num_bins=spec.num_bins, tails="linear", tail_bound=spec.bound
        )

    layers = [make_layer() for _ in spec.nets]
    mades = [layer.autoregressive_net for layer in layers]
    _copy([(m.initial_layer, m.blocks[0].linear, m.final_layer) for m in mades], spec)
    if spec.num_bins is not None:
        # Its slopes are the softplus of an output, ours of an output and a constant.
        with torch.no_grad():
            for made in mades:
                by_number = made.final_layer.bias.view(spec.num_features, -1)
                by_number[:, 2 * spec.num_bins :] += _SLOPE_OFFSET
    base = distributions.StandardNormal([spec.num_features])
    return flows.Flow(transforms.CompositeTransform(layers), base).log_prob
