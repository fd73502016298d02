"""Text samples: fixed prompts, continued every N steps, on the terminal and as TensorBoard text."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from dsv3_lightning.callbacks.protocol import require_data, require_model
from dsv3_lightning.callbacks.settings import PROMPTS, SampleTextSettings
from dsv3_lightning.inference.generate import generate
from dsv3_lightning.inference.sampling import Sampling
from dsv3_lightning.parallel.data_ranks import pipeline_of
from dsv3_lightning.parallel.pipeline.relay import Relay
from dsv3_lightning.training.logging import is_due


class SampleText(Callback):
    """Continues `prompts` every `every_n_steps` and after the last step.

    temperature: 0 is greedy. The same random numbers are used each time, independent of those of training.
    Logs samples/prompt_<i>. Needs `pl_module.model` (a Transformer) and `trainer.datamodule.tokenizer`.
    """

    def __init__(
        self,
        every_n_steps: int = 200,
        prompts: Sequence[str] = PROMPTS,
        max_new_tokens: int = 64,
        temperature: float = 0.7,
    ) -> None:
        SampleTextSettings(
            every_n_steps=every_n_steps, prompts=prompts, max_new_tokens=max_new_tokens, temperature=temperature
        )
        self.every_n_steps, self.prompts = every_n_steps, prompts
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.latest: list[str] = []  # prompts with their continuations, for the report

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        require_model(pl_module, self)
        require_data(trainer, self, "tokenizer")

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not is_due(trainer, batch_idx, self.every_n_steps):
            return
        tokenizer = trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        limit = pl_module.model.config.max_position_embeddings
        prompts = [[tokenizer.bos_id, *tokenizer.encode(prompt)][:limit] for prompt in self.prompts]
        pipeline, unused = pipeline_of(trainer.strategy), tokenizer.ids_without_text(pl_module.model.config.vocab_size)
        model = pl_module.model if pipeline is None else Relay(pipeline)
        with trainer.precision_plugin.forward_context():
            new = generate(model, prompts, self.max_new_tokens, Sampling(self.temperature), tokenizer.eos_id, 0, unused)
        self.latest = [prompt + tokenizer.decode(ids) for prompt, ids in zip(self.prompts, new, strict=True)]
        if trainer.is_global_zero:
            self.show(trainer, trainer.global_step)

    def show(self, trainer: Trainer, step: int) -> None:
        for number, text in enumerate(self.latest):
            print(f"--- sample {number} at step {step}", text, sep="\n")
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    fenced = "\n".join("    " + line for line in text.splitlines())  # Markdown: shown as code
                    logger.experiment.add_text(f"samples/prompt_{number}", fenced, step)
        print("---", flush=True)
