"""Every model on the GPU beside the CPU; a training step under autocast; compiled, and in CUDA graphs."""

import json

import pytest
import timm
import torch
from class_folders import make_settings, write_splits
from gpu.calls import FUNCTIONS, assert_close, inputs, with_gradients
from gpu.device import DEVICE, DRY, needs_card

import dat  # noqa: F401

SMALL = ("dat_nano", "dat_pp_nano")


@pytest.fixture(autouse=True)
def _exact_products():
    """float32 in full, that values may be compared with the CPU's."""
    torch.manual_seed(0)
    allowed = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = allowed


def step(model, x, dtype=None):
    """The loss of a training step, and the gradient of every parameter."""
    model.zero_grad(set_to_none=True)
    with torch.autocast(DEVICE.type, dtype or torch.bfloat16, enabled=dtype is not None):
        loss = model(x).float().square().mean()
    loss.backward()
    return loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", SMALL if DRY else timm.list_models("dat*"))
def test_every_model_equals_the_cpu(name):
    model = timm.create_model(name, num_classes=10, img_size=(64, 96)).eval()
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = model(x)
        assert_close([model.to(DEVICE)(x.to(DEVICE))], [expected], 1e-3)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_a_training_step_equals_the_cpus(name, dtype):
    model = timm.create_model(name, num_classes=10, drop_path_rate=0.0, img_size=(64, 96)).train()
    x = torch.randn(4, 3, 64, 96)
    expected = step(model, x) if DEVICE.type == "cuda" else step(model, x, dtype)
    model = model.to(DEVICE)
    ours = step(model, x.to(DEVICE), dtype)
    assert all(t.isfinite().all() for t in ours)
    assert_close(ours, expected, 1e-3 if dtype is None else 0.1)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_ops_compile_to_one_graph_of_any_batch(name):
    torch.compiler.reset()
    compiled = torch.compile(FUNCTIONS[name], fullgraph=True, dynamic=True)
    tensors = inputs(name, DEVICE)
    assert_close(with_gradients(compiled, tensors), with_gradients(FUNCTIONS[name], tensors))


@pytest.mark.parametrize("name", SMALL)
def test_models_compile_to_one_graph(name):
    torch.compiler.reset()
    model = timm.create_model(name, num_classes=10, img_size=64).eval().to(DEVICE)
    x = torch.randn(2, 3, 64, 64, device=DEVICE)
    with torch.no_grad():
        assert_close([torch.compile(model, fullgraph=True, backend="aot_eager")(x)], [model(x)], 1e-3)


# Inductor takes a minute for a model: one with every kind of attention stands for the others.
@needs_card
def test_a_model_trains_in_graphs_of_one_size():
    torch.compiler.reset()
    model = timm.create_model("dat_pp_nano", num_classes=10, drop_path_rate=0.0, img_size=64).train().to(DEVICE)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    x = torch.randn(2, 3, 64, 64, device=DEVICE)
    expected = [t.clone() for t in step(model, x)]
    # Graphs are recorded in the second call and replayed from the third on.
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        assert_close([t.clone() for t in step(compiled, x)], expected, 1e-2)


@needs_card
@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_a_training_in_graphs_equals_an_eager_one(amp, tmp_path, monkeypatch):
    pytest.importorskip("yaml", reason="training needs what `pip install dat` brings")
    from dat.classification.config import ClassificationConfig
    from dat.classification.train import train
    from dat.engine.config import from_dict

    captured, capture = [], torch.cuda.make_graphed_callables
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda *args: captured.append(args) or capture(*args))
    write_splits(tmp_path)
    losses = []
    for cuda_graphs in (False, True):
        settings = make_settings(tmp_path)
        settings["model"]["backbone"]["name"] = "dat_pp_nano"
        settings["train"] |= {"device": "cuda", "amp": amp, "cuda_graphs": cuda_graphs}
        settings["output"] += str(cuda_graphs)
        train(from_dict(ClassificationConfig, settings, "test"))
        lines = (tmp_path / f"run{cuda_graphs}/log.jsonl").read_text().splitlines()
        losses.append([line["loss"] for line in map(json.loads, lines) if line["kind"] == "train"])
    assert len(captured) == 1
    assert len(losses[0]) == 12
    assert losses[1] == pytest.approx(losses[0], rel=1e-2 if amp == "none" else 5e-2)
