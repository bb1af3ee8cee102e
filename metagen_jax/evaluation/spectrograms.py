"""Spectrograms of sounds, as arrays and as a picture of many.

Davis, Mermelstein: Comparison of Parametric Representations for Monosyllabic Word Recognition in
Continuously Spoken Sentences, 1980: bands of equal width to the ear.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from metagen_jax.errors import UserError
from metagen_jax.evaluation.figures import File, finish, new_figure, save

_DECIBELS = 60
# In inches.
_WIDTH, _HEIGHT, _TOP = 2.3, 1.5, 0.7


def spectrogram(
    amplitudes: Float[np.ndarray, " t"], *, window: int = 256, hop: int = 64
) -> Float[np.ndarray, "frames bins"]:
    """The size of each frequency in windows that follow one another, `|sum_n w_n x_n e^{-i f n}|`.

    Args:
      amplitudes: one sound; zeros stand around it, so that window `i` has its middle at sample
        `i hop`.
      window: samples of a window, weighed by Hann's, which sum to 1.
      hop: samples from one to the next.

    Returns:
      `(t // hop + 1, window // 2 + 1)`; a sine of amplitude a gives a / 2 in its bin. Bin `k` is at
      `k / window` times the rate.

    Raises:
      UserError: for a window of fewer than two samples, or no hop.
    """
    if window < 2 or hop < 1:
        raise UserError(f"window is {window} and hop {hop}; give at least 2 and 1")
    weights = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    padded = np.pad(np.asarray(amplitudes, np.float64), (window // 2, window))
    starts = np.arange(0, len(amplitudes) + 1, hop)
    frames = padded[starts[:, None] + np.arange(window)]
    return np.abs(np.fft.rfft(frames * (weights / weights.sum()), axis=-1))


def log_mel(
    amplitudes: Float[np.ndarray, " t"],
    *,
    rate: int,
    num_bands: int = 40,
    window: int = 256,
    hop: int = 64,
) -> Float[np.ndarray, "frames {num_bands}"]:
    """The logarithm of the power in bands that are equally wide in mel, `2595 log10(1 + f/700)`.

    Bands are triangles over the power of `spectrogram`, each from the middle of the one before to
    that of the next; together they reach from 0 to half the rate.

    Args:
      amplitudes: one sound, from -1 to 1.
      rate: samples a second.
      num_bands: how many.
      window: of the spectrogram.
      hop: likewise.

    Returns:
      `(frames, num_bands)`; silence is ln 1e-10.

    Raises:
      UserError: as `spectrogram`.
    """
    power = spectrogram(amplitudes, window=window, hop=hop) ** 2
    highest = 2595 * np.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, highest, num_bands + 2) / 2595) - 1)
    low, middle, high = edges[:-2], edges[1:-1], edges[2:]
    frequencies = np.arange(power.shape[1])[:, None] * rate / window
    rising, falling = (frequencies - low) / (middle - low), (high - frequencies) / (high - middle)
    return np.log(power @ np.maximum(np.minimum(rising, falling), 0) + 1e-10)


def plot_spectrograms(
    sounds: Sequence[Sequence[tuple[str, Float[np.ndarray, "_"]]]],
    path: File,
    *,
    title: str,
    rate: int,
) -> None:
    """Spectrograms in rows and columns, all in the same seconds and hertz.

    Each is drawn in decibels from its own loudest point down to 60 below it.

    Args:
      sounds: rows of names and amplitudes.
      path: the picture to write; its suffix is the format.
      title: of the picture.
      rate: samples a second.

    Raises:
      UserError: if there is no sound, or one without samples.
    """
    columns = max(map(len, sounds), default=0)
    lengths = [len(sound) for row in sounds for _, sound in row]
    if not lengths or not all(lengths):
        raise UserError("there are no sounds, or some without samples; give at least one of each")
    width = max(columns * _WIDTH + 0.5, 0.1 * len(title))
    figure = new_figure(width, len(sounds) * _HEIGHT + _TOP, title)
    grid = np.atleast_2d(figure.subplots(len(sounds), columns, sharex=True, sharey=True))
    for axes in grid.flat:
        axes.axis("off")
    for i, row in enumerate(sounds):
        for axes, (name, sound) in zip(grid.reshape(len(sounds), columns)[i], row, strict=False):
            sizes = spectrogram(sound)
            decibels = 20 * np.log10(sizes / max(sizes.max(), 1e-12) + 1e-12)
            box = (0, len(sound) / rate, 0, rate / 2000)
            axes.axis("on")
            axes.imshow(
                decibels.T,
                extent=box,
                origin="lower",
                aspect="auto",
                cmap="magma",
                vmin=-_DECIBELS,
                vmax=0,
            )
            axes.set_xlim(0, max(lengths) / rate)
            finish(axes, "seconds" if i == len(sounds) - 1 else "", name)
            axes.grid(False)
    for axes in grid.reshape(len(sounds), columns)[:, 0]:
        axes.set_ylabel("kHz")
    save(figure, path)
