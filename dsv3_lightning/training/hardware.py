"""What the device does with attention and experts, in lines for the start of a run."""

from dsv3_lightning.model.attention_kernels import choose_kernel, describe_kernel
from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.model.devices import Device, empty_experts_get_gradients, grouped_products_loop
from dsv3_lightning.training.precision import product_dtype

FP8_LINES = {  # by compute.fp8
    "emulated": "FP8, emulated: linear layers of blocks and experts; numbers in tiles, products in fp32",
    True: "FP8: linear layers of blocks, by torch's scaled products; experts stay as trainer.precision has them",
}


def hardware_lines(
    model: ModelConfig, device: Device, precision: str, sequence_length: int, isolate: bool
) -> list[str]:
    """The kernel of attention, and what is known to be slow or wrong on the device.

    precision: one of `precision.PRECISIONS` but auto. isolate: whether documents of a sample do not see each other.
    """
    dtype = product_dtype(precision)
    qk, v = model.qk_head_dim, model.v_head_dim
    lines = [describe_kernel(choose_kernel(device, qk, v, dtype, sequence_length, isolate), device, qk, v, dtype)]
    capability, name = ".".join(map(str, device.capability)), str(dtype).split(".")[-1]
    if model.num_moe_layers and grouped_products_loop(device, dtype):
        lines.append(
            f"experts: {name} on compute capability {capability} has no grouped product; "
            "each expert has its own, and each layer waits for the GPU"
        )
    if model.num_moe_layers and empty_experts_get_gradients(device):
        lines.append(
            f"experts: gradients of experts without tokens are masked, since compute capability {capability} "
            "gets them wrong (pytorch#172439)"
        )
    return lines
