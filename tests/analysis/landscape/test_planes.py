# SPDX-License-Identifier: Apache-2.0
import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn.decomposition import PCA

from analysis.landscape import planes
from analysis.landscape.planes import Plane
from image_classification.errors import InputError
from tests.analysis.conftest import karat_model

from .conftest import Weights


def path_of(points, shapes):
    """Readers of moments that are displaced from a model by rows of `points`."""
    model = Weights(*shapes)
    trained = planes.flatten(model)
    readers = []
    for row in points:
        moment, offset = copy.deepcopy(model), 0
        for parameter in planes.trainable(moment).values():
            size = parameter.numel()
            parameter.data = (trained + row)[offset : offset + size].view_as(parameter)
            offset += size
        readers.append(planes.reader_of(dict(moment.named_parameters())))
    return model, readers


@pytest.mark.parametrize("at_once", [1, 2**23])
def test_the_principal_directions_are_those_of_pca(at_once, monkeypatch):
    monkeypatch.setattr(planes, "_READ_AT_ONCE", at_once)  # row by row, or all together
    points = torch.randn(7, 12, dtype=torch.float64) * torch.linspace(3, 0.1, 12, dtype=torch.float64)
    model, readers = path_of(points, [(2, 3), (2, 2), (2,)])
    plane = planes.path_plane(model, readers)
    expected = PCA(2).fit(points.numpy())
    np.testing.assert_allclose(plane.explained, expected.explained_variance_ratio_)
    np.testing.assert_allclose(np.abs(np.sum(plane.directions.numpy() * expected.components_, 1)), 1)
    np.testing.assert_allclose(planes.products(plane.directions), np.eye(2), atol=1e-12)
    np.testing.assert_allclose(plane.path, points @ plane.directions.mT, atol=1e-12)
    np.testing.assert_allclose(plane.distances, points.norm(dim=1))
    assert (plane.path[0] >= 0).all()


def test_a_path_in_a_plane_is_found_exactly():
    turn = torch.linalg.qr(torch.randn(10, 2, dtype=torch.float64)).Q
    angles = torch.linspace(0, 2, 9, dtype=torch.float64)
    points = torch.stack([5 * angles.cos(), 2 * angles.sin()], 1) @ turn.mT
    model, readers = path_of(points, [(5, 2)])
    plane = planes.path_plane(model, readers)
    np.testing.assert_allclose(plane.path @ plane.directions.numpy(), points, atol=1e-12)
    assert plane.explained.sum() == pytest.approx(1)
    # Rescaled directions are not orthonormal; a point's coordinates are those of the nearest point of the plane.
    rescaled = planes.path_plane(model, readers, "tensor")
    nearest = np.linalg.lstsq(rescaled.directions.mT.numpy(), points.mT.numpy(), rcond=None)[0].T
    np.testing.assert_allclose(rescaled.path, nearest, atol=1e-10)


def test_a_path_without_two_dimensions_is_refused():
    line = torch.arange(4, dtype=torch.float64)[:, None] * torch.ones(6, dtype=torch.float64)
    for points, message in ((line, "did not move in two"), (0 * line, "did not move in two"), (line[:2], "3 moments")):
        model, readers = path_of(points, [(2, 3)])
        with pytest.raises(InputError, match=message):
            planes.path_plane(model, readers)


@settings(deadline=None, max_examples=40)
@given(
    data=st.data(),
    shapes=st.lists(arrays.array_shapes(min_dims=1, max_dims=4, max_side=4), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
)
def test_filters_of_a_direction_have_the_norms_of_the_weights(data, shapes, seed):
    model = Weights(*shapes, seed=seed)
    dead = data.draw(st.booleans())
    if dead:
        model.weights[0].data[0] = 0
    directions = planes.random_plane(model, seed).directions
    offset = 0
    for parameter in model.weights:
        for direction in directions:
            part = direction[offset : offset + parameter.numel()].view(parameter.shape)
            if parameter.ndim == 1:
                assert not part.any()
            elif parameter.ndim == 3:  # embeddings of tokens
                torch.testing.assert_close(part.norm(dim=2), parameter.norm(dim=2))
            else:
                torch.testing.assert_close(part.flatten(1).norm(dim=1), parameter.flatten(1).norm(dim=1))
        offset += parameter.numel()
    # Filters of another size move in proportion, so that the plane does not show the size of the weights.
    larger = copy.deepcopy(model)
    for parameter in larger.weights:
        parameter.data *= 8
    torch.testing.assert_close(planes.random_plane(larger, seed).directions, 8 * directions)


@pytest.mark.parametrize("fields", [{}, {"basis_type": "rational"}, {"modular_mode": "w1_phi2"}])
def test_filters_of_karat_are_what_feeds_an_output(fields):
    model = karat_model(**fields)
    directions = planes.random_plane(model).directions
    karat, offset, seen = model.karat_parameter_names(), 0, 0
    for name, parameter in planes.trainable(model).items():
        part = directions[0, offset : offset + parameter.numel()].view(parameter.shape)
        offset += parameter.numel()
        if name not in karat:
            continue
        seen += 1
        # (heads, ..., outputs, inputs): everything of one head and output together.
        ours, theirs = (of.detach().movedim(-2, 1).flatten(2).norm(dim=2) for of in (part, parameter))
        torch.testing.assert_close(ours, theirs)
    assert seen
    assert offset == directions.shape[1]
    tensors = planes.random_plane(model, normalise="tensor").directions
    first = next(iter(planes.trainable(model).values()))
    torch.testing.assert_close(tensors[0, : first.numel()].norm(), first.detach().norm())


def test_the_extent_holds_every_path_and_the_trained_weights():
    def of(path):
        return Plane("pca", "none", torch.zeros(2, 3), np.array(path))

    x, y = planes.extent([of([[4.0, 1.0]]), of([[8.0, -1.0]])], 5)
    np.testing.assert_allclose(x, [-2, 1, 4, 7, 10])
    np.testing.assert_allclose(y, [-1.5, -0.75, 0, 0.75, 1.5])
    x, y = planes.extent([of([[4.0, 1.0]])], 3, 2.5)
    assert x.tolist() == y.tolist() == [-2.5, 0, 2.5]
    assert planes.extent([Plane("random", "filter", torch.zeros(2, 3))], 3)[0].tolist() == [-1, 0, 1]
