"""The task "masked" of `experiments.language`: hidden tokens, beside counts of neighbours."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table
from jaxtyping import Float, Int

from experiments.language_config import Config
from experiments.language_data import Corpus, over_texts
from experiments.language_encoder import (
    TEST_SEED,
    hidden_losses,
    hide,
    net_of,
    rows_of,
    train_encoder,
)
from metagen_jax.data.text import MASK, PAD, Rows, decode
from metagen_jax.errors import writing
from metagen_jax.evaluation import plots
from metagen_jax.evaluation.estimates import Estimate, estimate
from metagen_jax.evaluation.figures import COLOURS, finish, new_figure, save
from metagen_jax.evaluation.neighbour_counts import (
    fit_neighbour_counts,
    neighbour_log_prob,
    neighbours,
)
from metagen_jax.runs.log import read_metrics
from metagen_jax.self_supervised.masked_language import Masked
from metagen_jax.types import Params

NET, UNIGRAM, NEIGHBOURS = "transformer", "unigram", "two-sided trigram"
_BLOCK_SIZE = 256
_NUM_SHOWN = 8


class Found(NamedTuple):
    """Of each hidden token the nats that a model gives it, and 1 if it is its first choice."""

    nats: Float[np.ndarray, " m"]
    right: Float[np.ndarray, " m"]


def main(config: Config, corpus: Corpus) -> dict[str, Any]:
    """Trains, tests beside counts, prints the table, draws; gives the numbers by name."""
    print("training by masked language modelling")
    result = train_encoder(config, corpus, config.run_dir)
    params, net = result.best_params, net_of(config, corpus)
    test = rows_of(config, corpus, corpus.test)
    masked = hide(config, corpus, test, TEST_SEED)
    chosen = np.asarray(masked.chosen)
    print(f"testing on {chosen.sum():,} hidden tokens")
    found = {
        UNIGRAM: count_unigrams(config, corpus, test.tokens[chosen]),
        NEIGHBOURS: count_neighbours(config, corpus, test, masked),
        NET: Found(*hidden_losses(config, net)(params, test, masked)),
    }
    sources = test.sources[chosen]
    models = {
        name: {"nats": over_texts(of.nats, sources), "accuracy": over_texts(of.right, sources)}
        for name, of in found.items()
    }
    print_table(config, corpus, models, num_hidden=int(chosen.sum()))
    draw(config, models)
    write_examples(config, corpus, params, test, masked)
    better = {
        name: estimate(models[NEIGHBOURS][name].per_task - models[NET][name].per_task)
        for name in ("nats", "accuracy")
    }
    return {
        "num_parameters": sum(x.size for x in jax.tree.leaves(params)),
        "vocab_size": corpus.vocab_size,
        "num_train_tokens": int((rows_of(config, corpus, corpus.train).tokens != PAD).sum()),
        "num_hidden": int(chosen.sum()),
        "num_texts": len(np.unique(sources)),
        "best_step": result.best_step,
        "validation": result.best_validation,
        "train_seconds": round(result.train_seconds, 1),
        "rows_per_second": round(result.steps_per_second * config.batch_size, 1),
        "models": {name: _numbers(of) for name, of in models.items()},
        "better_than_trigram": {
            "nats": float(better["nats"].mean),
            "nats_interval": float(better["nats"].interval),
            "accuracy": -float(better["accuracy"].mean),
            "accuracy_interval": float(better["accuracy"].interval),
        },
    }


def count_unigrams(config: Config, corpus: Corpus, targets: Int[np.ndarray, " m"]) -> Found:
    """What the frequencies of tokens tell."""
    tokens = rows_of(config, corpus, corpus.train).tokens
    counts = np.bincount(tokens[tokens > MASK], minlength=corpus.vocab_size) + 1
    counts[: MASK + 1] = 0
    return Found(
        -np.log(counts[targets] / counts.sum()), (targets == counts.argmax()).astype(float)
    )


def count_neighbours(config: Config, corpus: Corpus, test: Rows, masked: Masked) -> Found:
    """What both neighbours tell by counts, as far as they are not hidden themselves."""
    train = rows_of(config, corpus, corpus.train)
    before, after = neighbours(train.tokens, train.documents, PAD)
    there = train.tokens > MASK
    model = fit_neighbour_counts(
        train.tokens[there], before[there], after[there], num_tokens=corpus.vocab_size
    )
    chosen = np.asarray(masked.chosen)
    before, after = neighbours(np.asarray(masked.inputs), test.documents, PAD)
    before, after, targets = before[chosen], after[chosen], test.tokens[chosen]
    nats, right = [], []
    for start in range(0, len(targets), _BLOCK_SIZE):
        block = slice(start, start + _BLOCK_SIZE)
        log_prob = neighbour_log_prob(model, before[block], after[block])
        nats.append(-np.take_along_axis(log_prob, targets[block, None], 1)[:, 0])
        right.append(log_prob.argmax(1) == targets[block])
    return Found(np.concatenate(nats), np.concatenate(right).astype(float))


def _numbers(of: dict[str, Estimate]) -> dict[str, float]:
    numbers = {"perplexity": float(np.exp(of["nats"].mean))}
    for name, value in of.items():
        numbers |= {name: float(value.mean), f"{name}_interval": float(value.interval)}
    return numbers


def print_table(
    config: Config, corpus: Corpus, models: dict[str, dict[str, Estimate]], *, num_hidden: int
) -> None:
    """A row for each model."""
    table = rich.table.Table(
        title=f"{num_hidden:,} hidden tokens of {len(corpus.test.texts)} unseen texts of "
        f"{config.dataset}",
        caption=f"mean ± 95 % interval over texts; {100 * config.mask_share:g} % of the tokens "
        f"hidden, {corpus.vocab_size:,} different ones",
    )
    for column in ("model", "accuracy in %", "nats a token", "perplexity"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, of in models.items():
        nats, accuracy = of["nats"], of["accuracy"]
        table.add_row(
            name,
            f"{100 * accuracy.mean:.2f} ± {100 * accuracy.interval:.2f}",
            f"{nats.mean:.3f} ± {nats.interval:.3f}",
            f"{np.exp(nats.mean):.1f}",
        )
    rich.console.Console(width=100).print(table)


def draw(config: Config, models: dict[str, dict[str, Estimate]]) -> None:
    """The learning curve, and the accuracies beside each other."""
    folder = config.run_dir
    plots.plot_learning_curve(
        read_metrics(folder),
        folder / "learning_curve.png",
        title=f"Masked language modelling of {config.dataset}",
        loss_label="Nats a hidden token",
        accuracy_label="Hidden tokens found (%)",
    )
    figure = new_figure(5.5, 3.4, f"Hidden tokens of {config.dataset} that are found")
    axes = figure.subplots()
    accuracies = [of["accuracy"] for of in models.values()]
    axes.bar(
        list(models),
        [100 * x.mean for x in accuracies],
        yerr=[100 * x.interval for x in accuracies],
        color=COLOURS[: len(models)],
        width=0.6,
    )
    finish(axes, "", "Accuracy (%), 95 % interval over texts")
    save(figure, folder / "accuracy.png")
    print(f"pictures are in {folder}: learning_curve.png, accuracy.png")


def write_examples(
    config: Config, corpus: Corpus, params: Params, test: Rows, masked: Masked
) -> None:
    """Test rows with what is hidden in them, and the net's first choices, as text to read."""
    net = net_of(config, corpus)
    shown = slice(_NUM_SHOWN)
    logits = net.apply(params, masked.inputs[shown], test.documents[shown])
    choices = np.asarray(jax.lax.top_k(jnp.asarray(logits), 3)[1])
    lines = []
    for row in range(len(choices)):
        parts = []
        for place in np.flatnonzero(test.documents[row]):
            token = decode(corpus.tokenizer, test.tokens[row, place : place + 1])
            if masked.chosen[row, place]:
                guesses = [decode(corpus.tokenizer, choice[None]) for choice in choices[row, place]]
                blank = " " if token.startswith((" ", "\n")) else ""
                token = f"{blank}[{token.strip()}? {' | '.join(map(str.strip, guesses))}]"
            parts.append(token)
        lines.append(" ".join("".join(parts).split()))
    file = config.run_dir / "examples.txt"
    with writing(file):
        file.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    print(f"hidden tokens and three guesses of each are in {file}")
