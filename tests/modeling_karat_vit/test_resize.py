# SPDX-License-Identifier: Apache-2.0
"""Other image sizes: the operator resampled along its token axes."""

import copy
import math

import numpy as np
import pytest
import torch

from modeling_karat_vit import KArAtViTForImageClassification
from modeling_karat_vit.attention import eager_karat_attention
from tests.modeling_karat_vit import oracle


# The tiny models: images of 8x12 pixels in patches of 4, 2x3 patches and [CLS].
GRID, TOKENS, PATCH = (2, 3), 7, 4
GRIDS = [(4, 6), (3, 2), (5, 4), (1, 3), (2, 4)]
grids = pytest.mark.parametrize("grid", GRIDS, ids=str)
SCALES = ("scale_base", "scale_basis", "projector")


def pixels_of(grid, batch: int = 2, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(6)
    return torch.randn(batch, 3, grid[0] * PATCH, grid[1] * PATCH, generator=generator, dtype=torch.float64).to(dtype)


def size_of(grid) -> tuple[int, int]:
    return grid[0] * PATCH, grid[1] * PATCH


def operators(model) -> list:
    universal = [model.vit.operator] if model.vit.operator is not None else []
    return universal + [layer.attention.operator for layer in model.vit.layers if layer.attention.operator is not None]


# -------------------------------------------------------------------------------------------------- an oracle in loops


def cubic(x: float, a: float = -0.75) -> float:
    """Keys' convolution kernel, with the `a` of image libraries."""
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def bicubic(image: np.ndarray, new: tuple[int, int]) -> np.ndarray:
    """Pixels are areas, and the border repeats."""
    out = np.zeros(new)
    for i, j in np.ndindex(new):
        y, x = (i + 0.5) * image.shape[0] / new[0] - 0.5, (j + 0.5) * image.shape[1] / new[1] - 0.5
        for m in range(math.floor(y) - 1, math.floor(y) + 3):
            for n in range(math.floor(x) - 1, math.floor(x) + 3):
                inside = min(max(m, 0), image.shape[0] - 1), min(max(n, 0), image.shape[1] - 1)
                out[i, j] += cubic(y - m) * cubic(x - n) * image[inside]
    return out


def nearest(image: np.ndarray, new: tuple[int, int]) -> np.ndarray:
    rows = [i * image.shape[0] // new[0] for i in range(new[0])]
    columns = [j * image.shape[1] // new[1] for j in range(new[1])]
    return image[np.ix_(rows, columns)]


def resampled(name: str, array: np.ndarray, axis: int, new: tuple[int, int]) -> np.ndarray:
    """One token axis of one parameter."""
    array = np.moveaxis(array, axis, -1)
    out = np.zeros((*array.shape[:-1], 1 + new[0] * new[1]))
    for index in np.ndindex(array.shape[:-1]):
        cls, image = array[index][0], array[index][1:].reshape(GRID)
        if name.endswith("width"):
            patches = nearest(np.sign(image), new) * np.exp(bicubic(np.log(np.abs(image)), new))
        else:
            patches = bicubic(image, new)
        if name.rpartition(".")[2] in SCALES:
            patches = patches * (GRID[0] * GRID[1]) / (new[0] * new[1])
        out[index] = [cls, *patches.reshape(-1)]
    return np.moveaxis(out, -1, axis)


@grids
def test_every_parameter_is_resampled_as_it_should(make_model, basis, variant, grid):
    """[CLS] apart, the patches bicubic over rows and columns; what is scaled, and what is not."""
    model = make_model(dtype=torch.float64, base_fn="silu", num_hidden_layers=1, **basis, **variant)
    (operator,) = operators(model)
    oracle.randomise(operator)
    before = oracle.arrays(operator)
    model.resize(size_of(grid))
    after = oracle.arrays(operator)
    assert after.keys() == before.keys()
    tokens = 1 + grid[0] * grid[1]
    for name, expected in before.items():
        # r = 3, so that an axis of 7 is one of tokens.
        axes = [axis for axis in (-2, -1) if expected.shape[axis] == TOKENS]
        for axis in axes:
            expected = resampled(name, expected, axis, grid)
        np.testing.assert_allclose(after[name], expected, rtol=1e-9, atol=1e-12, err_msg=name)
        assert all(after[name].shape[axis] == tokens for axis in axes)


@grids
def test_the_resized_operator_follows_the_papers_equations(make_model, basis, variant, grid):
    """Shannon's window is that of the new number of tokens, too."""
    model = make_model(dtype=torch.float64, base_fn="silu", num_hidden_layers=1, **basis, **variant)
    model.resize(size_of(grid))
    (operator,) = operators(model)
    tokens = 1 + grid[0] * grid[1]
    inputs = [x[:, :, :1] if i == 0 else x for i, x in enumerate(oracle.make_inputs(batch=1, tokens=tokens))]
    query, key, value = (x.detach() for x in inputs)
    _, maps, scores = eager_karat_attention(operator, query, key, value, 0.5, operator.tensors(torch.float64))
    for head in range(2):
        row = scores[0, head, 0].numpy()
        expected = oracle.activate(operator.config, oracle.arrays(operator), head, row, list(range(tokens)))
        np.testing.assert_allclose(maps[0, head, 0].detach(), expected, rtol=1e-9, atol=1e-11)


# ------------------------------------------------------------------------------------------------------ what is kept


def test_the_present_size_is_the_identity(make_model, basis, variant, sharing):
    model = make_model(sharing=sharing, **basis, **variant)
    images = pixels_of(GRID, dtype=torch.float32)
    with torch.no_grad():
        expected = model(images).logits
        assert torch.equal(model(images, interpolate_pos_encoding=True).logits, expected)
    before, parameters = copy.deepcopy(model.state_dict()), dict(model.named_parameters())
    assert model.resize(size_of(GRID)) is model
    # An optimiser made before goes on with them.
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(images).logits, expected)


@grids
def test_the_cls_token_stays_bit_for_bit(make_model, basis, variant, grid):
    model = make_model(**basis, **variant)
    before = copy.deepcopy(model)
    model.resize(size_of(grid))
    assert torch.equal(model.vit.embeddings.position_embeddings[:, 0], before.vit.embeddings.position_embeddings[:, 0])
    for new, old in zip(operators(model), operators(before)):
        for name, parameter in old.named_parameters():
            now = new.get_parameter(name)
            for axis in (-2, -1):
                if parameter.shape[axis] == TOKENS:
                    parameter, now = parameter.narrow(axis, 0, 1), now.narrow(axis, 0, 1)
            assert torch.equal(now, parameter), name


@pytest.mark.parametrize("grid", [(4, 6), (1, 3), (5, 4)], ids=str)
def test_sums_over_the_tokens_keep_their_size(make_model, basis, variant, grid):
    """
    Where neither parameters, scores nor values depend on the place, the output does not depend on their number.
    """
    model = make_model(dtype=torch.float64, base_fn="gelu", num_hidden_layers=1, **{**basis, **variant})
    (operator,) = operators(model)
    if basis.get("wavelet_type") == "shannon":
        # The sum of its window is not in proportion to the number of tokens, so without it.
        for step in operator.edges:
            step.window = lambda like: like.new_ones(like.shape[-1])
    with torch.no_grad():
        for parameter in operator.parameters():
            for axis in (-2, -1):
                if parameter.shape[axis] == TOKENS:
                    patch = parameter.narrow(axis, 1, 1).clone()
                    parameter.narrow(axis, 1, TOKENS - 1).copy_(patch.expand_as(parameter.narrow(axis, 1, TOKENS - 1)))
    # The projection sums to 1 anyway, by moving all entries.
    operator.config.project_l1 = False
    results = []
    for size in (GRID, grid):
        model.resize(size_of(size))
        tokens = 1 + size[0] * size[1]
        ones = torch.ones(1, 2, tokens, 4, dtype=torch.float64)
        value = ones.clone()
        value[:, :, 0] = 3.0
        key = 0.7 * ones
        key[:, :, 0] = -0.2
        output = eager_karat_attention(operator, ones[:, :, :1], key, value, 0.5, operator.tensors(torch.float64))[0]
        results.append(output)
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-12)


def test_constant_maps_stay_constant(make_model, basis, variant):
    """Coefficients and translations at their value, widths with their sign, and the scales in proportion."""
    model = make_model(dtype=torch.float64, base_fn="silu", num_hidden_layers=1, **basis, **variant)
    (operator,) = operators(model)
    with torch.no_grad():
        for index, parameter in enumerate(operator.parameters()):
            parameter.fill_(-0.3 - index)
    before = {name: parameter.clone() for name, parameter in operator.named_parameters()}
    model.resize(size_of((5, 4)))
    for name, parameter in operator.named_parameters():
        axes = [axis for axis in (-2, -1) if before[name].shape[axis] == TOKENS]
        expected = torch.full_like(parameter, before[name].flatten()[0].item())
        if name.rpartition(".")[2] in SCALES:
            for axis in axes:
                expected.narrow(axis, 1, 20).mul_(6 / 20)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["projector", "edges.0.cos_coef", "edges.0.scale_basis", "edges.0.width"])
