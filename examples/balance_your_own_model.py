"""ExpertBias in somebody else's Lightning project: a classifier whose hidden layer is a small mixture of experts.

All that the callback asks for: modules with an fp32 buffer `expert_bias`, and `training_step` outputs with
`expert_counts`, int64 [layers, experts]. python examples/balance_your_own_model.py
"""

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dsv3_lightning.callbacks import ExpertBias

EXPERTS, CHOSEN, WIDTH = 8, 2, 16


class MixtureOfExperts(nn.Module):
    """x [N, WIDTH] -> (y [N, WIDTH], tokens per expert int64 [EXPERTS]): the bias decides who, never how much."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS))
        self.register_buffer("expert_bias", torch.zeros(EXPERTS))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.router(x).sigmoid()
        chosen = (scores + self.expert_bias).topk(CHOSEN).indices
        gates = torch.zeros_like(scores).scatter(1, chosen, scores.gather(1, chosen))
        outputs = torch.stack([expert(x) for expert in self.experts], 1)
        return (gates.unsqueeze(-1) * outputs).sum(1), chosen.flatten().bincount(minlength=EXPERTS)


class Classifier(pl.LightningModule):
    """Two classes. The inputs have a common offset, so that a router without balancing prefers a few experts."""

    def __init__(self) -> None:
        super().__init__()
        self.moe, self.head = MixtureOfExperts(), nn.Linear(WIDTH, 2)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        x, labels = batch
        hidden, counts = self.moe(x)
        return {"loss": F.cross_entropy(self.head(hidden), labels), "expert_counts": counts.unsqueeze(0)}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def busiest(model: Classifier, x: Tensor) -> float:
    """Load of the busiest expert over the mean, minus 1."""
    with torch.no_grad():
        counts = model.moe(x)[1].double()
    return float(counts.max() / counts.mean() - 1)


def main(steps: int = 300) -> tuple[float, float]:
    """MaxVio without the callback and with it."""
    results = []
    for callbacks in ([], [ExpertBias(speed=0.01)]):
        pl.seed_everything(1, verbose=False)
        x = torch.randn(512, WIDTH) + 2.0
        loader = DataLoader(TensorDataset(x, (x[:, 0] > 2).long()), batch_size=128, shuffle=True)
        model = Classifier()
        trainer = pl.Trainer(
            max_steps=steps, accelerator="cpu", callbacks=callbacks, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(model, loader)
        results.append(busiest(model, x))
    return results[0], results[1]


if __name__ == "__main__":
    print("MaxVio without ExpertBias {:.2f}, with it {:.2f}".format(*main()))
