"""FLOP per token of matrix products: 6 per weight and token in training, plus attention scores and values.

Not counted: embedding look-up, norms, activations, softmax, the optimizer. Recomputation isn't counted either, so a
utilization computed from these numbers is model FLOP utilization (MFU).
"""

from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.planning.parameters import count_parameters


def training_flop_per_token(model: ModelConfig, sequence_length: int) -> int:
    """FLOP of forward and backward passes of main model and MTP modules; the backward pass has twice the forward's.

    6 · weights + 3 · layers · H · (d_qk + d_v) · T: causal attention works on half of the T × T square.
    """
    return 3 * forward_flop_per_token(model, sequence_length)


def forward_flop_per_token(model: ModelConfig, sequence_length: int, with_mtp: bool = True) -> int:
    """FLOP of the forward pass; each weight counts as one multiplication and one addition."""
    layers = model.num_hidden_layers + (model.mtp_depth if with_mtp else 0)
    attention = layers * model.num_attention_heads * (model.qk_head_dim + model.v_head_dim) * sequence_length
    return 2 * multiplied_weights(model, with_mtp) + attention


def multiplied_weights(model: ModelConfig, with_mtp: bool = True) -> int:
    """The number of weights in matrix products for a token: every head counts, the embedding doesn't."""
    parameters = count_parameters(model)
    heads = (1 + model.mtp_depth if with_mtp else 1) * model.vocab_size * model.hidden_size
    layers = sum(count.active for part, count in parameters.main.items() if part not in ("embedding", "head", "norms"))
    mtp = sum(count.active for part, count in parameters.mtp.items() if part != "norms")
    return layers + heads + (mtp if with_mtp else 0)
