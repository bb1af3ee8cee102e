"""Speech of people never heard in training, by a WaveNet that learns from a few recordings.

    python -m experiments.few_shot_speech                            # embedded voices
    python -m experiments.few_shot_speech --preset digits --data-dir DIR

A WaveNet of mu-law codes is trained by maximum likelihood, told what is said but not by whom, on
some speakers. From there two nets go on, for as many gradients: one as before, the other by MAML,
whose tasks are speakers. Both then adapt to recordings of each test speaker by steps of SGD or of
Adam, whose number and rate the validation speakers choose. Reports bits a sample of pieces of other
recordings of the speaker after 0, 1 and 5 such pieces, exact, and how many fewer MAML needs. Few
speakers are trained on, and fewer tested: intervals are over episodes of one speaker, and tell
nothing of others. Writes to the run's folder: `result.json`, `bits_by_shots.png`, sounds before and
after adaptation beside true ones as WAV files under `samples/` and in `spectrograms.png`, and for
each of the three trainings metrics and checkpoints.

Results, with command, machine, minutes and seeds, stand in experiments/README.md.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Array, PyTree

from experiments import few_shot_speech_report, program
from experiments.few_shot_speech_config import PRESETS, Config, check, with_gradient
from experiments.few_shot_speech_data import Speech, Splits, draw_episode, draw_task, load_splits
from experiments.few_shot_speech_report import CONVENTIONAL, MAML, Row, mean_of
from experiments.fine_tuning import adam_or_sgd, at_rates
from experiments.speech_model import draw_batch, first_params, make_log_prob, make_loss, make_net
from metagen_jax.data.episodes import ClassData
from metagen_jax.evaluation.estimates import Estimate, estimate, estimate_ratio
from metagen_jax.evaluation.few_shot import Sample
from metagen_jax.evaluation.likelihood_by_shots import (
    adapted_log_probs,
    choose_adaptation,
    evaluate_nll,
)
from metagen_jax.gradients import gradients, mean_over_tasks, task_keys
from metagen_jax.meta.maml import maml_loss
from metagen_jax.nets.wavenet import WaveNet
from metagen_jax.parallel import data_parallel, replicate
from metagen_jax.training import FitResult, fit, init_state, train_step
from metagen_jax.types import Episode, GradFn, MetaParams, Params, PredictFn, PRNGKey

# Of the episodes, the same for every --seed.
CHOICE_SEED, TEST_SEED = 1_000_000_002, 1_000_000_003
START = "start"


def key_of(config: Config, name: str) -> PRNGKey:
    """Of the first parameters, or of a training: no two draw alike."""
    index = ("parameters", START, MAML, CONVENTIONAL).index(name)
    return jax.random.fold_in(jax.random.key(config.seed), index)


def learn(
    config: Config,
    name: str,
    grad_fn: GradFn,
    sample: Callable[[PRNGKey, Any], PyTree],
    params: Params,
    data: PyTree,
    *,
    steps: int,
    rate: float,
    count: int,
) -> FitResult:
    """Trains on so many examples or tasks a step; the last parameters are the result."""
    print(f"training: {name}, {steps} steps")
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))
    devices = program.devices_for(config.num_devices, count)
    state = init_state(params, optimizer, key_of(config, name))
    state, data = replicate((state, data), devices=devices)
    step = train_step(data_parallel(grad_fn, devices=devices), optimizer, sample)
    folder = config.run_dir / name.lower()
    return fit(step, state, data, num_steps=steps, run_dir=folder, resume=config.resume)


def train(config: Config, net: WaveNet, data: Speech) -> dict[str, FitResult]:
    """All trainings by name; both nets begin where the first ends."""

    def tasks(key: PRNGKey, data: Speech) -> Episode:
        draw = functools.partial(draw_task, config)
        return jax.vmap(draw, in_axes=(0, None))(task_keys(key, config.num_tasks), data)

    in_batches = functools.partial(
        learn,
        config,
        grad_fn=gradients(make_loss(net)),
        sample=functools.partial(draw_batch, config),
        data=data.sounds,
        count=config.batch_size,
    )
    meta = maml_loss(
        make_loss(net, axis_name=None),
        inner_optimizer=optax.sgd(config.inner_rate),
        num_steps=config.inner_steps,
        gradient=config.gradient,
    )
    params = first_params(key_of(config, "parameters"), net, data.sounds)
    start = in_batches(START, params=params, steps=config.steps, rate=config.rate)
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
        ),
    }


def bits_a_sample(nats: Estimate, counts: Estimate) -> Estimate:
    """The bits of all episodes by their samples, of the nats and the samples of each."""
    return estimate_ratio(nats.per_task / np.log(2), counts.per_task)


def count_samples(params: Params, support: PyTree, queries: PyTree, key: PRNGKey) -> Array:
    """What `evaluate_nll` takes to give how many samples of a query count."""
    del params, support, key
    excerpts, _ = queries
    return -excerpts.counted.sum(-1).astype(np.float32)


def evaluate(
    config: Config, net: WaveNet, trained: Mapping[str, Params], splits: Splits
) -> dict[str, dict[int, Row]]:
    """The test of each net by number of recordings heard."""
    sample = functools.partial(
        draw_episode, num_shots=max(config.shots), num_queries=config.num_queries
    )

    @functools.cache
    def after(num_steps: int, every_step: bool = False) -> PredictFn:
        return adapted_log_probs(
            make_loss(net, axis_name=None),
            make_log_prob(net),
            rule=adam_or_sgd,
            num_steps=num_steps,
            every_step=every_step,
        )

    def test(log_probs: PredictFn, params: Any, num_shots: int) -> dict[str, Estimate]:
        return {
            name: evaluate_nll(
                log_probs,
                params,
                sample,
                speaker.pieces,
                num_shots=num_shots,
                key=jax.random.fold_in(jax.random.key(TEST_SEED), i),
                num_tasks=config.num_test_tasks,
                devices=jax.local_devices()[: config.num_devices],
            )
            for i, (name, speaker) in enumerate(splits.test.items())
        }

    counts = test(count_samples, (), 0)
    rows: dict[str, dict[int, Row]] = {name: {} for name in trained}
    for net_name, params in trained.items():
        print(f"testing: {net_name}")
        candidates = at_rates(params, config.rates)
        for num_shots in config.shots:
            rate, steps = None, 0
            if num_shots:
                ask = after(config.test_steps, every_step=True)
                rate, steps = choose(config, ask, candidates, sample, splits.val, num_shots)
            tested = candidates[rate or next(iter(candidates))]
            nats = test(after(steps), tested, num_shots)
            bits = {name: bits_a_sample(nats[name], counts[name]) for name in nats}
            rows[net_name][num_shots] = Row(bits, steps, rate, tested)
            print(f"{num_shots} recordings: {mean_of(bits):.3f} bits a sample")
    return rows


def choose(
    config: Config,
    log_probs: PredictFn,
    candidates: Mapping[str, MetaParams],
    sample: Sample,
    val: ClassData,
    num_shots: int,
) -> tuple[str, int]:
    """The rate, with its optimiser, and the number of steps that validate best.

    The same samples count whatever these are, so that the fewest nats are the fewest bits a sample.
    """
    chosen = choose_adaptation(
        log_probs,
        candidates,
        sample,
        val,
        num_shots=num_shots,
        key=jax.random.key(CHOICE_SEED),
        num_tasks=config.num_choice_tasks,
        devices=jax.local_devices()[: config.num_devices],
    )
    return chosen.candidate, chosen.num_steps


def main(config: Config) -> dict[str, Any]:
    """Trains, tests, prints the table, draws pictures, makes sounds; gives the numbers by name."""
    check(config)
    net = make_net(config)
    splits = load_splits(config, reach=net.receptive_field)
    counts = " / ".join(map(str, config.num_speakers))
    print(f"{config.source}: {counts} speakers for training / validation / test")
    trained = train(config, net, splits.train)
    nets = {name: trained[name].best_params for name in (MAML, CONVENTIONAL)}
    rows = evaluate(config, net, nets, splits)
    less = {
        num_shots: {
            name: estimate(of.per_task - rows[MAML][num_shots].bits[name].per_task)
            for name, of in row.bits.items()
        }
        for num_shots, row in rows[CONVENTIONAL].items()
    }
    few_shot_speech_report.print_table(config, rows, less)
    few_shot_speech_report.draw_bits(config, rows)
    few_shot_speech_report.make_samples(config, net, rows[MAML][max(config.shots)], splits.test)
    return {
        "num_parameters": sum(x.size for x in jax.tree.leaves(nets[MAML])),
        "train_seconds": {name: round(of.train_seconds, 1) for name, of in trained.items()},
        **few_shot_speech_report.numbers_of(config, rows, less),
    }


if __name__ == "__main__":
    program.run("few_shot_speech", main, PRESETS, default="voices", vary=with_gradient)
