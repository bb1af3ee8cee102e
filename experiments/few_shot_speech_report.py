"""The table, the pictures and the sounds of `experiments.few_shot_speech`."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table

from experiments.few_shot_speech_config import Config
from experiments.few_shot_speech_data import Speaker, draw_episode
from experiments.fine_tuning import adam_or_sgd, at_edge
from experiments.speech_model import make_loss
from experiments.speech_report import sounds_of, write_sounds
from metagen_jax.data.audio import RATE
from metagen_jax.evaluation.estimates import Estimate
from metagen_jax.evaluation.shot_curves import plot_nll_by_shots
from metagen_jax.evaluation.spectrograms import plot_spectrograms
from metagen_jax.gradients import gradients
from metagen_jax.meta.adapt import adapt
from metagen_jax.nets.wavenet import WaveNet
from metagen_jax.types import MetaParams

MAML, CONVENTIONAL = "MAML", "conventional"
SOUND_SEED = 1_000_000_004


class Row(NamedTuple):
    """A net after so many recordings.

    Attributes:
      bits: a sample, of each test speaker, over episodes.
      num_steps: of the adaptation, chosen on other speakers.
      rate: likewise, with its optimiser; None without recordings.
      tested: the parameters that adapt, and the rule.
    """

    bits: dict[str, Estimate]
    num_steps: int
    rate: str | None
    tested: MetaParams

    def at_edge(self, config: Config) -> bool:
        """Whether more steps or another rate than was tried might be better."""
        if self.rate is None or not self.num_steps:
            return False
        return self.num_steps == config.test_steps or at_edge(self.rate, config.rates)


Rows = Mapping[str, Mapping[int, Row]]
"""By net and number of recordings."""

Less = Mapping[int, Mapping[str, Estimate]]
"""By number of recordings and speaker: how many bits fewer MAML needs, on the same episodes."""


def mean_of(estimates: Mapping[str, Estimate]) -> float:
    """Over speakers, of whom there are too few for an interval."""
    return float(np.mean([of.mean for of in estimates.values()]))


def numbers_of(config: Config, rows: Rows, less: Less) -> dict[str, Any]:
    """`bits_by_shots` and `maml_needs_less`, as they stand in `result.json`."""
    return {
        "bits_by_shots": {
            name: {
                str(num_shots): {
                    "steps": row.num_steps,
                    "rate": row.rate,
                    "at_edge": row.at_edge(config),
                    **_numbers(row.bits),
                }
                for num_shots, row in of.items()
            }
            for name, of in rows.items()
        },
        "maml_needs_less": {str(num_shots): _numbers(of) for num_shots, of in less.items()},
    }


def _numbers(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
    speakers = {
        name: {"bits": float(of.mean), "interval": float(of.interval)}
        for name, of in estimates.items()
    }
    return {"mean": mean_of(estimates), "speakers": speakers}


def print_table(config: Config, rows: Rows, less: Less) -> None:
    """A row for each net and number of recordings, and for what MAML needs less."""
    table = rich.table.Table(
        title=f"Bits a sample of {config.source}, speakers never heard in training",
        caption=f"± 95 % interval over {config.num_test_tasks} episodes of the speaker; steps and "
        "rate chosen on other speakers, * at the edge of what was tried",
    )
    for column in ("net", "recordings", "steps (rate)"):
        table.add_column(column)
    for column in (*next(iter(less.values())), "mean"):
        table.add_column(column, justify="right")
    for name, of in rows.items():
        for num_shots, row in of.items():
            edge = "*" if row.at_edge(config) else ""
            steps = f"{row.num_steps} ({row.rate}){edge}" if row.rate else "none"
            table.add_row(name, str(num_shots), steps, *_cells(row.bits))
        table.add_section()
    for num_shots, of in less.items():
        table.add_row("MAML needs less by", str(num_shots), "", *_cells(of))
    rich.console.Console(width=110).print(table)


def _cells(estimates: Mapping[str, Estimate]) -> list[str]:
    cells = [f"{of.mean:.3f} ± {of.interval:.3f}" for of in estimates.values()]
    return [*cells, f"{mean_of(estimates):.3f}"]


def draw_bits(config: Config, rows: Rows) -> None:
    """Draws bits a sample of each net and speaker against recordings heard."""
    curves = {
        f"{name}: {speaker}": {num_shots: row.bits[speaker] for num_shots, row in of.items()}
        for name, of in rows.items()
        for speaker in next(iter(of.values())).bits
    }
    plot_nll_by_shots(
        curves,
        config.run_dir / "bits_by_shots.png",
        title=f"WaveNet of {config.source}: speakers never heard in training",
        unit="bits a sample",
        seen="recordings heard",
    )


def make_samples(config: Config, net: WaveNet, row: Row, speakers: Mapping[str, Speaker]) -> None:
    """Draws sounds before and after hearing a speaker, and writes and shows them by true ones."""
    num_shots = max(config.shots)
    draw = functools.partial(draw_episode, num_shots=num_shots, num_queries=config.num_queries)
    hear = jax.jit(
        functools.partial(
            adapt,
            gradients(make_loss(net, axis_name=None)),
            optimizer=adam_or_sgd(row.tested.rule),
            num_steps=row.num_steps,
        )
    )
    make = sounds_of(net, config.seconds)
    before, after, true = [], [], []
    for i, (speaker, (pieces, recordings)) in enumerate(speakers.items()):
        key = jax.random.fold_in(jax.random.key(SOUND_SEED), i)
        episode_key, adapt_key, sound_key = jax.random.split(key, 3)
        support = draw(episode_key, pieces).support
        adapted = hear(row.tested.init, support, adapt_key)
        # The recordings themselves whose pieces are the queries: not those that it hears.
        numbers = jnp.arange(len(recordings.labels))
        queries = draw(episode_key, pieces._replace(examples=numbers)).query
        chosen = np.asarray(queries)[: config.num_samples]
        labels = recordings.labels[chosen]
        words = np.eye(len(recordings.label_names), dtype=np.float32)[labels]
        names = [f"{recordings.label_names[label]} by {speaker}" for label in labels]
        for found, params in ((before, row.tested.init), (after, adapted.params)):
            found += zip(names, make(params, sound_key, words), strict=True)
        true += zip(names, [recordings.of(int(j)) / 2**15 for j in chosen], strict=True)
    rows = {"before": before, "after": after, "true": true}
    named = [[(f"{what}: {name}", x) for name, x in sounds] for what, sounds in rows.items()]
    folder = config.run_dir / "samples"
    write_sounds(folder, [(f"{name}, {what}", x) for what, of in rows.items() for name, x in of])
    plot_spectrograms(
        named,
        config.run_dir / "spectrograms.png",
        title=f"WaveNet of {config.source} by MAML: sounds before and after {num_shots} recordings,"
        " and true ones",
        rate=RATE,
    )
    print(f"sounds are in {folder}: {3 * len(true)} WAV files")
    print(f"pictures are in {config.run_dir}: bits_by_shots.png, spectrograms.png")
