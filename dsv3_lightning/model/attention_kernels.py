"""Causal attention by the kernel that suits the device and the widths, separately for each document of a sample.

Sources of the conditions: `aten/src/ATen/native/transformers/cuda/sdp_utils.cpp` and `torch/nn/attention/varlen.py` of
torch 2.11 to 2.14.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from dsv3_lightning.model.cpu import on_cpu
from dsv3_lightning.model.devices import Device, device_of
from dsv3_lightning.model.short_attention import is_short, short_attention

HALVES = (torch.bfloat16, torch.float16)
FALLBACKS = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)  # every width and dtype


class Kernel(NamedTuple):
    """How attention is computed.

    name: for the line at the start of a run. width: the one to which queries, keys and values are padded with zeros;
    None if they are not. backends: those of scaled_dot_product_attention, the preferred one first; none leaves it to
    torch.
    varlen: whether the kernel tells documents apart by itself; else each has a call of its own.
    short: whether it is `short_attention`, which tells them apart by a mask.
    """

    name: str
    width: int | None = None
    backends: tuple[SDPBackend, ...] = ()
    varlen: bool = False
    short: bool = False


@dataclass(frozen=True, eq=False)
class Documents:
    """Where the documents of a micro-batch end, found once for all layers; they do not see each other.

    lengths: tokens of each document, a list for each sample. cu_seqlens: where each document begins in the B·T tokens,
    and their end, int32 [documents + 1] on the device that computes. longest: tokens of the longest document.
    """

    lengths: list[list[int]]
    cu_seqlens: Tensor
    longest: int


def choose_kernel(device: Device, qk: int, v: int, dtype: torch.dtype, T: int, documents: bool) -> Kernel:
    """The fastest kernel for T tokens with queries and keys of width qk and values of width v, forward and backward.

    documents: whether samples hold several that do not see each other.
    """
    widest = max(qk, v)
    if device.type == "cpu" and is_short(T, dtype):
        return Kernel("batched products", short=True)
    if device.type != "cuda":  # on a CPU unequal widths leave the fast path
        return Kernel("flash" if device.type == "cpu" else "torch's own", widest)
    if dtype not in HALVES:
        return Kernel("efficient", None, FALLBACKS)
    if device.capability < (8, 0):
        return Kernel("torch's own", widest)
    aligned = -(-widest // 8) * 8
    if documents and flash_takes(device, aligned):
        return Kernel("flash, variable lengths", aligned, varlen=True)
    if not documents and cudnn_takes(device, qk, v, T):
        return Kernel("cuDNN", None, (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, *FALLBACKS))
    if flash_takes(device, aligned):
        return Kernel("flash", widest, (SDPBackend.FLASH_ATTENTION, *FALLBACKS))
    return Kernel("efficient", None, FALLBACKS)


def flash_takes(device: Device, width: int) -> bool:
    """Whether FlashAttention 2 has a forward and a backward pass for queries, keys and values of this width."""
    small = (8, 6) <= device.capability <= (8, 9) or device.capability[0] == 12  # less shared memory
    return width <= 256 and not (small and 192 < width <= 224)


def cudnn_takes(device: Device, qk: int, v: int, T: int) -> bool:
    """Whether cuDNN has a forward and a backward pass for these widths, and is the faster one: Hopper and Blackwell.

    Versions up to 9.15.0 are wrong for lengths that are no multiples of 128 (pytorch#169849).
    """
    fast = device.capability == (9, 0) or device.capability[0] == 10
    exact = device.cudnn > 91500 or T % 128 == 0
    wide = (qk, v) == (192, 128) and device.cudnn >= 91100
    return fast and exact and T > 1 and (wide or (max(qk, v) <= 128 and qk % 8 == v % 8 == 0 and device.cudnn >= 90000))


def describe_kernel(kernel: Kernel, device: Device, qk: int, v: int, dtype: torch.dtype) -> str:
    """The choice in one line.

    >>> describe_kernel(Kernel("flash", 192), Device("cpu"), 192, 128, torch.float32)
    'attention: flash on cpu, float32, widths 192 and 128 padded to 192'
    """
    where = f"compute capability {device.capability[0]}.{device.capability[1]}" if device.capability[0] else device.type
    padded = "" if kernel.width is None or kernel.width == qk == v else f" padded to {kernel.width}"
    return f"attention: {kernel.name} on {where}, {str(dtype).split('.')[-1]}, widths {qk} and {v}{padded}"


def find_documents(documents_BT: Tensor, device: torch.device) -> Documents | None:
    """The documents of documents_BT (int64, a number for each token's document, whose tokens are consecutive), or None
    where each sample is one document. Padding counts as one.

    On the host documents_BT costs no synchronization with the device that computes.
    """
    numbers_BT = documents_BT.cpu()
    first_BT = torch.ones_like(numbers_BT, dtype=torch.bool)
    first_BT[:, 1:] = numbers_BT[:, 1:] != numbers_BT[:, :-1]
    per_sample = first_BT.sum(1).tolist()
    if max(per_sample) == 1:
        return None
    begins = first_BT.flatten().nonzero().squeeze(1)
    cu_seqlens = torch.cat((begins, begins.new_full((1,), first_BT.numel()))).int()
    lengths = cu_seqlens.diff()
    by_sample = [part.tolist() for part in lengths.split(per_sample)]
    return Documents(by_sample, cu_seqlens.to(device, non_blocking=True), int(lengths.max()))


def causal_attention(
    q_BHTC: Tensor, k_BHTC: Tensor, v_BHTC: Tensor, scale: float, documents: Documents | None = None
) -> Tensor:
    """softmax(q k^T · scale) v over the positions up to one's own (V3 eq. 10), of one's own document where `documents`
    are given: [B, H, T, C of v], which may differ from the C of q and k.

    Positions need not restart with a document, since rotary embeddings depend on distances only.
    """
    qk, v_width, T = q_BHTC.shape[-1], v_BHTC.shape[-1], q_BHTC.shape[2]
    device = device_of(q_BHTC.device) if q_BHTC.is_cuda or on_cpu(q_BHTC) else Device("fake")
    kernel = choose_kernel(device, qk, v_width, q_BHTC.dtype, T, documents is not None)
    if kernel.short:
        return short_attention(q_BHTC, k_BHTC, v_BHTC, scale, None if documents is None else documents.cu_seqlens)
    q, k, v = (padded(x, kernel.width) for x in (q_BHTC, k_BHTC, v_BHTC))
    if documents is None:
        out_BHTC = one_document(q, k, v, scale, kernel.backends)
    elif kernel.varlen:
        out_BHTC = variable_lengths(q, k, v, scale, documents)
    else:
        out_BHTC = each_document(q, k, v, scale, kernel.backends, documents)
    return out_BHTC[..., :v_width]


def padded(x: Tensor, width: int | None) -> Tensor:
    """x with zeros after its last dim, up to `width`."""
    return x if width is None or x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def one_document(
    q_BHTC: Tensor, k_BHTC: Tensor, v_BHTC: Tensor, scale: float, backends: tuple[SDPBackend, ...]
) -> Tensor:
    if not backends:
        return F.scaled_dot_product_attention(q_BHTC, k_BHTC, v_BHTC, is_causal=True, scale=scale)
    with sdpa_kernel(list(backends), set_priority=True):
        return F.scaled_dot_product_attention(q_BHTC, k_BHTC, v_BHTC, is_causal=True, scale=scale)


def each_document(
    q_BHTC: Tensor, k_BHTC: Tensor, v_BHTC: Tensor, scale: float, backends: tuple[SDPBackend, ...], documents: Documents
) -> Tensor:
    """Attention by one call per document: time adds up over the documents, and memory is linear in T."""
    outputs = []
    # Gradients of `split` are joined once; those of slices would each have the size of the whole.
    samples = zip(q_BHTC.split(1), k_BHTC.split(1), v_BHTC.split(1), documents.lengths, strict=True)
    for q_1HTC, k_1HTC, v_1HTC, lengths in samples:
        parts = zip(q_1HTC.split(lengths, 2), k_1HTC.split(lengths, 2), v_1HTC.split(lengths, 2))
        outputs.append(torch.cat([one_document(q, k, v, scale, backends) for q, k, v in parts], 2))
    return torch.cat(outputs)


def variable_lengths(q_BHTC: Tensor, k_BHTC: Tensor, v_BHTC: Tensor, scale: float, documents: Documents) -> Tensor:
    """One call of FlashAttention for all documents of all samples, CUDA only."""
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q_BHTC, k_BHTC, v_BHTC))  # [B·T, H, C]
    ends, longest = documents.cu_seqlens, documents.longest
    out = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scale, window_size=(-1, 0))  # causal
    assert isinstance(out, Tensor), "no auxiliary results were asked for"
    return out.unflatten(0, (len(q_BHTC), -1)).transpose(1, 2)
