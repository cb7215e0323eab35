# SPDX-License-Identifier: Apache-2.0
"""The operator and its ways to compute it, held against loops written from the paper's equations."""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from modeling_karat_vit import KArAtViTConfig, portable
from modeling_karat_vit.karat_operator import KArAtOperator, eager_karat_attention, eager_softmax_attention
from modeling_karat_vit.modeling_karat_vit import AttentionMasks, KArAtViTAttention
from modeling_karat_vit.portable import portable_karat_attention
from tests.modeling_karat_vit import oracle
from tests.modeling_karat_vit.conftest import BASES
from tests.modeling_karat_vit.oracle import make_inputs, make_operator


SCALING = 0.5
paths = pytest.mark.parametrize("need_maps", [True, False], ids=["eager", "portable"])


def attend(operator, query, key, value, keep=None, need_maps=False, scaling=SCALING):
    """Output, maps and scores by the reference; the output, and `None` twice, by the portable path."""
    tensors = operator.tensors(torch.promote_types(query.dtype, torch.float32))
    keep = keep[:, None, None, :] if keep is not None and keep.dim() == 2 else keep
    if need_maps:
        return eager_karat_attention(operator, query, key, value, scaling, tensors, keep)
    return portable_karat_attention(operator, query, key, value, scaling, tensors, keep), None, None


def results(operator, inputs, keep=None, need_maps=False, scaling=SCALING) -> dict[str, torch.Tensor]:
    """The output and every gradient by name, for a gradient of the output that is the same for all ways."""
    operator.zero_grad(set_to_none=True)
    for x in inputs:
        x.grad = None
    output = attend(operator, *inputs, keep, need_maps, scaling)[0]
    if output.requires_grad:  # constant functions of what is frozen leave nothing to differentiate
        backward(output)
    leaves = dict(zip(("query", "key", "value"), inputs)) | dict(operator.named_parameters())
    gradients = {name: leaf.grad.clone() for name, leaf in leaves.items() if leaf.grad is not None}
    return {"output": output.detach()} | gradients


def backward(output: torch.Tensor) -> None:
    seeded = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    output.backward(seeded.to(output.dtype))


def assert_agree(actual: dict, expected: dict, tolerance: float):
    """Relative RMS error, and the largest error relative to the largest entry."""
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        error = actual[name].double() - wanted.double()
        assert actual[name].shape == wanted.shape, name
        assert actual[name].dtype == wanted.dtype, name
        assert torch.isfinite(wanted).all(), name
        assert error.norm() <= tolerance * wanted.double().norm() + 1e-30, name
        assert error.abs().max() <= 10 * tolerance * wanted.double().abs().max() + 1e-30, name


def key_mask(batch: int = 2, tokens: int = 5) -> torch.Tensor:
    """Key 2 of the first image and the last two of the second are hidden."""
    keep = torch.ones(batch, tokens, dtype=torch.bool)
    keep[0, 2] = keep[-1, -1] = keep[-1, -2] = False
    return keep


def as_numpy(*tensors):
    return [tensor.detach().double().numpy() for tensor in tensors]


# ------------------------------------------------------------------------------------------------ the paper's equations


