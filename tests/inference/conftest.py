"""One small model, and one server of it, for all tests of the server."""

import pytest
import torch

from dsv3_lightning.data.text.tokenizer import Tokenizer
from tests.hub.folders import biased
from tests.model.small import small_config


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.train(["def f(x):\n    return x\n", "日本語 and 👍 words"] * 3, 300)


@pytest.fixture(scope="session")
def model(tokenizer):
    torch.set_num_threads(1)
    return biased(small_config(vocab_size=tokenizer.vocab_size))


@pytest.fixture(scope="session")
def served(model, tokenizer):
    from tests.inference.serving import Served  # needs the extras serve and dev

    served = Served(model, tokenizer)
    yield served
    served.close()
