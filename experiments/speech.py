"""Speech, sample by sample: how many bits a model needs for recordings, and sounds that it makes.

    python -m experiments.speech                                     # embedded tones
    python -m experiments.speech --preset digits --data-dir DIR
    python -m experiments.speech --preset digits --data-dir DIR --resume --digit 7 --speaker jackson

Trains a WaveNet of mu-law codes by maximum likelihood, told who speaks and what is said, keeps the
parameters that validate best, and reports bits a sample of the test recordings, exact, beside those
of linear prediction with Laplace noise, of amplitudes and of codes, and of an n-gram of codes.
Writes to the run's folder: `result.json`, `learning_curve.png`, `spectrograms.png`, the samples as
WAV files under `samples/`, metrics, checkpoints. A run that is done can be resumed to make others.

Results, with command, machine, minutes and seeds, stand in experiments/README.md.
"""

import functools
from typing import Any

import jax
import optax

from experiments import program, speech_report
from experiments.excerpts import Sequences, cut
from experiments.speech_config import PRESETS, Config, check, with_conditional
from experiments.speech_data import load_splits, to_sounds
from experiments.speech_model import (
    bits_a_sample,
    draw_batch,
    first_params,
    key_of,
    make_log_prob,
    make_loss,
    make_net,
    references,
)
from metagen_jax.evaluation.estimates import Estimate, estimate
from metagen_jax.generative.maximum_likelihood import LogProb
from metagen_jax.gradients import gradients
from metagen_jax.nets.wavenet import WaveNet
from metagen_jax.parallel import data_parallel, replicate
from metagen_jax.training import FitResult, fit, init_state, train_step
from metagen_jax.types import Params


def train(
    config: Config, net: WaveNet, log_prob: LogProb, sounds: Sequences, val: Sequences
) -> FitResult:
    """Trains the net; the parameters that validate best are the result."""
    pieces = cut(val, length=config.excerpt, reach=net.receptive_field)

    def validate(params: Params) -> dict[str, float]:
        return {"bits": float(bits_a_sample(config, log_prob, params, pieces).mean)}

    optimizer = optax.adam(optax.cosine_decay_schedule(config.rate, config.steps))
    init_key, train_key = jax.random.split(jax.random.key(config.seed))
    params = first_params(init_key, net, sounds)
    devices = program.devices_for(config.num_devices, config.batch_size)
    grad_fn = data_parallel(gradients(make_loss(net)), devices=devices)
    state, data = replicate((init_state(params, optimizer, train_key), sounds), devices=devices)
    return fit(
        train_step(grad_fn, optimizer, functools.partial(draw_batch, config)),
        state,
        data,
        num_steps=config.steps,
        run_dir=config.run_dir,
        validate=validate,
        validate_every=config.validate_every,
        best_metric=("bits", "min"),
        resume=config.resume,
    )


def main(config: Config) -> dict[str, Any]:
    """Trains, tests, prints the table, makes sounds and pictures; gives the numbers by name."""
    check(config)
    recordings = load_splits(config)
    speech_report.conditions_asked(config, recordings.test)  # Before training, if it is a mistake.
    splits = [to_sounds(part, conditional=config.conditional) for part in recordings]
    counts = " / ".join(f"{len(part.labels):,}" for part in recordings)
    print(f"{config.source}: {counts} recordings for training / validation / test")
    net = make_net(config)
    log_prob = make_log_prob(net)
    print(f"training a WaveNet that sees {net.receptive_field} samples")
    result = train(config, net, log_prob, *splits[:2])
    params = result.best_params
    print("testing")
    pieces = cut(splits[2], length=config.excerpt, reach=net.receptive_field)
    bits = {"WaveNet": bits_a_sample(config, log_prob, params, pieces)}
    bits |= references(config, splits[0], splits[2])
    numbers = {
        "num_test": len(recordings.test.labels),
        "num_test_samples": len(recordings.test.samples),
        **compare(bits),
        "receptive_field": net.receptive_field,
        "num_parameters": sum(x.size for x in jax.tree.leaves(params)),
        "validation_bits": result.best_validation["bits"],
        "best_step": result.best_step,
        "train_seconds": round(result.train_seconds, 1),
        "validation_seconds": round(result.validation_seconds, 1),
        "excerpts_per_second": round(result.steps_per_second * config.batch_size, 2),
    }
    speech_report.print_table(config, numbers, bits)
    speech_report.draw_learning_curve(config)
    speech_report.make_samples(config, net, params, recordings.test)
    return numbers


def compare(bits: dict[str, Estimate]) -> dict[str, float]:
    """Bits a sample of each model by name, and how many fewer the first needs than each other."""
    numbers, first = {}, next(iter(bits.values()))
    for name, of in bits.items():
        key = key_of(name)
        numbers |= {f"{key}_bits": float(of.mean), f"{key}_interval": float(of.interval)}
        if of is not first:
            gain = estimate(of.per_task - first.per_task)
            numbers |= {f"gain_over_{key}": float(gain.mean)}
            numbers |= {f"gain_over_{key}_interval": float(gain.interval)}
    return numbers


if __name__ == "__main__":
    program.run("speech", main, PRESETS, default="tones", vary=with_conditional)