def test_there_and_back_again(name):
    """Smooth maps survive twice the size and back."""
    grid, larger = (8, 12), (16, 24)
    wavelet = {"basis_type": "wavelet"} if name.endswith("width") else {}
    operator = oracle.make_operator(image_size=list(grid), **wavelet)
    y, x = torch.meshgrid(torch.linspace(0, 1, 8), torch.linspace(0, 1, 12), indexing="ij")
    smooth = (1.5 + torch.sin(2 * y) - 0.5 * torch.cos(2 * x + 1)).double().reshape(-1)
    tensor = torch.cat([torch.tensor([7.0], dtype=torch.float64), smooth]).expand(2, 3, -1)
    tensor = tensor.mT if name == "projector" else tensor
    there = operator.resample(name, tensor, grid, larger)
    back = operator.resample(name, there, larger, grid)
    assert there.shape[-2 if name == "projector" else -1] == 1 + 16 * 24
    assert back.shape == tensor.shape
    assert (back - tensor).abs().max() < 0.02 * tensor.abs().max()


# --------------------------------------------------------------------------------------------------- calls and models


@grids
def test_a_call_with_interpolation_equals_resize(make_model, basis, variant, grid):
    images = pixels_of(grid)
    for implementation in ("eager", "karat_portable"):
        model = make_model(dtype=torch.float64, base_fn="silu", **basis, **variant)
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            actual = model(images, interpolate_pos_encoding=True).logits
            expected = model.resize(size_of(grid))(images).logits
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_rows_and_columns_are_not_swapped(make_model, sharing):
    """A grid and its transpose are two different things."""
    model = make_model(dtype=torch.float64, sharing=sharing)
    tall, wide = copy.deepcopy(model).resize(size_of((6, 2))), model.resize(size_of((2, 6)))
    for one, other in zip(operators(tall), operators(wide)):
        projector = one.projector[:, 1:].unflatten(1, (6, 2)).transpose(1, 2).flatten(1, 2)
        assert projector.shape == other.projector[:, 1:].shape
        assert not torch.allclose(projector, other.projector[:, 1:], atol=1e-3)


