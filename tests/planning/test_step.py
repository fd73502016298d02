"""The time of a step by part, against numbers worked out by hand with every rate set to 1."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest

from dsv3_lightning.config.compose import compose
from dsv3_lightning.config.schema import check
from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.parallel.mesh import MeshShape, StrategyConfig
from dsv3_lightning.planning import coefficients, parts, passes
from dsv3_lightning.planning.coefficients import TABLE, Coefficient
from dsv3_lightning.planning.hardware import GPU, GPUS, Hardware
from dsv3_lightning.planning.layout import FIRST, Again, Layout, Work, now
from dsv3_lightning.planning.parts import Part
from dsv3_lightning.planning.step import exposed, step
from dsv3_lightning.planning.wires import WIRES, copies, parameters, replicas
from tests.conftest import ROOT

FSDP = StrategyConfig(kind="fsdp2_ep")
ONE = Hardware(GPU(peak=1.0, peak_fp32=1.0, memory=1.0, inside=1.0, between=1.0, hbm=1.0, host=1.0))
# One dense and one MoE layer; 16 tokens in sequences of 8, three micro-batches: 48 tokens.
TINY = ModelConfig(
    vocab_size=10, hidden_size=8, num_hidden_layers=2, num_attention_heads=1, intermediate_size=5, kv_lora_rank=3,
    q_lora_rank=None, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=4, first_k_dense_replace=1, n_routed_experts=4,
    num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=8, n_group=1, topk_group=1,
    num_nextn_predict_layers=0, max_position_embeddings=8,
)  # fmt: skip
ALONE = MeshShape(1, 1)
WORK = Work(tokens=16, micro_batches=3, sequence_length=8, precision="bf16", policy="none")
V3 = check(compose(["v3"]).tree).model


def layout(mesh: MeshShape = ALONE, work: Work = WORK, imbalance: float = 1.0, **code) -> Layout:
    return Layout(mesh, FSDP, work, replace(FIRST, **{"attention": "cudnn"} | code), imbalance)


@pytest.fixture
def ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every coefficient is 1, whatever its unit."""
    monkeypatch.setattr(coefficients, "TABLE", {name: Coefficient({"all": 1.0}, "", "test") for name in TABLE})


def seconds(found: list[Part]) -> list[float]:
    return [part.seconds for part in found]


@pytest.mark.usefixtures("ones")
@pytest.mark.parametrize(
    ("code", "forward", "backward"),
    [
        ("cudnn", 2 * 4 * (6 + 4), 2 * 4 * (3 * 6 + 2 * 4)),  # half of 8 positions; 5 products in the backward pass
        ("flash", 2 * 4 * (6 + 6), 2 * 4 * (5 * 6)),  # values padded from 4 to 6
        ("efficient", 2 * 8 * (6 + 4), 2 * 8 * (3 * 6 + 2 * 4)),  # the whole square
    ],
)
def test_attention_by_kernel(code: str, forward: int, backward: int):
    found = parts.attention(TINY, ONE, layout(attention=code))
    assert seconds(found) == [48 * 2 * (forward + backward)]  # tokens, layers
    again = parts.attention(TINY, ONE, layout(attention=code, work=replace(WORK, policy="full")))
    assert seconds(again) == [48 * 2 * (2 * forward + backward)]


@pytest.mark.usefixtures("ones")
def test_documents_shorten_attention_where_the_kernel_skips_what_is_masked():
    short = replace(WORK, documents=2.0)
    for kernel, share in (("flex", 1 / 4), ("efficient", 1)):
        whole, isolated = (parts.attention(TINY, ONE, layout(attention=kernel, work=w)) for w in (WORK, short))
        assert isolated[0].seconds == pytest.approx(share * whole[0].seconds)


