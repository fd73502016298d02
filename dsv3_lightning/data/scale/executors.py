"""Cleaning as a chain of datatrove's executors: our steps and its MinHash stages 2 to 4 on our signatures.

    from datatrove.executor import SlurmPipelineExecutor
    chain = executors(plan, folder, SlurmPipelineExecutor, time="10:00:00", partition="cpu")
    chain[-1].run()                                # datatrove starts those that it depends on first

The class is datatrove's for one machine (LocalPipelineExecutor), SLURM or Ray; it decides where ranks run.
"""

from pathlib import Path
from typing import Any

from dsv3_lightning.data.cleaning.corpus import Plan
from dsv3_lightning.data.extras import needed
from dsv3_lightning.data.scale.steps import BY, Clean, KeepFirst, ReadKept, WriteKept, WriteSignatures, ranks
from dsv3_lightning.errors import ConfigError


def executors(plan: Plan, folder: Path, executor: Any, **arguments: Any) -> list[Any]:
    """Four executors, each depending on the one before; the last one's output is `folder`/kept/SOURCE/*.jsonl.zst.

    executor: the class. arguments: for each of them. All files, also of logs and completions, lie in `folder`, which
    belongs to this plan: other files or settings need another folder. Raises ConfigError.
    """
    near = plan.cleaning.near
    if near is None or plan.cleaning.scope != "global":
        raise ConfigError("data.cleaning: scaling out needs near, and scope=global")
    minhash = needed("datatrove.pipeline.dedup.minhash", BY)
    config = minhash.MinhashConfig(near.ngram, near.buckets, near.rows)
    tasks, mine = len(ranks(plan)), folder / plan.key
    signatures, pairs, removed = mine / "signatures", mine / "pairs", mine / "removed"
    clusters = minhash.MinhashDedupCluster(str(pairs), str(removed), config=config, save_cluster_id=True)
    stages: list[tuple[str, list[Any], int]] = [
        ("clean", [Clean(plan), WriteSignatures(plan, signatures)], tasks),
        ("pairs", [minhash.MinhashDedupBuckets(str(signatures), str(pairs), config=config)], near.buckets),
        ("clusters", [clusters, KeepFirst(removed)], 1),
        ("kept", [ReadKept(plan), minhash.MinhashDedupFilter(str(removed)), WriteKept(folder / "kept")], tasks),
    ]
    chain: list[Any] = []
    for name, pipeline, count in stages:
        logs = str(mine / "logs" / name)
        depends = chain[-1] if chain else None
        chain.append(executor(pipeline=pipeline, tasks=count, logging_dir=logs, depends=depends, **arguments))
    return chain
