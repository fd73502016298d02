"""How tokens reach the processes of their experts. Within one process nothing travels; `parallel/dispatch.py` has the
exchange between several."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from dsv3_lightning.model.autocast import compute_dtype
from dsv3_lightning.model.permute import Permute, WeightedUnpermute, sort_by_expert


@runtime_checkable
class Dispatcher(Protocol):
    """The exchange of tokens of one MoE layer, in five phases. `LocalDispatcher` by default.

    dispatch: starts sending each token of x_ND to its experts, experts_NK int64, whose outputs gates_NK (fp32) will
        weight; -1 for a copy that goes nowhere. Returns, while tokens may still be on their way, whatever the other
        methods need, with an attribute counts_E: this process's tokens per expert, int64.
    leave: sends the tokens that could not leave in `dispatch`, where the host did not yet know their numbers. It need
        not be called: `receive` does the same.
    receive: waits for the tokens of this process's experts, and returns the arguments of `Experts`: x_RD, sorted by
        expert; offsets_E, int64, the row at which each expert's rows end; and gates_R, fp32, where gates travel with
        the tokens. Called once per dispatch.
    send_back: starts the way back of the experts' outputs y_RD.
    combine: waits for them, and returns Σ_k gate · y [N, D], 0 for tokens that went nowhere.
    """

    def dispatch(self, x_ND: Tensor, experts_NK: Tensor, gates_NK: Tensor) -> Any: ...

    def leave(self, sent: Any) -> None: ...

    def receive(self, sent: Any) -> tuple[Tensor, ...]: ...

    def send_back(self, y_RD: Tensor, sent: Any) -> Any: ...

    def combine(self, returning: Any) -> Tensor: ...


class Sorted(NamedTuple):
    """Routed tokens of this process, sorted by expert, or the experts' outputs for them; see `permute.Order`."""

    x_RD: Tensor
    gates_NK: Tensor
    order_R: Tensor
    rows_NK: Tensor
    counts_E: Tensor


class LocalDispatcher:
    """The dispatcher of a process that has every expert. Gates weight the outputs, in fp32."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def dispatch(self, x_ND: Tensor, experts_NK: Tensor, gates_NK: Tensor) -> Sorted:
        order = sort_by_expert(experts_NK, self.num_experts)
        x_RD = Permute.apply(x_ND.to(compute_dtype(x_ND)), order.order_R, order.rows_NK)
        return Sorted(x_RD, gates_NK, *order)

    def leave(self, sent: Sorted) -> None:
        pass

    def receive(self, sent: Sorted) -> tuple[Tensor, ...]:
        return sent.x_RD, sent.counts_E.cumsum(0)  # rows of no expert follow

    def send_back(self, y_RD: Tensor, sent: Sorted) -> Sorted:
        return sent._replace(x_RD=y_RD)

    def combine(self, returning: Sorted) -> Tensor:
        return WeightedUnpermute.apply(returning.x_RD, returning.gates_NK, returning.order_R, returning.rows_NK)
