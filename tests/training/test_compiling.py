"""Fused functions: the same numbers compiled or not, one program for all token counts, and who compiles when."""

import logging
import os
import shutil

import pytest
import setuptools  # noqa: F401  torch.compile imports it, which fails once another test has loaded Python's own distutils
import torch

from dsv3_lightning.model.fused import Fused, compile_all, warm_up
from dsv3_lightning.model.fused_loss import IGNORE, LinearCrossEntropy, softmax_times
from dsv3_lightning.model.fused_norm import normalized, normalized_backward, rms_norm
from dsv3_lightning.training.compiling import Choice, Compiler, choose, key_of, obstacle
from tests.model.small import clear_batch, small_batch, small_config, small_model, total_loss

NAMES = f"compiled: {', '.join(each.__name__ for each in Fused.all)}"
COMPILER = shutil.which("g++")


@pytest.fixture
def dynamo(monkeypatch):
    """torch.compile, which the suite turns off otherwise."""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(disable=False):
        yield
    compile_all(False)
    torch._dynamo.reset()


def train(model, dtype, batch):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = total_loss(model.losses(*batch), batch.targets)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_changing_token_counts_compile_nothing_after_the_warm_up(dynamo, policy):
    """By torch's own log. Without a compiler, since what is compiled for whom is decided before."""
    compile_all(backend="eager")
    warm_up(torch.bfloat16)
    model = small_model(small_config(), activation_checkpointing=policy)
    seen = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert seen >= len(Fused.all)
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    torch._logging.set_logs(recompiles=True)
    log = logging.getLogger("torch._dynamo.guards.__recompiles")
    log.addHandler(handler)
    try:
        for B, T in ((2, 12), (3, 17), (1, 64), (5, 9)):
            train(model, torch.bfloat16, small_batch(model.config, B, T, padding=(0,) * (B - 1) + (4,)))
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
                model.losses(*small_batch(model.config, B, T + 1))
        assert said == [] and torch._dynamo.utils.counters["stats"]["unique_graphs"] == seen
    finally:
        log.removeHandler(handler)
        torch._logging.set_logs()


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_compiled_functions_give_the_gradients_of_the_others(dynamo, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = small_model(small_config())
    batch = clear_batch(model, B=2, T=20, padding=(0, 5))
    plain = train(model, torch.float32, batch)
    compile_all()
    for one, other in zip(plain, train(model, torch.float32, batch), strict=True):
        assert (one - other).norm() <= 1e-5 * one.norm()


@pytest.fixture
def as_written(monkeypatch):
    """Fused functions called where they would be compiled, without torch.compile."""
    for each in (normalized, normalized_backward, softmax_times):
        monkeypatch.setattr(each, "compiled", each.function)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_fused_norm_and_its_gradients_are_those_of_torch_in_fp64(as_written, dtype, strided):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 24, generator=generator).to(dtype)[..., : 16 if strided else 24].requires_grad_()
    weight = torch.randn(x.shape[-1], generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(x.shape, generator=generator).to(dtype)
    exact_x, exact_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    exact = torch.nn.functional.rms_norm(exact_x, exact_weight.shape, exact_weight, 1e-6)
    exact.backward(grad.double())
    out = rms_norm(x, weight, 1e-6, dtype)
    out.backward(grad)
    for ours, theirs in ((out, exact), (x.grad, exact_x.grad), (weight.grad, exact_weight.grad)):
        tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
        assert ours.dtype == dtype and (ours.double() - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_loss_and_its_gradients_are_those_of_the_unfused(monkeypatch, dtype):
    generator = torch.Generator().manual_seed(0)
    x, weight = ((4 * torch.randn(n, 12, generator=generator)).to(dtype).requires_grad_() for n in (10, 37))
    targets = torch.randint(37, (10,), generator=generator).index_fill(0, torch.tensor([0, 4]), IGNORE)
    factors = torch.rand(10, generator=generator)

    def loss_and_gradients():
        x.grad = weight.grad = None
        loss = LinearCrossEntropy.apply(x, weight, targets, 4, 3, factors)
        loss.backward()
        return loss.detach(), x.grad, weight.grad

    plain = loss_and_gradients()
    monkeypatch.setattr(softmax_times, "compiled", softmax_times.function)
    for ours, theirs in zip(loss_and_gradients(), plain, strict=True):
        assert (ours - theirs).norm() <= (1e-6 if dtype == torch.float32 else 1e-3) * theirs.norm()


@pytest.mark.parametrize(
    ("device", "capability", "compiler", "disabled", "why"),
    [
        ("cpu", "AVX512", "/usr/bin/g++", False, None),
        ("cpu", "AVX2", "/usr/bin/g++", False, None),
        ("cpu", "DEFAULT", "/usr/bin/g++", False, "the CPU has no AVX (DEFAULT)"),
        ("cpu", "AVX2", None, False, "there is no C++ compiler (g++, or what CXX names)"),
        ("cpu", "AVX2", "/usr/bin/g++", True, "TORCHDYNAMO_DISABLE is set"),
        ("cuda", "AVX2", "/usr/bin/g++", False, "tried on CPUs alone, and this is a cuda"),
    ],
)
def test_why_nothing_can_be_compiled(device, capability, compiler, disabled, why):
    assert obstacle(device, capability, compiler, disabled) == why


@pytest.mark.parametrize(
    ("setting", "begun_with", "blocked", "late", "choice"),
    [
        ("auto", None, None, "", Choice(True, NAMES)),
        ("auto", None, None, "too late", Choice(False, "compiled: nothing, too late")),
        ("auto", None, "no compiler", "", Choice(False, None)),
        (True, None, "no compiler", "", Choice(False, "compiled: nothing, no compiler")),
        (False, None, None, "", Choice(False, None)),
        ("auto", False, None, "", Choice(False, None)),  # a run keeps its rounding
        ("auto", True, None, "", Choice(True, NAMES)),
        (True, False, None, "", Choice(True, NAMES)),
        (
            "auto", True, None, "late",
            Choice(False, "compiled: nothing, late; the run began with compiled functions, so that rounding differs"),
        ),
    ],
)  # fmt: skip
def test_a_run_compiles_where_it_can_in_time_and_keeps_what_it_began_with(setting, begun_with, blocked, late, choice):
    assert choose(setting, begun_with, blocked, lambda: late) == choice


def test_a_cache_that_is_there_is_used_and_copied_where_it_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr("dsv3_lightning.training.compiling.writable", lambda folder: False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "before")
    compiler = Compiler(tmp_path / "cache", torch.float32)
    compiler.start()
    assert compiler.process is None and "can't be written" in compiler.wait()
    compiler.folder.mkdir()
    (compiler.folder / f"{key_of(torch.float32)}.done").touch()
    (compiler.folder / "program").write_text("code")
    assert compiler.wait() == ""
    try:
        compiler.load()
        used = os.environ["TORCHINDUCTOR_CACHE_DIR"]
        assert used != str(compiler.folder) and open(f"{used}/program").read() == "code"
        assert all(each.compiled for each in Fused.all)
    finally:
        compile_all(False)
