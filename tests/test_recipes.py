# SPDX-License-Identifier: Apache-2.0
"""The recipes in `configuration/`: one for each figure of the paper, and how recipes extend each other."""

from pathlib import Path

import pytest
import yaml

from image_classification import main as script
from image_classification.errors import InputError
from image_classification.models.building import build_config
from image_classification.models.transfer import check_teacher
from image_classification.settings.parser import parse_settings
from tests.images import own_library_settings  # noqa: F401
from tests.test_presets import count_parameters


pytestmark = pytest.mark.usefixtures("own_library_settings")

CONFIGURATION = Path(__file__).parents[1] / "configuration"
# The paper's main table (top-1 and top-5) and its transfer table (top-1).
SETS = ("cifar10", "cifar100", "imagenet1k", "svhn", "flowers102", "stl10")
PAPER = {
    "base_patch16_224": ((83.45, 99.19), (58.07, 83.70), (72.90, 90.56), 97.74, 92.24, 97.26),
    "base_patch16_224_karat": ((81.81, 99.01), (55.92, 82.04), (68.03, 86.41), 96.83, 89.66, 95.30),
    "base_patch16_224_karat_universal": ((80.75, 98.76), (57.36, 82.89), (68.83, 87.69), 97.21, 89.43, 95.78),
    "small_patch16_224": ((81.08, 99.02), (53.47, 82.52), (70.50, 89.34), 97.48, 91.46, 96.09),
    "small_patch16_224_karat": ((79.78, 98.70), (54.11, 81.02), (67.77, 87.51), 97.04, 89.67, 95.26),
    "small_patch16_224_karat_universal": ((79.52, 98.85), (53.86, 81.45), (67.76, 87.60), 97.11, 90.08, 95.45),
    "tiny_patch16_224": ((72.76, 98.14), (43.53, 75.00), (59.15, 82.07), 96.69, 84.21, 93.20),
    "tiny_patch16_224_karat": ((76.69, 98.57), (46.29, 77.02), (59.11, 82.01), 96.37, 83.67, 93.09),
    "tiny_patch16_224_karat_universal": ((75.56, 98.48), (46.75, 76.81), (57.97, 81.03), 96.39, 83.70, 92.93),
}
# Its ablations of ViT-Tiny G3B on CIFAR-10: top-1, and the parameters of an edge's function (the projector apart).
ABLATIONS = {
    "rational": (69.22, 6 + 4),
    "mexican_hat": (69.62, 3),
    "morlet": (70.84, 3),
    "dog": (73.89, 3),
    "meyer": (71.13, 3),
    "shannon": (71.41, 3),
    "base_identity": (75.90, 6),
    "base_silu": (76.25, 6),
    "base_gelu": (76.48, 6),
    "rank_4": (75.90, 6),
    "rank_2": (74.39, 6),
    "project_l1": (41.99, 6),
}
NAMES = {
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "imagenet1k": "IMNET",
    "svhn": "SVHN",
    "flowers102": "Flowers102",
    "stl10": "STL10",
}

# The width of a model of the strong recipe, whose weights start at a deviation of width^-1/2.
STRONG = {"tiny": 192, "small": 384, "base": 768}


def test_there_is_a_recipe_for_each_figure_and_no_other():
    found = {path.relative_to(CONFIGURATION).as_posix() for path in CONFIGURATION.glob("*/*.yaml")}
    expected = {f"{data}/vit_{model}.yaml" for data in SETS for model in PAPER}
    expected |= {f"ablations/{name}.yaml" for name in (*ABLATIONS, "attention_transfer")}
    expected |= {f"strong/vit_{size}_patch16_224{kind}.yaml" for size in STRONG for kind in ("", "_karat_hybrid")}
    assert {name for name in found if not name.startswith(("base/", "gallery/"))} == expected


