"""What a plan of time is made for: the mesh, the work of a step, and how the code computes it."""

from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

from dsv3_lightning.planning.share import Share


class Mesh(Protocol):
    """The size of each mesh axis; see `parallel.mesh.MeshShape`."""

    @property
    def dp_replicate(self) -> int: ...
    @property
    def dp_shard(self) -> int: ...
    @property
    def ep(self) -> int: ...
    @property
    def expert_shard(self) -> int: ...
    @property
    def small_shard(self) -> int | None: ...
    @property
    def nodes(self) -> int: ...
    @property
    def ranks(self) -> int: ...


class Policy(Protocol):
    """Settings of gathering and offloading; see `parallel.mesh.StrategyConfig`."""

    @property
    def reshard_after_forward(self) -> bool: ...
    @property
    def prefetch(self) -> int: ...
    @property
    def cpu_offload(self) -> bool: ...


@dataclass(frozen=True)
class Work:
    """The work of an optimizer step. tokens: per micro-batch and rank. micro_batches: per rank and step.

    documents: the mean length of the documents that tokens attend within; None: of the whole sequence.
    moment: bytes of a number in the optimizer's moments. kind: the optimizer's. fp8: compute.fp8.
    """

    tokens: int
    micro_batches: int
    sequence_length: int
    precision: str
    policy: str
    documents: float | None = None
    moment: int = 4
    kind: str = "adamw"
    fp8: bool | str = False

    @property
    def computed(self) -> int:
        """Bytes of a number in matrix products."""
        return 4 if self.precision == "32" else 2

    @property
    def residual(self) -> int:
        """Bytes of a number in the residual stream."""
        return 2 if self.precision == "bf16" else 4


class Again(NamedTuple):
    """The share of each part of a block's forward pass that the backward pass computes a second time.

    memory: norms, rotations and activations. rows: the sorting of tokens. exchange: the number of all-to-alls, of two.
    """

    attention: float
    experts: float
    products: float
    memory: float
    rows: float
    exchange: int


class Tiles(NamedTuple):
    """What of a step is in FP8, beside the linear layers of blocks. experts: their products. dispatch: tokens on their
    way to these. kernels: tiles are written by kernels of their own, else by plain torch, for each micro-batch."""

    experts: bool
    dispatch: bool
    kernels: bool


SETTING = Tiles(experts=False, dispatch=False, kernels=False)  # compute.fp8: true, as the code computes it
WHAT_IF = Tiles(experts=True, dispatch=True, kernels=True)  # as in the report (V3 §3.3)


@dataclass(frozen=True)
class Implementation:
    """How the code computes, as far as a plan of time depends on it.

    attention: cudnn, flash (values padded to the keys' width), flex, or efficient (with a mask).
    masked: the same, with `data.isolate_documents`.
    fused: element-wise work is compiled or hand-written, one kernel per part.
    rows: how routed tokens are sorted, a key of `passes.ROW_PASSES`.
    exchange: `direct` sends a copy per expert; `by_node` one per node, and from there one per expert; `fused` one per
        node and then per rank, by kernels of their own.
    exchange_hidden: it runs beside another micro-batch's computing.
    counted: exchanges of counts per MoE layer and pass. syncs: how often the host waits for the GPU there.
    logits: numbers computed at a time, but at least those of `least_tokens` tokens; None: all.
    fp32_passes: bytes per weight of the head and chunk of logits, to add up its gradient.
    zero1: parameters are gathered and gradients reduced once per step.
    reduce_once: copies of the model add their gradients once per step.
    gradient: bytes of a number. fp8: what is in FP8; None: nothing. again: by checkpointing policy.
    """

    attention: str
    fused: bool
    rows: str
    exchange: str
    syncs: int
    masked: str = "efficient"
    counted: int = 1
    exchange_hidden: bool = False
    logits: int | None = 2**27
    least_tokens: int = 1
    fp32_passes: int = 12
    zero1: bool = False
    reduce_once: bool = False
    gradient: int = 4
    fp8: Tiles | None = None
    again: dict[str, Again] = field(default_factory=dict)


FIRST = Implementation(  # this project's code of November 2026, before it was planned by parts
    attention="flash", fused=False, rows="sorted", exchange="direct", syncs=3,
    again={
        "none": Again(0, 0, 0, 0, 0, 0),
        "selective": Again(0, 0, 0, 1, 1, 2),
        "full": Again(1, 1, 1, 1, 1, 2),
    },
)  # fmt: skip
ONCE = replace(FIRST, reduce_once=True)
KERNELS = replace(ONCE, attention="cudnn", masked="flash", least_tokens=4096, fp32_passes=8)
TRAVELING = replace(  # gates travel with the tokens; with `full` they are sent again, but not back
    KERNELS, rows="gated", syncs=1,
    again={
        "none": Again(0, 0, 0, 0, 0, 0),
        "selective": Again(0, 0, 0, 1, 0.3, 0),
        "full": Again(1, 2 / 3, 1, 1, 0.3, 1),
    },
)  # fmt: skip
BY_NODE = replace(TRAVELING, exchange="by_node", rows="by_node")
HISTORY = {
    "the same code, planned by part": FIRST,
    "copies of the model add their gradients once per step": ONCE,
    "attention by cuDNN, unpadded; the loss in larger products": KERNELS,
    "gates travel with the tokens; nothing is sent twice, one wait per pass": TRAVELING,
    "a token travels once to each node": BY_NODE,
}


def now(generation: str, mesh: Mesh) -> Implementation:
    """What the code does today. cuDNN's attention is the faster one on Hopper alone."""
    code = BY_NODE if mesh.nodes > 1 else TRAVELING
    return code if generation == "sm90" else replace(code, attention="flash")


@dataclass(frozen=True)
class Layout:
    """Mesh, policies and work of a rank, and the code. imbalance: the slowest rank's routed tokens over the mean.

    share: the part of the model that the rank computes; None: all of it.
    """

    mesh: Mesh
    strategy: Policy
    work: Work
    code: Implementation
    imbalance: float = 1.0
    share: Share | None = None

    @property
    def again(self) -> Again:
        return self.code.again[self.work.policy]