def follows_the_paper(operator, keep):
    """Masked keys might as well not exist: the loops have neither their edges of Phi nor their rows of W."""
    inputs = query, key, _ = make_inputs()
    wanted = None if keep is None else (keep[:, None, None, :] if keep.dim() == 2 else keep).expand(2, 2, 5, 5)
    expected, expected_maps = oracle.attend(
        operator.config, oracle.arrays(operator), *as_numpy(*inputs), SCALING, wanted
    )
    output, maps, scores = attend(operator, *inputs, keep, need_maps=True)
    np.testing.assert_allclose(output.detach(), expected, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(maps.detach(), expected_maps, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(scores.detach(), (query @ key.mT * SCALING).detach(), atol=1e-12)
    if keep is None or keep.dim() == 2:  # The portable path has no masks of single pairs.
        np.testing.assert_allclose(attend(operator, *inputs, keep)[0].detach(), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("masked", [False, True])
def test_the_operator_follows_the_papers_equations(basis, variant, masked):
    follows_the_paper(make_operator(base_fn="silu", **basis, **variant), key_mask() if masked else None)


@pytest.mark.parametrize("heads", [1, 2])
def test_masks_of_single_pairs_follow_the_papers_equations(form, heads):
    keep = torch.rand(2, heads, 5, 5, generator=torch.Generator().manual_seed(4)) > 0.4
    follows_the_paper(make_operator(base_fn="silu", **form), keep)


@paths
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("karat_heads", [1, 2, 3])
def test_the_first_heads_are_karat_and_the_rest_softmax(karat_heads, masked, need_maps):
    """A whole attention module in fp64, softmax heads included, with its projections, against the loops."""
    config = oracle.make_config(heads=3, num_karat_heads=karat_heads)
    torch.manual_seed(0)
    module = KArAtViTAttention(config, 0).double()
    oracle.randomise(module.operator)
    hidden = torch.randn(2, 5, 12, dtype=torch.float64)
    keep = key_mask() if masked else None
    softmax_keep = None if keep is None or need_maps else keep[:, None, None, :]
    implementation = "eager" if need_maps else "karat_portable"
    actual, maps, _ = module(hidden, AttentionMasks(keep, softmax_keep), implementation=implementation)

    query, key, value = (
        projection(hidden).view(2, 5, 3, 4).transpose(1, 2)
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    query, key, value = as_numpy(query, key, value)
    wide = np.ones((2, 3, 5, 5), bool) if keep is None else np.broadcast_to(keep[:, None, None, :], (2, 3, 5, 5))
    tensors = oracle.arrays(module.operator)
    k = karat_heads
    first, first_maps = oracle.attend(config, tensors, query[:, :k], key[:, :k], value[:, :k], 4**-0.5, wide[:, :k])
    scores = query[:, k:] @ key[:, k:].swapaxes(-1, -2) * 4**-0.5
    rest_maps = oracle.softmax(np.where(wide[:, k:], scores, -np.inf))
    joined = np.concatenate([first, rest_maps @ value[:, k:]], axis=1).swapaxes(1, 2).reshape(2, 5, 12)
    expected = module.o_proj(torch.from_numpy(joined))
    np.testing.assert_allclose(actual.detach(), expected.detach(), rtol=1e-9, atol=1e-10)
    if need_maps:
        np.testing.assert_allclose(maps.detach(), np.concatenate([first_maps, rest_maps], 1), rtol=1e-9, atol=1e-10)


# ------------------------------------------------------------------------------------------------------------- masks


@paths
def test_what_a_masked_key_holds_does_not_matter(form, need_maps):
    operator = make_operator(base_fn="silu", dtype=torch.float32, **form)
    query, key, value = make_inputs(torch.float32)
    keep = key_mask()
    expected = results(operator, (query, key, value), keep, need_maps)
    assert (expected["key"][0, :, 2] == 0).all() and (expected["value"][0, :, 2] == 0).all()
    hidden = ~keep[:, None, :, None].expand_as(key)
    for content in (1e30, -1e30, math.inf, math.nan):
        other = [x.detach().masked_fill(hidden, content).requires_grad_() for x in (key, value)]
        if math.isfinite(content):
            actual = results(operator, (query, *other), keep, need_maps)
            assert all(torch.equal(actual[name], expected[name]) for name in expected)
        else:
            with torch.no_grad():
                assert torch.equal(attend(operator, query, *other, keep, need_maps)[0], expected["output"])


@paths
def test_an_image_of_which_nothing_is_left(form, need_maps):
    operator = make_operator(base_fn="sigmoid", **form)
    keep = torch.ones(2, 5, dtype=torch.bool)
    keep[0] = False
    found = results(operator, make_inputs(), keep, need_maps)
    assert (found["output"][0] == 0).all() and (found["output"][1] != 0).all()
    assert all(torch.isfinite(x).all() for x in found.values())


# ----------------------------------------------------------------------------------------------- eager and portable


@pytest.mark.parametrize(("tokens", "rank", "base_fn"), [(17, 1, "gelu"), (17, 12, "zero"), (65, 2, "gelu")])
def test_portable_gives_what_eager_gives_in_fp32(form, tokens, rank, base_fn):
    operator = make_operator(torch.float32, tokens=tokens, base_fn=base_fn, **{"karat_rank": rank, **form})
    inputs = make_inputs(torch.float32, tokens=tokens)
    for keep in (None, key_mask(tokens=tokens)):
        expected = results(operator, inputs, keep, need_maps=True)
        assert_agree(results(operator, inputs, keep), expected, 1e-5)
        trainable = {name for name, parameter in operator.named_parameters() if parameter.requires_grad}
        assert expected.keys() == {"output", "query", "key", "value"} | trainable


@pytest.mark.parametrize("tokens", [197, 198])
@pytest.mark.parametrize("case", [{}, {"grid_size": 11}, {"modular_mode": "w1_phi2"}], ids=str)
def test_the_size_of_real_images(tokens, case):
    operator = make_operator(torch.float32, tokens=tokens, heads=1, karat_rank=12, **case)
    inputs = make_inputs(torch.float32, tokens=tokens, heads=1)
    assert_agree(results(operator, inputs), results(operator, inputs, need_maps=True), 1e-5)


def test_strong_scores(form):
    operator = make_operator(base_fn="silu", **form)
    inputs = make_inputs(strength=30.0)
    assert_agree(results(operator, inputs), results(operator, inputs, need_maps=True), 1e-10)


@pytest.fixture
def use_threads():
    """Sets PyTorch's number of threads for this test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def mask_of(kind: str, batch: int) -> torch.Tensor | None:
    return {"none": None, "keys": key_mask(batch), "one for all": key_mask(batch)[:1]}[kind]


@pytest.mark.parametrize("mask", ["keys", "one for all"])
def test_chunks_of_the_batch(form, monkeypatch, mask, use_threads):
    """However the batch is cut, the last chunk smaller than the others included."""
    use_threads(1)
    operator = make_operator(base_fn="silu", **form)
    inputs = make_inputs(batch=5)
    keep = mask_of(mask, 5)
    sizes = []
    chunks, maps_of = portable._chunks, portable._Maps.of

    def spy(*args):
        parts = chunks(*args)
        sizes.extend(part.stop - part.start for part in parts)
        return parts

    def spy_on_maps(self, maps):
        sizes.append(maps)
        return maps_of(self, maps)

    monkeypatch.setattr(portable, "_chunks", spy)
    monkeypatch.setattr(portable._Maps, "of", spy_on_maps)
    expected = results(operator, inputs, keep)
    # Families that are linear in their coefficients go through the images of one head after the other, and say so
    # forwards and backwards.
    by_head = form in (BASES["fourier"], BASES["spline"])
    times = 4 if by_head else 1
    assert sizes == [5] * times
    floats_per_image = 5 * 5 * max(map(portable.floats_per_score, operator.edges)) * (1 if by_head else 2)
    for budget, wanted in ((1, [1] * 5), (2 * floats_per_image, [2, 2, 1])):
        sizes.clear()
        monkeypatch.setattr(portable, "_budget", lambda device, budget=budget: budget)
        assert_agree(results(operator, inputs, keep), expected, 1e-12)
        assert sizes == wanted * times


@pytest.mark.parametrize("mask", ["none", "keys"])
@pytest.mark.parametrize(
    ("threads", "room", "sizes"),
    [(1, 1, [1] * 10), (2, 2, [2, 2, 1] * 2), (3, 5, [3, 2] * 2), (5, 5, [5, 5]), (8, 8, [8, 2]), (3, 2, [2] * 5)],
)
def test_every_thread_gets_as_many_maps(threads, room, sizes, mask, monkeypatch, use_threads):
    """Images of one head, as many as threads; with fewer images, or room for fewer maps, all heads of an image."""
    operator = make_operator(base_fn="silu")
    inputs, keep = make_inputs(batch=5), mask_of(mask, 5)
    expected = results(operator, inputs, keep, need_maps=True)
    found, maps_of = [], portable._Maps.of
    floats = inputs[0].shape[2] ** 2 * portable.floats_per_score(operator.edges[0])
    monkeypatch.setattr(portable, "_budget", lambda device: room * floats)
    monkeypatch.setattr(portable._Maps, "of", lambda self, maps: found.append(maps) or maps_of(self, maps))
    use_threads(threads)
    assert_agree(results(operator, inputs, keep), expected, 1e-10)
    assert found == sizes * 2
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_give_the_same_bits(threads, dtype, use_threads):
    use_threads(threads)
    operator = make_operator(torch.float32, tokens=65, karat_rank=12)
    inputs = [x.detach().to(dtype).requires_grad_() for x in make_inputs(torch.float32, tokens=65, batch=3)]
    first, second = results(operator, inputs), results(operator, inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)


class TestMemoryThatIsKept:
    """Of the portable path on a CPU, from call to call."""

    @pytest.fixture(autouse=True)
    def none_yet(self, monkeypatch):
        monkeypatch.setattr(portable._Maps, "spare", [])

    def test_what_was_in_it_does_not_matter(self, use_threads):
        use_threads(1)
        operator, inputs, keep = make_operator(base_fn="silu"), make_inputs(batch=3), key_mask(3)
        expected = results(operator, inputs, keep)
        (memory,) = portable._Maps.spare
        for content in (math.nan, math.inf):
            memory.fill_(content)
            found = results(operator, inputs, keep)
            assert all(torch.equal(found[name], expected[name]) for name in expected)
            assert portable._Maps.spare[0] is memory

    def test_calls_of_all_modes_and_sizes_share_it(self):
        operator = make_operator(torch.float32, tokens=17)
        small = make_operator()
        for size in (1, 3, 2):
            inputs = make_inputs(torch.float32, tokens=17, batch=size)
            with torch.inference_mode():
                output = attend(operator, *inputs)[0]
            # Memory of the inference mode could not be written to here.
            torch.testing.assert_close(results(operator, inputs)["output"], output)
            assert_agree(results(small, make_inputs()), results(small, make_inputs(), need_maps=True), 1e-10)
            assert len(portable._Maps.spare) == 1

    def test_large_memory_is_given_back(self, monkeypatch):
        monkeypatch.setattr(portable._Maps, "KEPT", 10)
        monkeypatch.setattr(portable, "_budget", lambda device: 10)
        results(make_operator(), make_inputs())
        assert portable._Maps.spare == []

    def test_what_looks_on_sees_new_memory(self):
        """Modes that count memory or products, and such that have neither."""
        operator, inputs = make_operator(), make_inputs()
        attend(operator, *inputs)
        (memory,) = portable._Maps.spare
        memory.fill_(7.0)
        with FlopCounterMode(display=False) as counter:
            attend(operator, *inputs)
        # Scores, H, W^T V and their product, of two images with two heads of five tokens.
        assert counter.get_total_flops() == 2 * 4 * (5 * 5 * 4 + 5 * 5 * 2 * 3 * 3 + 2 * 5 * 3 * 4)
        assert (memory == 7.0).all()
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = [mode.from_tensor(x) for x in inputs]
            assert attend(operator, *fake)[0].shape == inputs[0].shape
        assert portable._Maps.spare[0] is memory

    def test_an_error_leaves_nothing_behind(self, monkeypatch):
        operator, inputs = make_operator(), make_inputs()
        expected = results(operator, inputs)
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):

            def interrupted(*_):
                raise KeyboardInterrupt

            patched.setattr(portable, "_multiply", interrupted)
            attend(operator, *inputs)
        found = results(operator, inputs)
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    def test_threads_of_a_server_do_not_share_it(self):
        operator = make_operator(torch.float32, tokens=65, karat_rank=12)
        inputs = [make_inputs(torch.float32, tokens=65, batch=4, seed=seed) for seed in range(4)]

        def call(tensors):
            with torch.no_grad():
                return attend(operator, *tensors)[0]

        expected = [call(tensors) for tensors in inputs]
        with ThreadPoolExecutor(4) as pool:
            for _ in range(10):
                assert all(torch.equal(a, b) for a, b in zip(pool.map(call, inputs), expected))


@paths
@pytest.mark.parametrize("batch", [0, 1])
def test_a_batch_of_one_and_of_none(basis, batch, need_maps):
    operator = make_operator(**basis)
    whole = results(operator, make_inputs(batch=2), need_maps=True)
    inputs = [x.detach()[:batch].requires_grad_() for x in make_inputs(batch=2)]
    found = results(operator, inputs, need_maps=need_maps)
    torch.testing.assert_close(found["output"], whole["output"][:batch], rtol=1e-10, atol=1e-12)
    assert found.keys() == whole.keys()
    assert all(found[name].shape == x.shape for name, x in zip(("query", "key", "value"), inputs))


@paths
def test_inputs_that_are_not_contiguous(need_maps):
    operator = make_operator()
    plain = make_inputs()
    expected = results(operator, plain, need_maps=True)
    # As ViT makes them: (B, N, all heads, d) transposed, and only some of the heads.
    wide = [torch.randn(2, 5, 4, 4, dtype=torch.float64) for _ in plain]
    for whole, x in zip(wide, plain):
        whole[:, :, 1:3] = x.detach().transpose(1, 2)
        whole.requires_grad_()
    views = [whole.transpose(1, 2)[:, 1:3] for whole in wide]
    assert not any(view.is_contiguous() for view in views)
    for view in views:
        view.retain_grad()
    output = attend(operator, *views, need_maps=need_maps)[0]
    # A gradient that is not contiguous either.
    seeded = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    output.backward(seeded.mT.contiguous().mT)
    found = {"output": output.detach()} | {name: view.grad for name, view in zip(("query", "key", "value"), views)}
    assert_agree(found, {name: expected[name] for name in found}, 1e-10)


def test_a_universal_operator_is_the_same_operator_in_every_block(make_model, pixels):
    universal = make_model(dtype=torch.float64, sharing="universal")
    blockwise = make_model(dtype=torch.float64, sharing="blockwise")
    missing, unexpected = blockwise.load_state_dict(universal.state_dict(), strict=False)
    assert all(".operator." in name for name in (*missing, *unexpected))
    operators = [layer.attention.operator for layer in blockwise.vit.layers]
    for operator in operators:
        operator.load_state_dict(universal.vit.operator.state_dict())
    for model in (universal, blockwise):
        model(pixels.double()).logits.square().sum().backward()
    torch.testing.assert_close(
        universal(pixels.double()).logits, blockwise(pixels.double()).logits, rtol=1e-12, atol=1e-12
    )
    for name, parameter in universal.vit.operator.named_parameters():
        if parameter.requires_grad:
            expected = sum(operator.get_parameter(name).grad for operator in operators)
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-12)


# --------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.system
def test_gradients_are_those_of_finite_differences(form, monkeypatch):
    """Of the portable path, which has its own backward pass."""
    monkeypatch.setattr(portable, "_budget", lambda device: 1)
    operator = make_operator(tokens=3, heads=1, karat_rank=2, grid_size=2, base_fn="tanh", **form)
    inputs = make_inputs(tokens=3, heads=1, size=2, seed=5)
    keep = torch.tensor([[True, True, True], [True, False, True]])

    def output(*_):
        return attend(operator, *inputs, keep)[0]

    assert torch.autograd.gradcheck(output, (*inputs, *operator.parameters()))


@paths
@pytest.mark.parametrize("base_fn", ["zero", "silu"])
def test_what_the_configuration_freezes(form, need_maps, base_fn):
    for train_basis, train_base in itertools.product([True, False], repeat=2):
        operator = make_operator(base_fn=base_fn, train_basis=train_basis, train_base=train_base, **form)
        found = results(operator, make_inputs(), need_maps=need_maps)
        for name, _ in operator.named_parameters():
            if name == "projector":
                trainable = True
            elif name.endswith("scale_base"):
                trainable = train_base and base_fn != "zero"
            else:
                trainable = train_basis
            assert (name in found) == trainable, name
        assert (found["query"] != 0).any()


@paths
@pytest.mark.parametrize("frozen", [True, False])
def test_a_parameter_that_takes_no_part_is_no_error(basis, need_maps, frozen):
    """Without a base function `scale_base` has no gradient, also where nobody called `freeze`."""
    operator = KArAtOperator(oracle.make_config(5, 2, **basis)).double()
    oracle.randomise(operator)
    if frozen:
        operator.freeze()
    found = results(operator.requires_grad_(True), make_inputs(), need_maps=need_maps)
    if "edges.0.scale_base" in found:
        assert not frozen and (found["edges.0.scale_base"] == 0).all()


@pytest.mark.parametrize("variant", [{}, {"modular_mode": "w1_phi2"}, {"modular_mode": None}], ids=str)
@pytest.mark.parametrize(
    "case",
    [{"basis_type": "rational", "rational_order": (0, 0)}, {"basis_type": "spline", "spline_order": 0}],
    ids=["rational_0_0", "spline_0"],
)
def test_functions_whose_slope_is_zero(variant, case):
    """Constant functions hand no gradient to the scores, and work otherwise."""
    operator = make_operator(**case, **variant)
    inputs = make_inputs()
    expected, _ = oracle.attend(operator.config, oracle.arrays(operator), *as_numpy(*inputs), SCALING)
    for need_maps in (True, False):
        found = results(operator, inputs, need_maps=need_maps)
        np.testing.assert_allclose(found["output"], expected, rtol=1e-9, atol=1e-10)
        assert "query" not in found or (found["query"] == 0).all()
        assert (found["value"] != 0).all()


def test_a_second_derivative_is_refused_rather_than_wrong():
    operator = make_operator()
    inputs = make_inputs()
    output = attend(operator, *inputs)[0]
    (gradient,) = torch.autograd.grad(output.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# --------------------------------------------------------------------------------------------------------- precision


@paths
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_fp32(form, dtype, need_maps):
    """Inputs and parameters in half precision give the fp32 result, rounded once at the end."""
    operator = make_operator(dtype, base_fn="silu", **form)
    with torch.no_grad():
        for parameter in operator.parameters():
            parameter *= 0.5
    wide = make_operator(torch.float32, base_fn="silu", **form)
    wide.load_state_dict(operator.state_dict())
    inputs = make_inputs(dtype)
    wide_inputs = [x.detach().float().requires_grad_() for x in inputs]
    found, expected = results(operator, inputs, need_maps=need_maps), results(wide, wide_inputs, need_maps=need_maps)
    ulp = torch.finfo(dtype).eps
    assert torch.equal(found["output"], expected["output"].to(dtype))
    for name, wanted in expected.items():
        assert found[name].dtype == dtype
        # The gradient of the output arrives rounded.
        assert (found[name].float() - wanted).norm() <= 4 * ulp * wanted.norm(), name


class Given(torch.nn.Module):
    """Stands in for a projection of a (B, h, N, d) tensor that is given."""

    def __init__(self, x: torch.Tensor):
        super().__init__()
        self.x = x.transpose(1, 2)

    def forward(self, hidden):
        return self.x.flatten(2)


@paths
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing_inside(form, dtype, need_maps):
    """What arrives in half precision is computed in fp32, forwards and backwards, under autocast too."""
    operator = make_operator(torch.float32, base_fn="silu", **form)
    inputs = make_inputs(dtype)
    expected = results(operator, inputs, need_maps=need_maps)
    module = KArAtViTAttention(operator.config, 0)
    module.operator = operator
    module.q_proj, module.k_proj, module.v_proj = map(Given, inputs)
    module.o_proj = torch.nn.Identity()
    for leaf in (*inputs, *operator.parameters()):
        leaf.grad = None
    with torch.autocast("cpu", dtype=dtype):
        output = module(torch.zeros(2, 5, 8), implementation="eager" if need_maps else "karat_portable")[0]
        if not need_maps:
            # A backward pass under autocast is discouraged, and the portable path is safe from it all the same.
            backward(output.view(2, 5, 2, 4).transpose(1, 2))
    if need_maps:
        backward(output.view(2, 5, 2, 4).transpose(1, 2))
    leaves = dict(zip(("query", "key", "value"), inputs)) | dict(operator.named_parameters())
    assert output.dtype == dtype
    assert torch.equal(output.view(2, 5, 2, 4).transpose(1, 2), expected.pop("output"))
    for name, gradient in expected.items():
        assert torch.equal(leaves[name].grad, gradient), name


@pytest.mark.parametrize("masked", [False, True])
def test_softmax_heads_of_the_reference(masked):
    keep = key_mask()[:, None, None, :] if masked else None
    query, key, value = make_inputs()
    scores = query @ key.mT * SCALING
    expected = scores if keep is None else scores.masked_fill(~keep, -math.inf)
    expected = torch.from_numpy(oracle.softmax(expected.detach().numpy()))
    output, maps, found = eager_softmax_attention(query, key, value, SCALING, keep=keep)
    assert output.dtype == maps.dtype == torch.float64
    torch.testing.assert_close(maps.detach(), expected, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(output.detach(), expected @ value.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found, scores)
    for dtype in (torch.float16, torch.bfloat16):
        half = [x.detach().to(dtype) for x in (query, key, value)]
        with torch.autocast("cpu", dtype=dtype):
            output = eager_softmax_attention(*half, SCALING, keep=keep)[0]
        wide = eager_softmax_attention(*(x.float() for x in half), SCALING, keep=keep)[0]
        assert torch.equal(output, wide.to(dtype))


# -------------------------------------------------------------------------------------------- random configurations


@st.composite
def configurations(draw) -> dict:
    """Any operator that can be configured, small."""
    mode = draw(st.sampled_from(["phi1_w2", "w1_phi2", None]))
    low = draw(st.floats(-5, 0.5))
    return {
        "heads": draw(st.integers(1, 3)),
        "tokens": draw(st.integers(2, 9)),
        "basis_type": draw(st.sampled_from(["fourier", "spline", "wavelet", "rational"])),
        "wavelet_type": draw(st.sampled_from(["mexican_hat", "morlet", "dog", "meyer", "shannon"])),
        "grid_size": draw(st.integers(1, 6)),
        "spline_order": draw(st.integers(0, 5)),
        "grid_range": (low, low + draw(st.floats(0.5, 8))),
        "rational_order": (draw(st.integers(0, 5)), draw(st.integers(0, 4))),
        "base_fn": draw(st.sampled_from(["zero", *oracle.BASE_FUNCTIONS])),
        "karat_rank": draw(st.integers(1, 5)),
        "modular_mode": mode,
        "karat_depth": 2 if mode is not None else draw(st.integers(1, 4)),
        "sharing": draw(st.sampled_from(["blockwise", "universal"])),
        "project_l1": draw(st.booleans()),
        "train_basis": draw(st.booleans()),
        "train_base": draw(st.booleans()),
        "karat_init": draw(st.sampled_from(["scaled", "normal"])),
    }


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(configurations(), st.integers(0, 10**6), st.integers(1, 3), st.booleans(), st.data())
def test_any_configuration_agrees_on_both_paths_and_with_the_loops(case, seed, batch, masked, data):
    """Outputs and gradients, whatever of inputs and parameters is frozen."""
    operator = make_operator(seed=seed, **case)
    inputs = make_inputs(seed=seed + 1, batch=batch, tokens=case["tokens"], heads=case["heads"])
    leaves = [*inputs, *(x for x in operator.parameters() if x.requires_grad)]
    for leaf in data.draw(st.lists(st.sampled_from(range(len(leaves))), unique=True, max_size=len(leaves))):
        leaves[leaf].requires_grad_(False)
    keep = None
    if masked:
        keep = torch.rand(batch, case["tokens"], generator=torch.Generator().manual_seed(seed)) > 0.3
    eager = results(operator, inputs, keep, need_maps=True)
    portable = results(operator, inputs, keep)
    one = [x[:1, :1] for x in as_numpy(*inputs)]
    wanted = None if keep is None else keep[:1, None, None].expand(1, 1, case["tokens"], -1)
    expected, _ = oracle.attend(operator.config, oracle.arrays(operator), *one, SCALING, wanted)
    np.testing.assert_allclose(eager["output"][:1, :1], expected, rtol=1e-8, atol=1e-9)
    # Where nothing depends on a tensor, eager gives it no gradient, and portable zeros.
    for name in portable.keys() - eager.keys():
        assert (portable.pop(name) == 0).all()
    assert_agree(portable, eager, 1e-9)


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(configurations())
def test_any_configuration_is_the_same_when_reloaded(tmp_path_factory, case):
    config = oracle.make_config(**case)
    folder = tmp_path_factory.mktemp("config")
    config.save_pretrained(folder)
    reloaded = KArAtViTConfig.from_pretrained(folder)
    assert reloaded.to_dict() == config.to_dict()
    shapes = [{name: p.shape for name, p in KArAtOperator(c).named_parameters()} for c in (config, reloaded)]
    assert shapes[0] == shapes[1]
