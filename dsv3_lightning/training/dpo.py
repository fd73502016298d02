"""Direct preference optimization (arXiv 2305.18290): the module of runs with a `dpo` section."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv3_lightning.data.batches.sampling import MicroBatch
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.model.losses import IGNORE
from dsv3_lightning.parallel.data_ranks import data_ranks, sum_over_data
from dsv3_lightning.training.metrics import means
from dsv3_lightning.training.objectives import Outcome, dpo
from dsv3_lightning.training.tuning import DPOConfig
from dsv3_lightning.training.weighted import Judge, WeightedModule

SPLITS = ("train", "validation")


class DPOModule(WeightedModule):
    """Learns to prefer one answer to another. Batches are those of `PairDataset`.

    The log-probabilities of the reference, which is the model at step 0, are computed once for all pairs before the
    first step, and stored in every checkpoint. Logs loss/main, the mean over pairs, and the mean margin, accuracy (how
    often it is positive) and implicit rewards; in validations the same, with val/loss as the loss of a pair.
    """

    FACTS = ("pairs", "loss", "accuracy", "margin", "reward_chosen", "reward_rejected")

    def __init__(self, dpo: DPOConfig, pairs_of_step: int, *args: Any, **settings: Any) -> None:
        super().__init__(dpo.mtp, *args, **settings)
        self.dpo, self.pairs_of_step = dpo, pairs_of_step
        self.reference: dict[
            str, Tensor
        ] = {}  # by split, fp32 [pairs, 2]: Σ log π of the chosen and the rejected answer

    @staticmethod
    def charts(tree: dict[str, Any], origins: int) -> dict[Any, list[str]]:
        charts: dict[Any, list[str]] = {**WeightedModule.charts(tree, origins)}
        charts[("does it prefer", "share of pairs whose chosen answer has the larger reward")] = [r"(val|dpo)/accuracy"]
        charts[("does it prefer", "margin between the rewards")] = [r"(val|dpo)/margin"]
        charts[("does it prefer", "implicit rewards")] = [r"dpo/reward_\w+"]
        return charts

    def on_train_start(self) -> None:
        self.find_reference()
        super().on_train_start()

    def on_validation_start(self) -> None:
        self.find_reference()

    def units(self, batch: dict[str, Tensor]) -> int:
        return int((batch["sample_ids"] >= 0).sum())

    def units_of_step(self) -> int:
        return self.pairs_of_step

    def judge(self, batch: dict[str, Tensor]) -> Judge:
        valid_BT = batch["targets"][:, 0] != IGNORE
        numbers, present = batch["sample_ids"].clamp(min=0), batch["sample_ids"] >= 0
        reference = self.reference[SPLITS[not self.in_training]]
        reference_B = reference[numbers.to(reference.device)].to(valid_BT.device).T.flatten()
        scale = self.parts / self.pairs_of_step

        def judged(log_p_BT: Tensor, entropy_BT: Tensor) -> Outcome:
            rows = torch.cat((present, present)).nonzero().flatten()  # a pair that isn't there would add ln 2
            some = dpo(log_p_BT[rows], valid_BT[rows], reference_B[rows], self.dpo.beta, self.dpo.by_length, scale)
            weights_BT = torch.zeros_like(log_p_BT).index_copy(0, rows, some.weights_BT)
            return some._replace(weights_BT=weights_BT, facts=some.facts | {"pairs": present.sum()})

        return judged

    def find_reference(self) -> None:
        """Takes the reference from the checkpoint, or computes it at step 0. Every rank calls it."""
        if self.reference:
            return
        if self.steps_done:
            raise ConfigError(f"checkpoint of step {self.steps_done}: holds no reference of dpo; it is another run's")
        for split in SPLITS:
            self.reference[split] = self.log_probabilities_of(split)

    @torch.no_grad()
    def log_probabilities_of(self, split: str) -> Tensor:
        """Σ log π of each pair's answers, fp32 [pairs, 2], from equally many passes on every rank."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        data.lines(split)
        dataset = data._datasets[split]
        ranks, rank, size = data_ranks(self.trainer.strategy), data._layout.rank, data._layout.micro_batch_size
        sums = torch.zeros(len(dataset), 2, device=self.device)
        for first in range(0, len(dataset), size * ranks):
            own = np.arange(first, first + size * ranks).reshape(size, ranks)[:, rank]
            own = np.where(own < len(dataset), own, -1)
            batch = {name: value.to(self.device) for name, value in dataset[MicroBatch(own)].items()}
            with self.trainer.precision_plugin.val_step_context():
                log_p_BT = self.target_log_probabilities(batch)
            numbers, there = batch["sample_ids"], batch["sample_ids"] >= 0
            sums[numbers[there]] = log_p_BT.sum(1).view(2, -1).T[there].float()
        return sum_over_data(self.trainer.strategy, sums).cpu()

    def readings(self, sums: dict[str, float]) -> dict[str, float | None]:
        pairs = sums["pairs"]
        names = ("accuracy", "margin", "reward_chosen", "reward_rejected")
        return {f"dpo/{name}": sums[name] / pairs if pairs else None for name in names}

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return {"expert_counts": self.validated(batch).counts_LE}

    def on_validation_epoch_end(self) -> None:
        sums = dict(zip(self.val_facts.names, self.summed(self.val_facts.packed()), strict=True))
        self.val_facts.clear()
        totals = torch.tensor([sums["loss"], sums["accuracy"], sums["margin"]], dtype=torch.float64)
        loss, accuracy, margin = means(totals, torch.full((3,), int(sums["pairs"])))
        self.log_validation({"val/loss": loss, "val/accuracy": accuracy, "val/margin": margin} | self.validated_mtp())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["reference"] = {split: sums.tolist() for split, sums in self.reference.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        stored = checkpoint.get("reference", {})
        self.reference = {split: torch.tensor(sums).view(-1, 2) for split, sums in stored.items()}
