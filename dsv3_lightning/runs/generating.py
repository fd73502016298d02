"""What generating takes where weights are sharded, said before the first step."""

from dsv3_lightning.config.checks import mesh_strategy
from dsv3_lightning.config.schema import Config
from dsv3_lightning.planning.parameters import count_parameters


def generation_notes(config: Config) -> list[str]:
    """A line for each part of the run that generates from sharded weights; none where every rank has them whole."""
    if mesh_strategy(config.strategy) is None:
        return []
    notes = []
    if config.grpo is not None:
        size = 4 * count_parameters(config.model).total / 1e9
        notes.append(
            f"grpo: each rank gathers a whole fp32 copy of the model to sample from, {size:,.3g} GB of its device's "
            "memory beside the training"
        )
    if config.callbacks.get("evaluate") is not None:
        notes.append(
            "callbacks.evaluate: a sharded model generates without a cache, by a pass over the text for every token; "
            "keep its limit and the tasks' max_new_tokens small, or run dsv3 evaluate on a checkpoint"
        )
    return notes
