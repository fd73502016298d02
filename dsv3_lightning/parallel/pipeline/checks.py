"""What a pipeline's settings must fulfill, whatever the model and the data. Imports no torch."""

from typing import TYPE_CHECKING

from dsv3_lightning.common.schedules import SCHEDULES, fitting_micro_batches, placement, valid_chunks
from dsv3_lightning.errors import ConfigError

if TYPE_CHECKING:
    from dsv3_lightning.parallel.mesh import StrategyConfig


def check_settings(strategy: "StrategyConfig") -> None:
    """Raises ConfigError if the settings of the strategy's pipeline contradict each other."""
    ranks, name, micro_batches = strategy.pipeline_parallel, strategy.schedule, strategy.micro_batches
    if strategy.overlap == "pairs" and (ranks == 1 or name != "dualpipev"):
        raise ConfigError(
            "strategy.overlap=pairs: is for pairs of passes, which only a pipeline with schedule: dualpipev has; "
            f"set it to {'two_batches or none' if ranks == 1 else 'none'}"
        )
    if ranks < 1:
        raise ConfigError(f"strategy.pipeline_parallel={ranks}: must be at least 1")
    if ranks == 1:
        if micro_batches != "auto":
            raise ConfigError(
                f"strategy.micro_batches={micro_batches}: is of a pipeline, and strategy.pipeline_parallel is 1; "
                "set trainer.accumulate_grad_batches"
            )
        if strategy.stages is not None:
            at = f"strategy.stages={strategy.stages}"
            raise ConfigError(f"{at}: is of a pipeline, and strategy.pipeline_parallel is 1; set it to null")
    check_waiting(strategy)
    if ranks == 1:
        return
    if micro_batches != "auto":
        check_micro_batches("strategy.micro_batches", micro_batches, name, ranks)
    chunks, rest = divmod(len(strategy.stages or []), ranks)
    if strategy.stages is not None and (rest or not valid_chunks(SCHEDULES[name], chunks)):
        least = SCHEDULES[name].chunks * ranks
        more = f" or a larger multiple of {ranks}" if valid_chunks(SCHEDULES[name], 3) else ""
        raise ConfigError(
            f"strategy.stages={strategy.stages}: has {len(strategy.stages)} chunks; {name} on {ranks} ranks has "
            f"{least}{more}"
        )
    if strategy.overlap == "two_batches":
        raise ConfigError(
            "strategy.overlap=two_batches: is for runs without a pipeline; set it to none, or pairs with dualpipev"
        )
    if strategy.cpu_offload:
        raise ConfigError("strategy.cpu_offload=true: is not for pipelines; set it to false, or pipeline_parallel to 1")


def check_waiting(strategy: "StrategyConfig") -> None:
    """Raises ConfigError for a limit of waiting weight parts where none can wait."""
    limit, at = strategy.waiting_weights, f"strategy.waiting_weights={strategy.waiting_weights}"
    if limit is None:
        return
    if limit < 1:
        raise ConfigError(f"{at}: must be at least 1, or null")
    splitting = [name for name, schedule in SCHEDULES.items() if schedule.splits]
    if strategy.pipeline_parallel == 1 or strategy.schedule not in splitting:
        raise ConfigError(f"{at}: is for pipelines with schedule: {', '.join(splitting)}; set it to null")


def check_micro_batches(key: str, wanted: int, schedule: str, ranks: int) -> None:
    """Raises ConfigError, with the nearest that works, unless the schedule takes this number of micro-batches."""
    if (fitting := fitting_micro_batches(schedule, ranks, wanted)) != wanted:
        rule = {
            "1f1b": "at least pipeline_parallel",
            "dualpipev": "at least twice pipeline_parallel",
            "zbv": "at least 1",
        }.get(schedule, f"a multiple of max(1, micro_batches // {ranks})")
        raise ConfigError(f"{key}={wanted}: {schedule} on {ranks} ranks needs {rule}; use {fitting}")


def micro_batches_of(strategy: "StrategyConfig") -> int:
    """The number of micro-batches of a full step."""
    return 2 * strategy.pipeline_parallel if strategy.micro_batches == "auto" else strategy.micro_batches


def placement_of(strategy: "StrategyConfig") -> list[list[int]]:
    """The chunks of each rank."""
    ranks = strategy.pipeline_parallel
    chunks = None if strategy.stages is None else len(strategy.stages) // ranks
    return placement(SCHEDULES[strategy.schedule], ranks, chunks)
