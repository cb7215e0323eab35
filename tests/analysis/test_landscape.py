# SPDX-License-Identifier: Apache-2.0
import copy
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.decomposition import PCA
from torch import nn

from analysis import landscape, planes, style, surfaces
from analysis.checkpoints import load_checkpoint, load_start
from analysis.images import find_images
from analysis.planes import Plane
from analysis.surfaces import Eigenvalue, Points
from image_classification.errors import InputError

from .conftest import SIZES, karat_model, save


CPU = torch.device("cpu")
FILES = [f"landscape{end}" for end in (".json", ".npz", ".png", ".points.jsonl", ".svg", "_3d.png", "_3d.svg")]


class Weights(nn.Module):
    """Trainable tensors of given shapes, one that is frozen, and a buffer."""

    def __init__(self, *shapes, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.weights = nn.ParameterList(torch.randn(shape, dtype=torch.float64) for shape in shapes)
        self.frozen = nn.Parameter(torch.ones(2, dtype=torch.float64), requires_grad=False)
        self.register_buffer("average", torch.ones(3, dtype=torch.float64))


class Quadratic:
    """w^T H w / 2 + g^T w in two batches, w from where the model was; the "accuracy" is w's first number."""

    def __init__(self, model, hessian, gradient=None):
        self.origin = planes.flatten(model)
        self.hessian = hessian
        self.gradient = torch.zeros(len(hessian), dtype=torch.float64) if gradient is None else gradient
        self.calls = 0

    def parts(self, model):
        self.calls += 1
        w = torch.cat([parameter.flatten() for parameter in planes.trainable(model).values()]) - self.origin
        yield 0.5 * w @ self.hessian @ w, w[0].item()
        yield self.gradient @ w, 0.0


def symmetric(*eigenvalues):
    torch.manual_seed(3)
    turn = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), dtype=torch.float64)).Q
    return turn @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ turn.mT


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(state, model):
    return all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_the_surface_of_a_quadratic():
    model = Weights((2, 2), (2,))
    before = state_of(model)
    gradient = torch.arange(6, dtype=torch.float64)
    objective = Quadratic(model, symmetric(1, 2, 3, 4, 5, 6), gradient)
    directions = torch.randn(2, 6, dtype=torch.float64)
    points = {f"{a} {b}": (a, b) for a in (-2.0, 0.0, 0.5) for b in (-1.0, 0.0, 3.0)}
    store = {"0.5 3.0": {"loss": 7.0, "accuracy": 7.0}}
    surfaces.evaluate(model, directions, objective, points, store, [CPU])
    assert objective.calls == len(points) - 1  # what is stored is not computed again
    assert store.pop("0.5 3.0")["loss"] == 7
    for key, found in store.items():
        a, b = points[key]
        w = a * directions[0] + b * directions[1]
        assert found["loss"] == pytest.approx((0.5 * w @ objective.hessian @ w + gradient @ w).item(), abs=1e-12)
        assert found["accuracy"] == pytest.approx(w[0].item(), abs=1e-12)
    assert store["0.0 0.0"]["loss"] == 0
    assert same(before, model)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("eigenvalues", "largest", "dominant"),
    [((9, 5, -3, 1), 9, 9), ((-9, 5, 1, -2), 5, -9), ((-4, -3, -2, -1), -1, -4), ((0, 0, 0, 0), 0, 0)],
)
def test_the_largest_eigenvalue_of_a_known_hessian(eigenvalues, largest, dominant):
    model = Weights((3,), (1,))
    before = state_of(model)
    hessian = symmetric(*eigenvalues)
    found = surfaces.largest_eigenvalue(model, Quadratic(model, hessian), tolerance=1e-6)
    assert found.converged
    assert found.value == pytest.approx(largest, abs=1e-5)
    assert found.dominant == pytest.approx(dominant, abs=1e-5)
    assert found.residual <= 1e-6 * max(map(abs, eigenvalues))
    vector = torch.randn(4, dtype=torch.float64)
    torch.testing.assert_close(surfaces.hessian_product(model, Quadratic(model, hessian), vector), hessian @ vector)
    assert same(before, model)


