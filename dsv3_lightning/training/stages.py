"""How a model's layers are spread over a pipeline, and what can't be. Imports no torch."""

from dsv3_lightning.errors import ConfigError
from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.parallel.mesh import StrategyConfig
from dsv3_lightning.parallel.pipeline.checks import placement_of
from dsv3_lightning.planning.pipeline.split import check_layers, layer_costs, least_layers, split_layers


def chunk_layers(strategy: StrategyConfig, model: ModelConfig, sequence_length: int) -> list[int] | None:
    """The number of layers in each of the pipeline's chunks: those of strategy.stages, else by planned cost.

    None without a pipeline. Raises ConfigError for a model that can't be split so.
    """
    if strategy.pipeline_parallel == 1:
        return None
    if model.tie_word_embeddings:
        raise ConfigError(
            f"strategy.pipeline_parallel={strategy.pipeline_parallel}: model.tie_word_embeddings=true needs one weight "
            "in the first and in the last chunk; set tie_word_embeddings to false, or pipeline_parallel to 1"
        )
    of_ranks = placement_of(strategy)
    chunks = sum(map(len, of_ranks))
    if strategy.stages is None:
        return split_layers(layer_costs(model, sequence_length), of_ranks, least_layers(model, chunks))
    check_layers(strategy.stages, model, chunks)
    return strategy.stages
