"""Where the shards of a checkpoint lie: found by one rank, and the same as what torch finds."""

import pickle
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from dsv3_lightning.errors import ConfigError
from dsv3_lightning.parallel.checkpoints.index import joined
from dsv3_lightning.parallel.checkpoints.metadata import index_of, metadata_of
from tests.parallel.conftest import on_ranks


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What two ranks print, each as a dict."""
    folder = tmp_path_factory.mktemp("shards")
    outputs = on_ranks(2, folder / "logs", ["tests.parallel.shard_worker", str(folder)])
    return [dict(line.split(": ", 1) for line in output.splitlines() if ": " in line) for output in outputs]


@pytest.mark.parametrize("layout", range(3))
def test_one_rank_reads_the_metadata_once_and_the_others_only_shards(found, layout):
    first, second = found
    assert ".metadata" in first[f"opened {layout}"] and "rest.pt" in first[f"opened {layout}"]
    assert first[f"metadata {layout}"] == "1" and second[f"metadata {layout}"] == "0"
    assert "__1_0.distcp" in second[f"opened {layout}"] and "rest.pt" not in second[f"opened {layout}"]


def test_a_rank_opens_only_the_files_that_hold_something_of_its_own(found):
    """Of a tensor that both have in full, one has written it, and the other reads it from there."""
    own = [
        found[rank]["opened 0"].count(".distcp") == 1 and f"__{rank}_0" in found[rank]["opened 0"] for rank in (0, 1)
    ]
    assert sum(own) == 1 and found[1]["opened 1"] == "['__0_0.distcp', '__1_0.distcp']"


@pytest.mark.parametrize("what, line", [
    ("another", "model.two is (5, 6) there, (4, 3, 2) here"),
    ("fewer", "its weights are those of another model (model.plain)"),
    ("optimizer", "its weights are those of another model (optimizer/0/2/exp_avg)"),
    ("damaged", "model/model.two in shards/__1_0.distcp is damaged"),
    ("cut", "not a readable checkpoint (shards/__1_0.distcp is missing or cut)"),
])  # fmt: skip
def test_what_is_wrong_is_the_same_line_on_all_ranks(found, what, line):
    assert found[0][what] == found[1][what] and line in found[0][what]


def test_of_a_single_file_each_rank_has_only_its_own_part_in_memory(found):
    for rank in found:
        assert float(rank["resident"]) < 0.75


def grid(sizes, cuts, draw):
    """The chunks of a tensor that is cut at random places along each dim."""
    edges = [sorted({0, size, *(draw.randint(0, size) for _ in range(cuts))}) for size in sizes]
    pieces = [list(zip(along, along[1:])) for along in edges]
    chosen = [[]]
    for along in pieces:
        chosen = [[*before, piece] for before in chosen for piece in along]
    return [ChunkStorageMetadata(torch.Size(a for a, _ in c), torch.Size(b - a for a, b in c)) for c in chosen]


def made_up(draw):
    tensors, storage = {"a/b": BytesStorageMetadata()}, {}
    for number, sizes in enumerate([(9,), (6, 5), (4, 5, 3), (1,), (0, 3), (), (70_000, 2)]):
        chunks = grid(sizes, 2, draw) + ([ChunkStorageMetadata(torch.Size((9,)), torch.Size((0,)))] * (number == 0))
        key = f"model/{number}"
        tensors[key] = TensorStorageMetadata(TensorProperties(torch.bfloat16), torch.Size(sizes), chunks)
        for chunk in chunks:
            place = _StorageInfo(f"__{draw.randint(0, 300)}_0.distcp", draw.randint(0, 2**33), draw.randint(1, 5000))
            storage[MetadataIndex(key, chunk.offsets)] = place
    return Metadata(tensors, storage_data=storage)


@pytest.mark.parametrize("seed", range(5))
def test_the_shards_that_overlap_are_those_that_share_a_number(seed):
    draw = random.Random(seed)
    metadata = made_up(draw)
    index = index_of(metadata)
    entries = {k: e for k, e in metadata.state_dict_metadata.items() if isinstance(e, TensorStorageMetadata)}
    assert index.tensors == {key: (entry.size, torch.bfloat16) for key, entry in entries.items()}
    wanted, expected = {}, set()
    for key, entry in entries.items():
        if draw.random() < 0.2:
            continue
        starts = [draw.randint(0, size) for size in entry.size]
        wanted[key] = tuple(slice(at, draw.randint(at, size)) for at, size in zip(starts, entry.size))
        numbers = [set(range(part.start, part.stop)) for part in wanted[key]]
        for chunk in entry.chunks:
            held = [set(range(at, at + size)) for at, size in zip(chunk.offsets, chunk.sizes)]
            if all(one & other for one, other in zip(held, numbers)):
                place = metadata.storage_data[MetadataIndex(key, chunk.offsets)]
                expected.add((key, tuple(chunk.offsets), place.relative_path, place.offset, place.length))
    shards = index.overlapping(wanted)
    got = {
        (name, tuple(part.start for part in index.place(shard, len(index.tensors[name][0]))),
         index.files[index.file[shard]], int(index.start[shard]), int(index.length[shard]))
        for shard, name in zip(shards, index.names(shards))
    }  # fmt: skip
    assert got == expected and len(shards) == len(got) > 0
    ends = {}
    for key, entry in entries.items():
        for chunk in entry.chunks:
            if 0 not in chunk.sizes:
                place = metadata.storage_data[MetadataIndex(key, chunk.offsets)]
                ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    assert index.ends() == ends


def same_places(index):
    found = {}
    for shard, name in enumerate(index.names(np.arange(len(index)))):
        where = str(index.place(shard, len(index.tensors[name][0])))
        found[name, where] = index.files[index.file[shard]], int(index.start[shard]), int(index.length[shard])
    return found


def test_metadata_written_from_an_index_are_those_that_torch_writes():
    metadata = made_up(random.Random(3))
    del metadata.state_dict_metadata["a/b"]
    for entry in metadata.state_dict_metadata.values():
        entry.chunks = [chunk for chunk in entry.chunks if 0 not in chunk.sizes]
        for chunk in entry.chunks:
            chunk.offsets, chunk.sizes = torch.Size(chunk.offsets), torch.Size(chunk.sizes)
    written = pickle.loads(metadata_of(index_of(metadata)))
    assert type(written.state_dict_metadata) is type(written.storage_data) is dict
    assert written.state_dict_metadata == metadata.state_dict_metadata
    places = {MetadataIndex(k, c.offsets) for k, e in metadata.state_dict_metadata.items() for c in e.chunks}
    assert written.storage_data == {key: metadata.storage_data[key] for key in places}


def test_indices_of_ranks_join_to_one_in_which_a_shard_is_once():
    """Every rank has its own files and, as with pipelines, some tensors that others don't have."""
    whole = made_up(random.Random(4))
    parts = []
    for number in range(3):
        places = whole.storage_data.items()
        kept = {place for place, info in places if int(info.relative_path.split("_")[2]) % 3 == number}
        entries = {
            key: TensorStorageMetadata(entry.properties, entry.size, chunks)
            for key, entry in whole.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
            and (chunks := [chunk for chunk in entry.chunks if MetadataIndex(key, chunk.offsets) in kept])
        }
        parts.append(index_of(Metadata(entries, storage_data={place: whole.storage_data[place] for place in kept})))
    again = replace(parts[1], files=[f"again{file}" for file in parts[1].files])
    got = joined([*parts, again])
    assert same_places(got) == same_places(index_of(whole))
    another = replace(parts[0], tensors={name: (size, torch.int8) for name, (size, _) in parts[0].tensors.items()})
    with pytest.raises(ConfigError, match="ranks have different tensors named model/"):
        joined([*parts, another])


def test_shards_are_read_in_the_order_of_the_disk():
    index = index_of(made_up(random.Random(1)))
    order = index.in_order_of_files(np.arange(len(index)))
    places = [(index.file[shard], index.start[shard]) for shard in order]
    assert places == sorted(places) and sorted(order) == list(range(len(index)))
