"""Few-shot classification of characters never seen in training, by MAML and other learners.

    python -m experiments.few_shot                                   # embedded glyphs, minutes
    python -m experiments.few_shot --preset omniglot-5w1s --data-dir DIR
    python -m experiments.few_shot --preset omniglot-20w1s --data-dir DIR
    python -m experiments.few_shot --preset omniglot-5w1s --data-dir DIR --learner reptile
    python -m experiments.few_shot --preset omniglot-5w1s --data-dir DIR --labels umtra
    python -m experiments.few_shot --preset omniglot-5w1s --data-dir DIR \
        --init-from runs/representation-omniglot-simclr          # starts from features by SimCLR
    python -m experiments.few_shot --preset omniglot-20w1s --data-dir DIR --learner prototypical \
        --checkpoint runs/few_shot-omniglot-5w1s-prototypical        # tests a run at other ways

Meta-trains the four-block net on episodes of the training classes, keeps the
checkpoint that is best on validation classes, and reports accuracy on `num_test_tasks` episodes of
the test classes: before adaptation and after each step, transductive (queries normalised together,
as published) and inductive (each query by itself), beside nearest neighbours in pixels and a
classifier pretrained on the same classes and fine-tuned on the support set. Writes to the run's
folder: `result.json`, `learning_curve.png`, `episode.png`, `adaptation.png`, metrics, checkpoints.

Results, with command, machine, minutes and seeds, stand in experiments/README.md.
"""

from typing import Any

import jax
import optax
from jaxtyping import PyTree

from experiments import few_shot_report, program
from experiments.few_shot_config import (
    PRESETS,
    Config,
    check,
    check_checkpoint,
    with_learner,
)
from experiments.few_shot_data import (
    load_splits,
    normalise,
    sampler,
    to_class_data,
    training_episodes,
)
from experiments.few_shot_learners import LEARNERS, Learner, make_net
from experiments.few_shot_start import check_start, start_from
from metagen_jax.data.episodes import ClassData, sample_batch
from metagen_jax.evaluation import few_shot
from metagen_jax.gradients import gradients, mean_over_tasks, task_keys
from metagen_jax.parallel import data_parallel, replicate
from metagen_jax.supervised import cross_entropy_loss
from metagen_jax.training import FitResult, fit, init_state, load_params, train_step
from metagen_jax.types import Episode, Params, PRNGKey


def meta_train(
    config: Config,
    learner: Learner,
    data: ClassData,
    val_data: ClassData,
    sample_val: few_shot.Sample,
) -> FitResult:
    """Meta-trains the net; the parameters that validate best are the result."""
    episodes, sample = training_episodes(config, data)

    def sample_tasks(key: PRNGKey, data: PyTree) -> Episode:
        return jax.vmap(sample, in_axes=(0, None))(task_keys(key, config.num_tasks), data)

    def validate(params: Params) -> dict[str, float]:
        accuracies = few_shot.evaluate_few_shot(
            learner.predict,
            params,
            sample_val,
            val_data,
            key=jax.random.key(few_shot_report.VALIDATION_SEED),
            num_tasks=config.num_validation_tasks,
            chunk=config.chunk,
            devices=jax.local_devices()[: config.num_devices],
        )
        return {"accuracy": accuracies["transductive"].mean.max()}

    optimizer = outer_optimizer(config)
    init_key, train_key = jax.random.split(jax.random.key(config.seed))
    params = learner.init(init_key, normalise(data.examples[:1]))
    if config.init_from is not None:
        params = start_from(config.init_from, params)
    devices = program.devices_for(config.num_devices, config.num_tasks)
    grad_fn = data_parallel(mean_over_tasks(learner.grad_fn, chunk=config.chunk), devices=devices)
    state, episodes = replicate(
        (init_state(params, optimizer, train_key), episodes), devices=devices
    )
    return fit(
        train_step(grad_fn, optimizer, sample_tasks, schedule=learner.schedule),
        state,
        episodes,
        num_steps=config.steps,
        run_dir=config.run_dir,
        tasks_per_step=config.num_tasks,
        validate=validate,
        validate_every=config.validate_every,
        resume=config.resume,
    )