def test_an_eigenvalue_that_has_not_converged_says_so():
    model = Weights((4,))
    objective = Quadratic(model, symmetric(9, 8.9, 1, 1))
    found = surfaces.largest_eigenvalue(model, objective, tolerance=1e-9, iterations=4)
    assert (found.converged, found.iterations, objective.calls) == (False, 4, 4)
    # An eigenvalue lies within the residual all the same.
    assert min(abs(found.value - each) for each in (9, 8.9, 1)) <= found.residual


def test_the_hessian_of_karat_is_what_finite_differences_say(karat):
    checkpoint = load_checkpoint(karat)
    model = checkpoint.model.double()
    objective = surfaces.Objective(torch.randn(5, 3, 12, 12, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1]), 2)
    vector = torch.randn_like(planes.flatten(model))
    product = vector @ surfaces.hessian_product(model, objective, vector)
    surface = surfaces.Surface(copy.deepcopy(model), torch.stack([vector, vector]), objective)
    step = 1e-5
    (above, _), (here, _), (below, _) = (surface(a, 0.0) for a in (step, 0.0, -step))
    assert product.item() == pytest.approx((above - 2 * here + below) / step**2, rel=1e-3)
    logits = model(objective.pixels).logits
    assert here == pytest.approx(nn.functional.cross_entropy(logits, objective.labels).item(), rel=1e-12)


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


class Killed(Points):
    """Dies without notice after a few entries, half a line behind them."""

    def __setitem__(self, key, value):
        if len(self) == 5:
            self.file.write('{"key": "3/')
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        super().__setitem__(key, value)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_after_a_kill_it_goes_on_and_recomputes_nothing(tmp_path):
    model = Weights((2, 2))
    directions = torch.randn(2, 4, dtype=torch.float64)
    points = {f"{row}/{column}": (float(row), float(column)) for row in range(4) for column in range(4)}
    path = tmp_path / "points.jsonl"

    def fill(kind, objective):
        with kind(path, {"grid": 4}) as store:
            surfaces.evaluate(model, directions, objective, points, store, [CPU])
            return dict(store)

    expected, objective = {}, Quadratic(model, symmetric(1, 2, 3, 4))
    surfaces.evaluate(model, directions, objective, points, expected, [CPU])
    process = multiprocessing.get_context("fork").Process(target=fill, args=(Killed, objective))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(path.read_text().splitlines()) == 7
    objective.calls = 0
    assert fill(Points, objective) == expected
    assert objective.calls == len(points) - 5
    assert fill(Points, objective) == expected
    assert objective.calls == len(points) - 5


def test_points_of_other_settings_are_not_mixed(tmp_path):
    path = tmp_path / "new" / "points.jsonl"
    with Points(path, {"grid": 3, "weights": "a" * 64, "radius": None}) as store:
        store["x"] = {"loss": float("inf")}
        with pytest.raises(TypeError):
            del store["x"]
    with Points(path, {"grid": 3, "weights": "a" * 64, "radius": None}) as store:
        assert dict(store) == {"x": {"loss": float("inf")}}
    written = path.read_bytes()
    other = {"grid": 5, "weights": "b" * 64, "radius": None}
    with pytest.raises(InputError, match=r"grid 3 there and 5 here; weights aaaaaaaa... there and bbbb.*--overwrite"):
        Points(path, other)
    assert path.read_bytes() == written
    with Points(path, other, replace=True) as store:
        assert not store
    for text in ("my notes", "my notes\n", '{"a": 1}\n', "[1]\n"):
        path.write_text(text)
        with pytest.raises(InputError, match="damaged, or no file of this command"):
            Points(path, other, replace=True)
        assert path.read_text() == text
    path.write_text('{"settings": {"gr')  # killed while it was begun
    with Points(path, other) as store:
        assert not store


