"""The DeepSeek-V3 model in pure PyTorch, one idea per file, in the order of the report's section 2.

Letters in shapes, the same in every file: B sequences, T tokens of a sequence, N = B·T, D hidden size, H heads,
C channels of a head, R rotary channels, E routed experts, K experts per token, G groups, F width of an expert,
V vocabulary, L MoE layers (main model first, then MTP modules).
"""