def outer_optimizer(config: Config) -> optax.GradientTransformation:
    """Adam or SGD, at a rate that is constant or warms up and decays along a cosine."""
    rate, warmup = config.outer_rate, max(1, config.steps // 50)
    return {"adam": optax.adam, "sgd": optax.sgd}[config.outer_optimizer](
        optax.warmup_cosine_decay_schedule(0.0, rate, warmup, config.steps)
        if config.cosine
        else rate
    )


def pretrain(config: Config, data: ClassData) -> FitResult:
    """A conventional classifier of all training classes, by the same net and optimiser."""
    net = make_net(config, len(data.sizes) * config.rotations)

    def sample(key: PRNGKey, data: ClassData):
        images, labels = sample_batch(key, data, batch_size=128, num_rotations=config.rotations)
        return normalise(images), labels

    optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, config.pretraining_steps))
    init_key, train_key = jax.random.split(jax.random.key(config.seed))
    params = net.init(init_key, normalise(data.examples[:1]))
    return fit(
        train_step(gradients(cross_entropy_loss(net.apply)), optimizer, sample),
        init_state(params, optimizer, train_key),
        data,
        num_steps=config.pretraining_steps,
        run_dir=config.run_dir / "pretrained",
        resume=config.resume,
    )


def main(config: Config) -> dict[str, Any]:
    """Meta-trains, tests, prints the tables, draws the pictures; gives the numbers by name."""
    check(config)
    if config.checkpoint is not None:
        check_checkpoint(config.checkpoint, config)
    if config.init_from is not None:
        check_start(config.init_from, config)
    splits = load_splits(config)
    train = to_class_data(config, splits.train, "training")
    val = to_class_data(config, splits.val, "validation")
    test = to_class_data(config, splits.test, "test")
    describe = " / ".join(str(len(part.sizes) * config.rotations) for part in (train, val, test))
    turned = ", quarter turns being classes of their own" if config.rotations > 1 else ""
    print(f"{config.dataset}: {describe} classes for training / validation / test{turned}")
    name = config.learner if config.labels == "true" else f"{config.learner}, {config.labels}"
    what = f"{config.dataset}, {config.num_ways}-way {config.num_shots}-shot"
    learner = LEARNERS[config.learner](config)
    # The same objects in validation and test, which then share compiled programs.
    samplers = {num_queries: sampler(config, num_queries) for num_queries in config.test_queries}
    numbers: dict[str, Any] = {"num_tasks": config.num_test_tasks}
    pretrained = None
    if config.checkpoint is not None:
        print(f"{name} as {config.checkpoint} has it")
        params = load_params(
            config.checkpoint,
            learner.init(jax.random.key(config.seed), normalise(train.examples[:1])),
        )
    else:
        print(f"meta-training by {name}")
        result = meta_train(config, learner, train, val, samplers[config.test_queries[0]])
        params = result.best_params
        numbers |= {
            "best_step": result.best_step,
            "train_seconds": round(result.train_seconds, 1),
            "validation_seconds": round(result.validation_seconds, 1),
            "tasks_per_second": round(result.steps_per_second * config.num_tasks, 1),
        }
        few_shot_report.draw_learning_curve(
            config.run_dir, title=f"{what}: meta-training by {name}"
        )
        if config.baselines:
            print("pretraining a classifier of all training classes, to fine-tune as a baseline")
            result = pretrain(config, train)
            pretrained = result.best_params
            numbers |= {"pretraining_seconds": round(result.train_seconds, 1)}
    return numbers | few_shot_report.report(
        few_shot_report.Subject(
            name=name,
            predict=learner.predict,
            params=params,
            pretrained=pretrained,
            apply=make_net(config, config.num_ways).apply,
        ),
        samplers,
        val,
        test,
        what=what,
        num_ways=config.num_ways,
        num_tasks=config.num_test_tasks,
        chunk=config.chunk,
        devices=jax.local_devices()[: config.num_devices],
        run_dir=config.run_dir,
    )


if __name__ == "__main__":
    program.run("few_shot", main, PRESETS, default="glyphs", vary=with_learner)
