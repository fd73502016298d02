"""The DeepSeek-V3 model in pure PyTorch, one idea per file.

For readers of the report, in the order of its section 2: config, rope, norm, attention, router, experts, balance, moe,
block, mtp, losses, transformer. The other files are machinery (checks, init, attention_kernels, short_attention,
devices, recompute, permute, dispatch, weight_grad, fused, swiglu, fused_norm, fp8, fp8_cuda, phases, fused_loss, head,
scores, cpu, autocast, balance_table) and parts of related models (grouped_query, parallel_heads).

Letters in the suffixes of tensors' names, the same in every file of the package:
B sequences
T tokens of a sequence that are predicted from
S tokens of a sample, T + 1 + mtp_depth
N tokens of all sequences, B·T, or a chunk of them
P prediction heads, 1 + mtp_depth: the main head and those of MTP
D hidden size
H attention heads
C channels of an attention head
V vocabulary
L MoE layers, those of the main model first, then those of MTP modules
E routed experts, or those that a process holds
K experts per token
G groups of experts
F width of an expert
R routed tokens, N·K: a copy of each token for each of its experts
W ranks that exchange tokens
U positions of a cache
O origins of text

Where the model departs from the report, and why:
- `eh_proj` takes the embedding before the hidden state, as in the released weights (eq. 21 has the other order).
- Each MTP module has a norm of its own before the shared output head, as in the released weights.
- MTP module 1 starts from the main model's output after its final norm, as inference engines of the released weights
  run it; the report does not say which.
- The two latent norms of MLA have eps 1e-6, whatever `rms_norm_eps` says, as in the released code.
- A group is scored by its two best experts, as in the released code, for any number of chosen
  experts and groups (report: by its K/M best).
- Experts outside the selected groups get -inf, as in the official code, and not 0: with negative biases 0 would win.
- 1e-20 is added to the sum of the gates before dividing by it (eq. 13), as in the released code.
- The balance loss is also taken in the MoE layers of MTP modules.
- Every mean is over valid targets: padding and masked targets count neither as tokens nor as losses.
The report has none of these options: softmax routers and their losses (V2), multiplicative biases, tied embeddings,
grouped-query attention, models without experts (the older family), parallel heads (arXiv 2404.19737).
"""
