"""Group relative policy optimization (arXiv 2402.03300; V3 §5.2.2): the module of runs with a `grpo` section."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv3_lightning.data.tuning.datasets import count_targets, rows_of
from dsv3_lightning.data.tuning.module import PromptDataModule
from dsv3_lightning.errors import RunStopped
from dsv3_lightning.inference.rollout import Key, Sampled, sample_answers
from dsv3_lightning.model.losses import IGNORE
from dsv3_lightning.model.transformer import Losses, Transformer
from dsv3_lightning.parallel.data_ranks import sum_over_data
from dsv3_lightning.parallel.weights import copies, from_store, put, to_store, whole_model
from dsv3_lightning.training.agreement import compared, gap_of, replayed, routers_of, spread_routes
from dsv3_lightning.training.objectives import Outcome, advantages, grpo, token_factors, without_contrast
from dsv3_lightning.training.rewards import RewardFailed, Rewards
from dsv3_lightning.training.rollouts import Group, arguments_of, complaint, of_all_ranks, packed, unpacked
from dsv3_lightning.training.tuning import GRPOConfig
from dsv3_lightning.training.weighted import Judge, WeightedModule

VALIDATION = 2**32 - 1  # the step in the random numbers of validations, so that all of them draw the same


class GRPOModule(WeightedModule):
    """Learns from rewards of sampled answers. Batches are those of `PromptDataset`; `data.batch_size` counts prompts.

    A step's first micro-batch samples the answers of the step on this rank, or of the next `updates` steps, and has
    them judged. Logs grpo/reward (and /NAME for each function, with its deviation), the share of groups without
    contrast, the KL from the reference, entropy, lengths, the share of answers that were cut, and of clipped tokens;
    how far rollout and training pass agree (`agreement.py`): the gap of log-probabilities, mean and largest, and the
    share of experts that both choose; in validations val/reward, its mean over samples, val/reward_best, the best of a
    prompt's samples, and val/reward_greedy.
    """

    def __init__(self, grpo: GRPOConfig, prompts_of_step: int, *args: Any, **settings: Any) -> None:
        short = [name.rpartition(":")[2] for name in grpo.rewards]
        self.names = short if len(set(short)) == len(short) else grpo.rewards
        of_functions = [f"{name}/{kind}" for name in self.names for kind in ("sum", "squares", "count")]
        self.FACTS = (
            "tokens", "entropy", "kl", "clipped_low", "clipped_high", "answers", "length", "cut", "groups", "alike",
            "reward", "scored", "gap", "compared", "experts", "same_experts", *of_functions,
        )  # fmt: skip
        self.LARGEST = ("largest_gap",)
        self.temperature = grpo.temperature
        super().__init__(grpo.mtp, *args, **settings)
        self.grpo, self.prompts_of_step = grpo, prompts_of_step
        self.rewards = Rewards(grpo.rewards, grpo.reward_seconds)
        self.groups: dict[int, Group] = {}  # by the prompt's number in the run: those of this rank still to learn from
        self.step_factors = (1.0, 1.0)  # answers and tokens of the step, over all ranks
        self.reference: dict[str, Tensor] = {}  # this rank's shards of the reference's weights, on the CPU
        self.loaded: dict[str, Tensor] | None = None
        self.samplers: tuple[Transformer, ...] = ()  # a whole copy of a sharded model; in a tuple, it is no submodule
        self.complained = False
        self.val_rewards = torch.zeros(4, dtype=torch.float64)

    @staticmethod
    def charts(tree: dict[str, Any], origins: int) -> dict[Any, list[str]]:
        charts: dict[Any, list[str]] = {**WeightedModule.charts(tree, origins)}
        question = "is it rewarded"
        return charts | {
            (question, "mean reward of sampled answers"): ["grpo/reward$", r"grpo/reward/\S+"],
            (question, "reward in validations: mean, best of a prompt's samples, greedy"): [r"val/reward\w*"],
            (question, "share of groups whose answers have equal rewards"): ["grpo/without_contrast"],
            (question, "KL divergence from the reference (nats per token)"): ["grpo/kl"]
            if tree["grpo"]["beta"]
            else [],
            (question, "entropy of the distribution (nats per token)"): ["grpo/entropy"],
            (question, "length of answers (tokens)"): ["grpo/length"],
            (question, "share of answers cut at max_new_tokens"): ["grpo/cut"],
            (question, "share of tokens that are clipped"): [r"grpo/clipped_\w+"],
            (question, "gap of log-probabilities between rollout and training (nats)"): [r"grpo/log_p_gap\w*"],
            (question, "share of experts that rollout and training both choose"): ["grpo/same_experts"],
        }

    @property
    def data(self) -> PromptDataModule:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    # a step

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor | int]:
        self.in_training = True
        step, micro_batch = self.trainer.global_step, len(self.micro_batches)
        numbers, _ = self.data.of_step(step)
        if micro_batch == 0:
            if any(int(number) not in self.groups for number in numbers.flat):
                self.roll_out(step)
            self.count(numbers)
        groups = [self.groups[int(number)] for number in numbers[micro_batch]]
        assert [group.sample for group in groups] == batch["sample_ids"].tolist()
        filled = self.batch_of(groups)
        if micro_batch == 0:
            filled["target_counts"] = self.targets_of_step
        outputs = super().training_step(filled, batch_idx)
        if micro_batch == len(numbers) - 1:
            for number in numbers.flat:
                del self.groups[int(number)]
        return outputs

    def roll_out(self, step: int) -> None:
        """Samples the answers of this step and of the others that share them, and has them judged."""
        last = min(step - step % self.grpo.updates + self.grpo.updates, self.max_steps)
        pairs = [self.data.of_step(later) for later in range(step, last)]
        numbers = np.concatenate([found.reshape(-1) for found, _ in pairs]).tolist()
        samples = np.concatenate([found.reshape(-1) for _, found in pairs]).tolist()
        keys = [Key(self.seed, step, number) for number in numbers]
        routed = len(samples) if self.grpo.replay_routes else 1  # of the first prompt, to compare them
        sampled = self.sample(samples, keys, self.grpo.group_size, self.grpo.temperature, routed)
        rewards = self.judged(samples, sampled, f"step {step + 1}: ")
        apart = advantages(torch.from_numpy(rewards), torch.tensor(self.grpo.weights).double(), self.grpo.scale,
                           self.grpo.normalize == "each")  # fmt: skip
        self.groups = {
            number: Group(
                number,
                sample,
                one.tokens,
                one.ended,
                rewards[:, row],
                apart[row].numpy(),
                [np.array(log_p, dtype=np.float32) for log_p in one.log_p],
                routes=one.routes,
            )
            for row, (number, sample, one) in enumerate(zip(numbers, samples, sampled, strict=True))
        }
        self.note_rewards(rewards, sampled, apart, step)
        if self.grpo.updates > 1:
            self.groups = {n: g._replace(old=rows) for n, g, rows in self.with_log_probabilities()}
        if self.grpo.beta:
            self.renew_reference(step)
            trained = copies(self.model)
            put(self.model, self.reference)
            try:
                self.groups = {n: g._replace(reference=rows) for n, g, rows in self.with_log_probabilities()}
            finally:
                put(self.model, trained)

    def sample(
        self, samples: list[int], keys: list[Key], answers: int, temperature: float, routed: int = 0
    ) -> list[Sampled]:
        """Answers to prompts of the data, by their numbers in the split that is in use."""
        lines = self.data.lines("train" if self.in_training else "validation")
        sampler = whole_model(self.model, self.device, *self.samplers)
        self.samplers = () if sampler is self.model else (sampler,)
        prompts = [lines.parts(sample)[0].tolist() for sample in samples]
        with torch.autocast(self.device.type, enabled=False):
            found = sample_answers(sampler, prompts, keys, answers, self.grpo.max_new_tokens, temperature,
                                   self.data.tokenizer.end_ids, routed) if prompts else []  # fmt: skip
        return found

    def judged(self, samples: list[int], sampled: list[Sampled], where: str = "") -> np.ndarray:
        """The reward of each answer, fp64 [functions, prompts, answers], NaN where a function does not apply.

        A failure on any rank stops the run on all of them, with one line.
        """
        tokenizer, lines = self.data.tokenizer, self.data.lines("train" if self.in_training else "validation")
        texts = [
            [tokenizer.decode(ids[:-1] if ended else ids) for ids, ended in zip(one.tokens, one.ended, strict=True)]
            for one in sampled
        ]
        answers, found, failure = sum(map(len, texts)), [], None
        try:
            if answers:
                found = self.rewards(arguments_of(lines, samples, sampled, texts), answers)
        except RewardFailed as failed:
            failure = str(failed)
        failures = [one for one in of_all_ranks(failure, self.trainer.world_size) if one]
        if failures:
            raise RunStopped(f"{where}{failures[0]}; checkpoints are as they were")
        return np.array(found, dtype=np.float64).reshape(len(self.names), len(samples), -1)

    def with_log_probabilities(self) -> list[tuple[int, Group, list[np.ndarray]]]:
        """Each group with its number and the log-probabilities of its answers that the model has now."""
        groups = list(self.groups.values())
        size = len(self.data.of_step(0)[0][0])
        found: list[tuple[int, Group, list[np.ndarray]]] = []
        for first in range(0, len(groups), size):
            some = groups[first : first + size]
            batch = self.batch_of(some)
            rows = iter(self.log_probabilities_of(batch))
            found += [(group.number, group, [next(rows) for _ in group.answers]) for group in some]
        return found

    def log_probabilities_of(self, batch: dict[str, Tensor]) -> list[np.ndarray]:
        """log π of each answer's tokens."""
        self.set_routes(batch)
        log_p_BT = self.target_log_probabilities(batch).cpu()
        valid_BT = (batch["targets"][:, 0] != IGNORE).cpu()
        return [row[valid].numpy() for row, valid in zip(log_p_BT, valid_BT, strict=True)]

    def batch_of(self, groups: list[Group]) -> dict[str, Tensor]:
        """A micro-batch of the groups' answers, a sequence each, with what the objective needs of them."""
        split = "train" if self.in_training else "validation"
        lines = self.data.lines(split)
        prompts = [lines.parts(group.sample)[0] for group in groups for _ in group.answers]
        answers = [np.array(ids) for group in groups for ids in group.answers]
        batch = rows_of(prompts, answers, self.model.config.mtp_depth, self.data.tokenizer.pad_id)
        batch["advantages"] = torch.from_numpy(np.concatenate([group.advantages for group in groups]))
        batch["sample_ids"] = torch.tensor([group.sample for group in groups for _ in group.answers])
        valid_BT = batch["targets"][:, 0] != IGNORE
        for field in ("sampled", "old", "reference"):
            rows = [row for group in groups for row in getattr(group, field) or ()]
            if rows:
                spread_BT = torch.zeros(valid_BT.shape)
                spread_BT[valid_BT] = torch.from_numpy(np.concatenate(rows))
                batch[field] = spread_BT
        routes: list[np.ndarray | None] = []
        for group in groups:
            routes += [None] * len(group.answers) if group.routes is None else group.routes
        if any(route is not None for route in routes):
            batch["routes"] = spread_routes(routes, valid_BT.shape[1])
        return {name: value.to(self.device) for name, value in batch.items()}

    def set_routes(self, batch: dict[str, Tensor] | None) -> None:
        """Lets the main model's routers replay the experts of a batch where it is asked for; None ends it."""
        has = batch is not None and "routes" in batch and self.grpo.replay_routes
        for layer, router in enumerate(routers_of(self.model)):
            router.replay = replayed(batch["routes"][:, :, layer]) if has else None  # type: ignore[index]

    def losses_of(self, batch: dict[str, Tensor], draft: bool = False) -> Losses:
        with compared(self.model, batch.get("routes") if self.has_sampling_model else None) as found:
            losses = super().losses_of(batch, draft)
        for same, of in found:
            self.facts.add({"same_experts": same, "experts": of})
        return losses

    @property
    def has_sampling_model(self) -> bool:
        """Whether the step trains on answers of the model as it is, and not of some steps before."""
        return self.in_training and self.trainer.global_step % self.grpo.updates == 0

    def count(self, numbers: np.ndarray) -> None:
        """What the means of the step are over: answers and tokens of all ranks, and targets of MTP modules."""
        groups = [self.groups[int(number)] for number in numbers.flat]
        scored = [~np.isnan(group.advantages) for group in groups]
        tokens = sum(
            len(ids) for group, there in zip(groups, scored) for ids, counts in zip(group.answers, there) if counts
        )
        own = torch.tensor([sum(there.sum() for there in scored), tokens], dtype=torch.float64, device=self.device)
        self.step_factors = tuple(sum_over_data(self.trainer.strategy, own).tolist())
        lines, depth = self.data.lines("train"), self.model.config.mtp_depth
        prompts = [lines.parts(group.sample)[0] for group in groups for _ in group.answers]
        counts = count_targets(prompts, [np.array(ids) for group in groups for ids in group.answers], depth)
        self.targets_of_step = torch.from_numpy(counts).to(self.device)

    def judge(self, batch: dict[str, Tensor]) -> Judge:
        valid_BT = batch["targets"][:, 0] != IGNORE
        self.set_routes(batch)

        def judged(log_p_BT: Tensor, entropy_BT: Tensor) -> Outcome:
            facts = {"tokens": valid_BT.sum(), "entropy": (entropy_BT * valid_BT).sum()}
            if not self.in_training:
                return Outcome(log_p_BT.new_zeros(()), torch.zeros_like(log_p_BT), facts)
            lengths_B = valid_BT.sum(1).to(log_p_BT.dtype)
            answers, tokens = self.step_factors
            factors_B = token_factors(lengths_B, self.grpo.variant, answers, tokens, self.grpo.max_new_tokens)
            apart_B = batch["advantages"].to(log_p_BT.dtype)
            factors_B = factors_B.masked_fill(apart_B.isnan(), 0) * self.parts
            old_BT = batch.get("old", log_p_BT)
            if self.has_sampling_model:
                facts |= gap_of(old_BT, batch["sampled"], valid_BT)
            outcome = grpo(log_p_BT, old_BT, batch.get("reference"), valid_BT, apart_B.nan_to_num(), factors_B,
                           self.grpo.clip, self.grpo.beta)  # fmt: skip
            return outcome._replace(facts=outcome.facts | facts)

        return judged

    def units(self, batch: dict[str, Tensor]) -> int:
        return len(batch["tokens"])

    def units_of_step(self) -> int:
        return self.prompts_of_step * self.grpo.group_size

    def renew_reference(self, step: int) -> None:
        """Takes the reference from a checkpoint; the model becomes it at step 0, and every `reference_steps` steps."""
        if self.loaded is not None:
            self.reference, self.loaded = from_store(self.model, self.loaded), None
        every = self.grpo.reference_steps
        if not self.reference or (every is not None and step and step % every == 0):
            self.reference = copies(self.model)

    # what is logged

    def note_rewards(self, rewards: np.ndarray, sampled: list[Sampled], apart: Tensor, step: int) -> None:
        alike, weights = without_contrast(apart), np.array(self.grpo.weights)[:, None, None]
        there, total = ~np.isnan(rewards), np.nansum(rewards * weights, 0)
        scored = there.any(0)
        facts = {
            "answers": sum(len(one.tokens) for one in sampled),
            "length": sum(len(ids) for one in sampled for ids in one.tokens),
            "cut": sum(not ended for one in sampled for ended in one.ended),
            "groups": len(sampled), "alike": int(alike.sum()), "reward": float(total[scored].sum()),
            "scored": int(scored.sum()),
        }  # fmt: skip
        for name, own, present in zip(self.names, rewards, there, strict=True):
            facts |= {f"{name}/sum": float(np.nansum(own)), f"{name}/squares": float(np.nansum(own**2)),
                      f"{name}/count": int(present.sum())}  # fmt: skip
        self.facts.add(facts)
        own_sums = [facts["groups"], facts["alike"], float((np.nan_to_num(rewards) != 0).sum())]
        found = self.summed(torch.tensor(own_sums, dtype=torch.float64))
        line = complaint(step + 1, *found)
        if line is not None and not self.complained and self.trainer.is_global_zero:
            print(line, flush=True)
        self.complained = line is not None

    def readings(self, sums: dict[str, float]) -> dict[str, float | None]:
        def share(name: str, of: str) -> float | None:
            return sums[name] / sums[of] if sums[of] else None

        values = {
            "grpo/reward": share("reward", "scored"),
            "grpo/without_contrast": share("alike", "groups"),
            "grpo/entropy": share("entropy", "tokens"),
            "grpo/length": share("length", "answers"),
            "grpo/cut": share("cut", "answers"),
            "grpo/clipped_low": share("clipped_low", "tokens"),
            "grpo/clipped_high": share("clipped_high", "tokens"),
        }
        if sums["compared"]:
            values["grpo/log_p_gap"], values["grpo/log_p_gap_largest"] = share("gap", "compared"), sums["largest_gap"]
            values["grpo/same_experts"] = share("same_experts", "experts")
        if self.grpo.beta:
            values["grpo/kl"] = share("kl", "tokens")
        for name in self.names:
            mean, squares = share(f"{name}/sum", f"{name}/count"), share(f"{name}/squares", f"{name}/count")
            values[f"grpo/reward/{name}"] = mean
            values[f"grpo/reward_std/{name}"] = None if mean is None else math.sqrt(max(0, squares - mean**2))  # type: ignore[operator]
        return values

    # validation

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        samples = [int(sample) for sample in batch["sample_ids"] if sample >= 0]
        keys = [Key(self.seed, VALIDATION, sample) for sample in samples]
        answers = self.grpo.validation_samples
        sampled = self.sample(samples, keys, answers, self.grpo.temperature)
        greedy = self.sample(samples, keys, 1, 0.0)
        weights = np.array(self.grpo.weights)[:, None, None]
        of_samples, of_greedy = (np.nansum(self.judged(samples, one) * weights, 0) for one in (sampled, greedy))
        sums = [len(samples), of_samples.mean(1).sum(), of_samples.max(1, initial=-np.inf).sum(), of_greedy.sum()]
        self.val_rewards += torch.tensor(sums if samples else [0.0] * 4, dtype=torch.float64)
        rows = [
            Group(0, sample, one.tokens, one.ended, np.zeros((1, answers)), np.zeros(answers))
            for sample, one in zip(samples, sampled, strict=True)
        ]
        rows += [Group(0, 0, [[]], [False], np.zeros((1, 1)), np.zeros(1))] if not rows else []  # nothing to predict
        return {"expert_counts": self.validated(self.batch_of(rows)).counts_LE}

    def on_validation_epoch_end(self) -> None:
        prompts, *sums = self.summed(self.val_rewards)
        self.val_rewards = torch.zeros(4, dtype=torch.float64)
        self.val_facts.clear()
        names = ("val/reward", "val/reward_best", "val/reward_greedy")
        values = {name: total / prompts if prompts else None for name, total in zip(names, sums, strict=True)}
        self.log_validation(values | self.validated_mtp())

    # checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        own = [self.groups[number] for number in sorted(self.groups)]
        groups = {g.number: g for of_rank in of_all_ranks(own, self.trainer.world_size) for g in of_rank}
        checkpoint["rollouts"] = packed([groups[number] for number in sorted(groups)])
        if self.loaded is not None:
            self.reference, self.loaded = from_store(self.model, self.loaded), None
        if self.reference:
            checkpoint["reference_weights"] = to_store(self.model, self.reference, self.trainer.strategy)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.groups = {group.number: group for group in unpacked(checkpoint["rollouts"])}
        self.loaded = checkpoint.get("reference_weights")

    def teardown(self, stage: str) -> None:
        self.rewards.close()
