"""Speech of people never heard in training, by a WaveNet that learns from a few recordings.

    python -m experiments.few_shot_speech                            # embedded tones
    python -m experiments.few_shot_speech --preset digits --data-dir DIR

A WaveNet of mu-law codes is trained by maximum likelihood, told what is said but not by whom, on
some speakers. From there two nets go on, for as many gradients: one as before, the other by MAML,
whose tasks are speakers. Both then adapt to recordings of each test speaker by gradient steps,
whose number and rate the validation speakers choose. Reports bits a sample of other recordings of
the speaker after 0, 1 and 5. Few speakers are trained on, and fewer tested; an interval over
episodes knows nothing of other speakers, so each stands by itself. Writes to the run's folder:
`result.json`, `bits_by_shots.png`, and for each of three trainings metrics and checkpoints.

Results, with command, machine, minutes and seeds, stand in experiments/README.md.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
import rich.table
from jaxtyping import Array, PyTree

from experiments import program
from experiments.excerpts import Excerpt, cut, excerpt_loss
from experiments.few_shot_speech_config import PRESETS, Config, check, with_source
from experiments.speech_config import SourceName
from experiments.speech_data import to_sounds
from experiments.speech_model import make_log_prob, make_net
from metagen_jax.data.audio import Recordings, load_recordings
from metagen_jax.data.episodes import ClassData, group_by_class, sample_batch, sample_episode
from metagen_jax.evaluation.estimates import Estimate, estimate
from metagen_jax.evaluation.likelihood_by_shots import (
    adapted_log_probs,
    choose_adaptation,
    evaluate_nll,
)
from metagen_jax.evaluation.shot_curves import plot_nll_by_shots
from metagen_jax.gradients import gradients, mean_over_tasks, task_keys
from metagen_jax.meta.maml import maml_loss
from metagen_jax.nets.wavenet import WaveNet
from metagen_jax.parallel import data_parallel, replicate
from metagen_jax.training import FitResult, fit, init_state, train_step
from metagen_jax.types import Episode, GradFn, LossFn, MetaParams, Params, PRNGKey

# Of the pieces of recordings, and of the episodes, the same for every --seed.
PIECE_SEED, CHOICE_SEED, TEST_SEED = 1_000_000_001, 1_000_000_002, 1_000_000_003
START, MAML, CONVENTIONAL = "start", "MAML", "conventional"

# Speakers of training, validation and test, by their place among the sorted names.
_PARTS: dict[SourceName, tuple[int, int]] = {"tones": (1, 2), "free_spoken_digit": (3, 4)}


class Splits(NamedTuple):
    """Excerpts with what is said in them, by speaker; the test speakers by name."""

    train: ClassData
    val: ClassData
    test: dict[str, ClassData]


def load_splits(config: Config) -> Splits:
    """One piece of each recording, from a place that is drawn; no speaker is in two parts."""
    excerpts, speakers, names = [], [], ()
    rng = np.random.default_rng(PIECE_SEED)
    for split in ("train", "validation", "test"):
        recordings = load_recordings(config.source, split, data_dir=config.data_dir)
        excerpts.append(one_piece_each(config, recordings, rng))
        speakers.append(recordings.speakers)
        names = recordings.speaker_names
    examples = jax.tree.map(lambda *x: np.concatenate(x), *excerpts)
    speakers = np.concatenate(speakers)

    def of(first: int, after: int) -> ClassData:
        rows = (speakers >= first) & (speakers < after)
        return group_by_class(jax.tree.map(lambda x: x[rows], examples), speakers[rows])

    first, after = _PARTS[config.source]
    test = {names[i]: of(i, i + 1) for i in range(after, len(names))}
    return Splits(of(0, first), of(first, after), test)


def one_piece_each(
    config: Config, recordings: Recordings, rng: np.random.Generator
) -> tuple[Excerpt, np.ndarray]:
    """An excerpt of each recording, and what is said in it, one-hot."""
    sounds = to_sounds(recordings, conditional=True)
    pieces = cut(sounds, length=config.excerpt, reach=config.warm_up)
    _, first, counts = np.unique(pieces.owners, return_index=True, return_counts=True)
    chosen = first + rng.integers(0, counts)
    excerpts = Excerpt(*(np.asarray(x)[chosen] for x in pieces.excerpts))
    return excerpts, np.asarray(sounds.conditions)[:, : len(recordings.label_names)]


def loss_of(net: WaveNet, *, axis_name: str | None) -> LossFn:
    """Nats a sample of excerpts."""

    def predict(params: Params, codes: Array, said: Array) -> Any:
        return net.apply(params, codes, said)

    return excerpt_loss(predict, axis_name=axis_name)


def learn(
    config: Config,
    name: str,
    grad_fn: GradFn,
    sample: Callable[[PRNGKey, ClassData], PyTree],
    params: Params,
    data: ClassData,
    *,
    steps: int,
    rate: float,
    count: int,
) -> FitResult:
    """Trains on so many examples or tasks a step; the last parameters are the result."""
    print(f"training: {name}, {steps} steps")
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))
    devices = program.devices_for(config.num_devices, count)
    state = init_state(params, optimizer, jax.random.key(config.seed))
    state, data = replicate((state, data), devices=devices)
    step = train_step(data_parallel(grad_fn, devices=devices), optimizer, sample)
    folder = config.run_dir / name.lower()
    return fit(step, state, data, num_steps=steps, run_dir=folder, resume=config.resume)


def draw_episode(key: PRNGKey, data: ClassData, *, num_shots: int, num_queries: int) -> Episode:
    """Recordings of one speaker to learn from, and others of the same."""
    drawn = sample_episode(key, data, num_ways=1, num_shots=num_shots, num_queries=num_queries)
    return Episode(drawn.support[0], drawn.query[0])


def train(config: Config, net: WaveNet, data: ClassData) -> dict[str, FitResult]:
    """All trainings by name; both nets begin where the first ends."""

    def batch(key: PRNGKey, data: ClassData) -> PyTree:
        return sample_batch(key, data, batch_size=config.batch_size)[0]

    episode = functools.partial(
        draw_episode, num_shots=config.num_shots, num_queries=config.num_queries
    )

    def tasks(key: PRNGKey, data: ClassData) -> Episode:
        return jax.vmap(episode, in_axes=(0, None))(task_keys(key, config.num_tasks), data)

    conventional = gradients(loss_of(net, axis_name="tasks"))
    meta = maml_loss(
        loss_of(net, axis_name=None),
        inner_optimizer=optax.sgd(config.inner_rate),
        num_steps=config.inner_steps,
        gradient=config.gradient,
    )
    (codes, _), said = data.examples
    init = jax.jit(net.init)(jax.random.key(config.seed), codes[:1], said[:1])
    in_batches = functools.partial(learn, config, grad_fn=conventional, sample=batch, data=data)
    start = in_batches(
        START, params=init, steps=config.steps, rate=config.rate, count=config.batch_size
    )
    # Gradients of recordings in an outer step.
    each = config.num_tasks * (config.inner_steps * config.num_shots + config.num_queries)
    return {
        START: start,
        MAML: learn(
            config,
            MAML,
            mean_over_tasks(gradients(meta), chunk=1),
            tasks,
            start.best_params,
            data,
            steps=config.meta_steps,
            rate=config.meta_rate,
            count=config.num_tasks,
        ),
        CONVENTIONAL: in_batches(
            CONVENTIONAL,
            params=start.best_params,
            steps=max(1, config.meta_steps * each // config.batch_size),
            rate=config.meta_rate,
            count=config.batch_size,
        ),
    }


class Row(NamedTuple):
    """Bits a sample of each test speaker after so many steps at such a rate."""

    bits: dict[str, Estimate]
    num_steps: int
    rate: float | None


def evaluate(config: Config, net: WaveNet, params: Params, splits: Splits) -> dict[int, Row]:
    """The test by number of recordings, each with the steps and the rate that validate best."""
    log_prob = make_log_prob(net)

    def bits_of_one(params: Params, example: PyTree, key: PRNGKey) -> Array:
        """Mean over the recording's samples."""
        return log_prob(params, example, key) / example[0].counted.sum() / np.log(2)

    sample = functools.partial(
        draw_episode, num_shots=max(config.shots), num_queries=config.num_queries
    )
    after = functools.partial(
        adapted_log_probs, loss_of(net, axis_name=None), bits_of_one, rule=optax.sgd
    )
    devices = jax.local_devices()[: config.num_devices]
    ask = after(num_steps=config.test_steps, every_step=True)
    candidates = {rate: MetaParams(params, jnp.float32(rate)) for rate in config.rates}
    rows = {}
    for num_shots in config.shots:
        rate, steps = None, 0
        if num_shots:
            chosen = choose_adaptation(
                ask,
                candidates,
                sample,
                splits.val,
                num_shots=num_shots,
                key=jax.random.key(CHOICE_SEED),
                num_tasks=config.num_choice_tasks,
                devices=devices,
            )
            rate, steps = chosen.candidate, chosen.num_steps
        adapted = after(num_steps=steps)
        bits = {
            speaker: evaluate_nll(
                adapted,
                candidates[rate or config.rates[0]],
                sample,
                data,
                num_shots=num_shots,
                key=jax.random.key(TEST_SEED),
                num_tasks=config.num_test_tasks,
                devices=devices,
            )
            for speaker, data in splits.test.items()
        }
        rows[num_shots] = Row(bits, steps, rate)
        print(f"{num_shots} recordings: {pooled(bits).mean:.3f} bits a sample")
    return rows


