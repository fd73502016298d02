"""The charts of TensorBoard's custom scalars, in display order. Each class that logs declares the tags of its charts.

It does so in `charts(tree, origins)`, which returns {chart: tags} for a run's settings `tree` (from to_tree) and the
number of `origins` of its validation text. A chart is a key from this file, to which several classes may add, or
(question, title), a chart of the class's own. A tag is a regular expression matched from the start of the tag. Training
and validation curves are in separate charts because TensorBoard draws all curves of one run in the same color.
"""

Charts = dict[str | tuple[str, str], list[str]]

QUESTIONS: dict[str, dict[str, str]] = {  # question: {key: title}
    "is it learning": {
        "loss": "training loss (nats per token)",
        "val_loss": "validation loss (nats per token)",
        "bpb": "bits per byte of validation text",
        "source_loss": "validation loss by source (nats per token)",
        "source_bpb": "bits per byte of validation text by source",
        "lr": "learning rate",
    },
    "is it balanced": {
        "max_vio": "MaxVio in training: of a batch and of a micro-batch (0 is balance)",
        "max_vio_global": "MaxVio over the validation set (0 is balance)",
        "max_vio_worst": "MaxVio of the worst layer",
        "load": "load of the busiest, the typical and the idlest expert (1 is a fair share)",
        "dead_experts": "share of experts without a token",
        "unevenness": "unevenness of the load: coefficient of variation (0 is balance) and entropy (1 is balance)",
        "bias": "expert bias: spread, mean and largest absolute value",
        "bias_speed": "update speed of the expert bias",
        "balance_loss": "balance loss as it is added to the training loss",
        "balance_losses": "balance losses without their factors, mean over layers",
        "balance_factor": "scheduled multiplier of the balance losses' factors",
        "margin": "margin between the last expert chosen and the first one left out",
        "groups": "expert groups: number reached per token, load of the busiest",
        "coactivation": "how much more often than by chance the most attached pair of experts is chosen (1 is chance)",
        "specialization": "difference in routing between texts of different origin (0 is none)",
    },
    "which layer is it": {
        "layers_max_vio": "MaxVio of a batch, by layer",
        "layers_max_vio_global": "MaxVio over the validation set, by layer",
    },
    "is MTP helping": {
        "mtp_loss": "MTP training loss by depth",
        "val_mtp_loss": "MTP validation loss by depth",
        "acceptance": "share of MTP drafts that greedy decoding would accept",
        "mtp_weight": "weight of the MTP loss",
    },
    "is it fast": {
        "tokens": "tokens per second",
        "flops": "FLOP per second that the model needs for them",
        "mfu": "share of the device's peak: by its data sheet, and as measured",
        "data_wait": "share of the time spent waiting for data",
        "memory": "peak memory of the rank that needs most, allocated and reserved (bytes)",
    },
    "which rank is it": {
        "step_seconds": "seconds of a step that a rank needs by itself: fastest, median and slowest rank",
        "slowest_rank": "the slowest rank",
        "data_wait_max": "seconds of a step that the rank with the slowest loader waits for data",
        "slots": "routed tokens received by the busiest rank (1 is the mean of the ranks)",
        "retries": "allocations that had to free cached memory first, all ranks",
    },
    "is it healthy": {
        "grad_norm": "gradient norm: of all parameters, of the routers",
        "skipped_steps": "skipped steps",
    },
}
