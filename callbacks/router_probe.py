"""Routing on validation text: margins, groups per token, coactivation of experts and specialization by origin."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from dsv3_lightning.callbacks.charts import Charts
from dsv3_lightning.callbacks.protocol import from_batch, own_rows, require_model, routers_of
from dsv3_lightning.callbacks.router_monitor import draw
from dsv3_lightning.model.transformer import MTP_KINDS
from dsv3_lightning.training.logging import log_scalars
from dsv3_lightning.training.metrics import mean_present
from dsv3_lightning.training.router_metrics import (
    ChoiceStatistics,
    relative_coactivation,
    relative_load,
    specialization,
)


class RouterProbe(Callback):
    """Measures the routers' outputs during validation; training is unaffected and costs nothing extra.

    Needs `pl_module.model` (a Transformer) and batches with `mask` [B, T + 1 + mtp_depth].
    If `trainer.datamodule.origins` has several names, batches have `origins` of the same shape: indices into that list.
    Logs, as means over the MoE layers: balance/margin, the score gap between the last chosen expert and the first one
    left out; balance/groups_per_token, which the node limit bounds; balance/coactivation_max, how many times more often
    than by chance the strongest pair of experts is chosen together; balance/specialization, how differently text of
    different origin is routed. Draws router/coactivation of the layer with the strongest pair, and
    router/specialization, the relative load by origin (V3 Figure 9), of the most specialized layer.
    """

    def __init__(self) -> None:
        self.statistics: ChoiceStatistics | None = None
        self.handles: list[RemovableHandle] = []
        self.masks_LN: list[Tensor] = []
        self.origins_LN: list[Tensor | None] = []
        self.specialization: list[float | None] | None = None  # by layer, for the report

    @staticmethod
    def charts(tree: dict[str, Any], origins: int) -> Charts:
        model = tree["model"]
        open_experts = model["n_routed_experts"] // model["n_group"] * model["topk_group"]
        return {
            "margin": ["balance/margin"] if open_experts > model["num_experts_per_tok"] else [],
            "groups": ["balance/groups_per_token"],
            "coactivation": ["balance/coactivation_max"],
            "specialization": ["balance/specialization"] if origins > 1 else [],
        }

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        require_model(pl_module, self)

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        require_model(pl_module, self)
        self.statistics = ChoiceStatistics(pl_module.model.config, len(origins_of(trainer))).to(pl_module.device)
        routers, rows = list(routers_of(pl_module)), own_rows(trainer)
        for layer, router in zip(range(len(routers)) if rows is None else rows, routers, strict=True):
            self.handles.append(router.register_forward_hook(self.hook(layer)))  # type: ignore[attr-defined]

    def hook(self, layer: int) -> Any:
        def look(router: Any, _inputs: Any, routing: Any) -> None:
            assert self.statistics is not None
            tokens = len(routing.experts_NK)  # a pipeline calls the router for each micro-batch
            mask_N, origins_N = self.masks_LN[layer][:tokens], self.origins_LN[layer]
            self.masks_LN[layer] = self.masks_LN[layer][tokens:]
            if origins_N is not None:
                self.origins_LN[layer], origins_N = origins_N[tokens:], origins_N[:tokens]
            self.statistics.update(layer, routing, router.expert_bias, mask_N, origins_N)

        return look

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        model, mask_BS = pl_module.model, from_batch(batch, "mask", self)
        T = mask_BS.shape[1] - 1 - model.config.mtp_depth
        starts = [0] * (model.config.num_moe_layers - model.config.mtp_depth)  # module k sees tokens k … k + T - 1
        between = MTP_KINDS[model.config.mtp_kind].sees_tokens_between
        starts += [k if between else 0 for k in range(1, model.config.mtp_depth + 1)]
        self.masks_LN = [mask_BS[:, start : start + T].flatten() for start in starts]
        origins_BS = from_batch(batch, "origins", self) if len(origins_of(trainer)) > 1 else None
        self.origins_LN = [origins_BS if origins_BS is None else origins_BS[:, s : s + T].flatten() for s in starts]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []
        if self.statistics is None or trainer.sanity_checking:
            return
        margins, groups, together_LEE, counts_LOE = self.statistics.compute()
        relative_LEE = relative_coactivation(together_LEE)
        strongest = [
            float(relative_EE.max()) if chosen else None
            for relative_EE, chosen in zip(relative_LEE, together_LEE.sum((1, 2)).tolist(), strict=True)
        ]
        by_layer = {
            "balance/margin": margins,
            "balance/groups_per_token": groups,
            "balance/coactivation_max": strongest,
        }
        log_scalars(trainer, {name: mean_present(values) for name, values in by_layer.items()})
        if (layer := place_of_largest(strongest)) is not None:
            title = f"experts chosen together in MoE layer {layer}, 1 = by chance"
            draw(trainer, "router/coactivation", relative_LEE[layer].cpu(), title, 1.0, "expert")
        if counts_LOE.shape[1] > 1:
            self.compare_origins(trainer, counts_LOE)
        self.statistics = None

    def compare_origins(self, trainer: Trainer, counts_LOE: Tensor) -> None:
        pairs = zip(specialization(counts_LOE).tolist(), counts_LOE.sum((1, 2)).tolist(), strict=True)
        self.specialization = [value if chosen else None for value, chosen in pairs]
        log_scalars(trainer, {"balance/specialization": mean_present(self.specialization)})
        if (layer := place_of_largest(self.specialization)) is None:
            return
        seen = counts_LOE[layer].sum(1).nonzero().flatten().tolist()
        title = f"load by origin of the text in MoE layer {layer}, 1 = fair share"
        names = [origins_of(trainer)[origin] for origin in seen]
        draw(trainer, "router/specialization", relative_load(counts_LOE[layer, seen]).cpu(), title, 1.0, names)


def place_of_largest(values: list[float | None]) -> int | None:
    """Index of the largest value; None if there is no value.

    >>> place_of_largest([1.0, None, 2.0]), place_of_largest([None])
    (2, None)
    """
    present = {place: value for place, value in enumerate(values) if value is not None}
    return max(present, key=present.__getitem__, default=None)


def origins_of(trainer: Trainer) -> list[str]:
    """The names that a batch's `origins` index; a single name if the data has no origins."""
    names: list[str] = getattr(trainer.datamodule, "origins", ["all"])  # type: ignore[attr-defined]
    return names