@pytest.mark.usefixtures("ones")
def test_experts_wait_for_the_slowest_rank_and_other_products_do_not():
    # 2 of 4 experts of 3 · 8 · 8 weights, multiplied and added, forward and twice backward
    assert seconds(parts.experts(TINY, ONE, layout(imbalance=1.5))) == [3 * 2 * (2 * 192) * 48 * 1.5]
    full = layout(imbalance=1.5, work=replace(WORK, policy="full"))
    assert seconds(parts.experts(TINY, ONE, full)) == [4 * 2 * (2 * 192) * 48 * 1.5]
    attention = 8 * 6 + 8 * (3 + 2) + 3 * (4 + 4) + 4 * 8  # queries, latent and rotary key, keys and values, output
    dense, shared, router = 3 * 8 * 5, 3 * 8 * 8, 4 * 8
    found = parts.products(TINY, ONE, layout(imbalance=1.5))
    assert seconds(found) == [6 * 48 * (2 * attention + dense), 6 * 48 * shared, 6 * 48 * router]


@pytest.mark.usefixtures("ones")
def test_the_head_multiplies_three_times_and_passes_over_its_logits():
    # bytes per logit: 2 + 4 to log-softmax, 4 + 4 exp, 4 + 4 mask, 4 + 2 cast; per chunk 12 per weight
    chunks = 3 * 3  # 160 logits per micro-batch, 64 at a time
    found = parts.head(TINY, ONE, layout(logits=64))
    assert seconds(found) == [3 * 2 * 80 * 48 + 28 * 10 * 48 + 12 * chunks * 80]
    larger = parts.head(TINY, ONE, layout(logits=64, least_tokens=8))  # two chunks in place of three
    assert seconds(larger) == [3 * 2 * 80 * 48 + 28 * 10 * 48 + 12 * 2 * 3 * 80]
    assert seconds(parts.head(TINY, ONE, layout(logits=None, fused=True))) == [3 * 2 * 80 * 48 + 6 * 10 * 48]


@pytest.mark.usefixtures("ones")
def test_bytes_of_passes_over_memory():
    assert passes.norm(2, 4, fused=False) == (4 + 4 + 4 + 2, 2 + 4 + 12)  # fp32 in, normalized, cast to bf16
    assert passes.norm(2, 2, fused=False) == (2 + 4 + 8 + 4 + 2, 6 + 12 + 6)
    assert passes.norm(2, 4, fused=True) == (6, 10)
    assert passes.residual(2, 4) == (10, 6 + 12)
    assert passes.swiglu(6, 2, fused=False, joined=True) == (60, 156)
    # a token of TINY: rotations of two channels for the query and the shared key; queries, keys and the output copied
    rotation = 2 * ((2 + 4) + 36 + 8 + (4 + 2))
    assert passes.attention_copies(TINY, 2, fused=False, padded=False).forward == 4 * (2 * 6 + 4) + 2 * rotation
    padded = passes.attention_copies(TINY, 2, fused=False, padded=True)
    assert padded.forward == 4 * (2 * 6 + 4) + 2 * rotation + 2 * (6 + 4)
    found = parts.sorting(TINY, ONE, layout(mesh=MeshShape(1, 2, 2), rows="sorted"))
    rows = 48 * 2
    assert seconds(found) == [rows * 16 * (9 + 11) + 2 * rows]  # 16 bytes a row, and two sorts
    assert seconds(parts.sorting(TINY, ONE, layout(rows="sorted"))) == [rows * 16 * (5 + 7) + rows]  # all experts here


@pytest.mark.usefixtures("ones")
def test_a_step_waits_for_counts_and_updates_its_share_of_the_parameters():
    assert seconds(parts.host_waits(TINY, ONE, layout(syncs=3))) == [3 * 1 * 3]  # per MoE layer and micro-batch
    selective = layout(syncs=3, work=replace(WORK, policy="selective"))
    assert seconds(parts.host_waits(TINY, ONE, selective)) == [3 * 1 * 3 * 2]
    total = 80 * 2 + 2 * 144 + 120 + 5 * 192 + 32 + 2 * (16 + 3) + 8
    assert seconds(parts.optimizer(TINY, ONE, layout(mesh=MeshShape(1, 2)))) == [40 * total / 2]


