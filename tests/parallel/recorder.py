"""What a run computed, whole, whatever it was spread over: every gradient of every step, and the weights at the end."""

from pathlib import Path

import torch
from lightning.pytorch import Callback

from dsv3_lightning.model.losses import IGNORE
from dsv3_lightning.parallel.checkpoints.stages import gather_stages
from dsv3_lightning.parallel.data_ranks import data_ranks, has_first_samples, pipeline_of


class Recorder(Callback):
    """Writes step=<n>.pt with all gradients before clipping, start.pt and end.pt with the state, into `folder`.

    masters.pt: fp32 copies of weights at the start, by their number, where the optimizer has them.
    """

    def __init__(self, folder: str, gradients: bool = True) -> None:
        self.folder, self.gradients = Path(folder), gradients

    def write(self, trainer, name, tensors):
        if pipeline_of(trainer.strategy) is None:
            full = {key: whole(value) for key, value in tensors.items()}
        else:
            full = gather_stages(tensors, trainer.strategy.stages, sends=has_first_samples(trainer.strategy))
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            torch.save(full, self.folder / f"{name}.pt")

    def on_train_start(self, trainer, pl_module):
        self.write(trainer, "start", pl_module.model.state_dict())
        self.write(trainer, "masters", dict(enumerate(getattr(trainer.optimizers[0], "masters", []))))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.gradients:
            gradients = {name: p.grad for name, p in pl_module.model.named_parameters()}
            assert all(gradient is not None for gradient in gradients.values())
            self.write(trainer, f"step={trainer.global_step + 1}", gradients)

    def on_train_end(self, trainer, pl_module):
        self.write(trainer, "end", pl_module.model.state_dict())
        biases = [value for name, value in pl_module.model.named_buffers() if name.endswith("expert_bias")]
        if biases:
            mine = torch.stack(biases)
            for theirs in of_ranks_with_them(trainer.strategy, mine):
                assert torch.equal(theirs, mine), "the ranks' expert biases differ"


class Valid(Callback):
    """Lets the first targets of each sample count alone: `counts` of them, by the sample's place in the step."""

    def __init__(self, counts: list[int]) -> None:
        self.counts = counts

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        rows, heads, T = batch["targets"].shape
        first = getattr(trainer.strategy, "data_rank", trainer.global_rank) * rows
        for row, count in enumerate(self.counts[first : first + rows]):
            for head in range(heads):
                batch["targets"][row, head] = batch["tokens"][row, 1 + head : 1 + head + T]
            batch["targets"][row, :, count:] = IGNORE
        batch["target_counts"][:] = sum(self.counts[first : first + rows])


class Even(Callback):
    """Weighs each step's samples alike, as if all `count` targets were valid."""

    def __init__(self, count: int) -> None:
        self.count = count

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if "target_counts" in batch:
            batch["target_counts"].fill_(self.count // data_ranks(trainer.strategy))


def of_ranks_with_them(strategy, mine):
    """Those of the ranks that have the same layers: all, or in a pipeline those of a stage."""
    if pipeline_of(strategy) is None:
        return strategy.all_gather(mine).reshape(-1, *mine.shape)
    theirs = [torch.empty_like(mine) for _ in range(strategy.data_ranks)]
    torch.distributed.all_gather(theirs, mine, group=strategy.meshes.data.get_group())
    return theirs


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().cpu().clone()
