"""The Lightning strategy for FSDP2, HSDP and expert parallelism over one mesh; the kinds are in mesh.KINDS."""

import subprocess
from collections.abc import Callable, Iterator, Sequence
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
from dsv3_lightning.parallel.checkpoints.stages import (
    Numbers,
    from_all_stages,
    gather_stages,
    own_numbers,
    whole_numbers,
)
from dsv3_lightning.parallel.dispatch import AllToAll
from dsv3_lightning.parallel.groups import build_meshes, set_timeout
from dsv3_lightning.parallel.launcher import PatientLauncher
from dsv3_lightning.parallel.lost import peer_failure
from dsv3_lightning.parallel.mesh import KINDS, StrategyConfig, mesh_shape
from dsv3_lightning.parallel.pipeline.checks import micro_batches_of, placement_of
from dsv3_lightning.parallel.pipeline.pairs import run_pair
from dsv3_lightning.parallel.pipeline.pipeline import Pipeline
from dsv3_lightning.parallel.sharding import MakeDispatcher, shard_model, sync_gradients_of_replicas
from dsv3_lightning.parallel.tensors import as_dtensor_like, fill_shard, gather_full, local, local_shard


class MeshStrategy(ModelParallelStrategy):
    """Spreads `pl_module.model`, a Transformer, over all processes. Takes the arguments of StrategyConfig, with the
    dispatcher as a class.

    Every rank is a data-parallel rank, or with a pipeline every rank of a stage. The LightningModule's
    `configure_model` calls `shard` while its model is on the meta device, and fills each shard with the function that
    it returns: no process ever holds the full model.
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
        self.lost_ranks: list[subprocess.Popen] | None = None  # this process's children, once a rank is gone
        self.pipeline: Pipeline | None = None  # with pipeline_parallel, once the model is sharded

    def _configure_launcher(self) -> None:
        super()._configure_launcher()
        if self._launcher is not None:
            assert self.cluster_environment is not None
            self._launcher = PatientLauncher(self.cluster_environment, self.num_processes, self.num_nodes)

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
        return {"num_replicas": self.data_ranks, "rank": self.data_rank}

    @property
    def data_ranks(self) -> int:
        """The number of ranks with different samples."""
        return self.world_size // self.config.pipeline_parallel

    @property
    def data_rank(self) -> int:
        """This rank's number among those of its stage."""
        return self.global_rank % self.data_ranks

    @property
    def pipeline_micro_batches(self) -> int | None:
        """Micro-batches of a full step that go through the pipeline; None without one."""
        return micro_batches_of(self.config) if self.config.pipeline_parallel > 1 else None

    def sum_over_data(self, values: Tensor) -> Tensor:
        """The sum over ranks with different samples, in place; a pipeline's other stages have the same values."""
        dist.all_reduce(values, group=None if self.meshes.data is None else self.meshes.data.get_group())
        return values

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """With a pipeline also the backward passes: gradients are zeroed before it, and autocast is the stages' own."""
        if self.pipeline is None:
            return super().training_step(*args, **kwargs)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        return self.lightning_module.training_step(*args, **kwargs)  # type: ignore[union-attr]

    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.pipeline is None:
            return super().backward(closure_loss, *args, **kwargs)
        module: Any = self.lightning_module  # the hooks around the backward pass are called after it
        closure_loss = self.precision_plugin.pre_backward(closure_loss, module)
        return self.precision_plugin.post_backward(closure_loss, module)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        if self.pipeline is None:
            return super().validation_step(*args, **kwargs)
        return self.lightning_module.validation_step(*args, **kwargs)  # type: ignore[union-attr]

    @property
    def parameter_device(self) -> torch.device:
        return torch.device("cpu") if self.config.cpu_offload else self.root_device

    def shard(
        self, model: Transformer, stages: Sequence[int] | None = None
    ) -> Callable[[Tensor, int | None, Callable[[], Tensor]], None]:
        """Shards a model on the meta device; returns the function that writes initial weights into its shards.

        stages: the number of layers in each of a pipeline's chunks, of which the model keeps this rank's; None: those
        of the settings.
        """
        parts: list[Transformer] = [model]
        precision = str(self.precision_plugin.precision)
        if self.meshes.pp is not None:
            layers = stages or self.config.stages
            assert layers is not None, "a pipeline needs the number of layers in each chunk"
            dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
            self.pipeline = Pipeline(
                model, layers, placement_of(self.config), self.config.schedule, self.meshes.pp, self.root_device, dtype,
                self.precision_plugin.forward_context,
            )  # fmt: skip
            self.pipeline.overlap = run_pair if self.config.overlap == "pairs" else None
            self.pipeline.waiting = self.config.waiting_weights
            parts = [*self.pipeline.stages]
            chunks = f"chunks of {', '.join(map(str, layers))} layers, {self.pipeline_micro_batches} micro-batches"
            rank_zero_only(print)(f"pipeline {self.config.schedule}: {chunks}", flush=True)
        for part in parts:
            shard_model(part, self.meshes, self.config, precision, self.dispatcher)
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

    def on_exception(self, exception: BaseException) -> None:
        """If another rank is gone, takes the children from their observer, or it would end this process while it waits
        for what is being saved."""
        super().on_exception(exception)
        if peer_failure(exception, []) is not None:
            watched = getattr(self.launcher, "procs", [])
            self.lost_ranks = watched.copy()
            watched.clear()

    def teardown(self) -> None:
        try:
            self.finish_saving()
        except Exception:
            if self.lost_ranks is None:  # else the lost rank is why, and is reported
                raise
        finally:
            if self.saver is not None:
                self.saver.close()
            self.saver = None
            super().teardown()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Full tensors on the CPU, gathered one at a time, on the first rank only; or each rank's shards."""
        return self.on_first_rank(self.to_save(self.lightning_module.state_dict()))  # type: ignore[union-attr]

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state as AdamW has it on one process, so the file is the same for any number of processes."""
        optimizer = getattr(optimizer, "optimizer", optimizer)
        weights, state, numbers = weights_of(optimizer), optimizer.state_dict(), self.numbers(optimizer)
        named = {
            (number, what): as_dtensor_like(weight, value)
            for weight, number, (_, values) in zip(weights, numbers.own, sorted(state["state"].items()), strict=True)
            for what, value in values.items()
        }
        scalars = {key: value for key, value in named.items() if not value.dim()}
        if self.stages is not None:
            scalars = from_all_stages({key: value.cpu() for key, value in scalars.items()}, self.stages)
        state["state"] = {}
        saved = scalars | self.to_save({key: value for key, value in named.items() if value.dim()})
        for (number, what), value in sorted(saved.items()):
            state["state"].setdefault(number, {})[what] = value
        state["param_groups"] = [
            group | {"params": params} for group, params in zip(state["param_groups"], numbers.groups, strict=True)
        ]
        return self.on_first_rank(state)

    def numbers(self, optimizer: Any) -> Numbers:
        """The numbers of the optimizer's parameters in the whole model; every rank must call it."""
        sizes = [len(group["params"]) for group in optimizer.param_groups]
        if self.pipeline is None or self.stages is None:
            return own_numbers(sizes)
        name_of = {id(parameter): name for name, parameter in self.pipeline.model.named_parameters()}
        names = iter([name_of[id(weight)] for weight in weights_of(optimizer)])
        return whole_numbers([[next(names) for _ in range(size)] for size in sizes], self.pipeline.order, self.stages)

    @property
    def stages(self) -> dist.ProcessGroup | None:
        """The ranks that hold the other stages for the same samples; None without a pipeline."""
        return None if self.meshes.pp is None else self.meshes.pp.get_group()

    def to_save(self, tensors: dict[Any, Tensor]) -> dict[Any, Tensor]:
        """This rank's shards; or, for a single file, all full tensors on the first rank and empty ones elsewhere."""
        if self.saver is not None:
            return {name: tensor.detach() for name, tensor in tensors.items()}
        if self.stages is not None:
            return gather_stages(tensors, self.stages, sends=self.data_rank == 0)
        gathered = {}
        for name, tensor in tensors.items():
            full = gather_full(tensor)
            gathered[name] = full if self.is_global_zero else full.new_empty(0)
        return gathered

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
        own, path = module.state_dict(), Path(checkpoint_path)
        numbers = [self.numbers(optimizer) for optimizer in self.optimizers]
        weights = [weights_of(optimizer) for optimizer in self.optimizers]
        elsewhere = set() if self.pipeline is None else {f"model.{name}" for name in self.pipeline.order} - own.keys()
        if on_first_rank(path.is_dir):  # another rank may see an old listing
            by_number = [
                dict(zip(of_all.own, mine, strict=True)) for of_all, mine in zip(numbers, weights, strict=True)
            ]
            checkpoint = read_parts(path, own, by_number, elsewhere)
        else:
            files: Any = self.checkpoint_io
            checkpoint = files.load_checkpoint(path, mmap=True)
        if unequal := (own.keys() ^ checkpoint["state_dict"].keys()) - elsewhere:
            raise ConfigError(
                f"{checkpoint_path}: its weights are those of another model ({', '.join(sorted(unequal)[:4])})"
            )
        with torch.no_grad():
            for name, value in own.items():
                local(value).copy_(local_shard(checkpoint["state_dict"][name], value))
        for optimizer, state, of_all, mine in zip(self.optimizers, checkpoint["optimizer_states"], numbers, weights):
            masters, moments = state.pop("masters", []), state["state"]
            state["state"] = {
                index: {what: local_shard(value, weight) for what, value in moments[number].items()}
                for index, (number, weight) in enumerate(zip(of_all.own, mine, strict=True))
            }
            with torch.no_grad():
                for number, weight in zip(of_all.own, mine) if masters else ():  # of one process with bf16 weights
                    local(weight).copy_(local_shard(masters[number], weight))
            sizes = own_numbers([len(group["params"]) for group in optimizer.param_groups])
            state["param_groups"] = [
                group | {"params": params} for group, params in zip(state["param_groups"], sizes.groups, strict=True)
            ]
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