def pooled(bits: dict[str, Estimate]) -> Estimate:
    """Over the episodes of all speakers."""
    return estimate(np.concatenate([of.per_task for of in bits.values()]))


def main(config: Config) -> dict[str, Any]:
    """Trains, tests, prints the table, draws the picture; gives the numbers by name."""
    check(config)
    splits = load_splits(config)
    print(
        f"{config.source}: {len(splits.train.sizes)} / {len(splits.val.sizes)} / "
        f"{len(splits.test)} speakers for training / validation / test"
    )
    net = make_net(config)
    trained = train(config, net, splits.train)
    rows = {}
    for name in (MAML, CONVENTIONAL):
        print(f"testing: {name}")
        rows[name] = evaluate(config, net, trained[name].best_params, splits)
    less = {
        n: estimate(
            pooled(rows[CONVENTIONAL][n].bits).per_task - pooled(rows[MAML][n].bits).per_task
        )
        for n in config.shots
    }
    print_table(config, rows, less)
    file = config.run_dir / "bits_by_shots.png"
    plot_nll_by_shots(
        {
            f"{name}: {speaker}": {n: row.bits[speaker] for n, row in of.items()}
            for name, of in rows.items()
            for speaker in splits.test
        },
        file,
        title=f"WaveNet of {config.source}: people never heard in training",
        unit="bits a sample",
    )
    print(f"the picture is {file}")
    return {
        "num_parameters": sum(x.size for x in jax.tree.leaves(trained[MAML].best_params)),
        "train_seconds": {name: round(of.train_seconds, 1) for name, of in trained.items()},
        "bits_by_shots": {
            name: {str(n): _numbers(row) for n, row in of.items()} for name, of in rows.items()
        },
        "maml_needs_less": {
            str(n): {"bits": float(x.mean), "interval": float(x.interval)} for n, x in less.items()
        },
    }


