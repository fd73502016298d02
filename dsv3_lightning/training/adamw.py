"""AdamW on a rank's shards, with fp32 master copies of low-precision weights, and moments in fp32 or bf16."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from dsv3_lightning.parallel.tensors import local


class MasterAdamW(torch.optim.AdamW):
    """AdamW on this rank's shards; low-precision weights are updated in fp32 master copies and rounded after each step.

    Without copies, updates below 1/256 of a bf16 weight would be lost (V3 §3.3.2 has fp32 master weights too). A copy
    starts from the weight's `master`, its value before rounding, if it has one. Copies are part of the state, since
    rounded weights could not resume a run exactly. AdamW is elementwise, so it can run on shards, and parameters of
    several meshes form one group.

    moments: the dtype in which both moments are stored. Rounded ones are widened for a step, one weight at a time.
    """

    def __init__(self, groups: list[dict[str, Any]], moments: torch.dtype = torch.float32, **settings: Any) -> None:
        self.moments = moments
        self.weights: list[Tensor] = [p for group in groups for p in group["params"]]
        exact = [getattr(p, "master", local(p.detach())) for p in self.weights]
        self.masters: list[Tensor] = [nn.Parameter(p.to(w.device, torch.float32)) for p, w in zip(exact, self.weights)]
        master_of = dict(zip(self.weights, self.masters, strict=True))
        super().__init__([{**group, "params": [master_of[p] for p in group["params"]]} for group in groups], **settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for weight, master in zip(self.weights, self.masters, strict=True):
            master.grad = None if weight.grad is None else local(weight.grad).to(master.dtype)
            if weight.dtype == master.dtype:
                master.data = local(weight.detach())  # FSDP2 may have moved the shard
        self.update()
        for master in self.masters:
            master.grad = None
        rounded = [pair for pair in zip(self.weights, self.masters, strict=True) if pair[0].dtype != pair[1].dtype]
        if rounded:
            torch._foreach_copy_([local(weight) for weight, _ in rounded], [master for _, master in rounded])
        return loss

    def update(self) -> None:
        """Updates the masters that have gradients."""
        if self.moments == torch.float32:
            super().step()
        else:
            self.step_with_rounded_moments()

    def step_with_rounded_moments(self) -> None:
        """AdamW's step in fp32 from moments that are rounded when they are stored again."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for master in (master for master in group["params"] if master.grad is not None):
                state = self.state[master]
                if not state:
                    state["step"] = torch.zeros((), device=master.device)
                    state |= {name: torch.zeros_like(master, dtype=self.moments) for name in ("exp_avg", "exp_avg_sq")}
                first, second = state["exp_avg"].float(), state["exp_avg_sq"].float()
                adamw([master], [master.grad], [first], [second], [], [state["step"]], fused=True, amsgrad=False,
                      beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
                      maximize=False)  # fmt: skip
                state["exp_avg"].copy_(first)
                state["exp_avg_sq"].copy_(second)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for weight in self.weights:
            weight.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The state, with the masters where they are not the weights themselves."""
        state = super().state_dict()
        if any(local(weight).dtype != master.dtype for weight, master in zip(self.weights, self.masters, strict=True)):
            state["masters"] = [master.detach() for master in self.masters]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state. Without saved masters, as from sharded weights, those made of the fp32 weights remain."""
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "masters"})
        for state in self.state.values():  # which torch has cast to the masters' dtype
            state |= {name: value.to(self.moments) for name, value in state.items() if name != "step"}
        if "masters" in state_dict:
            with torch.no_grad():
                torch._foreach_copy_(self.masters, state_dict["masters"])
