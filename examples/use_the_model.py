"""The model without Lightning: build it, train it on one batch with your own loop, let it repeat the text.

python examples/use_the_model.py
"""

import torch

from dsv3_lightning import ModelConfig, build_model

CONFIG = ModelConfig(
    vocab_size=128, hidden_size=64, num_hidden_layers=3, first_k_dense_replace=1, intermediate_size=128,
    num_attention_heads=4, q_lora_rank=None, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
    n_routed_experts=16, num_experts_per_tok=4, n_shared_experts=1, moe_intermediate_size=32, n_group=4, topk_group=2,
    num_nextn_predict_layers=1, max_position_embeddings=64,
)  # fmt: skip


def main(steps: int = 150) -> str:
    """Returns the text that the trained model writes after the first letters of its training text."""
    text = b"the quick brown fox jumps over the lazy dog"
    model = build_model(CONFIG, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = torch.tensor([list(text)])
    T = tokens.shape[1] - 1 - CONFIG.mtp_depth  # the last token has no successor, the one before none for MTP
    targets = torch.stack([tokens[:, 1 + k : 1 + k + T] for k in range(1 + CONFIG.mtp_depth)], 1)
    for step in range(steps):
        losses = model.losses(tokens, torch.ones_like(tokens, dtype=torch.bool), targets)
        main_loss, mtp_loss = losses.nll_P / T
        loss = main_loss + 0.3 * mtp_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            counts = losses.counts_LE[0].tolist()  # of the first MoE layer
            print(f"step {step}: loss {main_loss:.3f}, MTP {mtp_loss:.3f}, tokens per expert {counts}")
    written = list(text[:4])
    model.eval()
    with torch.no_grad():
        while len(written) < T:
            written.append(int(model(torch.tensor([written]), torch.tensor([len(written) - 1])).argmax()))
    return bytes(written).decode()


if __name__ == "__main__":
    print(main())
