"""How tokens reach the processes of their experts. Within one process nothing travels; `parallel/dispatch.py` has the
exchange between several."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from dsv3_lightning.model.permute import permute, unpermute


@runtime_checkable
class Dispatcher(Protocol):
    """The exchange of tokens of one MoE layer. `LocalDispatcher` by default.

    dispatch: starts sending each token of x_ND to its experts, experts_NK int64, whose outputs gates_NK will weight;
        returns while tokens may still be on their way, with whatever the other two methods need.
    receive: waits for the tokens of this process's experts: x_RD, sorted by expert, and offsets_E, int64, the row at
        which each expert's rows end. Called once per dispatch.
    combine: takes the experts' outputs y_RD back to the tokens: Σ_k gate · y [N, D].
    """

    def dispatch(self, x_ND: Tensor, experts_NK: Tensor, gates_NK: Tensor) -> Any: ...

    def receive(self, sent: Any) -> tuple[Tensor, Tensor]: ...

    def combine(self, y_RD: Tensor, sent: Any) -> Tensor: ...


class Sorted(NamedTuple):
    """Routed tokens of this process, sorted by expert; see `permute`."""

    x_RD: Tensor
    order_R: Tensor
    counts_E: Tensor
    gates_NK: Tensor


class LocalDispatcher:
    """The dispatcher of a process that has every expert."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def dispatch(self, x_ND: Tensor, experts_NK: Tensor, gates_NK: Tensor) -> Sorted:
        return Sorted(*permute(x_ND, experts_NK, self.num_experts), gates_NK)

    def receive(self, sent: Sorted) -> tuple[Tensor, Tensor]:
        return sent.x_RD, sent.counts_E.cumsum(0)

    def combine(self, y_RD: Tensor, sent: Sorted) -> Tensor:
        return unpermute(y_RD, sent.order_R, sent.gates_NK)
