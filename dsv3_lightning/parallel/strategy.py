"""The Lightning strategy for FSDP2, HSDP and expert parallelism over one mesh; the kinds are in mesh.KINDS."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor
from torch.optim import Optimizer

from dsv3_lightning.errors import ConfigError
from dsv3_lightning.model.transformer import Transformer
from dsv3_lightning.parallel.checkpoints.loading import on_first_rank, read_parts
from dsv3_lightning.parallel.checkpoints.saving import Saver
from dsv3_lightning.parallel.dispatch import AllToAll
from dsv3_lightning.parallel.groups import build_meshes, set_timeout
from dsv3_lightning.parallel.mesh import KINDS, StrategyConfig, mesh_shape
from dsv3_lightning.parallel.sharding import MakeDispatcher, shard_model, sync_gradients_of_replicas
from dsv3_lightning.parallel.tensors import as_dtensor_like, fill_shard, gather_full, local, local_shard


class MeshStrategy(ModelParallelStrategy):
    """Spreads `pl_module.model`, a Transformer, over all processes. Takes the arguments of StrategyConfig, with the
    dispatcher as a class.

    Every rank is a data-parallel rank. The LightningModule's `configure_model` calls `shard` while its model is on the
    meta device, and fills each shard with the function that it returns: no process ever holds the full model.
    """

    def __init__(self, dispatcher: MakeDispatcher = AllToAll, **settings: Any) -> None:
        self.config, self.dispatcher = StrategyConfig(**settings), dispatcher
        timeout = timedelta(minutes=self.config.timeout_minutes)
        # For a checkpoint, offloaded tensors are gathered between hosts without a copy to the GPUs.
        backend = "cpu:gloo,cuda:nccl" if self.config.cpu_offload else None
        super().__init__(data_parallel_size=1, tensor_parallel_size=1, timeout=timeout, process_group_backend=backend)
        self.saver: Saver | None = None
        self.started_at: int | None = None  # the step that this start began with
        self.timeout_lowered = False

    def setup_environment(self) -> None:
        if self.config.cpu_offload and self.root_device.type == "cpu":
            raise ConfigError("strategy.cpu_offload=true: this run is on the CPU; offloading is for GPUs")
        self._setup_distributed()
        model: Any = self.lightning_module.model.config  # type: ignore[union-attr]
        shape = mesh_shape(self.config, self.world_size, self.num_processes, model)
        self.meshes = build_meshes(shape, self.root_device.type, self._timeout)
        self._device_mesh = self.meshes.dense
        holders = self.meshes.dense.mesh.flatten().tolist()  # of plain tensors
        self.saver = Saver(holders) if self.config.sharded_checkpoints else None
        rank_zero_only(print)(f"strategy {self.config.kind}: {shape}, {shape.ranks} processes", flush=True)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """After the first step of this start, lowers the limit on the time that a collective waits for a rank."""
        minutes, step = self.config.step_timeout_minutes, self.lightning_module.trainer.global_step  # type: ignore[union-attr]
        if self.started_at is None:
            self.started_at = step
        if minutes is None or self.timeout_lowered or step == self.started_at:
            return
        self.barrier()  # a rank that is still in its first step has the longer limit
        set_timeout(self.meshes, timedelta(minutes=minutes))
        dist.group.WORLD.set_timeout(timedelta(minutes=minutes))  # type: ignore[union-attr]
        self.timeout_lowered = True

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    @property
    def parameter_device(self) -> torch.device:
        return torch.device("cpu") if self.config.cpu_offload else self.root_device

    def shard(self, model: Transformer) -> Callable[[Tensor, int | None, Callable[[], Tensor]], None]:
        """Shards a model on the meta device; returns the function that writes initial weights into its shards."""
        shard_model(model, self.meshes, self.config, str(self.precision_plugin.precision), self.dispatcher)
        return fill_shard

    def model_to_device(self) -> None:
        """Moves metrics and, with offloading, buffers to the device; the weights are there already."""
        if self.config.cpu_offload:
            move_all_but_parameters(self.lightning_module, self.root_device)
        else:
            super().model_to_device()

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Lightning calls it around each of a step's micro-batches but the last: replicas are reduced once per step."""
        model: Any = self.lightning_module.model  # type: ignore[union-attr]
        sync_gradients_of_replicas(model, False)
        try:
            yield
        finally:
            sync_gradients_of_replicas(model, True)

    def finish_saving(self) -> None:
        """Waits for a checkpoint that is still being written."""
        if self.saver is not None:
            self.saver.finish()

    def teardown(self) -> None:
        try:
            self.finish_saving()
        finally:
            if self.saver is not None:
                self.saver.close()
            self.saver = None
            super().teardown()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Full tensors on the CPU, gathered one at a time, on the first rank only; or each rank's shards."""
        state = self.lightning_module.state_dict()  # type: ignore[union-attr]
        return self.on_first_rank({name: self.to_save(value) for name, value in state.items()})

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state as AdamW has it on one process, so the file is the same for any number of processes."""
        optimizer = getattr(optimizer, "optimizer", optimizer)
        weights, state = weights_of(optimizer), optimizer.state_dict()
        for weight, (index, values) in zip(weights, sorted(state["state"].items()), strict=True):
            state["state"][index] = {k: self.to_save(as_dtensor_like(weight, v)) for k, v in values.items()}
        return self.on_first_rank(state)

    def to_save(self, tensor: Tensor) -> Tensor:
        """This rank's shard; or, for a single file, the full tensor on the first rank and an empty one elsewhere."""
        if self.saver is not None:
            return tensor.detach()
        gathered = gather_full(tensor)
        return gathered if self.is_global_zero else gathered.new_empty(0)

    def on_first_rank(self, state: dict[str, Any]) -> dict[str, Any]:
        return state if self.is_global_zero or self.saver is not None else {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        if self.saver is not None:
            self.saver.save(checkpoint, Path(filepath))
        elif self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads this rank's shards from a file or from a sharded checkpoint, which may be of another mesh."""
        module = self.lightning_module
        assert module is not None
        own = module.state_dict()
        path = Path(checkpoint_path)
        if on_first_rank(path.is_dir):  # another rank may see an old listing
            checkpoint = read_parts(path, own, [weights_of(optimizer) for optimizer in self.optimizers])
        else:
            files: Any = self.checkpoint_io
            checkpoint = files.load_checkpoint(path, mmap=True)
        if own.keys() != checkpoint["state_dict"].keys():
            different = ", ".join(sorted(own.keys() ^ checkpoint["state_dict"].keys())[:4])
            raise ConfigError(f"{checkpoint_path}: its weights are those of another model ({different})")
        with torch.no_grad():
            for name, value in checkpoint["state_dict"].items():
                local(own[name]).copy_(local_shard(value, own[name]))
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"]):
            weights = weights_of(optimizer)
            for index, weight in enumerate(weights):
                state["state"][index] = {k: local_shard(v, weight) for k, v in state["state"][index].items()}
            with torch.no_grad():
                for weight, master in zip(weights, state.pop("masters", [])):  # of one process with bf16 weights
                    local(weight).copy_(local_shard(master, weight))
            optimizer.load_state_dict(state)
        return checkpoint


def move_all_but_parameters(module: Any, device: torch.device) -> None:
    """Moves buffers and metrics of a LightningModule whose parameters are all in its `model`, and sets its device."""
    for child in module.children():
        if child is not module.model:
            child.to(device)  # metrics
    for layer in module.model.modules():
        for name, buffer in layer.named_buffers(recurse=False):
            setattr(layer, name, buffer.to(device))
    module._device = device  # as Lightning's `to` sets it, which would also move parameters


def weights_of(optimizer: Any) -> list[Tensor]:
    """The model's parameters in the order of the optimizer's state, which holds shards or fp32 copies of them."""
    return optimizer.weights


def register() -> None:
    """Registers the kinds with Lightning, so `Trainer(strategy="fsdp2")` works, with default sizes."""
    for kind in KINDS:
        if kind not in StrategyRegistry:
            StrategyRegistry.register(kind, MeshStrategy, f"dsv3-lightning: {kind}", kind=kind)


register()
