"""PretrainModule: losses, gradients and logs of a batch. Callbacks do what happens between steps."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from dsv3_lightning.errors import ConfigError, RunStopped
from dsv3_lightning.hub.folder import WeightSource
from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.model.fp8 import emulated_product, use_fp8
from dsv3_lightning.model.fp8_cuda import scaled_product
from dsv3_lightning.model.init import fill
from dsv3_lightning.model.transformer import Losses, Transformer
from dsv3_lightning.parallel.checkpoints.opened import open_checkpoint
from dsv3_lightning.parallel.data_ranks import data_ranks, has_first_samples, pipeline_of, sum_over_data
from dsv3_lightning.parallel.meeting import refuse_mixed_steps
from dsv3_lightning.parallel.pipeline.pipeline import Pipeline
from dsv3_lightning.parallel.strategy import MeshStrategy
from dsv3_lightning.parallel.tensors import global_norm, local
from dsv3_lightning.planning.flops import training_flop_per_token
from dsv3_lightning.training.balance import BalanceTerm, count_step
from dsv3_lightning.training.config import ComputeConfig, LossConfig, OptimizerConfig
from dsv3_lightning.training.logging import is_last_micro_batch, is_log_step, log_scalars, publish
from dsv3_lightning.training.loops import loops_at, set_micro_batches
from dsv3_lightning.training.metrics import Acceptance, BitsPerByte, SourceLoss, TokenLoss
from dsv3_lightning.training.non_finite import describe, find_on_rank, gather_findings
from dsv3_lightning.training.optimizer import build_optimizer
from dsv3_lightning.training.pipeline_step import pipeline_step
from dsv3_lightning.training.schedule import lr_factor
from dsv3_lightning.training.stages import chunk_layers
from dsv3_lightning.training.stored import stored_arguments


class PretrainModule(pl.LightningModule):
    """Pre-training with L = L_main + λ/mtp_depth · Σ_k L_mtp,k + α · Σ_layers L_balance (V3 eq. 17, 25).

    A batch holds `tokens` and `mask` [B, T + 1 + mtp_depth], `targets` [B, 1 + mtp_depth, T] and `target_counts`
    [1 + mtp_depth], in a step's first micro-batch: the number of valid targets of all of the step's micro-batches on
    this rank. Their sum over the ranks divides every mean, however the step is split.
    If `balance.needs_counts`, the first of several micro-batches also holds `step_tokens` and `step_mask` of all.
    With `data.isolate_documents` it also holds `documents` (and `step_documents`).
    In a pipeline a batch is that of the whole step, whose micro-batches are the pipeline's.
    init_from: a folder with initial weights, in place of random ones.
    `mtp_weight` (λ) and `balance.scale` (on α) may be set by callbacks before each step. The outputs hold
    `expert_counts`, int64 [L, E], and `tokens`, the micro-batch's positions.
    """

    def __init__(
        self,
        model: ModelConfig,
        optimizer: OptimizerConfig,
        loss: LossConfig,
        compute: ComputeConfig,
        sequence_length: int,
        max_steps: int,
        seed: int,
        init_from: WeightSource | None = None,
    ) -> None:
        super().__init__()
        self.optimizer_config, self.loss_config, self.max_steps = optimizer, loss, max_steps
        self.sequence_length, self.flops_per_token = sequence_length, training_flop_per_token(model, sequence_length)
        self.seed, self.init_from = seed, init_from
        self.balance = BalanceTerm(loss.balance_factors, model.num_experts_per_tok)
        with torch.device("meta"):  # until `configure_model`, when the sharding is known
            self.model = Transformer(model, compute.activation_checkpointing, tuple(loss.balance_factors))
        if compute.fp8:
            emulated = compute.fp8 == "emulated"
            use_fp8(self.model, emulated_product if emulated else scaled_product, experts=emulated)
        self.mtp_weight = loss.mtp_weight or 0.0
        self.train_loss = TokenLoss(1 + model.mtp_depth)
        self.val_loss = TokenLoss(1 + model.mtp_depth)
        self.val_bpb = BitsPerByte()
        self.val_acceptance = Acceptance(model.mtp_depth)
        self.val_sources: SourceLoss | None = None  # where the data have sources
        self.scalars: dict[str, float] = {}
        self.target_counts_P: Tensor | None = None  # of the current step, over all micro-batches and ranks
        self.step_loss: Tensor | float = 0.0  # sum over the current step's micro-batches on this rank
        self.micro_batches: list[tuple[Tensor, Tensor | None]] = []  # losses and sample numbers of the current step
        self.step_skipped = False
        self.skipped_steps = self.skipped_in_a_row = 0
        self.loaded_step = 0
        self.kept: tuple[Tensor, Tensor, list[float]] | None = None
        self.updating = False
        self.forward_start = 0.0  # time.perf_counter when the callbacks were done with a batch
        self.settings: dict[str, Any] = {}  # the run's, for its checkpoints
        self.ramp: Callable[[int], int] | None = None  # micro-batches of the step after so many; None: always as many
        self.validated_step: int | None = None  # the step of the last validation

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # everything else that Lightning asks for is in the checkpoint
        cls,
        checkpoint_path: str | Path,
        map_location: torch.device | str | None = "cpu",
        strict: bool = True,
        weights_only: bool = True,
        **arguments: Any,
    ) -> "PretrainModule":
        """The module of a run's checkpoint, a file or a folder of shards, fp32 in evaluation mode.

        map_location: the device; None is the CPU. weights_only=False changes nothing: no code is run from the file.
        arguments: of the class, in place of those that follow from the stored settings. Raises ConfigError.
        """
        path = Path(checkpoint_path)
        checkpoint = open_checkpoint(path)
        module = cls(**stored_arguments(checkpoint) | arguments)
        module.settings = checkpoint.settings
        module.model.to_empty(device=map_location or "cpu")
        module.model.tie_weights()
        try:
            module.load_state_dict({name: checkpoint.read(name) for name in checkpoint.names()}, strict=strict)
        except RuntimeError as error:
            raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
        return module.eval()

    @staticmethod
    def charts(tree: dict[str, Any], origins: int) -> dict[str, list[str]]:
        """The tags that the module logs, by chart (callbacks/charts.py)."""
        balanced, mtp = tree["loss"]["balance"] not in ("none", ["none"]), tree["model"]["num_nextn_predict_layers"] > 0
        return {
            "loss": ["loss/main"],
            "val_loss": ["val/loss$"],
            "bpb": ["val/bpb"],
            "source_loss": [r"sources/loss_.*"] if tree["data"]["sources"] else [],
            "source_bpb": [r"sources/bpb_.*"] if tree["data"]["sources"] else [],
            "lr": ["optimizer/lr"],
            "balance_loss": ["loss/balance$"] if balanced else [],
            "balance_losses": [r"loss/balance_\w+"] if balanced else [],
            "mtp_loss": [r"loss/mtp_\d+"] if mtp else [],
            "val_mtp_loss": [r"val/mtp_\d+"] if mtp else [],
            "acceptance": [r"mtp/acceptance_\d+"] if mtp else [],
            "grad_norm": ["optimizer/grad_norm"],
            "skipped_steps": ["optimizer/skipped_steps"],
        }

    def configure_model(self) -> None:
        """Makes the initial weights, or this rank's shards of them; they don't depend on the number of ranks."""
        if not next(self.model.parameters()).is_meta:
            return
        strategy = self.trainer.strategy
        if isinstance(strategy, MeshStrategy):
            stages = chunk_layers(strategy.config, self.model.config, self.sequence_length)
            fill_parameter, device = strategy.shard(self.model, stages), strategy.parameter_device
        else:
            fill_parameter, device = fill, strategy.root_device
        self.model.to_empty(device=device)
        self.model.init_weights(self.seed, fill_parameter)
        if self.init_from is not None:
            self.init_from.load_into(self.model, fill_parameter)

    @property
    def steps_done(self) -> int:
        """Optimizer steps of the run so far, also if a finished run is loaded only for validation."""
        return max(self.trainer.global_step, self.loaded_step)

    @property
    def pipeline(self) -> Pipeline | None:
        return pipeline_of(self.trainer.strategy)

    def step_targets(self, batch: dict[str, Tensor]) -> Tensor:
        """Valid targets of each head in the whole step over all micro-batches and ranks, int64 [P]."""
        if "target_counts" in batch:
            self.target_counts_P = sum_over_data(self.trainer.strategy, batch["target_counts"].clone())
        assert self.target_counts_P is not None, "a step's first micro-batch has target_counts"
        return self.target_counts_P

    def step_counts(self, batch: dict[str, Tensor], losses: Losses | None) -> Tensor | None:
        """Tokens per expert of the whole step over all micro-batches and ranks, or None if no loss needs them.

        losses: of the micro-batch; None before a pipeline's.
        """
        if not self.balance.needs_counts:
            return None
        if losses is None:
            assert self.pipeline is not None
            counts_LE = self.pipeline.count(batch, self.pipelined_after(self.trainer.global_step))
        elif self.trainer.accumulate_grad_batches > 1:
            if "step_tokens" not in batch:
                return self.balance.step_counts_LE
            step = batch["step_tokens"], batch["step_mask"], batch.get("step_documents")
            counts_LE = count_step(self.model, *step, len(batch["tokens"]))
        else:
            counts_LE = losses.counts_LE.clone()
        self.balance.step_counts_LE = sum_over_data(self.trainer.strategy, counts_LE)
        return self.balance.step_counts_LE

    def head_loss(self, nll_P: Tensor, parts: int) -> Tensor:
        """L_main + λ/mtp_depth · Σ_k L_mtp,k of a part of the step. nll_P: summed token losses. parts: of the step."""
        assert self.target_counts_P is not None
        mean_P = nll_P / self.target_counts_P.clamp(min=1) * parts
        return mean_P[0] + self.mtp_weight * mean_P[1:].mean() if len(mean_P) > 1 else mean_P[0]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor | int]:
        self.step_targets(batch)
        ranks = data_ranks(self.trainer.strategy)
        if self.pipeline is None:
            losses = self.losses_of(batch)
            counts_LE = self.step_counts(batch, losses)
        else:
            counts_LE, micro_batches = self.step_counts(batch, None), self.pipelined_after(self.trainer.global_step)
            losses = pipeline_step(self.pipeline, batch, micro_batches, self.head_loss, self.balance, ranks, counts_LE)
        # Lightning averages over micro-batches and DDP over ranks; the target counts are of all of them.
        parts = ranks * self.trainer.accumulate_grad_batches
        loss = self.head_loss(losses.nll_P, parts) + self.balance.weigh(losses, counts_LE, parts)
        self.note(losses, batch)
        self.step_loss = self.step_loss + loss.detach()
        self.micro_batches.append((loss.detach(), batch.get("sample_ids")))
        return {"loss": loss, "expert_counts": losses.counts_LE, "tokens": batch["targets"][:, 0].numel()}

    def note(self, losses: Losses, batch: dict[str, Tensor]) -> None:
        """Adds a micro-batch to the means for the log."""
        self.train_loss.update(losses.nll_P, batch["targets"])

    def losses_of(self, batch: dict[str, Tensor], draft: bool = False) -> Losses:
        """The losses of a batch, without a pipeline with gradients. draft: as in `Transformer.losses`."""
        if self.pipeline is not None:
            return self.pipeline.evaluate(batch, self.pipelined_after(None), draft)
        return self.model.losses(batch["tokens"], batch["mask"], batch["targets"], draft, batch.get("documents"))

    def optimizer_zero_grad(self, *args: Any) -> None:
        """Lightning calls it between training_step and the backward pass, which a pipeline has done by then."""
        if self.pipeline is None:
            super().optimizer_zero_grad(*args)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Skips a step with non-finite values, else clips its gradients, and logs. Called once per optimizer step."""
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        norm = global_norm(gradients)
        finite = torch.isfinite(norm + self.step_loss).float()
        # All ranks must decide alike, and a value may be non-finite on one of them only.
        self.step_skipped = not bool(self.trainer.strategy.reduce(finite, reduce_op="sum") == self.trainer.world_size)
        self.step_loss = 0.0
        micro_batches, self.micro_batches = self.micro_batches, []
        if self.step_skipped:
            own = find_on_rank(self.trainer.global_rank, self.named_parameters(), micro_batches)
            self.skip_step(describe(gather_findings(own, self.trainer.world_size)))
        else:
            self.skipped_in_a_row = 0
            parts = [local(gradient) for gradient in gradients]
            if gradient_clip_val and gradient_clip_algorithm == "value":
                torch._foreach_clamp_min_(parts, -gradient_clip_val)
                torch._foreach_clamp_max_(parts, gradient_clip_val)
            elif gradient_clip_val:
                torch._foreach_mul_(parts, (gradient_clip_val / (norm + 1e-6)).clamp(max=1.0).to(parts[0].device))
        self.log_step(float(norm))
        self.updating = True  # the weights change next

    def skip_step(self, cause: str) -> None:
        """Drops the gradients, so the optimizer changes no weight and no state. Raises RunStopped after too many."""
        for parameter in self.parameters():
            parameter.grad = None
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        self.train_loss.reset()  # its sums may include the non-finite loss
        self.balance.clear()
        step = self.trainer.global_step + 1
        if self.skipped_in_a_row >= self.optimizer_config.max_skipped_steps:
            raise RunStopped(
                f"step {step}: the loss or a gradient was not finite {self.skipped_in_a_row} steps in a row "
                f"(optimizer.max_skipped_steps); the newest checkpoint is from before; at last {cause}"
            )
        if self.trainer.is_global_zero:
            skipped = f"step skipped ({self.skipped_steps} so far)"
            print(f"step {step}: the loss or a gradient is not finite; {skipped}; {cause}", flush=True)

    def log_step(self, norm: float) -> None:
        """Logs the means since the last logged step. Called before the optimizer's step counter increases."""
        step = self.trainer.global_step + 1
        if not is_log_step(self.trainer, step):
            return
        names = ["loss/main", *(f"loss/mtp_{k}" for k in range(1, self.model.config.mtp_depth + 1))]
        values: dict[str, float | None] = {}
        if self.balance.steps:  # 0 if every step since the last log was skipped
            values = dict(zip(names, self.train_loss.compute(), strict=True))
            *sums, steps = self.summed(self.balance.packed())
            values |= {name: total / steps for name, total in zip(self.balance.names, sums, strict=True)}
        self.train_loss.reset()
        self.balance.clear()
        values["optimizer/lr"] = self.trainer.optimizers[0].param_groups[0]["lr"]
        if not self.step_skipped:
            values["optimizer/grad_norm"] = norm
        values["optimizer/skipped_steps"] = self.skipped_steps
        log_scalars(self.trainer, values | self.own_values(), step)

    def own_values(self) -> dict[str, float | None]:
        """What a subclass logs beside this; every rank calls it at each logged step."""
        return {}

    def on_train_start(self) -> None:
        """Applies the optimizer settings of this run in place of those in a checkpoint."""
        for group, wanted in zip(self.trainer.optimizers[0].param_groups, self.set_for_step, strict=True):
            group |= wanted | {"lr": wanted["initial_lr"] * self.rate_factor(self.trainer.global_step)}
        set_micro_batches(self.trainer, self.micro_batches_after(self.trainer.global_step))
        publish(self.trainer, self.scalars)  # from before a resume: a monitored one may not be logged again soon

    def micro_batches_after(self, step: int) -> int:
        """Micro-batches of each rank in the step that follows on so many."""
        if self.ramp is None or self.pipeline is not None:
            return self.trainer.accumulate_grad_batches
        return self.ramp(step)

    def pipelined_after(self, step: int | None) -> int:
        """Micro-batches of the pipeline in the step that follows on so many; None: in a full one."""
        strategy = self.trainer.strategy
        assert isinstance(strategy, MeshStrategy) and strategy.pipeline_micro_batches is not None
        return strategy.pipeline_micro_batches if self.ramp is None or step is None else self.ramp(step)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.forward_start = time.perf_counter()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = self.trainer.global_step
        if is_last_micro_batch(self.trainer, batch_idx):
            set_micro_batches(self.trainer, self.micro_batches_after(step), step)
        if step >= self.max_steps:
            self.trainer.should_stop = True  # Lightning still validates once more before it stops

    def on_validation_epoch_start(self) -> None:
        if names := self.source_names:
            self.val_sources = SourceLoss(len(names)).to(self.device)

    @property
    def source_names(self) -> list[str]:
        """The sources of validation batches with a `source`; none if the data are one corpus."""
        return getattr(self.trainer.datamodule, "source_names", [])  # type: ignore[attr-defined]

    def validated(self, batch: dict[str, Tensor]) -> Losses:
        """The losses of a validation batch; those of all heads, and accepted drafts, are added to their means."""
        losses = self.losses_of(batch, draft=self.model.config.mtp_depth > 0)
        if losses.drafts_BPT is not None:
            self.val_acceptance.update(losses.drafts_BPT, batch["targets"])
        self.val_loss.update(losses.nll_P, batch["targets"])
        return losses

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        losses = self.validated(batch)
        self.val_bpb.update(losses.nll_P[0], batch["target_bytes"])
        if self.val_sources is not None:
            self.val_sources.update(batch["source"], losses.nll_P[0], batch["targets"][:, 0], batch["target_bytes"])
        return {"expert_counts": losses.counts_LE}

    def on_validation_epoch_end(self) -> None:
        main, *mtp = self.val_loss.compute()
        values = {"val/loss": main, "val/bpb": self.val_bpb.compute()}
        if self.val_sources is not None:
            for kind, of_sources in zip(("loss", "bpb"), self.val_sources.compute(), strict=True):
                values |= {f"sources/{kind}_{name}": value for name, value in zip(self.source_names, of_sources)}
        values |= self.mtp_values(mtp)
        self.val_loss.reset()
        self.val_bpb.reset()
        self.log_validation(values)

    def mtp_values(self, losses: list[float | None]) -> dict[str, float | None]:
        """Losses of the MTP modules in a validation, and the shares of accepted drafts, which begin anew."""
        values = {f"val/mtp_{k}": loss for k, loss in enumerate(losses, start=1)}
        if losses:
            accepted = enumerate(self.val_acceptance.compute(), start=1)
            values |= {f"mtp/acceptance_{k}": share for k, share in accepted}
            self.val_acceptance.reset()
        return values

    def log_validation(self, values: dict[str, float | None]) -> None:
        if not self.trainer.sanity_checking:
            log_scalars(self.trainer, values)
            self.validated_step = self.steps_done

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = build_optimizer(self.model, self.optimizer_config, str(self.trainer.precision))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate_factor)
        self.set_for_step = [
            {key: group[key] for key in ("initial_lr", "betas", "eps", "weight_decay")}
            for group in optimizer.param_groups
        ]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def rate_factor(self, step: int) -> float:
        config = self.optimizer_config
        return lr_factor(step, self.max_steps, config.warmup_steps, config.phases)

    def every_rank(self, value: int) -> list[int]:
        """The value of each rank, all of which must call it."""
        mine = torch.zeros(self.trainer.world_size, dtype=torch.int64)
        mine[self.trainer.global_rank] = value
        reduced: Tensor = self.trainer.strategy.reduce(mine.to(self.device), reduce_op="sum")
        return [int(one) for one in reduced]

    def summed(self, values: Tensor) -> list[Any]:
        """The values summed over all ranks with different samples; every rank must call it."""
        return sum_over_data(self.trainer.strategy, values.to(self.device, copy=True)).tolist()

    def keep(self) -> None:
        """Stores the sums for the log, which a step changes before it is complete."""
        self.kept = self.train_loss.nll_P.clone(), self.train_loss.count_P.clone(), self.balance.packed().tolist()
        self.updating = False

    def take_back(self) -> None:
        """Restores the sums of the last `keep`, without the micro-batches since."""
        assert self.kept is not None, "call keep first"
        self.train_loss.nll_P, self.train_loss.count_P = self.kept[0].clone(), self.kept[1].clone()
        self.balance.unpack(self.kept[2])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["skipped_steps"] = [self.skipped_steps, self.skipped_in_a_row]
        sums = torch.stack([self.train_loss.nll_P, self.train_loss.count_P.double()])
        balance = {"names": self.balance.names, "balance": self.summed(self.balance.packed())}
        checkpoint["since_log"] = {"loss": self.summed(sums), **balance}
        checkpoint["settings"] = self.settings
        checkpoint["scalars"] = dict(self.scalars)
        checkpoint["validated"] = self.validated_step == self.trainer.global_step

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.skipped_steps, self.skipped_in_a_row = checkpoint["skipped_steps"]
        self.scalars.update(checkpoint["scalars"])
        step = self.loaded_step = checkpoint["global_step"]
        refuse_mixed_steps(self.every_rank(step))
        all_full = step * self.trainer.accumulate_grad_batches  # val_check_interval counts full steps' micro-batches
        due = all_full % self.trainer.val_check_interval == 0 and self.trainer.enable_validation
        validate_first = due and not checkpoint["validated"]
        micro_batches = self.micro_batches_after(step)
        checkpoint["loops"] = loops_at(checkpoint["loops"], step, micro_batches, validate_first)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Timer):  # else a run whose time was up would never make another step
                checkpoint["callbacks"].pop(callback.state_key, None)
        if has_first_samples(self.trainer.strategy):  # the sums were of all ranks, whatever their number
            nll_P, count_P = torch.tensor(checkpoint["since_log"]["loss"], dtype=torch.float64, device=self.device)
            self.train_loss.nll_P += nll_P
            self.train_loss.count_P += count_P.long()
            if checkpoint["since_log"]["names"] == self.balance.names:  # else the losses have changed
                self.balance.unpack(checkpoint["since_log"]["balance"])
        for state in checkpoint["lr_schedulers"]:
            rates = [self.optimizer_config.lr] * len(state["base_lrs"])
            state |= {"base_lrs": rates, "_last_lr": [rate * self.rate_factor(step) for rate in rates]}
