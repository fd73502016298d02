"""A module from its checkpoint alone, as users of Lightning load one."""

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dsv3_lightning import PretrainModule, load
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.parallel.checkpoints import shards
from dsv3_lightning.parallel.checkpoints.names import REST, SHARDS


def test_a_module_loads_from_a_file_and_from_shards_without_arguments(nano, tmp_path):
    run = nano.run("run", "trainer.max_steps=1", "model.tie_word_embeddings=true")
    path, folder = run.folder / "checkpoints/step=1.ckpt", tmp_path / "step=1.ckpt"
    tensors, rest = shards.split(torch.load(path, weights_only=True))
    folder.mkdir()
    dcp.save(tensors, checkpoint_id=folder / SHARDS, no_dist=True)
    shards.write(rest, folder / REST)

    model, _ = load(path)
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        expected = model(tokens)
        for given in (path, str(folder)):
            module = PretrainModule.load_from_checkpoint(given, map_location="cpu")
            assert not module.training and module.settings["run"]["name"] == "run" and module.max_steps == 1
            assert module.model.lm_head.weight is module.model.embed_tokens.weight
            torch.testing.assert_close(module.model(tokens), expected)  # another layout in memory


def test_what_is_no_checkpoint_of_a_run_is_one_line(tmp_path):
    path = tmp_path / "other.ckpt"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(ConfigError, match="^.*other.ckpt: not a checkpoint that a run can resume from.*$"):
        PretrainModule.load_from_checkpoint(path)
