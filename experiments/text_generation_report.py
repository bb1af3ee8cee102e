"""The table, the picture and the texts of `experiments.text_generation`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import rich.console
import rich.table
from jaxtyping import Array

from experiments.text_generation_config import Config
from experiments.text_generation_data import Corpus
from metagen_jax.data.text import END, SPECIAL_TOKENS, decode, encode
from metagen_jax.errors import UserError, writing
from metagen_jax.evaluation import plots
from metagen_jax.evaluation.estimates import Estimate
from metagen_jax.generative.sequences import draw_categorical, sample_transformer
from metagen_jax.gradients import task_keys
from metagen_jax.nets.transformer import Transformer
from metagen_jax.runs.log import read_metrics
from metagen_jax.types import Params, PRNGKey

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SAMPLE_SEED = 3


def print_table(config: Config, numbers: Mapping[str, Any], a_word: Mapping[str, Estimate]) -> None:
    """Prints perplexities a word, and by how much the net's is lower."""
    table = rich.table.Table(
        title=f"{numbers['num_test']:,} test texts of {config.dataset}, "
        f"{numbers['num_test_words']:,} words, {numbers['num_test_tokens']:,} tokens",
        caption="words are what blanks part; the end of a text counts; 95 % intervals over texts",
    )
    table.add_column("model")
    for column in ("perplexity a word", "from", "to", "nats a word", "more than the net"):
        table.add_column(column, justify="right")
    for i, (name, of) in enumerate(a_word.items()):
        ends = (of.mean - of.interval, of.mean + of.interval)
        more = f"{numbers['gain_nats_a_word']:.3f} ± {numbers['gain_interval']:.3f}" if i else ""
        table.add_row(
            name,
            *(f"{np.exp(x):.2f}" for x in (of.mean, *ends)),
            f"{of.mean:.3f} ± {of.interval:.3f}",
            more,
        )
    rich.console.Console(width=110).print(table)


def draw_learning_curve(config: Config) -> None:
    """Draws nats a token against steps."""
    plots.plot_learning_curve(
        read_metrics(config.run_dir, validation_loss="validation_nats"),
        config.run_dir / "learning_curve.png",
        title=f"transformer of {config.dataset}: training",
        loss_label="Nats a token",
    )


def prompts_asked(config: Config, corpus: Corpus) -> list[tuple[str, np.ndarray]]:
    """What each text begins with, and as tokens: the prompt, or the first lines of test texts."""
    begin = [text.split("\n", 1)[0] + "\n" for text in corpus.test]
    if config.prompt is not None:
        begin = [config.prompt]
    given = [begin[i % len(begin)] for i in range(config.num_samples)]
    tokens = [document.tokens for document in encode(corpus.tokenizer, given)]
    longest = max(map(len, tokens))
    if config.prompt is None:
        tokens = [of[: config.max_length // 2] for of in tokens]
    elif longest >= config.max_length:
        raise UserError(
            f"prompt has {longest} tokens and a text at most {config.max_length}; give a shorter "
            "one, or a higher --length"
        )
    return list(zip(given, tokens, strict=True))


def write_transcript(
    config: Config,
    net: Transformer,
    params: Params,
    tokenizer: "Tokenizer",
    prompts: list[tuple[str, np.ndarray]],
) -> None:
    """Goes on from each prompt to the end of the text, or as far as the net sees; prints one."""
    start = np.zeros((len(prompts), config.max_length), np.int32)
    keep = np.zeros(start.shape, bool)
    for row, (_, tokens) in enumerate(prompts):
        start[row, : len(tokens)], keep[row, : len(tokens)] = tokens, True
    draw = draw_categorical(temperature=config.temperature, top_p=config.top_p)
    # No special token but the end stands in a text.
    never = np.zeros(net.vocab_size, np.float32)
    never[[i for i in range(len(SPECIAL_TOKENS)) if i != END]] = -np.inf

    def sample(params: Params, key: PRNGKey, start: Array, keep: Array) -> Array:
        def draw_text(key: PRNGKey, logits: Array) -> Array:
            return draw(key, logits + never)

        return sample_transformer(key, net, params, draw_text, start, keep)

    keys = task_keys(jax.random.fold_in(jax.random.key(SAMPLE_SEED), config.seed), len(prompts))
    made = np.asarray(jax.jit(jax.vmap(sample, (None, 0, 0, 0)))(params, keys, start, keep))
    texts = []
    for (_, prompt), tokens in zip(prompts, made, strict=True):
        ends = np.flatnonzero(tokens == END)
        last = ends[0] if len(ends) else len(tokens)
        going_on = decode(tokenizer, tokens[len(prompt) : last])
        ending = "" if len(ends) else " ..."
        texts.append(f"{decode(tokenizer, prompt)}⏵{going_on}{ending}")
    file = config.run_dir / "transcript.txt"
    with writing(file):
        file.write_text(f"\n\n{'-' * 40}\n\n".join(texts) + "\n", encoding="utf-8")
    print(f"a text that it makes (from ⏵ on):\n{texts[0]}\n")
    print(f"texts are in {file}, the picture in {config.run_dir}: learning_curve.png")
