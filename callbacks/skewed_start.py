"""An unbalanced start, to test whether a balancing strategy recovers from it."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from dsv3_lightning.callbacks.protocol import require_routers, routers_of
from dsv3_lightning.callbacks.settings import SkewedStartSettings


class SkewedStart(Callback):
    """Sets the bias of expert i of E to strength · (1 - i / (E - 1)) before the first step, crowding the first experts.

    Sigmoid affinities are initially near 0.5, so a strength of 0.5 leaves the last experts without a token.
    Logs nothing. Stateless: the checkpoint of a resumed run contains the biases.
    """

    def __init__(self, strength: float) -> None:
        SkewedStartSettings(strength=strength)
        self.strength = strength

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        require_routers(trainer, pl_module, self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:
            for router in routers_of(pl_module):
                router.expert_bias += skew(len(router.expert_bias), self.strength).to(router.expert_bias.device)


def skew(experts: int, strength: float) -> torch.Tensor:
    """Biases that fall evenly from `strength` to 0, fp32 [E].

    >>> skew(3, 0.5).tolist()
    [0.5, 0.25, 0.0]
    """
    return torch.linspace(strength, 0.0, experts)
