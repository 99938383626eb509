"""The TensorFlow-free tokenizer, with a model fitted here to a few sentences."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
import sentencepiece

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.objectives.vocabulary import VocabularyLayout
from vishwam_t5x.serving.tokenizer import Tokenizer, text_ids

SENTENCES = ["the quick brown fox jumps over the lazy dog", "a picture of the digit seven",
             "what digit is this?", "pack my box with five dozen liquor jugs"] * 20


def fit(**ids: int) -> bytes:
    out = io.BytesIO()
    settings = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, **ids}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=out, vocab_size=340, byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2, num_threads=1, **settings)
    return out.getvalue()


@pytest.fixture(scope="module")
def model() -> bytes:
    return fit()


@pytest.fixture(scope="module")
def tokenizer(model) -> Tokenizer:
    return Tokenizer(model)


def test_text_comes_back(tokenizer):
    for text in ("the quick brown fox", "what digit is this?", "naïve ☃"):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32 and ids.ndim == 1
        assert 2 not in ids.tolist()
        assert tokenizer.decode(ids) == text


def test_ids_are_sentencepiece_s_own(tokenizer, model):
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    text = "pack my box with the digit seven"
    assert tokenizer.encode(text).tolist() == processor.encode(text)
    assert tokenizer.base_size == processor.get_piece_size()


def test_extra_tokens_are_one_id_each(tokenizer):
    layout = tokenizer.layout
    ids = tokenizer.encode("[Image] [S] the fox <extra_id_0> dog<extra_id_10><image_input>")
    assert ids[0] == layout.prefix("image", "S")
    assert ids.tolist().count(layout.sentinel(0)) == 1
    assert ids[-2:].tolist() == [layout.sentinel(10), layout.special_ids["<image_input>"]]
    assert layout.sentinel(1) not in ids.tolist()
    assert tokenizer.decode(ids) == (
        "[Image] [S] the fox <extra_id_0> dog <extra_id_10> <image_input>")
    assert tokenizer.decode(ids, skip_special=True) == "the fox dog"


def test_every_extra_token_round_trips(tokenizer):
    for name, token in tokenizer.layout.special_ids.items():
        assert tokenizer.encode(name).tolist() == [token]
        assert tokenizer.decode([token]) == name


def test_decoding_stops_at_the_end_and_skips_padding(tokenizer):
    ids = tokenizer.encode("the fox", add_eos=True)
    assert ids[-1] == 1
    padded = np.concatenate([[0], ids, tokenizer.encode("dog"), [0, 0]])
    assert tokenizer.decode(padded) == "the fox"
    assert tokenizer.decode_batch(np.stack([padded, padded])) == ["the fox"] * 2
    assert tokenizer.decode([]) == "" and tokenizer.encode("").tolist() == []


def test_pieces_hide_nothing(tokenizer):
    layout = tokenizer.layout
    assert tokenizer.pieces([0, 1, layout.sentinel(3), layout.size]) == [
        "<pad>", "</s>", "<extra_id_3>", f"<unused_{layout.size}>"]


def test_unused_rows_of_the_table_decode_and_what_lies_beyond_does_not(model):
    layout = VocabularyLayout(base_size=Tokenizer(model).base_size, num_location_bins=0,
                              num_sentinels=10, num_history=0)
    tokenizer = Tokenizer(model, layout)
    assert layout.table_size > layout.size
    assert tokenizer.decode([layout.size]) == f"<unused_{layout.size}>"
    with pytest.raises(UserError, match="outside the vocabulary"):
        tokenizer.decode([layout.table_size])
    with pytest.raises(UserError, match="outside the vocabulary"):
        tokenizer.decode([-1])
    assert "extra_id_10>" in tokenizer.decode(tokenizer.encode("<extra_id_10>"))
    assert len(tokenizer.encode("<extra_id_10>")) > 1  # no such token in this layout


def test_a_tokenizer_travels_to_other_processes(tokenizer):
    other = pickle.loads(pickle.dumps(tokenizer))
    text = "[Text] [R] the <extra_id_0> dog"
    assert other.encode(text).tolist() == tokenizer.encode(text).tolist()


def test_ids_of_a_text_for_gin(model, tokenizer):
    text = "the <extra_id_0> dog"
    assert text_ids(text, model, tokenizer.layout) == tuple(tokenizer.encode(text).tolist())


def test_mistakes_are_named(model, tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        Tokenizer(tmp_path / "missing.model")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        Tokenizer(b"not a model at all")
    with pytest.raises(UserError, match="another size"):
        Tokenizer(model, VocabularyLayout(base_size=32_000))
    with pytest.raises(UserError, match="bos_id=-1"):
        Tokenizer(fit(pad_id=3, bos_id=1, eos_id=2, unk_id=0))
