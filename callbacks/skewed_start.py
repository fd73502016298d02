"""A run that starts unbalanced, to see whether a strategy gets it out of there."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from dsv3_lightning.callbacks.expert_bias import routers_of
from dsv3_lightning.callbacks.settings import SkewedStartSettings


class SkewedStart(Callback):
    """Before the first step expert i of E gets the bias strength · (1 - i / (E - 1)): the first ones are crowded.

    With sigmoid affinities, which initially lie near 0.5, a strength of 0.5 leaves the last experts without a token.
    Nothing is logged; no state: a run that goes on has its biases in the checkpoint.
    """

    def __init__(self, strength: float) -> None:
        SkewedStartSettings(strength=strength)
        self.strength = strength

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:
            for router in routers_of(pl_module):
                router.expert_bias += skew(len(router.expert_bias), self.strength).to(router.expert_bias.device)


def skew(experts: int, strength: float) -> torch.Tensor:
    """From strength down to 0, fp32 [E].

    >>> skew(3, 0.5).tolist()
    [0.5, 0.25, 0.0]
    """
    return torch.linspace(strength, 0.0, experts)