@pytest.mark.parametrize("model", PAPER)
def test_recipes_are_the_papers(model):
    """Table 5 of the paper: what every recipe trains with, and the figure that it names."""
    for data, figures in zip(SETS, PAPER[model], strict=True):
        settings = parse_settings([str(CONFIGURATION / data / f"vit_{model}.yaml"), "--use_cpu"])
        training = settings.training
        assert settings.model.model == f"vit_{model}" and settings.data.data_set == NAMES[data]
        expected = {"top1": figures} if isinstance(figures, float) else dict(zip(("top1", "top5"), figures))
        assert settings.reported == expected
        assert training.output_dir == f"outputs/{data}/vit_{model}"
        assert (training.adam_epsilon, training.weight_decay, training.max_grad_norm) == (1e-6, 0.05, 1.0)
        assert (training.sched, training.warmup_epochs, training.warmup_lr) == ("cosine", 5, 1e-6)
        assert (training.model_ema, training.label_smoothing_factor) == (True, 0.1)
        images = settings.data
        assert (images.eval_crop_ratio, images.train_crop_scale, images.color_jitter) == (0.9, [0.08, 1.0], 0.4)
        assert images.auto_augment == "rand-m15-n2-mstd1.0-inc1"
        assert (images.mixup, images.cutmix, images.mixup_switch_prob) == (0.8, 1.0, 0.5)
        if data in ("cifar10", "cifar100", "imagenet1k"):
            assert settings.model.finetune is None and training.model_ema_decay == 0.99992
            assert training.num_train_epochs == 100 and training.min_lr == 1e-5
            batch, rate = (128, 1.25e-4) if data == "imagenet1k" else (32, 3.125e-5)
            assert training.global_batch_size == batch and training.learning_rate == pytest.approx(rate)
        else:
            assert settings.model.finetune == f"outputs/imagenet1k/vit_{model}"


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_differ_in_one_thing(name):
    settings = parse_settings([str(CONFIGURATION / "ablations" / f"{name}.yaml"), "--use_cpu"])
    whole = parse_settings([str(CONFIGURATION / "cifar10" / "vit_tiny_patch16_224_karat.yaml"), "--use_cpu"])
    top1, per_edge = ABLATIONS[name]
    assert settings.reported == {"top1": top1} and settings.training.output_dir == f"outputs/ablations/{name}"
    changed = {key for key, value in settings.record.items() if whole.record[key] != value} - {"output_dir"}
    assert len(changed - {"wavelet_type"}) == 1
    rank = int(name.removeprefix("rank_")) if name.startswith("rank_") else 12
    softmax = 5_526_346
    # 12 blocks of 3 heads; on top of the function's own, two scales an edge, and the projector.
    expected = softmax + 12 * 3 * 197 * rank * (per_edge + 3)
    assert count_parameters(build_config(settings.model, [str(label) for label in range(10)])) == expected


@pytest.mark.parametrize("data", ["digits", "cifar10"])
def test_the_models_of_the_gallery_differ_in_their_attention_alone(data):
    karat, softmax = (
        parse_settings([str(CONFIGURATION / "gallery" / f"{data}_{kind}.yaml"), "--use_cpu"])
        for kind in ("karat", "softmax")
    )
    shape = {"hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"}
    changed = {key for key, value in softmax.record.items() if karat.record[key] != value}
    assert changed - shape == {"model", "output_dir"} and karat.training.save_total_limit is None
    ours, theirs = (build_config(each.model, list("ab")) for each in (karat, softmax))
    assert (ours.model_type, theirs.model_type) == ("karat_vit", "vit")
    assert all(getattr(ours, name) == getattr(theirs, name) for name in (*shape, "image_size", "patch_size"))


