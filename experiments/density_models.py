"""The models of `experiments.density`, by name."""

from collections.abc import Callable

from experiments.density_autoregressive import made, pixelcnn, pixelrnn
from experiments.density_config import Config, ModelName
from experiments.density_flows import flow
from experiments.density_gan import gan
from experiments.density_matching import flow_matching
from experiments.density_model import Model, Shape
from experiments.density_vaes import gaussian_vae, iaf_vae, ladder_vae

MODELS: dict[ModelName, Callable[[Config, Shape], Model]] = {
    "vae": gaussian_vae,
    "conv_vae": gaussian_vae,
    "iwae": gaussian_vae,
    "ladder_vae": ladder_vae,
    "iaf_vae": iaf_vae,
    "made": made,
    "pixelcnn": pixelcnn,
    "row_lstm": pixelrnn,
    "diagonal_bilstm": pixelrnn,
    "realnvp": flow,
    "glow": flow,
    "maf": flow,
    "spline": flow,
    "gan": gan,
    "flow_matching": flow_matching,
}
