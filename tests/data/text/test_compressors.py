"""The figures of gzip and xz by source are those of the texts that were written, document by document."""

import gzip
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from dsv3_lightning.data.config import DataConfig, SourceConfig
from dsv3_lightning.data.text import compressors
from dsv3_lightning.data.text.compressors import compressed_sources, texts_of
from dsv3_lightning.data.text.prepare import prepare
from dsv3_lightning.data.text.store import TokenFile, read_manifest
from dsv3_lightning.data.text.tokenizer import Tokenizer


def test_each_document_alone_and_all_in_one_stream(
    tmp_path: Path, make_config: Callable[..., DataConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, sources, texts = random.Random(0), {}, {}
    for name, words in (("english", "the cat sat on a mat "), ("chinese", "数据清洗去重混合")):
        texts[name] = [f"{name} {i} " + "".join(rng.choices(words, k=300)) for i in range(20)]
        lines = [json.dumps({"text": text}) + "\n" for text in texts[name]]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        sources[name] = SourceConfig(paths=[str(tmp_path / f"{name}.jsonl")])
    folder = prepare(make_config(tmp_path, paths=[], sources=sources, validation_fraction=0.5))
    tokenizer, file = Tokenizer.from_file(folder), TokenFile(folder, "validation")
    names = read_manifest(folder)["origins"]
    held_out = {name: list(found) for name, found in zip(names, texts_of(file, tokenizer, 2), strict=True)}
    for name in sources:
        assert 3 < len(held_out[name]) < 20 and {text.decode() for text in held_out[name]} <= set(texts[name])
    facts = compressed_sources(folder, tokenizer)
    for name, found in held_out.items():
        joined = b"".join(found)
        expected = {
            "gzip_bpb": sum(len(gzip.compress(text, 9)) for text in found),
            "xz_bpb": sum(len(lzma.compress(text)) for text in found),
            "gzip_stream_bpb": len(gzip.compress(joined, 9)),
            "xz_stream_bpb": len(lzma.compress(joined)),
        }
        assert facts[name] == {"documents": len(found), "bytes": len(joined)} | {
            key: 8 * size / len(joined) for key, size in expected.items()
        }
    monkeypatch.setattr(compressors, "compressed", None)
    assert compressed_sources(folder, tokenizer) == facts  # from its file
    monkeypatch.setattr(compressors, "MOST", 1000)
    assert all(0 < len(list(some)) < len(held_out[name]) for name, some in zip(names, texts_of(file, tokenizer, 2)))
