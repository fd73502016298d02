"""Training whose loss is a weight on each token's -log π: what DPO and GRPO have in common."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dsv3_lightning.model.losses import IGNORE
from dsv3_lightning.model.transformer import Losses
from dsv3_lightning.parallel.data_ranks import data_ranks, has_first_samples, sum_over_data
from dsv3_lightning.training.logging import latest_scalars
from dsv3_lightning.training.metrics import max_vio
from dsv3_lightning.training.module import PretrainModule
from dsv3_lightning.training.objectives import Outcome
from dsv3_lightning.training.rollouts import of_all_ranks

Judge = Callable[[Tensor, Tensor], Outcome]  # from log π and entropies [B, T] of the targets


class Facts:
    """Sums over micro-batches, by name: fp64, of this rank since the last log. largest: names of which the largest
    value takes the place of the sum; none is below 0."""

    def __init__(self, names: tuple[str, ...], largest: tuple[str, ...] = ()) -> None:
        self.names, self.largest = (*names, *largest), largest
        self.clear()

    def clear(self) -> None:
        self.values: dict[str, Tensor | float] = dict.fromkeys(self.names, 0.0)

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        for name, value in values.items():
            new = value.detach().double() if isinstance(value, Tensor) else value
            known = self.values[name]
            if name in self.largest:
                known = torch.as_tensor(known, dtype=torch.float64, device=torch.as_tensor(new).device)
                self.values[name] = torch.maximum(known, torch.as_tensor(new, dtype=torch.float64))
            else:
                self.values[name] = known + new

    def packed(self) -> Tensor:
        return torch.stack([torch.as_tensor(self.values[name], dtype=torch.float64).cpu() for name in self.names])

    def unpack(self, packed: list[float]) -> None:
        self.values = dict(zip(self.names, packed, strict=True))


class WeightedModule(PretrainModule):
    """A PretrainModule whose main loss has the value and the gradient of an objective of `training/objectives.py`.

    The loss of the MTP modules is added with its λ; it has no gradient in the main model (`detached`), or none at all
    (`frozen`). Balance losses are those of pre-training. Subclasses say how a batch is judged and what is logged.
    """

    FACTS: tuple[str, ...] = ()
    LARGEST: tuple[str, ...] = ()  # facts of which the largest value counts, and not the sum
    temperature = 1.0

    def __init__(self, mtp: str, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.frozen_mtp = mtp == "frozen"
        self.facts, self.val_facts = (Facts(self.FACTS, self.LARGEST) for _ in range(2))
        self.value: Tensor | float = 0.0  # of the micro-batch
        self.kept_facts: list[float] = []
        self.in_training = False

    def configure_model(self) -> None:
        super().configure_model()
        self.model.lm_head.temperature = self.temperature
        if self.frozen_mtp:
            self.model.mtp.requires_grad_(False)

    @property
    def parts(self) -> int:
        """The parts of a step over whose losses Lightning and the strategy take the mean."""
        return data_ranks(self.trainer.strategy) * self.trainer.accumulate_grad_batches

    def judge(self, batch: dict[str, Tensor]) -> Judge:
        """How the log-probabilities of a batch's targets become a loss; its value is that of this part of the step."""
        raise NotImplementedError

    def units(self, batch: dict[str, Tensor]) -> int:
        """What the step's mean is over: pairs or answers in this batch."""
        raise NotImplementedError

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor | int]:
        self.in_training = True
        return super().training_step(batch, batch_idx)

    def losses_of(self, batch: dict[str, Tensor], draft: bool = False) -> Losses:
        judge = self.judge(batch)
        facts = self.facts if self.in_training else self.val_facts

        def weigh(log_p_BT: Tensor, entropy_BT: Tensor) -> Tensor:
            outcome = judge(log_p_BT, entropy_BT)
            facts.add(outcome.facts)
            self.value = outcome.value.detach()
            return outcome.weights_BT.to(log_p_BT.dtype)

        return self.model.losses(batch["tokens"], batch["mask"], batch["targets"], draft, None, weigh)

    @torch.no_grad()
    def target_log_probabilities(self, batch: dict[str, Tensor]) -> Tensor:
        """log π of the main head's targets at `temperature`, fp32 [B, T], 0 where there is none."""
        found: list[Tensor] = []

        def keep(log_p_BT: Tensor, entropy_BT: Tensor) -> Tensor:
            found.append(log_p_BT)
            return torch.zeros_like(log_p_BT)

        self.model.losses(batch["tokens"], batch["mask"], batch["targets"], weigh=keep)
        torch.clear_autocast_cache()  # it would keep weights that were cast without gradient
        return found[0]

    def head_loss(self, nll_P: Tensor, parts: int) -> Tensor:
        """The objective's value with the gradient of Σ w · -log π, and λ times the mean of the MTP modules' losses."""
        assert self.target_counts_P is not None
        main = nll_P[0] + (self.value - nll_P[0]).detach()
        if len(nll_P) == 1:
            return main
        mean_P = nll_P[1:] / self.target_counts_P[1:].clamp(min=1) * parts
        return main + self.mtp_weight * mean_P.mean()

    def note(self, losses: Losses, batch: dict[str, Tensor]) -> None:
        """Adds the micro-batch to the means for the log: the objective's is over steps, MTP's over targets."""
        units = torch.tensor(self.units(batch), device=losses.nll_P.device)
        counts_P = (batch["targets"] != IGNORE).sum((0, 2))
        counts_P[0] = units
        nll_P = losses.nll_P.detach().clone()
        nll_P[0] = self.value * self.units_of_step() / self.parts
        self.train_loss.update(nll_P, batch["targets"], counts_P)

    def units_of_step(self) -> int:
        raise NotImplementedError

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.steps_done == 0:
            self.validate_before()

    def validate_before(self) -> None:
        """Validates the model that the run starts from, so that the curves show what the run changes."""
        batches = self.trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
        self.in_training, counts_LE = False, None
        self.eval()
        with torch.no_grad(), self.trainer.precision_plugin.val_step_context():
            for number, batch in enumerate(batches):
                outputs = self.validation_step(self.trainer.strategy.batch_to_device(batch), number)
                seen = outputs["expert_counts"]
                counts_LE = seen if counts_LE is None else counts_LE + seen
        torch.clear_autocast_cache()
        self.train()
        if counts_LE is None:
            return
        self.on_validation_epoch_end()
        values = {
            name: value for name, value in latest_scalars(self.trainer).items() if name.startswith(("val/", "mtp/"))
        }
        if counts_LE.numel():
            values["max_vio"] = float(max_vio(sum_over_data(self.trainer.strategy, counts_LE.clone())).mean())
        if self.trainer.is_global_zero:
            shown = "  ".join(f"{name.removeprefix('val/')} {value:.3f}" for name, value in values.items())
            print(f"validation before step 1:  {shown}", flush=True)

    def validated_mtp(self) -> dict[str, float | None]:
        values = self.mtp_values(self.val_loss.compute()[1:])
        self.val_loss.reset()
        return values

    def on_validation_epoch_start(self) -> None:
        self.in_training = False

    def skip_step(self, cause: str) -> None:
        self.facts.clear()
        super().skip_step(cause)

    def own_values(self) -> dict[str, float | None]:
        values = self.readings(dict(zip(self.facts.names, self.of_ranks(self.facts), strict=True)))
        self.facts.clear()
        return values

    def of_ranks(self, facts: Facts) -> list[float]:
        """The facts of all ranks with different samples together, packed; every rank must call it."""
        sums = len(self.FACTS)
        packed = facts.packed()
        largest = of_all_ranks(packed[sums:].tolist(), self.trainer.world_size) if self.LARGEST else [[]]
        return [*self.summed(packed[:sums]), *map(max, zip(*largest, strict=True))]

    def readings(self, sums: dict[str, float]) -> dict[str, float | None]:
        """What is logged of the sums since the last log."""
        raise NotImplementedError

    def keep(self) -> None:
        super().keep()
        self.kept_facts = self.facts.packed().tolist()

    def take_back(self) -> None:
        super().take_back()
        self.facts.unpack(self.kept_facts)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["since_log"]["facts"] = self.of_ranks(self.facts)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if has_first_samples(self.trainer.strategy) and "facts" in checkpoint["since_log"]:
            self.facts.unpack(checkpoint["since_log"]["facts"])
