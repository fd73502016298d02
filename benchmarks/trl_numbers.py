"""Losses, gradients and advantages of TRL's own trainers on fixed tensors, which tests/training compares ours with.

TRL is not among the dependencies: make an environment with it, and run this there, in a checkout.
  python -m venv trl && trl/bin/pip install trl && trl/bin/python benchmarks/trl_numbers.py
The methods of the trainers are called on a stand-in with the attributes that they read, so that no model is needed.
"""

import argparse
import inspect
import json
import math
import textwrap
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch

PLACE = Path(__file__).parents[1] / "tests/training/trl_numbers.json"
LIMIT, LOW, HIGH = 9, 0.1, 0.2
# Two functions and two groups of four answers; None where a function does not apply, one answer without any score.
REWARDS = [[1.0, 0.0, 0.5, None, 0.0, 0.0, 0.0, 1.0], [0.2, None, 0.1, None, 2.0, 2.0, 1.0, 2.0]]
WEIGHTS, GROUP = [1.0, 0.5], 4


def inputs() -> dict[str, torch.Tensor]:
    """Log-probabilities, masks and advantages of six answers of up to seven tokens, fp64."""
    generator = torch.Generator().manual_seed(0)
    log_p, near, far = (torch.randn(6, 7, generator=generator, dtype=torch.float64) for _ in range(3))
    lengths = torch.tensor([7, 1, 3, 5, 2, 6])
    mask = (torch.arange(7) < lengths[:, None]).double()
    log_p = -log_p.abs() * mask
    advantages = torch.tensor([1.0, -0.5, 2.0, -2.0, 0.0, -1.0], dtype=torch.float64)
    old, reference = (log_p + 0.3 * near) * mask, (log_p + 0.3 * far) * mask
    return {"log_p": log_p, "old": old, "reference": reference, "mask": mask, "advantages": advantages}


def stand_in(**attributes: Any) -> Any:
    """An object with these attributes, and with others that accept everything."""
    trainer = MagicMock()
    for name, value in attributes.items():
        setattr(trainer, name, value)
    trainer.accelerator.gather.side_effect = trainer.accelerator.gather_for_metrics.side_effect = lambda x: x
    trainer.accelerator.num_processes, trainer.accelerator.device = 1, torch.device("cpu")
    return trainer


def grpo_case(variant: str, beta: float) -> dict[str, Any]:
    from trl import GRPOTrainer

    given = inputs()
    log_p = given["log_p"].clone().requires_grad_()
    trainer = stand_in(
        loss_type=variant, beta=beta, epsilon_low=LOW, epsilon_high=HIGH, max_completion_length=LIMIT,
        importance_sampling_level="token", off_policy_mask_threshold=None, top_entropy_quantile=1.0, use_vllm=False,
        aux_loss_enabled=False, _entropy_bonus_enabled=False, current_gradient_accumulation_steps=1,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (log_p, torch.zeros_like(log_p), None),
    )  # fmt: skip
    trainer.model.training = True
    ids = torch.zeros(6, 7, dtype=torch.int64)
    batch = {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1] + 1, "completion_ids": ids,
        "completion_mask": given["mask"], "advantages": given["advantages"], "old_per_token_logps": given["old"],
        "ref_per_token_logps": given["reference"], "num_items_in_batch": given["mask"].sum(),
    }  # fmt: skip
    loss = GRPOTrainer._compute_loss(trainer, None, batch)
    (gradient,) = torch.autograd.grad(loss, log_p)
    facts = {"variant": variant, "beta": beta, "low": LOW, "high": HIGH, "limit": LIMIT}
    return facts | {"loss": loss.item(), "gradient": gradient.tolist()}


def dpo_case(loss_type: str, beta: float) -> dict[str, Any]:
    from trl import DPOTrainer

    given = inputs()
    log_p = given["log_p"].clone().requires_grad_()
    reference = (given["reference"] * given["mask"]).sum(1)
    trainer = stand_in(
        beta=beta, loss_types=[loss_type], loss_weights=[1.0], f_divergence_type="reverse_kl", ld_alpha=None,
        precompute_ref_logps=True, use_weighting=False, aux_loss_enabled=False,
    )  # fmt: skip
    trainer.model.training = True
    one = torch.zeros(6, 1)  # the prompt's token, from which the first one of the answer is predicted
    batch = {
        "input_ids": torch.zeros(6, 8, dtype=torch.int64), "completion_mask": torch.cat((one, given["mask"]), 1),
        "attention_mask": torch.ones(6, 8),
        "ref_chosen_logps": reference[:3], "ref_rejected_logps": reference[3:],
    }  # fmt: skip
    log_probs = log_p * given["mask"]
    # TRL logs the others; they are not read here.
    outputs = SimpleNamespace(log_probs=log_probs, mean_logits=log_probs, entropy=log_probs, is_top1=log_probs > -1)
    loss = DPOTrainer._compute_loss(trainer, lambda **kwargs: outputs, batch, False)
    (gradient,) = torch.autograd.grad(loss, log_p)
    return {"loss_type": loss_type, "beta": beta, "loss": loss.item(), "gradient": gradient.tolist()}


def advantages_case(scale: str) -> dict[str, Any]:
    """By the lines of `_generate_and_score_completions` that turn rewards into advantages."""
    from trl.trainer import grpo_trainer

    source = inspect.getsource(grpo_trainer.GRPOTrainer._generate_and_score_completions)
    begin, end = source.index("unscorable_mask ="), source.index("# Slice to keep only the local part")
    lines = textwrap.dedent(" " * 8 + source[begin:end])
    rewards = torch.tensor([[math.nan if r is None else r for r in row] for row in REWARDS]).T
    trainer = SimpleNamespace(
        multi_objective_aggregation="sum_then_normalize", scale_rewards=scale, reward_weights=torch.tensor(WEIGHTS)
    )
    scope = {"self": trainer, "rewards_per_func": rewards, "num_generations": GROUP, "device": "cpu"}
    exec(lines, vars(grpo_trainer) | scope, scope)
    found = scope["advantages"].tolist()
    return {"scale": scale, "rewards": REWARDS, "weights": WEIGHTS, "group": GROUP, "advantages": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PLACE, help="the file to write (default: %(default)s)")
    out = parser.parse_args().out
    content = {
        "versions": {name: version(name) for name in ("trl", "torch", "transformers")},
        "inputs": {name: tensor.tolist() for name, tensor in inputs().items()},
        "grpo": [grpo_case(variant, beta) for variant in ("grpo", "dr_grpo", "dapo") for beta in (0.0, 0.3)],
        "dpo": [dpo_case("sigmoid", 0.1), dpo_case("sigmoid_norm", 5.0)],
        "advantages": [advantages_case(scale) for scale in ("group", "none")],
    }
    out.write_text(json.dumps(content) + "\n", encoding="utf-8")
    print(f"{out}: {len(content['grpo']) + len(content['dpo']) + len(content['advantages'])} cases")


if __name__ == "__main__":
    main()