def test_copies_that_cross_nodes():
    """V3: 8 experts of 256 on 64 ranks of 8 nodes, of 4 nodes at most (V3 §2.1.2)."""
    direct = copies(V3, 64, 8, "direct")
    assert direct == pytest.approx((8 * (1 / 8 - 1 / 64), 7))
    by_node = copies(V3, 64, 8, "by_node")
    assert by_node == pytest.approx((8 * 7 / 8, 4 * 7 / 8))  # half as many between nodes; more within
    ungrouped = copies(replace(V3, n_group=1, topk_group=1), 64, 8, "by_node")
    assert ungrouped.between == pytest.approx(8 * (1 - (7 / 8) ** 8) * 7 / 8)  # different nodes of eight choices
    assert copies(V3, 8, 8, "direct") == pytest.approx((8 * 7 / 8, 0))
    assert copies(V3, 1, 8, "direct") == (0, 0)
    assert copies(V3, 64, 8, "fused").inside < by_node.inside


@pytest.mark.usefixtures("ones")
def test_tokens_take_the_slower_of_two_links_or_both_in_turn():
    mesh = MeshShape(1, 64, 64)
    rows = 4 * 48 * 59 * 7168 * 2  # there, back and the gradients; 58 layers and the MTP module's
    direct, by_node = (
        [part for part in WIRES[0](V3, ONE, layout(mesh=mesh, exchange=kind, counted=0))]
        for kind in ("direct", "by_node")
    )
    start = 4 * (1 + 63) * 59 * 3  # a collective's start and a peer's latency, both 1
    assert direct[0].seconds == pytest.approx(rows * 3 / 4 * 7 + start)
    assert direct[1].seconds == pytest.approx(rows * 1 / 4 * 7) and direct[1].hidden_under == ("shared experts",)
    assert by_node[0].seconds == pytest.approx(rows * 3 / 4 * (3.5 + 7) + 2 * start)


@pytest.mark.usefixtures("ones")
def test_rings_add_up_nics_and_hops():
    hardware = Hardware(replace(ONE.gpu, inside=1000.0))
    assert hardware.ring_rate(16, 8) == 8  # eight NICs of a node
    assert hardware.ring_rate(4, 1) == 1  # ranks on nodes of their own
    assert hardware.ring_rate(8, 8) == 1000
    assert hardware.ring_latency(16, 8) == 1 + 15  # all latencies 1
    assert hardware.ring_latency(1, 1) == 0


def test_latency_of_a_ring_of_2048_is_nccls_ten_milliseconds():
    latency = Hardware(GPUS["h100"]).ring_latency(2048, 8)
    assert latency == pytest.approx(8.4e-6 + (2047 - 256) * 3.4e-6 + 256 * 14e-6)
    assert 0.008 < latency < 0.011


@pytest.mark.usefixtures("ones")
def test_copies_of_the_model_add_gradients_once_per_micro_batch_or_once_per_step():
    mesh = MeshShape(dp_replicate=2, dp_shard=8)
    often, once = (replicas(V3, ONE, layout(mesh=mesh, reduce_once=flag))[0].seconds for flag in (False, True))
    assert often == pytest.approx(3 * once)
    assert replicas(V3, ONE, layout(mesh=MeshShape(1, 16))) == []


@pytest.mark.usefixtures("ones")
def test_gathers_hide_under_computing_but_not_under_the_exchange_which_uses_the_same_wires():
    found = parameters(V3, ONE, layout(mesh=MeshShape(1, 16, 8)))
    assert [part.name for part in found if part.hidden_under] == ["parameters gathered, gradients reduced"]
    assert "tokens to experts and back" not in found[0].hidden_under


