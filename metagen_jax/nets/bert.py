"""Weights of Hugging Face's `BertForMaskedLM`, in and out of `metagen_jax.nets.transformer`.

    net, params = load_bert("folder with config.json and model.safetensors")
    logits = net.apply(params, input_ids, attention_mask, token_type_ids)

The logits are those of Hugging Face's model wherever `attention_mask` is 1, if the padding stands
behind the text. Needs the package `safetensors`, and none of Hugging Face's others.

Devlin, Chang, Lee, Toutanova: BERT: Pre-training of Deep Bidirectional Transformers for Language
Understanding, 2019.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from metagen_jax.data.cache import Folder, missing_package_named
from metagen_jax.errors import DataError, UserError, one_line, writing
from metagen_jax.nets.transformer import Transformer
from metagen_jax.types import Params

CONFIG, WEIGHTS = "config.json", "model.safetensors"

Tensors = dict[str, np.ndarray]
"""The arrays of a file of safetensors by their names."""

# Names of the fields of a `Transformer` in Hugging Face's configuration.
_FIELDS = {
    "vocab_size": "vocab_size",
    "max_length": "max_position_embeddings",
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "hidden_width": "intermediate_size",
    "num_types": "type_vocab_size",
    "epsilon": "layer_norm_eps",
}
# What else a BERT may be and ours is not: what is taken, and what a file that is silent means.
_FIXED = {
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "tie_word_embeddings": True,
}
# Of the names of modules: ours, theirs.
_EMBEDDINGS = {
    "tokens": "bert.embeddings.word_embeddings",
    "positions": "bert.embeddings.position_embeddings",
    "types": "bert.embeddings.token_type_embeddings",
}
_NORMS = {
    "outer_norm": "bert.embeddings.LayerNorm",
    "head_norm": "cls.predictions.transform.LayerNorm",
}
_OF_BLOCK = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "dense0": "intermediate.dense",
    "dense1": "output.dense",
}
_NORMS_OF_BLOCK = {
    "attention_norm": "attention.output.LayerNorm",
    "dense_norm": "output.LayerNorm",
}
# What such files may hold beside: the other heads of BERT, repeats, and numbers from 0.
_UNUSED = (
    "bert.pooler.",
    "cls.seq_relationship.",
    "cls.predictions.decoder.",
    "bert.embeddings.position_ids",
)


class _Leaf(NamedTuple):
    """Where an array stands, in both trees, and whether it is turned."""

    path: tuple[str, ...]
    name: str
    turned: bool = False


def load_bert(folder: Folder) -> tuple[Transformer, Params]:
    """The net and the parameters of a folder that `save_pretrained` of Hugging Face has written.

    Raises:
      DataError: a file is missing or can't be read, the model is no BERT of the kind that
        `Transformer` is, or the weights are of another model than the configuration.
    """
    folder = Path(folder)
    with missing_package_named("a BERT"):
        from safetensors.numpy import load_file

    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    # The package raises errors of its own.
    except Exception as error:
        raise DataError(
            f"can't read {CONFIG} and {WEIGHTS} in {folder} ({one_line(error)}); give a folder "
            "that save_pretrained has written"
        ) from None
    net = bert_net(config)
    return net, params_from_bert(net, tensors)


def save_bert(folder: Folder, net: Transformer, params: Params) -> None:
    """Writes a folder that `BertForMaskedLM.from_pretrained` reads.

    Args:
      folder: is made.
      net: not causal, not `by_distance`, with `norm="post"`.
      params: of the net.

    Raises:
      UserError: of a net that is no BERT, or the folder can't be written.
      DataError: the package `safetensors` is missing.
    """
    with missing_package_named("a BERT"):
        from safetensors.numpy import save_file

    if net.causal or net.by_distance or net.norm != "post":
        raise UserError(
            f"the net has causal={net.causal}, by_distance={net.by_distance} and "
            f'norm={net.norm!r}; a BERT has neither of the first and norm="post"'
        )
    config: dict[str, Any] = {theirs: getattr(net, ours) for ours, theirs in _FIELDS.items()}
    config |= {**_FIXED, "architectures": ["BertForMaskedLM"], "model_type": "bert"}
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(params_to_bert(net, params), folder / WEIGHTS, {"format": "pt"})


def bert_net(config: Mapping[str, Any]) -> Transformer:
    """The net of a configuration of Hugging Face's `BertConfig`.

    Raises:
      DataError: a field is missing, or has a value that `Transformer` has no equal of.
    """
    if missing := sorted(set(_FIELDS.values()) - set(config)):
        raise DataError(f"the configuration lacks {', '.join(missing)}; give one of a BERT")
    for name, taken in _FIXED.items():
        if config.get(name, taken) != taken:
            raise DataError(f"the configuration has {name} {config[name]!r}; give a {taken!r} one")
    fields = {ours: config[theirs] for ours, theirs in _FIELDS.items()}
    return Transformer(**fields, norm="post")


def params_from_bert(net: Transformer, tensors: Mapping[str, np.ndarray]) -> Params:
    """The parameters that arrays with Hugging Face's names are, in float32.

    Raises:
      DataError: names are missing or unknown, or a shape is not that of the net.
    """
    tensors = {
        name.replace(".gamma", ".weight").replace(".beta", ".bias"): array
        for name, array in tensors.items()
        if not name.startswith(_UNUSED)
    }
    leaves = _leaves(net)
    expected = {leaf.name for leaf in leaves}
    if tensors.keys() != expected:
        missing, unknown = sorted(expected - tensors.keys()), sorted(tensors.keys() - expected)
        raise DataError(
            f"the weights lack {missing[:3] or 'nothing'} and have {unknown[:3] or 'nothing'} that "
            f"a net of {net.depth} blocks has not; give those of a BertForMaskedLM"
        )
    tree: dict[str, Any] = {}
    for path, name, turned in leaves:
        array = np.asarray(tensors[name], np.float32)
        *parents, last = path
        inner = tree
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = array.T if turned else array
    params = {"params": tree}
    shapes = jax.eval_shape(net.init, jax.random.key(0), np.zeros(1, np.int32))
    wrong = [
        f"{jax.tree_util.keystr(path)} {array.shape}, not {shape.shape}"
        for (path, shape), array in zip(
            jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(params), strict=True
        )
        if array.shape != shape.shape
    ]
    if wrong:
        raise DataError(f"the weights have {'; '.join(wrong[:3])}; give those of this net")
    return params


def params_to_bert(net: Transformer, params: Params) -> Tensors:
    """The parameters as arrays with Hugging Face's names, in float32."""
    tensors = {}
    for path, name, turned in _leaves(net):
        inner: Any = params["params"]
        for part in path:
            inner = inner[part]
        array = np.asarray(inner, np.float32)
        tensors[name] = np.ascontiguousarray(array.T if turned else array)
    return tensors


def _leaves(net: Transformer) -> list[_Leaf]:
    norms, dense = dict(_NORMS), {"head_dense": "cls.predictions.transform.dense"}
    for i in range(net.depth):
        ours, theirs = f"blocks_{i}", f"bert.encoder.layer.{i}"
        dense |= {f"{ours}/{a}": f"{theirs}.{b}" for a, b in _OF_BLOCK.items()}
        norms |= {f"{ours}/{a}": f"{theirs}.{b}" for a, b in _NORMS_OF_BLOCK.items()}
    leaves = [_Leaf(("head_bias",), "cls.predictions.bias")]
    for ours, theirs in _EMBEDDINGS.items():
        leaves.append(_Leaf((ours, "embedding"), f"{theirs}.weight"))
    for modules, weight in ((dense, "kernel"), (norms, "scale")):
        for ours, theirs in modules.items():
            path = tuple(ours.split("/"))
            leaves.append(_Leaf((*path, weight), f"{theirs}.weight", weight == "kernel"))
            leaves.append(_Leaf((*path, "bias"), f"{theirs}.bias"))
    return leaves