def test_two_commands_do_not_write_one_file(tmp_path):
    pytest.importorskip("fcntl")
    path = tmp_path / "points.jsonl"
    Points(path, {}).file.close()
    code = (
        f"import fcntl, sys; f = open({str(path)!r}, 'a'); fcntl.lockf(f, 2); print('', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        process.stdout.readline()
        with pytest.raises(InputError, match="Another process is computing"):
            Points(path, {})
        process.stdin.close()


def made(**fields):
    """A landscape x^2 + 10 y + 5 as far as the grid goes."""
    x, y = np.linspace(-2, 2, 9), np.linspace(0, 1, 5)
    loss = x**2 + 10 * y[:, None] + 5
    plane = Plane("random", "filter", torch.zeros(2, 3))
    values = {"loss": loss, "accuracy": 0 * loss, "trained_loss": 5.0, "trained_accuracy": 1.0}
    values |= {"epsilon": 0.5, "highest": 5.6, "hessian": Eigenvalue(1234.5, 1234.5, 1.0, 7, True)}
    return landscape.Landscape(**{"name": "a", "kind": "karat", "plane": plane, "x": x, "y": y, **values, **fields})


def test_heights_between_the_points_of_the_grid():
    data = made(loss=np.add.outer(10 * np.linspace(0, 1, 5), 2 * np.linspace(-2, 2, 9)))
    points = np.array([[0.3, 0.7], [-2, 0], [2, 1], [1.99, 0.01], [2.1, 0.5], [0, -0.1]])
    expected = [7.6, -4, 14, 4.08, np.nan, np.nan]
    np.testing.assert_allclose(data.height(points), expected)


def test_sharpness_and_what_is_said_of_it():
    assert made().epsilon_sharpness == pytest.approx(10)
    assert landscape.described(made()).startswith(r"$\lambda_\mathrm{max} = 1230$")
    unsure = made(hessian=Eigenvalue(0.001234, 1.0, 1.0, 7, False))
    assert landscape.described(unsure).startswith(r"$\lambda_\mathrm{max} \approx 0.00123$")
    assert "lambda" not in landscape.described(made(hessian=None))
    assert "10 %" in landscape.described(made())
    # A loss that overflows is null in the JSON, which knows no infinity.
    numbers = landscape.numbers_of("a", made(highest=np.inf, hessian=Eigenvalue(np.nan, np.nan, np.nan, 9, False)))
    assert (numbers["loss"], numbers["epsilon_sharpness_percent"]) == (5.0, None)
    assert numbers["hessian"]["value"] is None
    json.dumps(numbers, allow_nan=False)


@pytest.mark.parametrize("log", [False, True])
def test_the_figures_show_the_surface_and_the_path(log):
    path = np.array([[1.5, 0.9], [1.0, 0.2], [0.0, 0.0]])
    plane = Plane("pca", "none", torch.zeros(2, 3), path, explained=np.array([0.75, 0.125]))
    data = [made(plane=plane), made(kind="softmax", loss=made().loss * 3)]
    data[1].loss[0, 0] = np.inf
    levels = landscape.levels_of(data, log)
    assert levels[0] <= 5
    assert levels[-1] >= 3 * 19 - 1e-9
    steps = np.diff(np.log(levels) if log else levels)
    np.testing.assert_allclose(steps, steps[0])
    with style.context():
        flat = landscape.draw_all(data, style.figure(), log)
        deep = landscape.draw_all(data, style.figure(), log, surface=True)
        for figure in (flat, deep):
            figure.canvas.draw()
    ours, theirs = flat.axes[:2]
    np.testing.assert_allclose(ours.lines[0].get_xydata(), path)
    np.testing.assert_allclose(ours.lines[1].get_xydata(), [[0, 0]])
    assert ours.get_xlabel() == "first principal direction (75.0 % of variance)"
    assert ours.get_ylabel() == "second (12.5 % of variance)"
    assert theirs.get_xlabel() == "first random direction"
    assert len(theirs.lines) == 1
    (square,) = ours.patches
    assert square.get_bbox().bounds == (-0.5, -0.5, 1, 1)
    assert [axes.get_title().split("\n")[0] for axes in (ours, theirs)] == ["KArAt", "softmax"]
    scale = np.log10 if log else np.asarray
    drawn = np.array(deep.axes[0].lines[0].get_data_3d()).T
    np.testing.assert_allclose(drawn[:, :2], path)
    np.testing.assert_allclose(drawn[:, 2], scale(data[0].height(path)))
    # One scale for both.
    assert deep.axes[0].get_zlim() == deep.axes[1].get_zlim() == pytest.approx(tuple(scale(levels[[0, -1]])))
    assert ours.collections[0].norm.vmax == theirs.collections[0].norm.vmax


def test_levels_of_flat_and_of_endless_losses():
    assert len(landscape.levels_of([made(loss=np.full((5, 9), 2.0))])) > 2
    with pytest.raises(InputError, match="not finite anywhere"):
        landscape.levels_of([made(loss=np.full((5, 9), np.nan))])


def test_the_extent_holds_every_path_and_the_trained_weights():
    def of(path):
        return Plane("pca", "none", torch.zeros(2, 3), np.array(path))

    x, y = landscape.extent([of([[4.0, 1.0]]), of([[8.0, -1.0]])], 5)
    np.testing.assert_allclose(x, [-2, 1, 4, 7, 10])
    np.testing.assert_allclose(y, [-1.5, -0.75, 0, 0.75, 1.5])
    x, y = landscape.extent([of([[4.0, 1.0]])], 3, 2.5)
    assert x.tolist() == y.tolist() == [-2.5, 0, 2.5]
    assert landscape.extent([Plane("random", "filter", torch.zeros(2, 3))], 3)[0].tolist() == [-1, 0, 1]


def test_processes_are_spread_over_devices(monkeypatch):
    assert landscape.devices_of("cpu", 3) == [CPU] * 3
    assert len(landscape.devices_of("cpu", None)) == min(torch.get_num_threads(), 8)
    gpus = [torch.device("cuda", index) for index in range(2)]
    monkeypatch.setattr(landscape.options, "device_of", lambda name: torch.device(name or "cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert landscape.devices_of(None, None) == gpus
    assert landscape.devices_of(None, 3) == [*gpus, gpus[0]]
    assert landscape.devices_of("cuda:1", None) == gpus[1:]


@pytest.fixture
def classes(photos, tmp_path) -> str:
    """The photos in folders of their classes."""
    for number in range(6):
        folder = tmp_path / "classes" / ("cat", "dog", "newt")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(f"{photos}/{number}.png", folder)
    return str(tmp_path / "classes")


@pytest.fixture(scope="module")
def moving_run(run_folder, tmp_path_factory) -> str:
    """The run on digits as if it had moved, a checkpoint longer: each is a way off the start, the model is the last."""
    folder = tmp_path_factory.mktemp("moving") / "digits"
    shutil.copytree(run_folder, folder)
    shutil.copytree(folder / "checkpoint-2", folder / "checkpoint-3")
    state = json.loads((folder / "checkpoint-3" / "trainer_state.json").read_text())
    (folder / "checkpoint-3" / "trainer_state.json").write_text(json.dumps(state | {"global_step": 3, "epoch": 3.0}))
    for step in (1, 2, 3):
        weights = load_file(folder / f"checkpoint-{step}" / "model.safetensors")
        for number, tensor in enumerate(weights.values()):
            torch.manual_seed(number)
            there, aside = torch.randn(2, *tensor.shape)
            tensor += 0.02 * (step * there + (step % 2) * aside)
        save_file(weights, folder / f"checkpoint-{step}" / "model.safetensors", {"format": "pt"})
    shutil.copy(folder / "checkpoint-3" / "model.safetensors", folder)
    return str(folder)


def test_the_path_of_a_run_read_from_its_checkpoints(moving_run):
    checkpoint = load_checkpoint(moving_run)
    found = landscape.moments_until(moving_run)
    assert [moment.step for moment in found] == [0, 1, 2, 3]
    plane = landscape.plane_of_run(checkpoint, found)
    models = [load_start(moving_run), *(load_checkpoint(str(moment.folder)) for moment in found[1:])]
    moved = torch.stack([planes.flatten(each.model) for each in models]) - planes.flatten(checkpoint.model)
    np.testing.assert_allclose(plane.path, moved @ plane.directions.mT, atol=1e-4)
    np.testing.assert_allclose(plane.distances, moved.norm(dim=1), rtol=1e-5)
    assert plane.distances[-1] == 0
    # Start, checkpoints and trained weights lie in one plane here.
    assert plane.explained.sum() == pytest.approx(1, abs=1e-5)
    half = landscape.moments_until(f"{moving_run}/checkpoint-2")
    assert [moment.step for moment in half] == [0, 1, 2]
    with pytest.raises(InputError, match=r"classifier\.extra cannot be read"):
        planes.file_reader(found[1].folder)("classifier.extra", slice(0, 1))


def test_a_run_by_the_command_in_one_process_and_in_two(moving_run, analyse):
    words = ["landscape", "--model", moving_run, "--device", "cpu", "--grid", 4, "--num-images", 12, "--log"]
    out = analyse(*words, "--workers", 1)
    assert sorted(path.name for path in out.iterdir()) == FILES
    alone = dict(np.load(out / "landscape.npz"))
    assert alone["model_loss"].shape == alone["model_accuracy"].shape == (4, 4)
    assert alone["model_path"].shape == (4, 2)
    assert alone["model_epochs"].tolist() == [0, 1, 2, 3]
    checkpoint = load_checkpoint(moving_run)
    objective = landscape.labelled(checkpoint, find_images([checkpoint], None, 12))
    with torch.no_grad():
        logits = checkpoint.model(objective.pixels).logits
    numbers = json.loads((out / "landscape.json").read_text())
    expected = nn.functional.cross_entropy(logits, objective.labels).item()
    assert numbers["model"]["loss"] == pytest.approx(expected, rel=1e-5)
    assert numbers["model"]["accuracy"] == pytest.approx((logits.argmax(-1) == objective.labels).float().mean().item())
    assert numbers["model"]["hessian"]["converged"]
    assert numbers["model"]["epsilon"] == 1
    # Drawn anew, nothing is computed anew: the file of points stays as it is.
    points = (out / "landscape.points.jsonl").read_bytes()
    analyse(*words[:-1], "--workers", 1, "--overwrite")
    assert (out / "landscape.points.jsonl").read_bytes() == points
    shutil.rmtree(out)
    analyse(*words, "--workers", 2)
    together = dict(np.load(out / "landscape.npz"))
    assert alone.keys() == together.keys()
    for name in alone:
        assert np.array_equal(alone[name], together[name]), name


def test_karat_beside_softmax_by_the_command(karat, softmax, classes, analyse):
    words = ["--images", classes, "--device", "cpu", "--workers", 1, "--grid", 3, "--hessian-iterations", 3]
    out = analyse("landscape", "--model", karat, "--compare", softmax, *words)
    assert sorted(path.name for path in out.iterdir()) == FILES
    arrays = np.load(out / "landscape.npz")
    numbers = json.loads((out / "landscape.json").read_text())
    for prefix, source in (("model", karat), ("compare", softmax)):
        checkpoint = load_checkpoint(source)
        objective = landscape.labelled(checkpoint, find_images([checkpoint], [classes], 6))
        assert len(objective.labels) == 6
        assert arrays[f"{prefix}_x"].tolist() == [-1, 0, 1]
        # The middle of the grid is the trained model; the corner the one moved by both directions.
        assert arrays[f"{prefix}_loss"][1, 1] == numbers[prefix]["loss"]
        directions = planes.random_plane(checkpoint.model).directions
        torch.nn.utils.vector_to_parameters(
            planes.flatten(checkpoint.model) + directions.sum(0), planes.trainable(checkpoint.model).values()
        )
        with torch.no_grad():
            logits = checkpoint.model(objective.pixels).logits
        expected = nn.functional.cross_entropy(logits, objective.labels).item()
        assert arrays[f"{prefix}_loss"][2, 2] == pytest.approx(expected, rel=1e-4)
        assert numbers[prefix]["hessian"]["iterations"] <= 6
        assert numbers[prefix]["epsilon"] == 0.1


def test_the_papers_rescaled_directions_by_the_command(moving_run, analyse):
    words = ["--normalise", "tensor", "--no-hessian", "--grid", 3, "--num-images", 4, "--workers", 1, "--no-start"]
    out = analyse("landscape", "--model", moving_run, "--device", "cpu", *words)
    numbers = json.loads((out / "landscape.json").read_text())
    assert numbers["settings"]["normalise"] == "tensor"
    assert (numbers["model"]["hessian"], numbers["model"]["epsilon"]) == (None, 0.01)
    arrays = np.load(out / "landscape.npz")
    assert arrays["model_epochs"].tolist() == [1, 2, 3]
    # It reaches around the path and the trained weights, which are its last moment.
    np.testing.assert_allclose(arrays["model_path"][-1], 0, atol=1e-6)
    assert arrays["model_x"][0] < arrays["model_path"][:, 0].min()
    assert arrays["model_x"][-1] > arrays["model_path"][:, 0].max()


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def test_the_model_is_left_as_it_is_also_after_an_error(karat, two_threads):
    checkpoint = load_checkpoint(karat)
    before, implementation = state_of(checkpoint.model), checkpoint.model.config._attn_implementation
    plane = planes.random_plane(checkpoint.model)
    grid = np.array([-1.0, 0.0, 1.0])
    objective = surfaces.Objective(torch.randn(4, 3, 12, 12), torch.tensor([0, 1, 2, 0]))
    store = {}
    data = landscape.compute(checkpoint, objective, plane, grid, grid, 0.1, iterations=2, store=store)
    assert data.highest >= data.trained_loss == data.loss[1, 1]
    assert data.highest == max([data.trained_loss] + [store[key]["loss"] for key in store if "square" in key])
    assert sum("square" in key for key in store) == 24
    broken = surfaces.Objective(objective.pixels, torch.tensor([0, 1, 2, 99]))
    with pytest.raises((IndexError, RuntimeError)):
        landscape.compute(checkpoint, broken, plane, grid, grid, 0.1)
    assert same(before, checkpoint.model)
    assert not checkpoint.model.training
    assert checkpoint.model.config._attn_implementation == implementation
    assert all(parameter.grad is None for parameter in checkpoint.model.parameters())
    assert torch.get_num_threads() == 2


def test_the_images_of_a_data_set(tmp_path):
    names = {number: str(number) for number in range(10)}
    model = karat_model(id2label=names, label2id={name: number for number, name in names.items()})
    checkpoint = load_checkpoint(save(model, tmp_path / "ten"))
    found = find_images([checkpoint], None, 5, data_set="digits")
    assert landscape.labelled(checkpoint, found).labels.tolist() == [int(label) for _, _, label in found]
    for split in ("train", "validation"):
        for label in ("0", "1"):
            (tmp_path / "data" / split / label).mkdir(parents=True)
            Image.new("RGB", (9, 9)).save(tmp_path / "data" / split / label / "x.png")
    found = find_images([checkpoint], None, 5, data_set=str(tmp_path / "data"))
    assert [label for _, _, label in found] == ["0", "1"]


def test_what_cannot_be_drawn_is_refused_before_anything_is_computed(
    karat, photos, classes, run_folder, tmp_path, refusal
):
    def refused(*words, model=karat):
        return refusal("landscape", "--model", model, "--workers", 1, "--device", "cpu", *words)

    assert "class of 0.png is not known" in refused("--images", photos)
    assert "is of no run" in refused()
    assert "both say which" in refused("--images", classes, "--data-set", "digits")
    assert "there are 0. Or choose random" in refused("--images", classes, "--directions", "pca")
    assert "and it is none" in refused("--images", classes, "--normalise", "none")
    assert "expected 3 or more" in refused("--images", classes, "--grid", 2)
    assert "did not move in two dimensions" in refused("--directions", "pca", model=run_folder)
    assert "there are 2" in refused("--directions", "pca", "--no-start", model=run_folder)
    assert "Unknown data set 'digit'" in refused("--data-set", "digit")
    (tmp_path / "other").mkdir()
    other = save(karat_model(**{**SIZES, "id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}), tmp_path / "o")
    assert "is of the class 'cat'; " in refused("--images", classes, "--compare", other)
    encoder = save(karat_model().vit, tmp_path / "encoder")
    assert "has no classifier" in refused("--images", classes, model=encoder)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "landscape.npz").write_text("mine")
    assert "holds landscape.npz already" in refused("--images", classes)
