"""BERT in NumPy from the arrays of Hugging Face's files, by their names and nothing of ours."""

import numpy as np
import scipy.special


def random_bert(rng, *, vocab, length, width, depth, hidden, types):
    """Arrays of a `BertForMaskedLM` as `save_pretrained` names them: `y = x W^T + b`."""

    def dense(name, outputs, inputs):
        return {
            f"{name}.weight": rng.normal(size=(outputs, inputs)),
            f"{name}.bias": rng.normal(size=outputs),
        }

    def norm(name):
        return {f"{name}.weight": rng.normal(size=width), f"{name}.bias": rng.normal(size=width)}

    tensors = norm("bert.embeddings.LayerNorm")
    for name, size in (("word", vocab), ("position", length), ("token_type", types)):
        tensors[f"bert.embeddings.{name}_embeddings.weight"] = rng.normal(size=(size, width))
    for i in range(depth):
        layer = f"bert.encoder.layer.{i}"
        for name in ("query", "key", "value"):
            tensors |= dense(f"{layer}.attention.self.{name}", width, width)
        tensors |= dense(f"{layer}.attention.output.dense", width, width)
        tensors |= norm(f"{layer}.attention.output.LayerNorm")
        tensors |= dense(f"{layer}.intermediate.dense", hidden, width)
        tensors |= dense(f"{layer}.output.dense", width, hidden)
        tensors |= norm(f"{layer}.output.LayerNorm")
    tensors |= dense("cls.predictions.transform.dense", width, width)
    tensors |= norm("cls.predictions.transform.LayerNorm")
    tensors["cls.predictions.bias"] = rng.normal(size=vocab)
    return tensors


def bert_logits(tensors, tokens, types, *, num_heads, epsilon):
    """`(t, vocab)` of one text without padding."""

    def dense(name, x):
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def norm(name, x):
        scaled = (x - x.mean(1)[:, None]) / np.sqrt(x.var(1)[:, None] + epsilon)
        return scaled * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def gelu(x):
        return x / 2 * (1 + scipy.special.erf(x / np.sqrt(2)))

    of_words = tensors["bert.embeddings.word_embeddings.weight"]
    x = of_words[tokens] + tensors["bert.embeddings.token_type_embeddings.weight"][types]
    x = x + tensors["bert.embeddings.position_embeddings.weight"][: len(tokens)]
    x = norm("bert.embeddings.LayerNorm", x)
    depth = len({name.split(".")[3] for name in tensors if ".layer." in name})
    for i in range(depth):
        layer = f"bert.encoder.layer.{i}"
        query, key, value = (
            np.split(dense(f"{layer}.attention.self.{name}", x), num_heads, axis=1)
            for name in ("query", "key", "value")
        )
        heads = [
            scipy.special.softmax(q @ k.T / np.sqrt(q.shape[1]), axis=1) @ v
            for q, k, v in zip(query, key, value, strict=True)
        ]
        attended = dense(f"{layer}.attention.output.dense", np.concatenate(heads, axis=1))
        x = norm(f"{layer}.attention.output.LayerNorm", x + attended)
        hidden = gelu(dense(f"{layer}.intermediate.dense", x))
        x = norm(f"{layer}.output.LayerNorm", x + dense(f"{layer}.output.dense", hidden))
    head = "cls.predictions.transform"
    x = norm(f"{head}.LayerNorm", gelu(dense(f"{head}.dense", x)))
    return x @ of_words.T + tensors["cls.predictions.bias"]
