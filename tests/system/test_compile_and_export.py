# SPDX-License-Identifier: Apache-2.0
"""torch.compile without graph breaks, torch.export and ONNX: the portable path, for every basis and variant."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from modeling_karat_vit import KArAtViTModel, karat_operator
from tests.modeling_karat_vit.conftest import FORMS


LABELS = torch.tensor([0, 1, 2, 3])


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _only_the_portable_path(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the reference ran")

    monkeypatch.setattr(karat_operator, "eager_karat_attention", refuse)


def step(function, model, **inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    outputs = function(**inputs)
    outputs.loss.backward()
    return outputs.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_compiles(model, inputs, backend: str, tolerance: float = 1e-5):
    logits, gradients = step(model, model, **inputs)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    compiled_logits, compiled_gradients = step(compiled, model, **inputs)
    assert torch.allclose(compiled_logits, logits, rtol=tolerance, atol=tolerance)
    assert compiled_gradients.keys() == gradients.keys()
    largest = max(gradient.norm() for gradient in gradients.values())
    for name, gradient in gradients.items():
        error = (compiled_gradients[name] - gradient).norm()
        assert error <= tolerance * gradient.norm() + 1e-2 * tolerance * largest, name


# Every variant, and what a compiler meets of bases: the other wavelets are products of the same functions.
DIFFERENT = ["fourier", "meyer", "shannon-w1_phi2", "spline-phi2_phi1", "rational-depth_3", "shannon-full_rank"]
DIFFERENT += ["fourier-project_l1"]
different = pytest.mark.parametrize("name", DIFFERENT)


@different
def test_operators_compile(make_model, pixels, name):
    model = make_model(**FORMS[name], base_fn="silu", num_hidden_layers=1).train()
    assert_compiles(model, {"pixel_values": pixels, "labels": LABELS}, "aot_eager")


@pytest.mark.parametrize(
    ("changes", "masked"), [({"num_karat_heads": 1, "karat_layers": [1]}, True), ({"sharing": "universal"}, False)]
)
def test_mixtures_and_masks_compile(make_model, pixels, changes, masked):
    inputs = {"pixel_values": pixels, "labels": LABELS}
    if masked:
        inputs["attention_mask"] = torch.ones(4, 7, dtype=torch.bool).index_fill(1, torch.tensor([3]), False)
    assert_compiles(make_model(**changes), inputs, "aot_eager")


def test_inductor_compiles_the_defaults(make_model, pixels):
    assert_compiles(make_model(num_hidden_layers=1), {"pixel_values": pixels, "labels": LABELS}, "inductor", 1e-4)


def test_autocast_compiles(make_model, pixels):
    model = make_model(num_hidden_layers=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_compiles(model, {"pixel_values": pixels, "labels": LABELS}, "aot_eager", 5e-2)


def test_another_image_size_compiles(make_model):
    model = make_model(num_hidden_layers=1)
    pixels = torch.randn(4, 3, 12, 16)
    inputs = {"pixel_values": pixels, "labels": LABELS, "interpolate_pos_encoding": True}
    assert_compiles(model, inputs, "aot_eager", 1e-4)


def test_batches_of_any_size_need_one_more_compilation_at_most(make_model, pixels):
    model = make_model(num_hidden_layers=1)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for batch in (4, 4, 3, 2, 3):
            assert torch.allclose(compiled(pixels[:batch]).logits, model(pixels[:batch]).logits, atol=1e-6)
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    ("changes", "cudagraphs"),
    [({}, True), ({"sharing": "universal"}, False), ({"karat_layers": [1, 3], "num_karat_heads": 1}, True)],
)
def test_equal_blocks_are_compiled_once(make_model, pixels, changes, cudagraphs):
    """Block by block, in training with stochastic depth."""
    model = make_model(num_hidden_layers=5, drop_path_rate=0.1, **changes).train()
    counter = CompileCounter()
    for layer in model.vit.layers:
        layer.compile(backend=counter, fullgraph=True)
    # With CUDA graphs a number that changes makes a code for each of its values.
    with torch._inductor.config.patch({"triton.cudagraphs": cudagraphs}):
        for batch in (4, 3, 2):
            model(pixels[:batch], labels=LABELS[:batch]).loss.backward()
    kinds = 1 + ("karat_layers" in changes)
    # A second one is for batches of any size.
    assert counter.frame_count == 2 * kinds


def test_checkpointed_blocks_compile(make_model, pixels):
    model = make_model().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_compiles(model, {"pixel_values": pixels, "labels": LABELS}, "aot_eager")


# -------------------------------------------------------------------------------------------------- export and ONNX


def export(model, pixels, **inputs):
    """An exported program for batches of any size."""
    batch = torch.export.Dim("batch", max=64)
    shapes = {"pixel_values": {0: batch}} | {name: {0: batch} for name in inputs}
    return torch.export.export(model, (), {"pixel_values": pixels, **inputs}, dynamic_shapes=shapes)


def run_onnx(path, **inputs) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert {value.name for value in session.get_inputs()} == set(inputs)
    assert all(isinstance(value.shape[0], str) for value in session.get_inputs()), "the batch is fixed"
    return session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0]


def assert_exports(model, pixels, folder):
    program = export(model, pixels)
    more = torch.cat([pixels, pixels.flip(0), pixels[:1]]) * 2
    with torch.no_grad():
        expected = model(more).logits
    assert torch.allclose(program.module()(pixel_values=more).logits, expected, atol=1e-6)
    torch.onnx.export(program, f=folder / "model.onnx", dynamo=True, verbose=False)
    for images, logits in ((more, expected), (more[:1], expected[:1])):
        actual = torch.from_numpy(run_onnx(folder / "model.onnx", pixel_values=images))
        assert torch.allclose(actual, logits, rtol=1e-4, atol=1e-5)


@different
def test_operators_export(make_model, pixels, tmp_path, name):
    assert_exports(make_model(**FORMS[name], base_fn="silu", num_hidden_layers=1), pixels, tmp_path)


def test_mixtures_export(make_model, pixels, tmp_path):
    assert_exports(make_model(num_karat_heads=1, karat_layers=[1], sharing="universal"), pixels, tmp_path)


def test_masks_export(make_model, pixels):
    model = make_model(num_karat_heads=1, num_hidden_layers=1)
    mask = torch.ones(4, 7, dtype=torch.bool)
    program = export(model, pixels, attention_mask=mask)
    mask[:, 3] = False
    with torch.no_grad():
        expected = model(pixels, attention_mask=mask).logits
    actual = program.module()(pixel_values=pixels, attention_mask=mask).logits
    assert torch.allclose(actual, expected, atol=1e-6) and not torch.allclose(model(pixels).logits, expected, atol=1e-3)


def test_onnx_straight_from_a_model(make_config, pixels, tmp_path):
    model = KArAtViTModel(make_config(), add_pooling_layer=False).eval()
    torch.onnx.export(
        model,
        (pixels,),
        tmp_path / "model.onnx",
        dynamo=True,
        verbose=False,
        input_names=["pixel_values"],
        output_names=["last_hidden_state"],
        dynamic_shapes={"pixel_values": {0: "batch"}},
    )
    actual = run_onnx(tmp_path / "model.onnx", pixel_values=pixels[:3])
    assert np.allclose(actual, model(pixels[:3]).last_hidden_state.detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["karat_portable", "eager"])
@pytest.mark.parametrize(
    "changes",
    [*(FORMS[name] for name in DIFFERENT), {"num_karat_heads": 1, "sharing": "universal", "base_fn": "silu"}],
    ids=str,
)
def test_onnx_by_the_exporter_of_torchscript(make_model, pixels, tmp_path, monkeypatch, backend, changes):
    monkeypatch.undo()  # The reference runs, too.
    model = make_model(**changes)
    with torch.no_grad():
        expected = model(pixels[:3]).logits
    model.set_attn_implementation(backend)
    torch.onnx.export(
        model,
        (pixels * 2,),
        tmp_path / "model.onnx",
        dynamo=False,
        input_names=["pixel_values"],
        output_names=["logits"],
        dynamic_axes={"pixel_values": {0: "batch"}, "logits": {0: "batch"}},
    )
    actual = torch.from_numpy(run_onnx(tmp_path / "model.onnx", pixel_values=pixels[:3]))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_an_exported_program_survives_saving(make_model, pixels, tmp_path):
    model = make_model(num_hidden_layers=1)
    torch.export.save(export(model, pixels), tmp_path / "model.pt2")
    loaded: nn.Module = torch.export.load(tmp_path / "model.pt2").module()
    assert torch.allclose(loaded(pixel_values=pixels).logits, model(pixels).logits, atol=1e-6)


def test_traces(make_model, pixels):
    """`torch.jit.trace`, by which older exporters work: other images than those that were traced give their outputs."""
    model = make_model().eval()
    with torch.no_grad():
        traced = torch.jit.trace(model, (pixels,), strict=False)
        others = pixels.flip(0) * 0.5
        expected, actual = model(others).logits, traced(others)
    actual = actual["logits"] if isinstance(actual, dict) else actual[0]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
