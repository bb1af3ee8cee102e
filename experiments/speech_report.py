"""The table, the pictures and the sounds of `experiments.speech`."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table
from jaxtyping import Array

from experiments.speech_config import Config
from experiments.speech_data import one_hot
from experiments.speech_model import key_of, told
from metagen_jax.data.audio import RATE, Recordings, mu_law_decode, write_wav
from metagen_jax.errors import UserError, writing
from metagen_jax.evaluation import plots
from metagen_jax.evaluation.estimates import Estimate
from metagen_jax.evaluation.spectrograms import plot_spectrograms
from metagen_jax.generative.sequences import draw_categorical, sample_wavenet
from metagen_jax.gradients import task_keys
from metagen_jax.nets.wavenet import WaveNet
from metagen_jax.runs.log import read_metrics
from metagen_jax.types import Params, PRNGKey

SAMPLE_SEED, NUM_DRAWN = 3, 5


def print_table(config: Config, numbers: Mapping[str, Any], bits: Mapping[str, Estimate]) -> None:
    """Prints bits a sample of all models, and how many fewer the net needs."""
    table = rich.table.Table(
        title=f"{numbers['num_test']:,} test recordings of {config.source}, "
        f"{numbers['num_test_samples']:,} samples",
        caption="mu-law codes of 8 bits, exact likelihood; 95 % intervals over recordings",
    )
    table.add_column("model")
    for column in ("bits a sample", "more than WaveNet"):
        table.add_column(column, justify="right")
    for name, of in bits.items():
        key = f"gain_over_{key_of(name)}"
        more = f"{numbers[key]:.3f} ± {numbers[f'{key}_interval']:.3f}" if key in numbers else ""
        table.add_row(name, f"{of.mean:.3f} ± {of.interval:.3f}", more)
    rich.console.Console(width=100).print(table)


def draw_learning_curve(config: Config) -> None:
    """Draws bits a sample against steps."""
    records = read_metrics(config.run_dir, validation_loss="validation_bits")
    plots.plot_learning_curve(
        [x | {"loss": x["loss"] / np.log(2)} if x.get("loss") else x for x in records],
        config.run_dir / "learning_curve.png",
        title=f"WaveNet of {config.source}: training",
        loss_label="Bits a sample",
    )


def conditions_asked(config: Config, recordings: Recordings) -> list[tuple[int, int]]:
    """Label and speaker of each sample to be made: those asked for, or all in turn."""
    labels = _numbers("digit", config.digit, recordings.label_names)
    speakers = _numbers("speaker", config.speaker, recordings.speaker_names)
    # One speaker further with each round of the labels, so that every pair has its turn.
    return [
        (labels[i % len(labels)], speakers[(i % len(labels) + i // len(labels)) % len(speakers)])
        for i in range(config.num_samples)
    ]


def _numbers(flag: str, asked: str | None, names: tuple[str, ...]) -> list[int]:
    if asked is None:
        return list(range(len(names)))
    if asked not in names:
        raise UserError(f"{flag} is {asked!r}; give one of {', '.join(names)}")
    return [names.index(asked)]


def make_samples(config: Config, net: WaveNet, params: Params, recordings: Recordings) -> None:
    """Draws sounds, writes each as a WAV file and shows their spectrograms beside true ones."""
    asked = conditions_asked(config, recordings)
    labels, speakers = np.array(asked).T
    conditions = one_hot(recordings, labels, speakers)
    if not config.conditional:
        conditions = conditions[:, :0]
    make = sounds_of(net, config.seconds, temperature=config.temperature, top_p=config.top_p)
    key = jax.random.fold_in(jax.random.key(SAMPLE_SEED), config.seed)
    names = [_name(config, recordings, *pair) for pair in asked]
    sounds = list(zip(names, make(params, key, conditions), strict=True))
    folder = config.run_dir / "samples"
    write_sounds(folder, sounds)
    _draw_spectrograms(config, recordings, asked, sounds)
    print(f"sounds are in {folder}: {len(sounds)} WAV files")
    print(f"pictures are in {config.run_dir}: learning_curve.png, spectrograms.png")


def sounds_of(
    net: WaveNet, seconds: float, *, temperature: float = 1.0, top_p: float = 1.0
) -> Callable[[Params, PRNGKey, np.ndarray], np.ndarray]:
    """`(params, key, conditions (n, d)) -> amplitudes (n, t)`, a sound for each condition."""
    length = max(1, round(seconds * RATE))
    start, keep = jnp.zeros(length, jnp.int32), jnp.zeros(length, bool)
    draw = draw_categorical(temperature=temperature, top_p=top_p)

    def sample(params: Params, key: PRNGKey, condition: Array) -> Array:
        return sample_wavenet(key, net, params, draw, start, keep, condition=told(condition))

    samples = jax.jit(jax.vmap(sample, in_axes=(None, 0, 0)))

    def make(params: Params, key: PRNGKey, conditions: np.ndarray) -> np.ndarray:
        keys = task_keys(key, len(conditions))
        return np.asarray(mu_law_decode(samples(params, keys, jnp.asarray(conditions))))

    return make


def write_sounds(folder: Path, sounds: Sequence[tuple[str, np.ndarray]]) -> None:
    """Writes each as a WAV file of its number and name."""
    with writing(folder):
        folder.mkdir(exist_ok=True)
        for old in folder.glob("*.wav"):  # Of before the run was resumed.
            old.unlink()
    for i, (name, sound) in enumerate(sounds):
        write_wav(folder / f"{i:02d} {name}.wav", sound)


def _name(config: Config, recordings: Recordings, label: int, speaker: int) -> str:
    if not config.conditional:
        return "sample"
    return f"{recordings.label_names[label]} by {recordings.speaker_names[speaker]}"


def _draw_spectrograms(
    config: Config,
    recordings: Recordings,
    asked: list[tuple[int, int]],
    sounds: list[tuple[str, np.ndarray]],
) -> None:
    """Samples above test recordings of the same word by the same speaker."""
    true, seen = [], []
    for label, speaker in asked[:NUM_DRAWN]:
        (alike,) = np.nonzero((recordings.labels == label) & (recordings.speakers == speaker))
        # Another one each time, where several samples are alike.
        index = int(alike[seen.count((label, speaker)) % len(alike)]) if len(alike) else 0
        seen.append((label, speaker))
        name = f"{recordings.label_names[label]} by {recordings.speaker_names[speaker]}"
        if not len(alike):
            name = "another test recording"
        true.append((f"true: {name}", recordings.of(index) / 2**15))
    drawn = [(f"made: {name}", sound) for name, sound in sounds[:NUM_DRAWN]]
    plot_spectrograms(
        [drawn, true],
        config.run_dir / "spectrograms.png",
        title=f"WaveNet of {config.source}: sounds that it makes, and test recordings",
        rate=RATE,
    )
