# SPDX-License-Identifier: Apache-2.0
"""Other image sizes: the operator resampled along its token axes."""

import copy
import math

import numpy as np
import pytest
import torch

from modeling_karat_vit import KArAtViTForImageClassification
from modeling_karat_vit.karat_operator import eager_karat_attention
from tests.modeling_karat_vit import oracle


# The tiny models: images of 8x12 pixels in patches of 4, 2x3 patches and [CLS].
GRID, TOKENS, PATCH = (2, 3), 7, 4
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


@pytest.mark.parametrize("grid", [(4, 6), (5, 4), (1, 3)], ids=str)
def test_every_parameter_is_resampled_as_it_should(make_model, form, grid):
    """[CLS] as it was, the patches bicubic over rows and columns; what is scaled, and what is not."""
    model = make_model(dtype=torch.float64, base_fn="silu", num_hidden_layers=1, **form)
    (operator,) = operators(model)
    oracle.randomise(operator)
    with torch.no_grad():
        for step in operator.edges:
            if "width" in dict(step.named_parameters()):
                step.width *= 1e4  # so large that exp(log) rounds it
    before = copy.deepcopy(oracle.arrays(operator))
    cls_position = model.vit.embeddings.position_embeddings[:, 0].clone()
    model.resize(size_of(grid))
    assert torch.equal(model.vit.embeddings.position_embeddings[:, 0], cls_position)
    after = oracle.arrays(operator)
    assert after.keys() == before.keys()
    tokens = 1 + grid[0] * grid[1]
    for name, expected in before.items():
        # r = 3, so that an axis of 7 is one of tokens.
        axes = [axis for axis in (-2, -1) if expected.shape[axis] == TOKENS]
        corner = tuple(0 if axis - expected.ndim in axes else slice(None) for axis in range(expected.ndim))
        np.testing.assert_array_equal(after[name][corner], expected[corner])  # [CLS], bit for bit
        for axis in axes:
            expected = resampled(name, expected, axis, grid)
        np.testing.assert_allclose(after[name], expected, rtol=1e-9, atol=1e-12, err_msg=name)
        assert all(after[name].shape[axis] == tokens for axis in axes)


def test_the_resized_operator_follows_the_papers_equations(make_model, form):
    """Shannon's window is that of the new number of tokens, too."""
    grid = (5, 4)
    model = make_model(dtype=torch.float64, base_fn="silu", num_hidden_layers=1, **form)
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


def test_the_present_size_is_the_identity(make_model, shared_form):
    model = make_model(**shared_form)
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


# --------------------------------------------------------------------------------------------------- calls and models


@pytest.mark.parametrize("grid", [(4, 6), (3, 2)], ids=str)
def test_a_call_with_interpolation_equals_resize(make_model, form, grid):
    images = pixels_of(grid)
    for implementation in ("eager", "karat_portable"):
        model = make_model(dtype=torch.float64, base_fn="silu", **form)
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            actual = model(images, interpolate_pos_encoding=True).logits
            expected = model.resize(size_of(grid))(images).logits
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


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


def test_a_resized_model_is_a_model_of_that_size(make_model, tmp_path, sharing):
    model = make_model(sharing=sharing, train_basis=False)
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_dtype_can_be_resized(make_model, dtype, basis):
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
