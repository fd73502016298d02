"""What may be drawn, by hand; and pieces of text."""

import pytest
import torch

from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.inference.sampling import Sampling
from dsv3_lightning.inference.text import TextStream

P = [0.1, 0.4, 0.2, 0.3]


@pytest.mark.parametrize(
    "settings, kept",
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 10**6}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_p": 0.65}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.75}, [0, 4 / 9, 2 / 9, 3 / 9]),  # 0.7 does not suffice
        ({"top_p": 1e-9}, [0, 1, 0, 0]),
        ({"top_p": 0.0}, [0, 1, 0, 0]),
        ({"min_p": 0.6}, [0, 4 / 7, 0, 3 / 7]),
        ({"min_p": 1.0}, [0, 1, 0, 0]),
        ({"top_k": 3, "min_p": 0.6}, [0, 4 / 7, 0, 3 / 7]),
    ],
)
def test_what_may_be_drawn(settings, kept):
    got = Sampling(temperature=1.0, **settings).probabilities(torch.tensor([P]).log())
    torch.testing.assert_close(got, torch.tensor([kept], dtype=torch.float64), rtol=1e-6, atol=1e-12)


def test_temperature():
    logits = torch.tensor([P]).log()
    squared = torch.tensor([[p * p for p in P]], dtype=torch.float64)
    torch.testing.assert_close(Sampling(0.5).probabilities(logits), squared / squared.sum(), rtol=1e-6, atol=0)
    for cold in (0.0, 1e-8, 5e-324):
        assert Sampling(cold).probabilities(logits * 1000).tolist() == [[0, 1, 0, 0]]
    assert Sampling(0.0).pick(logits, [torch.Generator()]) == [1]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"temperature": -1.0}, "temperature=-1.0: must be at least 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1: must be at least 0"),
        ({"top_p": 1.1}, "top_p=1.1: must be between 0 and 1"),
        ({"min_p": -0.1}, "min_p=-0.1: must be between 0 and 1"),
    ],
)
def test_nonsense_is_one_line(settings, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**settings)


def test_draws_follow_the_probabilities_and_the_seed():
    sampling, logits = Sampling(1.0, top_k=3), torch.tensor([P]).log()
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(torch.tensor([sampling.pick(logits, [generator])[0] for _ in range(4000)]), minlength=4)
    expected = sampling.probabilities(logits)[0] * 4000
    assert counts[0] == 0 and (((counts - expected) ** 2)[1:] / expected[1:]).sum() < 13.8  # chi2, 2 df, p = 0.001


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["日本語のテキスト", "emoji 👩‍🚀 here", "plain text"] * 3, 300)


TEXTS = ["日本 x 👩‍🚀\ud7ffé", "plain", "", "a\r\n\0b"]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_join_to_the_text(tokenizer, text):
    ids, stream = tokenizer.encode(text), TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + stream.finish() == text == tokenizer.decode(ids)


def test_a_cut_end_is_one_replacement_sign(tokenizer):
    ids = tokenizer.encode("ab👍")
    assert len(ids) > 3
    for cut in range(1, len(ids) + 1):
        stream = TextStream(tokenizer)
        joined = "".join([*(stream.push(token) for token in ids[:cut]), stream.finish()])
        assert joined == tokenizer.decode(ids[:cut]) and joined.count("\ufffd") == (2 < cut < len(ids))


def test_text_ends_before_a_stop_string_of_which_nothing_is_shown(tokenizer):
    ids = tokenizer.encode("one STOP two")
    stream = TextStream(tokenizer, ("STOP", "never"))
    shown = ""
    for token in ids:
        shown += stream.push(token)
        assert "S" not in shown
        if stream.stopped:
            break
    assert shown == "one " and stream.finish() == "" and len(ids) > ids.index(token)
    almost = TextStream(tokenizer, ("STOP",))
    assert "".join(almost.push(token) for token in tokenizer.encode("one STO")) + almost.finish() == "one STO"
