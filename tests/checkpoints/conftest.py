import io

import jax
import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from endistill_jax.models.family import init_params
from endistill_jax.models.t5.config import T5Config


@pytest.fixture(scope="session")
def config() -> T5Config:
    return T5Config(
        vocab_size=40,
        d_model=12,
        num_heads=2,
        head_dim=4,
        mlp_dim=20,
        num_encoder_layers=2,
        num_decoder_layers=3,
    )


def random_params(config):
    """Random parameters of a model's shapes as NumPy arrays; no test may change them."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    tree = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)
    jax.tree.map(lambda leaf: leaf.setflags(write=False), tree)
    return tree


@pytest.fixture(scope="session")
def make_params():
    return random_params


@pytest.fixture(scope="session")
def params(config):
    return random_params(config)


def train_vocabulary(path, text="the cat sat on the mat and the dog sat on the log", size=40, **settings):
    """A tiny SentencePiece model with T5's special ids, at `path`."""
    model = io.BytesIO()
    specials = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "pad_piece": "<pad>"}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text] * 20),
        model_writer=model,
        vocab_size=size,
        hard_vocab_limit=False,
        minloglevel=2,
        **(specials | settings),
    )
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def make_vocabulary():
    return train_vocabulary


@pytest.fixture(scope="session")
def mt5_vocabulary_file(tmp_path_factory):
    """A SentencePiece model that ends with a hundred sentinels, as mT5's."""
    folder = tmp_path_factory.mktemp("mt5_vocabulary")
    path = train_vocabulary(folder / "plain.model")
    model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    for index in reversed(range(100)):
        model.pieces.add(piece=f"▁<extra_id_{index}>", score=0.0, type=model.SentencePiece.USER_DEFINED)
    (folder / "mt5.model").write_bytes(model.SerializeToString())
    return folder / "mt5.model"


@pytest.fixture(scope="session")
def vocabulary_file(tmp_path_factory):
    return train_vocabulary(tmp_path_factory.mktemp("vocabulary") / "tiny.model")
