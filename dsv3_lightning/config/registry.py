"""The callbacks that a YAML can name without a class path. Imports none of them."""

CALLBACKS = {
    "expert_bias": "dsv3_lightning.callbacks.ExpertBias",
    "balance_factor": "dsv3_lightning.callbacks.BalanceFactor",
    "skewed_start": "dsv3_lightning.callbacks.SkewedStart",
    "mtp_weight": "dsv3_lightning.callbacks.MTPWeight",
    "router_monitor": "dsv3_lightning.callbacks.RouterMonitor",
    "router_probe": "dsv3_lightning.callbacks.RouterProbe",
    "weight_average": "dsv3_lightning.callbacks.WeightAverage",
    "throughput": "dsv3_lightning.callbacks.Throughput",
    "sample_text": "dsv3_lightning.callbacks.SampleText",
    "checkpoint": "dsv3_lightning.callbacks.Checkpoint",
    "progress": "dsv3_lightning.callbacks.Progress",
    "run_report": "dsv3_lightning.callbacks.RunReport",
}