@pytest.mark.parametrize("size", STRONG)
def test_the_strong_recipes_differ_in_their_attention_alone_and_in_size_in_their_start(size):
    softmax, hybrid, tiny = (
        parse_settings([str(CONFIGURATION / "strong" / f"vit_{model}.yaml"), "--use_cpu"])
        for model in (f"{size}_patch16_224", f"{size}_patch16_224_karat_hybrid", "tiny_patch16_224")
    )
    assert (softmax.model.model, hybrid.model.model) == (name := f"vit_{size}_patch16_224", f"{name}_karat_hybrid")
    assert {key for key, value in hybrid.record.items() if softmax.record[key] != value} == {
        *("model", "output_dir", "attn_lr")
    }
    assert {key for key, value in softmax.record.items() if tiny.record[key] != value} <= {
        *("model", "output_dir", "initializer_range")
    }
    assert softmax.model.initializer_range == pytest.approx(STRONG[size] ** -0.5, abs=5e-4)
    training, images = softmax.training, softmax.data
    assert (training.learning_rate, training.global_batch_size, hybrid.training.attn_learning_rate) == (1e-3, 256, 3e-4)
    assert (training.num_train_epochs, training.warmup_epochs, training.min_lr) == (100, 10, 1e-6)
    assert (training.model_ema, training.model_ema_decay, training.label_smoothing_factor) == (True, 0.999, 0.1)
    assert (images.train_crop_scale, images.auto_augment, images.color_jitter) == ([0.35, 1.0], None, 0.3)
    assert (images.mixup, images.cutmix, images.mixup_prob) == (0.8, 1.0, 0.5)


def test_attention_transfer_is_the_softmax_recipe_with_the_karat_models_maps():
    settings = parse_settings([str(CONFIGURATION / "ablations" / "attention_transfer.yaml"), "--use_cpu"])
    softmax = parse_settings([str(CONFIGURATION / "cifar10" / "vit_tiny_patch16_224.yaml"), "--use_cpu"])
    karat = parse_settings([str(CONFIGURATION / "cifar10" / "vit_tiny_patch16_224_karat.yaml"), "--use_cpu"])
    changed = {key for key, value in settings.record.items() if softmax.record[key] != value}
    assert changed == {"teacher_attention", "output_dir"} and settings.reported == {"top1": 77.94}
    assert settings.model.teacher_attention == karat.training.output_dir
    check_teacher("teacher", build_config(karat.model), build_config(settings.model))


@pytest.mark.system
def test_log_and_card_set_the_papers_figure_beside_the_runs(tmp_path, capsys):
    recipe = {"extends": str(CONFIGURATION / "digits.yaml"), "reported": {"top1": 50, "top5": 99.5}}
    recipe |= {"num_train_epochs": 1, "warmup_epochs": 0, "max_train_samples": 64, "output_dir": str(tmp_path / "run")}
    assert script.main([write(tmp_path, recipe=recipe), "--use_cpu", "--disable_tqdm"]) == 0
    said = "the paper reports top-1 50.00 %, top-5 99.50 %"
    assert said in capsys.readouterr().out and said in (tmp_path / "run" / "README.md").read_text()


def write(folder, **recipes):
    for name, content in recipes.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return str(folder / f"{next(iter(recipes))}.yaml")


def test_a_recipe_is_over_what_it_extends_and_under_the_flags(tmp_path):
    first = write(
        tmp_path,
        first={"extends": ["second", "third.yaml"], "mixup": 0.3},
        third={"mixup": 0.2, "cutmix": 0.2, "base_lr": 1e-3},
    )
    with pytest.raises(InputError, match=r"first\.yaml extends .*second, which|recipe is a \.yaml"):
        parse_settings([first])
    first = write(
        tmp_path,
        first={"extends": ["second.yaml", "third.yaml"], "mixup": 0.3, "learning_rate": 0.5},
        second={"model": "karat_digits", "data_set": "digits", "cutmix": 0.1, "random_erasing": 0.4},
    )
    settings = parse_settings([first, "--reprob", "0.6"])
    assert (settings.data.mixup, settings.data.cutmix, settings.data.random_erasing) == (0.3, 0.2, 0.6)
    # The rate that is nearer stands for both of its spellings.
    assert (settings.training.learning_rate, settings.training.base_lr) == (0.5, None)


def test_recipes_that_extend_themselves_or_nothing(tmp_path):
    first = write(tmp_path, first={"extends": "second.yaml"}, second={"extends": "first.yaml"})
    with pytest.raises(InputError, match="extends itself"):
        parse_settings([first])
    with pytest.raises(InputError, match=r"extends .*third\.yaml, which does not exist"):
        parse_settings([write(tmp_path, first={"extends": "third.yaml"})])
    with pytest.raises(InputError, match=r"`reported` is .*percent"):
        parse_settings([write(tmp_path, first={"reported": {"accuracy": 3}})])