def test_of_what_runs_beside_something_only_the_excess_counts():
    found = [
        Part("a", 3.0, (), ()), Part("b", 4.0, (), ()), Part("x", 6.0, ("a", "b"), ()), Part("y", 2.0, ("a", "b"), ()),
        Part("z", 5.0, ("a",), ()),
    ]  # fmt: skip
    assert [each.seconds for each in exposed(found)] == [3, 4, 0.75, 0.25, 2]  # 8 beside 7; 5 beside 3


def test_a_step_is_the_sum_of_its_parts_and_counts_flop_as_published():
    planned = step(
        V3, Hardware(GPUS["h800"]), layout(mesh=MeshShape(1, 64, 64), work=replace(WORK, sequence_length=4096))
    )
    assert planned.seconds == pytest.approx(sum(each.seconds for each in planned.exposed))
    assert planned.flop == pytest.approx(260.64e9 * 48, rel=1e-4)  # FACTS §4, with MTP
    assert planned.tokens_per_second == pytest.approx(48 / planned.seconds)


def test_every_coefficient_says_where_it_comes_from():
    for name, entry in TABLE.items():
        assert entry.unit and entry.source and all(value > 0 for value in entry.values.values()), name
        assert set(entry.values) in ({"all"}, {"sm90", "sm80"}, {"sm90"}), name  # FP8 on Hopper alone
        assert any(mark in entry.source for mark in ("estimate: ", "arXiv", "#", "NCCL", "DeepEP", "blog")), name
    assert not any(
        entry.measured for entry in TABLE.values()
    )  # set it when a GPU was there, with the command as source


def test_twice_the_rates_and_half_the_latencies_are_half_the_time(monkeypatch: pytest.MonkeyPatch):
    """So no rate hides outside the table."""
    mesh = MeshShape(2, 128, 64, nodes=8)
    work = Work(8192, 2, 4096, "bf16", "full")
    case = V3, Hardware(GPUS["h800"]), Layout(mesh, FSDP, work, now("sm90", mesh), 1.2)
    before = step(*case).seconds

    def scaled(name: str, entry: Coefficient) -> Coefficient:
        factor = 1 if name.startswith("imbalance") else 1 / 2 if entry.unit == "s" else 2
        return entry._replace(values={key: factor * value for key, value in entry.values.items()})

    monkeypatch.setattr(coefficients, "TABLE", {name: scaled(name, entry) for name, entry in TABLE.items()})
    assert step(*case).seconds == pytest.approx(before / 2)


@pytest.mark.parametrize("name", ["parts", "wires", "step", "layout"])
def test_only_small_whole_numbers_stand_in_the_formulas(name: str):
    tree = ast.parse((ROOT / f"dsv3_lightning/planning/{name}.py").read_text())
    found = {
        node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and type(node.value) in (int, float)
    }
    # counts of products, passes and bytes; 27 of a power of two is what model/cpu.py has; 4,096 a width, 128 a tile
    assert found <= {*range(17), 27, 128, 4096, 0.0, 1.0, 0.3}, found


def test_every_part_names_coefficients_of_the_table():
    for mesh in (MeshShape(1, 1), MeshShape(2, 64, 8), MeshShape(1, 64, 64)):
        planned = step(V3, Hardware(GPUS["h100"]), layout(mesh=mesh))
        assert planned.coefficients and set(planned.coefficients) <= set(TABLE)
        assert all(each.part.source for each in planned.exposed)


def test_the_code_is_described_for_every_checkpointing_policy():
    from dsv3_lightning.model.recompute import RECOMPUTE

    for mesh in (MeshShape(1, 1), MeshShape(1, 64, 64, nodes=8)):
        code = now("sm90", mesh)
        assert set(code.again) == set(RECOMPUTE)
        assert code.again["none"] == Again(0, 0, 0, 0, 0, 0)


def test_planning_has_no_figure_of_the_runs_that_it_is_compared_with():
    text = "".join(path.read_text() for path in Path(ROOT / "dsv3_lightning/planning").glob("*.py"))
    assert not any(figure in text for figure in ("22528", "22,528", "11254", "11,254", "11758", "11,758", "torchtitan"))
