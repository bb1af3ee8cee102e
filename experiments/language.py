"""Text: what a net finds that is hidden, which segment comes first, what a text is about.

    python -m experiments.language                                   # Python's reference, embedded
    python -m experiments.language --preset wikitext2 --data-dir DIR
    python -m experiments.language --preset dialogues --data-dir DIR
    python -m experiments.language --preset dialogues --data-dir DIR --task order \
        --encoder runs/language-dialogues-masked
    python -m experiments.language --preset dialogues --data-dir DIR --task classification \
        --encoder runs/language-dialogues-masked

"masked" trains a transformer to find hidden tokens and tests it on unseen texts, beside the
frequencies of tokens and a count model of both neighbours. "order" goes on from that net to tell
whether two neighbouring segments of a text stand in their order, beside a classifier of the words
in each. "classification" goes on from it to tell what a text is about, from 1, 10 and 100 % of the
labels, beside the same net from scratch. The last two begin with the net of a run of the first that
`--encoder` names. Writes to the run's folder: `result.json`, `tokenizer.json`, pictures, texts to
read, metrics, checkpoints.

Results, with command, machine, minutes and seeds, stand in experiments/README.md.
"""

from collections.abc import Callable
from typing import Any

from experiments import language_classification, language_masked, language_order, program
from experiments.language_config import PRESETS, Config, TaskName, check, with_task
from experiments.language_data import Corpus, load_corpus

TASKS: dict[TaskName, Callable[[Config, Corpus], dict[str, Any]]] = {
    "masked": language_masked.main,
    "order": language_order.main,
    "classification": language_classification.main,
}


def main(config: Config) -> dict[str, Any]:
    """Trains, tests, prints the table, draws the pictures; gives the numbers by name."""
    check(config)
    corpus = load_corpus(config)
    counts = " / ".join(f"{len(part.texts):,}" for part in (corpus.train, corpus.val, corpus.test))
    print(f"{config.dataset}: {counts} texts to learn from / to choose by / to test")
    return TASKS[config.task](config, corpus)


if __name__ == "__main__":
    program.run("language", main, PRESETS, default="topics", vary=with_task)
