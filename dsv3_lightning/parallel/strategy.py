"""The Lightning strategy over one mesh: FSDP2, replicas of it, and expert parallelism, by the names in KINDS."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor
from torch.optim import Optimizer

from dsv3_lightning.errors import ConfigError
from dsv3_lightning.model.transformer import Transformer
from dsv3_lightning.parallel.checkpoints.shards import Saver, read_parts
from dsv3_lightning.parallel.dispatch import AllToAll
from dsv3_lightning.parallel.groups import build_meshes
from dsv3_lightning.parallel.mesh import KINDS, StrategyConfig, mesh_shape
from dsv3_lightning.parallel.sharding import MakeDispatcher, shard_model
from dsv3_lightning.parallel.tensors import as_dtensor_like, fill_shard, gather_full, local, local_shard


class MeshStrategy(ModelParallelStrategy):
    """Spreads `pl_module.model`, a Transformer, over all processes; its arguments are those of StrategyConfig, and the
    dispatcher its class.

    Every rank is a data-parallel rank. The LightningModule's `configure_model` calls `shard` while its model is still
    on the meta device, and puts each weight into its parts with what that returns: no process ever holds the whole.
    """

    def __init__(self, dispatcher: MakeDispatcher = AllToAll, **settings: Any) -> None:
        self.config, self.dispatcher = StrategyConfig(**settings), dispatcher
        timeout = timedelta(minutes=self.config.timeout_minutes)
        # What is offloaded is gathered for a checkpoint between hosts, without a detour over the GPUs.
        backend = "cpu:gloo,cuda:nccl" if self.config.cpu_offload else None
        super().__init__(data_parallel_size=1, tensor_parallel_size=1, timeout=timeout, process_group_backend=backend)
        self.saver: Saver | None = None

    def setup_environment(self) -> None:
        if self.config.cpu_offload and self.root_device.type == "cpu":
            raise ConfigError("strategy.cpu_offload=true: this run is on the CPU; offloading is for GPUs")
        self._setup_distributed()
        model: Any = self.lightning_module.model.config  # type: ignore[union-attr]
        shape = mesh_shape(self.config, self.world_size, self.num_processes, model)
        self.meshes = build_meshes(shape, self.root_device.type, self._timeout)
        self._device_mesh = self.meshes.dense
        self.saver = Saver() if self.config.sharded_checkpoints else None
        rank_zero_only(print)(f"strategy {self.config.kind}: {shape}, {shape.ranks} processes", flush=True)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    @property
    def parameter_device(self) -> torch.device:
        return torch.device("cpu") if self.config.cpu_offload else self.root_device

    def shard(self, model: Transformer) -> Callable[[Tensor, int | None, Callable[[], Tensor]], None]:
        """Lays the model, on the meta device, over the mesh; returns how initial weights are put into its parts."""
        shard_model(model, self.meshes, self.config, str(self.precision_plugin.precision), self.dispatcher)
        return fill_shard

    def model_to_device(self) -> None:
        """Weights were made where they belong; what is left are metrics and, where it is offloaded, buffers."""
        if self.config.cpu_offload:
            move_all_but_parameters(self.lightning_module, self.root_device)
        else:
            super().model_to_device()

    def finish_saving(self) -> None:
        """Waits for a checkpoint that is still being written."""
        if self.saver is not None:
            self.saver.finish()

    def teardown(self) -> None:
        self.finish_saving()
        super().teardown()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole tensors on the CPU, gathered one at a time, on the first rank alone; or each rank's parts."""
        state = self.lightning_module.state_dict()  # type: ignore[union-attr]
        return self.on_first_rank({name: self.to_save(value) for name, value in state.items()})

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As AdamW's on one process, so that the file is the same for any number of them."""
        optimizer = getattr(optimizer, "optimizer", optimizer)
        weights, state = weights_of(optimizer), optimizer.state_dict()
        for weight, (index, values) in zip(weights, sorted(state["state"].items()), strict=True):
            state["state"][index] = {k: self.to_save(as_dtensor_like(weight, v)) for k, v in values.items()}
        del state["masters"]  # they are the weights
        return self.on_first_rank(state)

    def to_save(self, tensor: Tensor) -> Tensor:
        """Its part; or, for a single file, the whole of it on the first rank and nothing on the others."""
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
        """Each rank reads its parts: of a file, or of shards, which may be another mesh's."""
        module = self.lightning_module
        assert module is not None
        own = module.state_dict()
        path = Path(checkpoint_path)
        if path.is_dir():
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
                for weight, master in zip(weights, state.pop("masters", [])):  # of one process, whose weights are bf16
                    local(weight).copy_(local_shard(master, weight))
            optimizer.load_state_dict(state)
        return checkpoint


def move_all_but_parameters(module: Any, device: torch.device) -> None:
    """Of a LightningModule whose parameters are all in its `model`. It then says that it is on the device."""
    for child in module.children():
        if child is not module.model:
            child.to(device)  # metrics
    for layer in module.model.modules():
        for name, buffer in layer.named_buffers(recurse=False):
            setattr(layer, name, buffer.to(device))
    module._device = device  # as Lightning's `to` does, which would move parameters too


def weights_of(optimizer: Any) -> list[Tensor]:
    """The parameters that the optimizer has its own parts or copies of, in the order of its state."""
    return optimizer.weights


def register() -> None:
    """Makes `Trainer(strategy="fsdp2")` and its siblings work, with every size chosen."""
    for kind in KINDS:
        if kind not in StrategyRegistry:
            StrategyRegistry.register(kind, MeshStrategy, f"dsv3-lightning: {kind}", kind=kind)


register()
