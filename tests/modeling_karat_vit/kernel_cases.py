# SPDX-License-Identifier: Apache-2.0
"""
The fused kernels against the fp64 reference. `test_kernels.py` runs this file in a process of its own, because Triton
reads TRITON_INTERPRET when it is imported; on a machine with an NVIDIA GPU it can be run directly:

    python -m pytest tests/modeling_karat_vit/kernel_cases.py
"""

from itertools import cycle

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from torch.autograd import forward_ad

from modeling_karat_vit import KArAtViTConfig, KArAtViTForImageClassification, fused
from modeling_karat_vit.karat_operator import KArAtOperator, eager_karat_attention


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU, or takes the interpreter too long")
WAVELETS = ("mexican_hat", "morlet", "dog", "meyer", "shannon")
# Relative RMS error; the largest error may be ten times that, relative to the largest entry.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch):
    """Whatever a kernel leaves unwritten is NaN; and what was worked out under other settings is forgotten."""

    def poison(new):
        # Bytes of ones are a NaN of any dtype.
        return new.fill_(torch.nan if new.is_floating_point() else 255)

    new_empty, strided, empty_like = torch.Tensor.new_empty, torch.Tensor.new_empty_strided, torch.empty_like
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: poison(new_empty(*args, **kwargs)))
    monkeypatch.setattr(torch.Tensor, "new_empty_strided", lambda *args, **kwargs: poison(strided(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(empty_like(*args, **kwargs)))
    monkeypatch.setattr(fused, "_passes", {})


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter runs one after the other, four fifths of its time for sums of 16 numbers each."""
    tiles = fused._tiles
    if DEVICE == "cpu":
        larger = {"_reduce": {"BLOCK": 256, "ROWS": 16, "num_warps": 2}}
        monkeypatch.setattr(fused, "_tiles", lambda form: (tiles(form)[0] | larger, tiles(form)[1]))


def make_operator(rows: int, columns: int, heads: int, **options) -> KArAtOperator:
    config = KArAtViTConfig(
        hidden_size=16 * heads, num_attention_heads=heads, image_size=(rows, columns), patch_size=1, **options
    )
    operator = KArAtOperator(config)
    with torch.no_grad():
        for name, parameter in operator.named_parameters():
            parameter.normal_()
            if name.endswith("width"):
                parameter.abs_().add_(0.5)
    return operator.to(DEVICE)


def attend(operator, way, query, key, value, keep, dtype):
    tensors = [x.detach().to(dtype).requires_grad_() for x in (query, key, value)]
    parameters = dict(operator.named_parameters())
    scaling = query.shape[-1] ** -0.5
    if way == "reference":
        double = {name: parameter.detach().double().requires_grad_() for name, parameter in parameters.items()}
        tensors = [x.double().detach().requires_grad_() for x in tensors]
        leaves = [*tensors, *double.values()]
        mask = None if keep is None else keep[:, None, None, :]
        output, _, _ = eager_karat_attention(operator, *tensors, scaling, double, mask)
    else:
        leaves = [*tensors, *parameters.values()]
        output, _, _ = operator(*tensors, scaling, way, keep)
    torch.manual_seed(1)
    weights = torch.randn(output.shape, dtype=torch.float64).to(output)
    gradients = torch.autograd.grad((output * weights).sum(), leaves, materialize_grads=True)
    names = ["query", "key", "value", *parameters]
    return {"output": output.detach(), **dict(zip(names, gradients))}


def assert_close(actual, expected, tolerance):
    for name, want in expected.items():
        have, want = actual[name].double(), want.double()
        assert torch.isfinite(have).all(), name
        error = (have - want).norm() / want.norm().clamp(min=1e-12)
        assert error <= tolerance, f"{name}: relative RMS error {error:.2e}"
        largest = (have - want).abs().max() / want.abs().max().clamp(min=1e-12)
        assert largest <= 10 * tolerance, f"{name}: largest error {largest:.2e} of the largest entry"


def check(images=2, heads=2, grid=(4, 4), head_size=16, dtype=torch.float32, masked=False, strength=1.0, **options):
    torch.manual_seed(0)
    operator = make_operator(*grid, heads, **options)
    if dtype == torch.float16:
        # Numbers of its range.
        with torch.no_grad():
            for parameter in (operator.edges[0].scale_basis, operator.edges[0].scale_base, operator.projector):
                parameter.mul_(0.05)
    tokens = grid[0] * grid[1] + 1
    # As the projections give them: strided, heads behind tokens.
    qkv = torch.randn(images, tokens, 3, heads, head_size, device=DEVICE)
    query, key, value = (x.transpose(1, 2) for x in qkv.unbind(2))
    query = query * strength
    keep = None
    if masked:
        keep = torch.rand(images, tokens, device=DEVICE) > 0.3
        # What a masked key holds must not matter, however wild.
        hidden = ~keep[:, None, :, None]
        key, value = key.masked_fill(hidden, 1e4), value.masked_fill(hidden, 1e4)
    query, key, value = (x.to(dtype) for x in (query, key, value))
    actual = attend(operator, "karat_triton", query, key, value, keep, dtype)
    expected = attend(operator, "reference", query, key, value, keep, dtype)
    if DEVICE == "cuda":
        # Triton has launched the kernels; from the second time on the driver does.
        again = attend(operator, "karat_triton", query, key, value, keep, dtype)
        assert all(torch.equal(again[name], x) for name, x in actual.items())
    # A score of 1e3 is itself rounded by 3e-5 in fp32, and its sine with it.
    assert_close(actual, expected, max(TOLERANCE[dtype], 3e-7 * strength))


BASES = [
    {"basis_type": "fourier", "grid_size": 1},
    {"basis_type": "fourier", "grid_size": 3},
    {"basis_type": "spline", "spline_order": 1},
    {"basis_type": "spline", "spline_order": 3},
    *({"basis_type": "wavelet", "wavelet_type": wavelet} for wavelet in WAVELETS),
    {"basis_type": "rational"},
    {"basis_type": "rational", "rational_order": (2, 0)},
]


BASE_FUNCTIONS = (
    *("linear", "relu", "leaky_relu", "relu2", "relu6", "sigmoid", "silu", "tanh", "gelu", "gelu_new", "quick_gelu"),
    *("mish", "gelu_pytorch_tanh"),
)


@pytest.mark.parametrize("options, base_fn", list(zip(cycle(BASES), BASE_FUNCTIONS)), ids=str)
def test_every_basis_and_every_base_function_with_masked_keys(options, base_fn):
    check(grid=(3, 4), karat_rank=2, images=1, masked=True, base_fn=base_fn, **options)


@pytest.mark.parametrize(
    "shape",
    [
        {"grid": (8, 8), "karat_rank": 12, "heads": 1},  # 65 tokens: one more than a tile
        {"grid": (7, 9), "karat_rank": 1, "heads": 1},
        {"grid": (2, 2), "karat_rank": 17, "heads": 3},  # ranks and heads that are no power of two
        {"karat_rank": 2, "head_size": 24},
        {"karat_rank": 4, "strength": 300.0},
    ],
    ids=str,
)
def test_shapes_and_strong_scores(shape):
    check(grid_size=2, images=1, **shape)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        {"grid": (4, 4), "karat_rank": 1, "grid_size": 11, "heads": 12, "head_size": 32},  # 17 tokens
        {"grid": (2, 31), "karat_rank": 2, "grid_size": 5, "heads": 3, "head_size": 64},  # 63
        {"grid": (14, 14), "karat_rank": 12, "grid_size": 1, "heads": 12, "head_size": 64},  # 197
        {"grid": (14, 14), "karat_rank": 16, "grid_size": 3, "heads": 1, "head_size": 128},
        {"grid": (1, 197), "karat_rank": 33, "grid_size": 3, "heads": 3, "head_size": 64},  # 198
        {"grid": (8, 8), "karat_rank": 64, "grid_size": 11, "heads": 1, "head_size": 128},
        {"grid": (16, 16), "karat_rank": 12, "grid_size": 5, "heads": 3, "head_size": 48, "masked": True},  # 257
        {"grid": (32, 32), "karat_rank": 12, "grid_size": 3, "heads": 1, "head_size": 64, "images": 1},  # 1025
        {"grid": (14, 14), "karat_rank": 12, "heads": 3, "head_size": 64, "images": 96},  # several images for a program
        {"grid": (14, 14), "karat_rank": 12, "heads": 3, "head_size": 64, "images": 40, "basis_type": "spline"},
        {"grid": (10, 10), "karat_rank": 12, "heads": 3, "head_size": 64, "images": 8, "basis_type": "rational"},
    ],
    ids=str,
)
def test_large_shapes(dtype, shape):
    check(dtype=dtype, **shape)


LINEAR_OR_NOT = [{"grid_size": 1}, {"basis_type": "wavelet", "wavelet_type": "dog"}]


@pytest.mark.parametrize("basis", LINEAR_OR_NOT, ids=str)
def test_many_images_for_a_program_and_small_tiles_for_the_rest(monkeypatch, basis):
    """As where there are many images: 73 tokens are a full tile and a rest, and the backward pass sums over images."""
    monkeypatch.setattr(fused, "_chunk", lambda images, *_: min(images, 2))
    monkeypatch.setattr(fused, "_PROGRAMS", 1)
    launched = []
    plan = fused._Plan.__wrapped__
    launches = plan.launches
    monkeypatch.setattr(plan, "launches", lambda *args: launched.extend(found := launches(*args)) or found)
    check(images=3, grid=(8, 9), heads=1, karat_rank=2, **basis)
    assert {"_forward_rest", "_forward"} <= {name for name, _, _ in launched}


@pytest.mark.parametrize(
    ("basis", "shares"), [("wavelet", (2, 1, 1)), ("wavelet", (1, 2, 3)), ("rational", (2, 3, 1))], ids=str
)
def test_images_keys_and_queries_of_a_program(monkeypatch, basis, shares):
    """Several images for a program, or several programs for the keys and for the queries of an image; and a rest."""
    monkeypatch.setattr(fused, "_shares", lambda *_: shares)
    check(images=shares[0] + 1, grid=(4, 8), heads=1, karat_rank=2, basis_type=basis, base_fn="silu", masked=True)


@pytest.mark.parametrize(
    ("images", "heads", "tiles", "shares"),
    [
        (256, 3, 13, (1, 2, 1)),
        (512, 6, 13, (1, 1, 1)),
        (1024, 6, 13, (3, 1, 1)),
        (32, 3, 13, (1, 4, 4)),
        (1, 1, 2, (1, 2, 2)),
        (2, 3, 257, (1, 16, 16)),
    ],
)
def test_work_is_shared_out_to_as_many_programs_as_run_at_a_time(images, heads, tiles, shares):
    assert fused._shares(images, heads, tiles, 1584) == shares


@pytest.mark.parametrize("basis", LINEAR_OR_NOT, ids=str)
def test_many_tokens_of_few_images(monkeypatch, basis):
    """As where there are many tokens: U and dU are summed in parts."""
    monkeypatch.setattr(fused, "_BLOCKS", 1)
    assert fused._parts(2, 73) == 2
    check(images=2, grid=(8, 9), heads=1, karat_rank=1, **basis)


def test_little_shared_memory(monkeypatch):
    """As on a smaller GPU, where coefficients are loaded again and again, and tiles of keys are smaller."""
    monkeypatch.setattr(fused, "_Plan", fused._Plan.__wrapped__)
    monkeypatch.setattr(fused, "_loadable", lambda device: 5000)
    form = fused._form("fourier", "zero", 3)
    plan = fused._Plan(form, 12, 16, torch.float32, True, True, 73, torch.device("cpu"))
    tile = plan.tiles["_backward_keys"]
    assert not tile["KEPT"] and tile["BM"] == tile["BN"] == 16
    assert plan.options["_backward_hidden"]["num_stages"] == plan.options["_backward_values"]["num_stages"] == 1
    check(images=1, grid=(8, 9), heads=1, masked=True)


@pytest.mark.parametrize("tokens", [1, 16, 17, 63, 64, 65, 80, 81, 197, 1025])
@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("basis", ["fourier", "wavelet"])
def test_every_token_is_in_one_tile(tokens, few, basis):
    form = fused._form(basis, "zero", 3 if basis == "fourier" else "dog")
    plan = fused._Plan(form, 12, 64, torch.float16, False, True, tokens, torch.device("cpu"))
    kernels_in_tiles = [("_forward", "BM"), ("_backward_queries", "BM"), ("_backward_keys", "BN")]
    for name, side in kernels_in_tiles if basis == "fourier" else kernels_in_tiles[:1]:
        begin = 0
        for options, first, tiles in plan.launches(name, side, tokens, few):
            assert first == begin and tiles > 0
            begin += tiles * plan.tiles[options][side]
        assert tokens <= begin < tokens + plan.tiles[name][side]


def test_without_gradients_nothing_is_saved(monkeypatch):
    saved = []
    run = fused._run_forward
    monkeypatch.setattr(fused, "_run_forward", lambda *args: saved.append(args[-2]) or run(*args))
    operator = make_operator(2, 2, 1, karat_rank=2, grid_size=1)
    inputs = [torch.randn(2, 1, 5, 16, device=DEVICE) for _ in range(3)]
    with_gradients, _, _ = operator(*inputs, 0.25, "karat_triton")
    with torch.no_grad():
        without, _, _ = operator(*inputs, 0.25, "karat_triton")
    assert saved == [True, False]
    torch.testing.assert_close(without, with_gradients)


def test_a_mask_for_all_images_and_inputs_of_two_dtypes():
    operator = make_operator(2, 2, 1, karat_rank=2, grid_size=1)
    query, key, value = (torch.randn(3, 1, 5, 16, device=DEVICE) for _ in range(3))
    keep = torch.tensor([[True, False, True, True, False]], device=DEVICE)
    found, _, _ = operator(query, key.half(), value.half(), 0.25, "karat_triton", keep)
    expected, _, _ = operator(query, key.half(), value.half(), 0.25, "karat_portable", keep)
    torch.testing.assert_close(found, expected)


def test_two_runs_give_equal_bits():
    operator = make_operator(4, 4, 2, karat_rank=4)
    inputs = [torch.randn(2, 2, 17, 16, device=DEVICE) for _ in range(3)]
    first, second = (attend(operator, "karat_triton", *inputs, None, torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("basis", LINEAR_OR_NOT, ids=str)
def test_what_was_worked_out_for_some_inputs_holds_for_others_of_their_kind(basis):
    """One tensor thrice, three tensors, an address that is no multiple of 16, also where a gradient is one row for all
    tokens, and what hooks bring back otherwise."""
    operator = make_operator(2, 2, 2, karat_rank=2, **basis)
    shape = 2, 5, 2, 16

    def gradients(way, tensors, pack=lambda x: x, reduce=torch.square):
        leaves = [x.requires_grad_() for x in tensors]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            inputs = {x: x.transpose(1, 2) for x in leaves}
            output, _, _ = operator(*(inputs[x] for x in leaves), 0.25, way)
        loss, wanted = reduce(output).sum(), [leaves[0], *operator.parameters()]
        return output, *torch.autograd.grad(loss, wanted, materialize_grads=True)

    def check_against_portable(tensors, **options):
        expected = gradients("karat_portable", tensors, **options)
        for found, wanted in zip(gradients("karat_triton", tensors, **options), expected):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)

    one, two, three = (torch.randn(shape, device=DEVICE) for _ in range(3))
    check_against_portable([one, one, one])
    check_against_portable([one, two, three])
    shifted = torch.randn(one.numel() + 1, device=DEVICE)[1:].view(shape)
    check_against_portable([shifted, two, three])
    check_against_portable([shifted, two, three], reduce=lambda x: x.mean((0, 1, 2)).square())
    check_against_portable([one, two, three], pack=torch.Tensor.contiguous)


def test_forward_mode_derivatives_are_those_of_the_reference():
    operator = make_operator(2, 2, 1, karat_rank=2, grid_size=1)
    inputs = [torch.randn(2, 1, 5, 16, device=DEVICE) for _ in range(3)]
    tangents = []
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, x.cos()) for x in inputs]
        for implementation in ("karat_triton", "eager"):
            output, _, _ = operator(*duals, 0.25, operator.way(implementation, duals[0]))
            tangents.append(forward_ad.unpack_dual(output).tangent)
    torch.testing.assert_close(*tangents, rtol=1e-4, atol=1e-4)


def make_model(**options) -> KArAtViTForImageClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"image_size": 4, "patch_size": 2, "num_labels": 3}
    return KArAtViTForImageClassification(KArAtViTConfig(**sizes, karat_rank=2, grid_size=1, **options)).to(DEVICE)


@pytest.mark.parametrize("options", [{}, {"sharing": "universal", "num_karat_heads": 1}], ids=str)
def test_a_model_trains_alike_on_every_path(options):
    """Training, 200 steps of it on a GPU: the losses of eager, portable and fused follow each other."""
    steps, tolerance = (200, 1e-2) if DEVICE == "cuda" else (3, 1e-4)
    losses = {}
    for way in ("eager", "karat_portable", "karat_triton"):
        model = make_model(**options)
        model.set_attn_implementation(way)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        images, labels = torch.randn(3, 3, 4, 4, device=DEVICE), torch.tensor([0, 1, 2], device=DEVICE)
        losses[way] = []
        for _ in range(steps):
            loss = model(images, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[way].append(loss.item())
    assert losses["karat_portable"] == pytest.approx(losses["eager"], rel=tolerance, abs=tolerance)
    assert losses["karat_triton"] == pytest.approx(losses["eager"], rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("way", ["gradient checkpointing", "offload"])
def test_gradients_are_equal_where_activations_are_not_kept(way):
    model = make_model()
    model.set_attn_implementation("karat_triton")
    images, labels = torch.randn(2, 3, 4, 4, device=DEVICE), torch.tensor([0, 2], device=DEVICE)

    def gradients():
        model.zero_grad()
        model(images, labels=labels).loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    expected = gradients()
    if way == "offload":
        with torch.autograd.graph.save_on_cpu():
            found = gradients()
    else:
        model.train()
        model.gradient_checkpointing_enable()
        found = gradients()
    assert len(found) == len(expected)
    for actual, wanted in zip(found, expected):
        torch.testing.assert_close(actual, wanted)


def compiled_and_eager(operator, compiled, images: int, head_size=16, masked=False, dtype=torch.float32):
    """Output and gradients of the compiled operator, and of the operator itself, for the same inputs."""
    tokens, heads = operator.config.num_tokens, operator.config.num_attention_heads
    # As the projections give them.
    qkv = torch.randn(images, tokens, 3, heads, head_size, device=DEVICE, dtype=dtype, requires_grad=True)
    keep = torch.rand(images, tokens, device=DEVICE) > 0.3 if masked else None
    names = ["qkv", *(name for name, _ in operator.named_parameters())]
    leaves = [qkv, *operator.parameters()]

    def run(function):
        query, key, value = (x.transpose(1, 2) for x in qkv.unbind(2))
        output, _, _ = function(query, key, value, 0.25, "karat_triton", keep)
        gradients = torch.autograd.grad(output.float().square().mean(), leaves, materialize_grads=True)
        # What a CUDA graph hands out is its own, until the next step.
        return {"output": output.detach().clone(), **{name: x.clone() for name, x in zip(names, gradients)}}

    return run(compiled), run(operator)


@pytest.mark.parametrize("basis", LINEAR_OR_NOT, ids=str)
def test_compile_takes_the_kernels_whole(basis):
    operator = make_operator(2, 2, 1, karat_rank=2, **basis)
    for dynamic, batches in ((False, [2]), (True, [2, 4, 3])):
        torch.compiler.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(operator, fullgraph=True, backend=counter, dynamic=dynamic)
        graphs = []
        for images in batches:
            torch.testing.assert_close(*compiled_and_eager(operator, compiled, images))
            graphs.append(counter.frame_count)
        assert graphs[-1] == graphs[0]


@pytest.mark.parametrize("basis", LINEAR_OR_NOT, ids=str)
def test_the_operators_keep_their_promises(monkeypatch, basis):
    """They write to no argument and return none; shapes, strides and gradients are what they say."""
    monkeypatch.undo()  # NaN is not equal to itself.
    operator = make_operator(2, 3, 1, karat_rank=2, **basis)
    calls, attention = [], fused._attention
    monkeypatch.setattr(fused, "_attention", lambda *args: calls.append(args) or attention(*args))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    query, key, value = (torch.randn(2, 1, 7, 16, device=DEVICE, requires_grad=True) for _ in range(3))
    keep = torch.rand(2, 7, device=DEVICE) > 0.3
    operator(query, key, value, 0.25, "karat_triton", keep)
    monkeypatch.undo()
    (arguments,) = calls
    torch.library.opcheck(attention.default, arguments)


@needs_gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"basis_type": "spline", "base_fn": "silu"},
        {"basis_type": "wavelet", "wavelet_type": "shannon"},
        {"basis_type": "rational", "base_fn": "silu"},
    ],
    ids=str,
)
def test_inductor_launches_the_kernels_itself(monkeypatch, options, masked, mode):
    monkeypatch.undo()  # Buffers are not poisoned: that would be traced, too.
    torch.compiler.reset()
    operator = make_operator(8, 9, 3, karat_rank=12, **options)
    compiled = torch.compile(operator, fullgraph=True, mode=mode)
    # A second number of images makes a graph for any.
    for images in (4, 6, 9):
        qkv = torch.randn(images, 73, 3, 3, 16, device=DEVICE, dtype=torch.bfloat16)
        inputs = [x.transpose(1, 2).detach().requires_grad_() for x in qkv.unbind(2)]
        keep = torch.rand(images, 73, device=DEVICE) > 0.3 if masked else None
        leaves = [*inputs, *operator.parameters()]

        def run(function, inputs=inputs, keep=keep, leaves=leaves):
            output, _, _ = function(*inputs, 0.25, "karat_triton", keep)
            gradients = torch.autograd.grad(output.float().square().sum(), leaves, materialize_grads=True)
            return [x.clone() for x in (output, *gradients)]

        found, code = run_and_get_code(run, compiled)
        if images == 4:
            assert any("_backward_values" in text for text in code)
            assert not any("torch.ops.karat_vit" in text for text in code)
        for actual, expected in zip(found, run(operator)):
            torch.testing.assert_close(actual, expected)


# Of each family one.
FAMILIES = [BASES[1], BASES[3], BASES[-3], BASES[-2]]


@pytest.mark.parametrize(
    "dtype, options", [*((torch.float16, options) for options in FAMILIES), (torch.bfloat16, BASES[0])], ids=str
)
def test_half_precision_without_a_gpu(dtype, options):
    """The interpreter computes bf16 in fp32, because it keeps it as integers."""
    check(dtype=dtype, karat_rank=2, images=1, grid=(3, 4), masked=True, **options)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", BASES, ids=str)
@pytest.mark.parametrize("grid", [(7, 9), (14, 14), (16, 16)], ids=str)
def test_half_precision(dtype, options, grid):
    check(dtype=dtype, grid=grid, head_size=64, karat_rank=12, heads=3, **options)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strength", [30.0, 300.0])
def test_strong_scores_in_half_precision(dtype, strength):
    check(dtype=dtype, grid=(14, 14), head_size=64, karat_rank=12, strength=strength)
