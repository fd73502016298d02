"""How tokens reach the processes of their experts. Within one process nothing travels; `parallel/dispatch.py` has the
exchange between several."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from dsv3_lightning.model.autocast import compute_dtype
from dsv3_lightning.model.cpu import row_multiple
from dsv3_lightning.model.permute import Order, Permute, PermuteGates, Unpermute, fill_up, sort_by_expert


@runtime_checkable
class Dispatcher(Protocol):
    """The exchange of tokens of one MoE layer, in five phases. `LocalDispatcher` by default.

    dispatch: starts sending each token of x_ND to its experts, experts_NK int64, whose outputs gates_NK (fp32) will
        weight; -1 for a copy that goes nowhere. Returns, while tokens may still be on their way, whatever the other
        methods need, with an attribute counts_E: this process's tokens per expert, int64.
    leave: sends the tokens that could not leave in `dispatch`, where the host did not yet know their numbers. It need
        not be called: `receive` does the same.
    receive: waits for the tokens of this process's experts, and returns the arguments of `Experts`: x_RD, sorted by
        expert; offsets_E, int64, the row at which each expert's rows end; and gates_R, fp32, unless `combine` weights
        the outputs. Called once per dispatch.
    send_back: starts the way back of the experts' outputs y_RD.
    combine: waits for them, and returns Σ_k gate · y [N, D], 0 for tokens that went nowhere.
    """

    def dispatch(self, x_ND: Tensor, experts_NK: Tensor, gates_NK: Tensor) -> Any: ...

    def leave(self, sent: Any) -> None: ...

    def receive(self, sent: Any) -> tuple[Tensor, ...]: ...

    def send_back(self, y_RD: Tensor, sent: Any) -> Any: ...

    def combine(self, returning: Any) -> Tensor: ...


class Sorted(NamedTuple):
    """Routed tokens of this process, sorted by expert, or the experts' outputs for them. order: see `permute.Order`.
    offsets_E: where each expert's rows end."""

    x_RD: Tensor
    gates_R: Tensor
    order: Order
    offsets_E: Tensor

    @property
    def counts_E(self) -> Tensor:
        return self.order.counts_E


class LocalDispatcher:
    """The dispatcher of a process that has every expert."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def dispatch(self, x_ND: Tensor, experts_NK: Tensor, gates_NK: Tensor) -> Sorted:
        x_ND = x_ND.to(compute_dtype(x_ND))
        order, offsets_E = fill_up(sort_by_expert(experts_NK, self.num_experts), row_multiple(x_ND))
        x_RD = Permute.apply(x_ND, order.order_R, order.rows_NK)
        return Sorted(x_RD, PermuteGates.apply(gates_NK, order.order_R, order.rows_NK), order, offsets_E)

    def leave(self, sent: Sorted) -> None:
        pass

    def receive(self, sent: Sorted) -> tuple[Tensor, ...]:
        return sent.x_RD, sent.offsets_E, sent.gates_R  # rows of no expert may follow

    def send_back(self, y_RD: Tensor, sent: Sorted) -> Sorted:
        return sent._replace(x_RD=y_RD)

    def combine(self, returning: Sorted) -> Tensor:
        return Unpermute.apply(returning.x_RD, returning.order.order_R, returning.order.rows_NK)
