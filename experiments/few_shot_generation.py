"""Images of characters never seen in training, by models that learn from a few examples.

    python -m experiments.few_shot_generation                    # embedded letters, MAML and a VAE
    python -m experiments.few_shot_generation --preset omniglot-lake --data-dir DIR \
        --learner reptile --model pixelcnn
    python -m experiments.few_shot_generation --preset omniglot-lake --data-dir DIR \
        --model attention_pixelcnn
    python -m experiments.few_shot_generation --preset omniglot-lake --data-dir DIR \
        --learner pretrained --model vae                            # the baseline of MAML's VAE
    python -m experiments.few_shot_generation --preset omniglot-lake --data-dir DIR \
        --learner pretrained --model vae --steps 195000 --shots 0 --run-dir runs/start
    python -m experiments.few_shot_generation --preset omniglot-lake --data-dir DIR \
        --model vae --init-from runs/start                  # MAML, in the minutes of that baseline

Trains on classes of their own, keeps the parameters that are best on validation classes, and
reports `nll_by_shots`: the negative log-likelihood, in nats, of the next image of a test class
given T of its images, with its 95 % interval over episodes. How many steps are taken on these, and
at what rate, is chosen for each T on validation classes, where bounds have fewer samples than at
test. Writes to the run's folder: `result.json`, `nll_by_shots.png`, `nll_by_shots.npz` (the values
of each episode, so that two runs may be compared in pairs), `samples.png` (support images, new
samples before and after), `learning_curve.png`, metrics, checkpoints. `--against RUN_DIR` compares
with such another run. With `--resume` a trained model is tested again, by other settings of the
test (`Config.MAY_CHANGE`) if these are given; what the first test has written is then written anew,
so copy the folder before.

`--model gan` is FIGR (Clouatre and Demers 2019), Reptile over a GAN, which has samples alone.
`--use-tasks 200` asks what samples are good for: the accuracy of a small net trained on few images
of five classes and on samples made from them, against that on the images alone.

Presets: `omniglot-lake` has the pixels of Generative Matching Networks (Bartunov and Vetrov 2018)
bit by bit. There, support and query are drawn with replacement, so that with 9 shots 37 % of all
queries are among the support images (5 % with 1, 19 % with 4); here they never are, unless by
`--replacement test` or `always`.
`omniglot-characters` has the split sizes of SCHA-VAE, pixels drawn from the grey values of a
filter; `omniglot-alphabets` 26 pixels, 45 and 5 alphabets, as Reed et al. 2018. Of the first and
the last, `--sets-of alphabets` takes an episode's images from an alphabet and not from a character.

Results, with command, machine, minutes and seeds, stand in experiments/README.md.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import PyTree

from experiments import few_shot_generation_report, program
from experiments.few_shot_generation_compare import load_other
from experiments.few_shot_generation_config import Config, check
from experiments.few_shot_generation_data import (
    VALIDATION_SHOTS,
    Splits,
    load_splits,
    test_episodes,
    validation_episodes,
)
from experiments.few_shot_generation_learners import Learner, make_learner
from experiments.few_shot_generation_presets import PRESETS, with_model
from experiments.few_shot_generation_report import Row
from experiments.few_shot_generation_start import (
    Averaged,
    check_resumed,
    check_start,
    first_params,
)
from experiments.few_shot_generation_use import use_and_report
from metagen_jax.data.episodes import ClassData
from metagen_jax.evaluation.few_shot import Sample
from metagen_jax.evaluation.likelihood_by_shots import choose_adaptation, evaluate_nll
from metagen_jax.gradients import mean_over_tasks, task_keys
from metagen_jax.parallel import data_parallel, replicate
from metagen_jax.training import FitResult, fit, init_state, train_step
from metagen_jax.types import Metrics, Params, PRNGKey

# Of the episodes of validation and test, the same for every --seed and unlike any likely one.
VALIDATION_SEED, CHOICE_SEED, TEST_SEED = 1_000_000_001, 1_000_000_002, 1_000_000_003


def train(config: Config, learner: Learner, params: Params, splits: Splits) -> FitResult:
    """Trains; the parameters that validate best are the result."""
    grad_fn = learner.grad_fn
    assert grad_fn is not None
    # A short run would else end with an average of what it began with.
    average_rate = max(1 - config.average_decay, min(10 / config.steps, 1.0))

    def sample(key: PRNGKey, data: PyTree) -> PyTree:
        return jax.vmap(learner.sample, in_axes=(0, None))(task_keys(key, config.num_tasks), data)

    def direction(params: Averaged, task: PyTree, key: PRNGKey) -> tuple[Averaged, Metrics]:
        gradient, metrics = grad_fn(params.current, task, key)
        return Averaged(gradient, optax.tree.zeros_like(params.average)), metrics

    def update_average(params: Averaged, batch: PyTree, key: PRNGKey) -> Averaged:
        del batch, key
        average = optax.incremental_update(params.current, params.average, average_rate)
        return params._replace(average=average)

    rate, warmup = config.outer_rate, config.warmup_steps
    schedule = optax.cosine_decay_schedule(rate, config.steps)
    if warmup:
        schedule = optax.warmup_cosine_decay_schedule(0.0, rate, warmup, config.steps)
    optimizer = {"adam": optax.adam, "sgd": optax.sgd}[config.outer_optimizer](schedule)
    update_slow = None
    if config.average_decay:
        params, over_one, update_slow = Averaged(params, params), direction, update_average
    else:
        over_one = grad_fn
    devices = program.devices_for(config.num_devices, config.num_tasks)
    over_tasks = data_parallel(mean_over_tasks(over_one, chunk=config.chunk), devices=devices)
    _, train_key = jax.random.split(jax.random.key(config.seed))
    state, data = replicate(
        (init_state(params, optimizer, train_key), splits.train), devices=devices
    )
    result = fit(
        train_step(over_tasks, optimizer, sample, update_slow=update_slow),
        state,
        data,
        num_steps=config.steps,
        run_dir=config.run_dir,
        tasks_per_step=config.num_tasks,
        validate=None if learner.log_probs is None else validation(config, learner, splits.val),
        validate_every=config.validate_every,
        best_metric=("nll", "min"),
        resume=config.resume,
    )
    if config.average_decay:
        result = result._replace(best_params=result.best_params.average)
    return result


def validation(
    config: Config, learner: Learner, data: ClassData
) -> Callable[[Params], dict[str, float]]:
    """`validate(params) -> {"nll": the mean over numbers of shots}`, as in training."""
    adapts = config.learner != "pretrained"
    shots, steps = (VALIDATION_SHOTS, config.inner_steps) if adapts else ((0,), 0)
    sample = validation_episodes(config)

    def validate(params: Params | Averaged) -> dict[str, float]:
        assert learner.log_probs is not None
        params = params.average if isinstance(params, Averaged) else params
        tested = next(iter(learner.candidates(params).values()))
        figures = [
            evaluate_nll(
                learner.log_probs(steps, "validation"),
                tested,
                sample,
                data,
                num_shots=num_shots,
                key=jax.random.key(VALIDATION_SEED),
                num_tasks=config.num_validation_tasks,
                **places(config),
            )
            for num_shots in shots
        ]
        return {"nll": float(np.mean([nll.mean for nll in figures]))}

    return validate


def places(config: Config) -> dict[str, Any]:
    """How many episodes are evaluated at once, and where."""
    return {"chunk": config.chunk, "devices": jax.local_devices()[: config.num_devices]}


def evaluate(
    config: Config, learner: Learner, params: Params, splits: Splits, sample_test: Sample
) -> dict[int, Row]:
    """The test by number of shots, each with the steps and the rate that validate best."""
    assert learner.log_probs is not None
    rows = {}
    for num_shots in config.shots:
        candidates, rate, steps = learner.candidates(params), None, 0
        if learner.takes_steps and num_shots:
            chosen = choose_adaptation(
                learner.log_probs(config.test_steps, "choice"),
                candidates,
                sample_test,
                splits.val,
                num_shots=num_shots,
                key=jax.random.key(CHOICE_SEED),
                num_tasks=config.num_choice_tasks,
                **places(config),
            )
            rate, steps = chosen.candidate, chosen.num_steps
        tested = next(iter(candidates.values())) if rate is None else candidates[rate]
        nll = evaluate_nll(
            learner.log_probs(steps, "test"),
            tested,
            sample_test,
            splits.test,
            num_shots=num_shots,
            key=jax.random.key(TEST_SEED),
            num_tasks=config.num_test_tasks,
            **places(config),
        )
        rows[num_shots] = Row(nll, steps, rate, tested)
        print(f"{num_shots} shots: {nll.mean:.2f} ± {nll.interval:.2f} nats")
    return rows


def main(config: Config) -> dict[str, Any]:
    """Trains, tests, prints the table, draws the pictures; gives the numbers by name."""
    check(config)
    check_start(config)
    check_resumed(config)
    other = load_other(config)
    splits = load_splits(config)
    learner = make_learner(config, splits.train.examples.shape[1:])
    counts = " / ".join(str(len(part.sizes)) for part in splits)
    print(f"{config.dataset}: {counts} {config.sets_of} for training / validation / test")
    params = first_params(config, learner, splits.train)
    sample_test = test_episodes(config)
    numbers: dict[str, Any] = {
        "kind": learner.kind,
        "num_test_tasks": config.num_test_tasks,
        "replacement": config.replacement,
        "num_test_classes": len(splits.test.sizes),
        "num_parameters": sum(x.size for x in jax.tree.leaves(params)),
    }
    name = f"{config.model} by {config.learner}"
    if learner.grad_fn is not None:
        print(f"training {name}")
        result = train(config, learner, params, splits)
        params = result.best_params
        numbers |= {
            "best_step": result.best_step,
            "validation_nll_nats": result.best_validation.get("nll"),
            "train_seconds": round(result.train_seconds, 1),
            "validation_seconds": round(result.validation_seconds, 1),
            "tasks_per_second": round(result.steps_per_second * config.num_tasks, 1),
        }
    data = "glyphs" if config.dataset == "glyphs" else f"Omniglot, {config.split}"
    drawn = {"never": "", "test": ", tested with replacement", "always": ", with replacement"}
    sets = ", sets of an alphabet" if config.sets_of == "alphabets" else ""
    title = f"{name}, {data}{sets}{drawn[config.replacement]}"
    if learner.log_probs is not None:
        print(f"testing: {learner.kind}")
        rows = evaluate(config, learner, params, splits, sample_test)
        numbers |= few_shot_generation_report.report(
            config, learner, rows, title=title, other=other
        )
    else:
        tested = next(iter(learner.candidates(params).values()))
        rows = dict.fromkeys(config.shots, Row(None, config.test_steps, None, tested))
    few_shot_generation_report.draw(
        config, learner, rows, splits.test, sample_test, title=title, test_seed=TEST_SEED
    )
    if config.use_tasks:
        numbers |= use_and_report(config, learner, rows[config.use_shots], splits.test, TEST_SEED)
    return numbers


if __name__ == "__main__":
    program.run("few_shot_generation", main, PRESETS, default="glyphs", vary=with_model)