def test_gradients_pass_through_the_interpolation(make_model, basis, sharing):
    model = make_model(dtype=torch.float64, sharing=sharing, base_fn="silu", **basis)
    gradients = {}
    for implementation in ("eager", "karat_portable"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        model(pixels_of((3, 5)), interpolate_pos_encoding=True).logits.square().sum().backward()
        names = model.karat_parameter_names()
        gradients[implementation] = {n: p.grad.clone() for n, p in model.named_parameters() if n in names}
    for name, gradient in gradients["eager"].items():
        assert (gradient != 0).any(), name
        torch.testing.assert_close(gradients["karat_portable"][name], gradient, rtol=1e-8, atol=1e-10)


def test_maps_of_another_size(make_model):
    model = make_model()
    with torch.no_grad():
        outputs = model(pixels_of((3, 5), dtype=torch.float32), interpolate_pos_encoding=True, output_attentions=True)
    assert [tuple(maps.shape) for maps in outputs.attentions] == [(2, 2, 16, 16)] * 2


@grids
def test_without_the_flag_another_size_raises_and_names_both(make_model, grid):
    height, width = size_of(grid)
    with pytest.raises(ValueError, match=rf"\({height}\*{width}\).*\(8\*12\)"):
        make_model()(pixels_of(grid, dtype=torch.float32))


def test_a_resized_model_is_a_model_of_that_size(make_model, tmp_path, basis, sharing):
    model = make_model(sharing=sharing, train_basis=False, **basis)
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.resize([20, 16])
    assert model.config.image_size == [20, 16] and model.config.num_tokens == 21
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trainable
    assert all(parameter.is_leaf for parameter in model.parameters())
    images = pixels_of((5, 4), dtype=torch.float32)
    model.save_pretrained(tmp_path)
    reloaded = KArAtViTForImageClassification.from_pretrained(tmp_path).eval()
    assert all(torch.equal(tensor, reloaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(reloaded(images).logits, model(images).logits)
    with pytest.raises(ValueError, match=r"\(20\*16\)"):
        model(pixels_of(GRID, dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_can_be_resized(make_model, basis, dtype):
    model = make_model(dtype=dtype, **basis)
    wide = copy.deepcopy(model).double().resize(size_of((3, 5)))
    model.resize(size_of((3, 5)))
    for name, parameter in model.named_parameters():
        assert parameter.dtype == dtype
        torch.testing.assert_close(
            parameter.double(), wide.get_parameter(name), rtol=4 * torch.finfo(dtype).eps, atol=1e-3
        )


def test_a_size_below_a_patch_raises_and_changes_nothing(make_model):
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    for size in (3, [16, 2], 0):
        with pytest.raises(ValueError, match="_size"):
            model.resize(size)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.image_size == [8, 12]
