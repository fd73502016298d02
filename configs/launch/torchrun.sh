#!/usr/bin/env bash
# One node, or this node of several: start the same line on each. Ranks that die are started again, from the last
# checkpoint, up to RESTARTS times. The node is tested first (`dsv3 doctor --node`); CHECK=0 skips this.
#   configs/launch/torchrun.sh configs/cluster/v2-lite-8.yaml run.dir=/shared/runs
#   NODES=2 HEAD=node0:29500 configs/launch/torchrun.sh configs/cluster/moonlight-16.yaml run.dir=/shared/runs
set -euo pipefail
NODES=${NODES:-1} GPUS=${GPUS:-8} RESTARTS=${RESTARTS:-10}
where=(--standalone)
if (( NODES > 1 )); then
  where=(--nnodes="$NODES" --rdzv-backend=c10d --rdzv-endpoint="${HEAD:?HEAD=host:port of the first node}" --rdzv-id="${JOB:-dsv3}")
fi
if (( ${CHECK:-1} )); then dsv3 doctor --node "$GPUS"; fi
exec torchrun "${where[@]}" --nproc-per-node="$GPUS" --max-restarts="$RESTARTS" \
  -m dsv3_lightning run "$@" trainer.devices="$GPUS" trainer.num_nodes="$NODES"