def _numbers(row: Row) -> dict[str, Any]:
    numbers: dict[str, Any] = {"steps": row.num_steps, "rate": row.rate}
    for name, of in {"all": pooled(row.bits), **row.bits}.items():
        numbers |= {name: float(of.mean), f"{name}, interval": float(of.interval)}
    return numbers


def print_table(config: Config, rows: dict[str, dict[int, Row]], less: dict[int, Estimate]) -> None:
    """A row for each net and number of recordings."""
    speakers = list(next(iter(rows[MAML].values())).bits)
    table = rich.table.Table(
        title=f"Bits a sample of {config.source}, speakers never heard in training",
        caption=f"mean ± 95 % interval over {config.num_test_tasks} episodes of each speaker; "
        "steps and rate chosen on other speakers",
    )
    for column in ("net", "recordings", "steps (rate)"):
        table.add_column(column)
    for column in (*speakers, "MAML needs less by"):
        table.add_column(column, justify="right")
    for name, of in rows.items():
        for n, row in of.items():
            steps = f"{row.num_steps} ({row.rate:g})" if row.rate else "none"
            cells = [f"{x.mean:.3f} ± {x.interval:.3f}" for x in row.bits.values()]
            gain = f"{less[n].mean:.3f} ± {less[n].interval:.3f}" if name != MAML else ""
            table.add_row(name, str(n), steps, *cells, gain)
    rich.console.Console(width=110).print(table)


if __name__ == "__main__":
    program.run("few_shot_speech", main, PRESETS, default="tones", vary=with_source)
