"""Weights of Hugging Face's BERT: the same logits as in NumPy and as theirs, there and back."""

import json

import jax
import numpy as np
import pytest
from references_bert import bert_logits, random_bert
from safetensors.numpy import load_file, save_file

from metagen_jax.errors import DataError, UserError
from metagen_jax.nets.bert import bert_net, load_bert, params_from_bert, params_to_bert, save_bert
from metagen_jax.nets.transformer import Transformer

CONFIG = {
    "vocab_size": 11,
    "max_position_embeddings": 9,
    "hidden_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 7,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}
TOKENS = np.array([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 0, 0, 0]])
TYPES = np.array([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0, 0]])
# The mask of Hugging Face's tokenizers, and one document a row.
MASK = np.array([[1] * 7, [1] * 4 + [0] * 3])


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    return random_bert(rng, vocab=11, length=9, width=6, depth=2, hidden=7, types=2)


def write(folder, tensors, **changes):
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    floats = {name: array.astype(np.float32) for name, array in tensors.items()}
    save_file(floats, folder / "model.safetensors")


def test_logits_of_a_folder_are_those_of_numpy(tmp_path, tensors):
    extra = {
        "bert.pooler.dense.weight": np.ones((6, 6)),
        "cls.predictions.decoder.bias": np.ones(3),
    }
    write(tmp_path, {**tensors, **extra})
    net, params = load_bert(tmp_path)
    logits = np.asarray(jax.jit(net.apply)(params, TOKENS, MASK, TYPES))
    for row, length in enumerate((7, 4)):
        expected = bert_logits(
            tensors, TOKENS[row, :length], TYPES[row, :length], num_heads=3, epsilon=1e-12
        )
        np.testing.assert_allclose(logits[row, :length], expected, rtol=1e-4, atol=1e-4)


def test_what_is_saved_is_what_was_loaded(tmp_path, tensors):
    write(tmp_path, tensors)
    net, params = load_bert(tmp_path)
    save_bert(tmp_path / "again", net, params)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == tensors.keys()
    for name, array in again.items():
        np.testing.assert_array_equal(array, tensors[name].astype(np.float32))
    other, others = load_bert(tmp_path / "again")
    assert other == net
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(others), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_every_parameter_of_a_net_has_a_name_of_its_own():
    net = Transformer(5, 6, width=4, depth=3, num_heads=2, hidden_width=3, norm="post")
    params = net.init(jax.random.key(1), TOKENS[0, :3])
    tensors = params_to_bert(net, params)
    assert len(tensors) == len(jax.tree.leaves(params))
    back = params_from_bert(net, tensors)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_old_names_of_norms_are_understood(tensors):
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): array
        for name, array in tensors.items()
    }
    assert old.keys() != tensors.keys()
    net = bert_net(CONFIG)
    for a, b in zip(
        jax.tree.leaves(params_from_bert(net, old)),
        jax.tree.leaves(params_from_bert(net, tensors)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_hugging_faces_model_has_these_logits_and_reads_ours(tmp_path):
    reason = "compares with Hugging Face: pip install 'metagen-jax[huggingface]'"
    transformers = pytest.importorskip("transformers", reason=reason)
    torch = pytest.importorskip("torch", reason=reason)
    torch.manual_seed(0)
    theirs = transformers.BertForMaskedLM(transformers.BertConfig(**CONFIG)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.5)
    theirs.save_pretrained(tmp_path / "theirs")
    net, params = load_bert(tmp_path / "theirs")

    def logits_of(model):
        inputs = {"input_ids": TOKENS, "attention_mask": MASK, "token_type_ids": TYPES}
        with torch.no_grad():
            outputs = model(**{name: torch.tensor(array) for name, array in inputs.items()})
        return outputs.logits.numpy()

    shown = MASK == 1
    expected = logits_of(theirs)
    ours = np.asarray(jax.jit(net.apply)(params, TOKENS, MASK, TYPES))
    np.testing.assert_allclose(ours[shown], expected[shown], rtol=0, atol=1e-4)

    moved = jax.tree.map(lambda x: 1.1 * x + 0.01, params)
    save_bert(tmp_path / "ours", net, moved)
    again = transformers.BertForMaskedLM.from_pretrained(tmp_path / "ours").eval()
    ours = np.asarray(jax.jit(net.apply)(moved, TOKENS, MASK, TYPES))
    np.testing.assert_allclose(logits_of(again)[shown], ours[shown], rtol=0, atol=1e-4)
    assert np.abs(ours - expected)[shown].max() > 0.1


def test_says_what_is_wrong_with_files(tmp_path, tensors):
    with pytest.raises(DataError, match="can't read config"):
        load_bert(tmp_path)
    write(tmp_path, tensors, hidden_act="relu")
    with pytest.raises(DataError, match="the configuration has hidden_act 'relu'; give a 'gelu'"):
        load_bert(tmp_path)
    write(tmp_path, tensors, num_hidden_layers=1)
    with pytest.raises(DataError, match="that a net of 1 blocks has not"):
        load_bert(tmp_path)
    write(tmp_path, tensors, vocab_size=12)
    with pytest.raises(DataError, match=r"the weights have .*, not \(12,\)"):
        load_bert(tmp_path)
    with pytest.raises(DataError, match="the configuration lacks hidden_size"):
        bert_net({name: value for name, value in CONFIG.items() if name != "hidden_size"})


def test_only_a_bert_is_saved_as_one(tmp_path):
    for settings in ({"causal": True}, {"by_distance": True}, {"norm": "pre"}):
        net = Transformer(5, 6, **{"norm": "post", **settings})
        with pytest.raises(UserError, match=r"the net has causal=.*; a BERT has neither"):
            save_bert(tmp_path, net, {})
