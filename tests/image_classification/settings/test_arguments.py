# SPDX-License-Identifier: Apache-2.0
"""Reading settings: precedence, contradictions, spelling, and the official flags."""

import os
from pathlib import Path

import pytest

from image_classification.errors import InputError
from image_classification.settings import official_flags
from image_classification.settings.arguments import DEFAULT_RECIPE, EXCLUSIVE, RunArguments
from image_classification.settings.official_flags import OFFICIAL_FLAGS
from image_classification.settings.parser import NOT_HERE, Parser, _from_recipe, parse_settings, truth


MODEL = ["--model", "vit_tiny_patch16_224_karat", "--use_cpu"]


def parse(*words):
    return parse_settings([*MODEL, *words])


def refused(*words):
    """The message with which the words are refused."""
    with pytest.raises((InputError, ValueError)) as error:
        parse(*words)
    return str(error.value)


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_no_arguments_is_the_digits_recipe():
    settings = parse_settings([])
    assert settings.recipe == DEFAULT_RECIPE
    assert (settings.model.model, settings.data.data_set) == ("karat_digits", "digits")


def test_flags_without_model_and_data_refine_the_digits_recipe():
    settings = parse_settings(["--num_train_epochs", "3"])
    assert (settings.model.model, settings.training.num_train_epochs) == ("karat_digits", 3)
    assert parse_settings(["--data_path", "x"]).recipe is None


def test_flag_over_recipe_over_default(recipe):
    path = recipe("weight_decay: 0.3\nnum_train_epochs: 7\nlearning_rate: 1e-3\n")
    training = parse_settings([path, *MODEL, "--num_train_epochs", "9"]).training
    assert (training.num_train_epochs, training.weight_decay, training.learning_rate) == (9, 0.3, 1e-3)
    assert training.adam_epsilon == 1e-6


def test_flag_replaces_the_recipes_other_spelling(recipe):
    path = recipe("learning_rate: 1e-3\nsched: step\nwarmup_epochs: 3\n")
    flags = ["--lr", "0.1", "--lr_scheduler_type", "polynomial", "--warmup_steps", "5", "--batch-size", "256"]
    training = parse_settings([path, *MODEL, *flags]).training
    assert (training.learning_rate, training.sched, training.warmup_epochs) == (pytest.approx(0.05), None, None)


@pytest.mark.parametrize(
    "words, names",
    [
        ("--blockwise --universal", ("--blockwise", "--universal", "sharing")),
        ("--batch-size 8 --per_device_train_batch_size 16", ("--batch-size", "--per_device_train_batch_size")),
        ("--grid 3 --grid_size 5", ("--grid", "--grid_size")),
        ("--lr 0.1 --learning_rate 0.1", ("--lr", "--learning_rate")),
        ("--epochs 3 --max_steps 4", ("--epochs", "--max_steps")),
        ("--data_set digits --dataset_name a/b", ("--data_set", "--dataset_name")),
        ("--depth 2 --modular_mode phi1_w2 --karat_depth 3", ("--depth", "--karat_depth")),
    ],
)
def test_contradictions_name_both_spellings(words, names):
    with pytest.raises(InputError) as raised:
        parse(*words.split())
    assert all(name in str(raised.value) for name in names)


@pytest.mark.parametrize(
    "words, setting, value",
    [
        ("--grid 3 --grid 5", "grid_size", 5),
        ("--basis_type FourierBasis --basis-type spline", "basis_type", "spline"),
        ("--batch-size 8 --batch_size 16", "per_device_train_batch_size", 16),
        ("--mixed_head --num_attention 0 --num_attention 2", "num_karat_heads", 2),
        ("--scale_lr false --scale-lr", "scale_lr", True),
        ("--opt-betas 0.8 0.9 --opt-betas 0.7 0.8", "adam_beta1", 0.7),
    ],
)
def test_of_one_flag_given_twice_the_last_one_wins(words, setting, value):
    assert parse(*words.split()).record[setting] == value


def test_the_same_value_twice_is_no_contradiction():
    assert (
        parse(
            "--grid", "5", "--grid_size", "5", "--basis_type", "FourierBasis", "--basis-type", "fourier"
        ).model.grid_size
        == 5
    )


@pytest.mark.parametrize("word, hint", [("--grd", "--grid"), ("--learning_rat", "--learning_rate"), ("--epo", "")])
def test_unknown_and_abbreviated_flags_are_errors(word, hint, capsys):
    with pytest.raises(SystemExit):
        parse(word, "1")
    message = capsys.readouterr().err
    assert word in message and hint in message


@pytest.mark.parametrize(
    "text, parts",
    [
        ("learning_rte: 1", ("learning_rte", "learning_rate")),
        ("batch-size: 4", ("batch-size", "per_device_train_batch_size")),
        ("grid_size: three", ("grid_size", "three", "int")),
        ("optim: adamm", ("optim", "adamm")),
        ("sched: cosin", ("sched", "cosin")),
        ("learning_rate: 1\nbase_lr: 2", ("learning_rate", "base_lr")),
        ("seed: 1\nseed: 2", ("seed", "twice")),
        ("- a\n- b", ("setting: value",)),
        ("a: [", ("YAML",)),
        ("extends: 5", ("extends", "5", ".yaml")),
        ("extends: {a: b}", ("extends", "path")),
        ("extends: [a.yaml, 5]", ("a.yaml", "does not exist")),
        ("seed: [1, 2]", ("seed", "one value")),
        ("seed: {a: 1}", ("seed", "no mapping")),
        ("output_dir: [a, b]", ("output_dir", "one value")),
        ("lr_scheduler_kwargs: [1]", ("lr_scheduler_kwargs", "a mapping")),
        ("image_size: [[8, 8], [8, 8]]", ("list",)),
        ("image_size: [a, b]", ("image_size", "int")),
        ("seed: yes", ("seed", "int")),
        ("seed: 1.5", ("seed", "int")),
        ("seed: 0x10", ("seed", "int")),
        ("augment_on: gpu", ("augment_on", "workers, device")),
        ("save_strategy: epochs", ("save_strategy", "did you mean `epoch`", "best")),
        ("train_dir: x", ("train_dir", "--data_path")),
        ("5: 3", ("5", "unknown setting")),
        ("? [a, b]\n: 3", ("unknown setting",)),
        ("seed: &x [*x]", ("YAML",)),
        ("a: " + 1200 * "[", ("YAML",)),
        ('output_dir: "a\\0b"', ("NUL",)),
        ("seed: 1\n---\nseed: 2", ("YAML",)),
        ("reported: {top1: yes}", ("reported", "percent")),
        ("reported: {top1: 760}", ("reported", "percent")),
        ("just words", ("setting: value",)),
    ],
)
def test_bad_recipes(recipe, text, parts):
    path = recipe(text)
    with pytest.raises(InputError) as raised:
        parse_settings([path, *MODEL])
    assert all(part in str(raised.value) for part in (*parts, path))


def test_a_recipe_that_is_not_utf8(tmp_path):
    path = tmp_path / "recipe.yaml"
    for content in (b"output_dir: caf\xe9\n", b"\xff\xfes\x00e\x00e\x00d\x00", b"\x80\x81\x82\x83", b"seed: 1\x00"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"{path} is no valid YAML in UTF-8"):
            parse_settings([str(path), *MODEL])


# Every truth value there is, by what it is unless told otherwise.
TRUTHS = {name: action.default for name, action in Parser().settings.items() if action.type is truth}


@pytest.mark.parametrize("word, value", [("true", True), ("Yes", True), ("on", True), ("false", False), ("no", False)])
@pytest.mark.parametrize("quote", ["", '"'])
def test_truth_values_are_read_as_they_are_meant(recipe, word, value, quote):
    """Also of what is true by default, and of what may be unset; refused settings are read before they are refused."""
    assert {"scale_lr", "do_train", "dataloader_pin_memory", "eval_do_concat_batches"} <= TRUTHS.keys()
    parser = Parser()
    path = recipe("".join(f"{name}: {quote}{word}{quote}\n" for name in TRUTHS))
    settings, _ = _from_recipe(parser, Path(path))
    assert settings == dict.fromkeys(TRUTHS, value)


@pytest.mark.parametrize(
    "name, typo", [*((name, "flase") for name in TRUTHS), *(("scale_lr", typo) for typo in ("2", "none", "[true]"))]
)
def test_what_is_no_truth_value_is_refused(recipe, name, typo):
    with pytest.raises(InputError, match=f"`{name}`"):
        _from_recipe(Parser(), Path(recipe(f"{name}: {typo}\n")))


def test_recipe_values_are_what_is_written(recipe):
    """YAML would make 8, 1.1, 90 and False of them."""
    path = recipe("seed: 010\nhub_revision: 1.10\nrun_name: 1:30\nsave_strategy: no\noutput_dir: 2024-01-01\n")
    record = parse_settings([path, *MODEL]).record
    assert (record["seed"], record["hub_revision"], record["run_name"]) == (10, "1.10", "1:30")
    assert (record["save_strategy"], record["output_dir"]) == ("no", "2024-01-01")
    # But what is null is not given, and mappings hold what YAML reads.
    path = recipe("seed: ~\nlr_scheduler_kwargs: {patience: 0, threshold: 1.0e+9}\n")
    record = parse_settings([path, *MODEL]).record
    assert (record["seed"], record["lr_scheduler_kwargs"]) == (42, {"patience": 0, "threshold": 1e9})


def test_missing_recipe_lists_those_there_are():
    with pytest.raises(InputError, match=r"configuration/digits\.yaml"):
        parse_settings(["configuration/digit.yaml"])


def test_recipe_values_are_read_as_flags_would_be(recipe):
    path = recipe("base_fn: nn.SiLU\ngrid_range: [-2, 2]\nmodular_mode: null\nproject_l1: yes\nimage_size: 32\n")
    model = parse_settings([path, *MODEL]).model
    assert (model.base_fn, model.grid_range, model.modular_mode) == ("silu", [-2.0, 2.0], "none")
    assert model.given()["modular_mode"] is None and "spline_order" not in model.given()
    assert (model.project_l1, model.image_size) == (True, [32])


NUMBERS = [name for name, action in Parser().settings.items() if action.type in (int, float) and name not in NOT_HERE]


@pytest.mark.parametrize("name", NUMBERS)
def test_no_number_is_unbounded(name):
    for value in [str(int(-1e30))] if Parser().settings[name].type is int else ["nan", "inf", "-1e30"]:
        with pytest.raises(InputError, match=rf"`{name}` is .*, expected .*(at most|less than)"):
            parse(f"--{name}={value}")


@pytest.mark.parametrize(
    "words",
    "seed -1|seed 4294967296|data_seed -1|adam_beta1 2|adam_beta1 1|adam_beta2 -0.1|adam_epsilon -1|cpu_threads 100000|"
    "cpu_threads 0|dataloader_num_workers 100000|dataloader_num_workers -1|num_train_epochs -1|num_train_epochs 0|"
    "max_steps -2|"
    "per_device_train_batch_size 0|per_device_eval_batch_size 0|gradient_accumulation_steps 0|weight_decay -0.1|"
    "label_smoothing_factor 1.1|max_grad_norm -1|save_steps 0|save_total_limit -1|logging_steps -1|eval_steps -5|"
    "eval_delay -1|eval_accumulation_steps 0|dataloader_prefetch_factor 0|ddp_timeout 0|ddp_timeout 10000000000|"
    "momentum 1|"
    "layer_decay 0|layer_decay 1.5|model_ema_decay 1.1|decay_epochs 0|decay_milestones -3|warmup_steps -1|base_lr -1|"
    "attn_lr -1|eval_crop_ratio 0|eval_crop_ratio 1.5|train_crop_scale 1 0.5|train_crop_scale 0 1|train_crop_scale 1|"
    "train_crop_ratio 0 1|image_std 0 1 1|image_std 1 1|image_mean 127 127 127|validation_fraction 1.5|mixup -1|"
    "mixup_prob 1.5|random_erasing -0.1|random_erasing_count 0|random_erasing_count 2000|max_train_samples 0|"
    "shuffle_buffer 0|"
    "cutmix_minmax 0.8 0.2|cutmix_minmax 0.2 1.8|image_size 0|image_size 1000000|image_size 8 8 8|patch_size -4|"
    "hidden_size 0|hidden_size 1000000000|num_hidden_layers 0|num_attention_heads 0|hidden_dropout_prob 1|"
    "drop_path_rate 1|attention_probs_dropout_prob -0.1|initializer_range 0|karat_rank 0|grid_size 0|"
    "grid_size 1000000000|karat_depth 0|spline_order -1|rational_order 5 -4|rational_order 4|grid_range 4|"
    "grid_range 4 -4|image_mean 0.5|lr_scheduler_kwargs fast|"
    "lr_scheduler_kwargs {bad|fsdp_config nowhere.json|num_karat_heads -1".split("|"),
)
def test_values_out_of_range_name_the_setting(words):
    name, *values = words.split()
    with pytest.raises(InputError, match=f"`{name}` is"):
        parse(f"--{name}", *values)


@pytest.mark.parametrize(
    "text", ["image_size: []", "image_std: []", "grid_range: []", "train_crop_scale: []", "rational_order: []"]
)
def test_lists_without_a_number(recipe, text):
    with pytest.raises(InputError, match=text.split(":")[0]):
        parse_settings([recipe(text), *MODEL])


@pytest.mark.parametrize("name", ["output_dir", "data_path", "model", "finetune", "resume_from_checkpoint", "run_name"])
def test_text_that_is_empty(name):
    with pytest.raises(InputError, match=f"`{name}` is empty"):
        parse_settings([f"--{name}=", "--use_cpu"])


# What a package or a backend does, and what does nothing here


@pytest.mark.parametrize(
    "words, said",
    [
        ("--torch_compile_backend foo", "torch_compile_backend"),
        ("--torch_compile_backend tvm", "torch_compile_backend"),
        ("--torch_compile_backend aot_eager --torch_compile_mode fastest", "torch_compile_mode"),
        ("--torch_compile_mode fastest", "torch_compile_mode"),
        ("--use_liger_kernel", "use_liger_kernel"),
        ("--report_to wandbb --run_name a", "did you mean `wandb`"),
        ("--report_to wandbb", "did you mean `wandb`"),
        ("--report_to mlflow --run_name a", "mlflow"),
        ("--deepspeed nowhere.json", "eepspeed"),
        ("--tf32 true", "tf32"),
        ("--fp16", "fp16"),
        ("--fp16 --bf16", "fp16"),
        ("--model_ema --model_ema_device foo", "model_ema_device"),
        ("--model_ema --model_ema_device cuda:9", "model_ema_device"),
        ("--batch_eval_metrics", "batch_eval_metrics"),
        ("--prediction_loss_only", "prediction_loss_only"),
        ("--no_eval_do_concat_batches", "eval_do_concat_batches"),
        ("--label_names label", "label_names"),
        ("--include_for_metrics inputs", "include_for_metrics"),
        ("--train_sampling_strategy group_by_length", "train_sampling_strategy"),
        ("--lr_scheduler_type reduce_lr_on_plateau --eval_strategy no", "reduce_lr_on_plateau"),
        ("--load_best_model_at_end --eval_strategy no", "load_best_model_at_end"),
        ("--save_strategy best --eval_strategy no", "save_strategy"),
        ("--fsdp full_shard", "fsdp"),
        ('--activation_checkpointing_kwargs {"foo":1}', "activation_checkpointing_kwargs"),
        ('--activation_checkpointing_kwargs {"every_n_layers":0}', "every_n_layers"),
        ("--ddp_backend gloo", "ddp_backend"),
        ("--bf16_full_eval", "bf16_full_eval"),
        ("--fp16_full_eval", "fp16_full_eval"),
        ("--auto_find_batch_size", "auto_find_batch_size"),
        ('--accelerator_config {"split_batches":true}', "accelerator_config"),
        ("--dataloader_num_workers 0 --dataloader_prefetch_factor 2", "dataloader_prefetch_factor"),
        ("--dataloader_num_workers 0 --dataloader_multiprocessing_context fork", "dataloader_multiprocessing_context"),
    ],
)
def test_what_is_not_here_or_does_not_go_together(words, said):
    """Before anything is read; in one line."""
    message = refused(*words.split())
    assert said in message and "\n" not in message


@pytest.mark.parametrize(
    "flag, setting",
    [
        ("--train_dir", "--data_path"),
        ("--validation_dir", "--data_path"),
        ("--train-dir=x", "--data_path"),
        ("--model_name_or_path", "--finetune"),
        ("--train_val_split", "--validation_fraction"),
        ("--image_column_name", "--image_column"),
        ("--label_column_name", "--label_column"),
        ("--evaluation_strategy", "--eval_strategy"),
        ("--no_cuda", "--use_cpu"),
    ],
)
def test_flags_of_transformers_example_are_told_ours(flag, setting, capsys):
    with pytest.raises(SystemExit):
        parse(flag, "x")
    assert f"here: {setting}" in capsys.readouterr().err
    assert setting.lstrip("-") in Parser().settings


def test_every_hint_names_a_setting_of_ours():
    known = Parser().settings
    for name, said in official_flags.OTHERS.items():
        assert name not in known
        assert {word.lstrip("-").rstrip(",:") for word in said.split() if word.startswith("--")} <= set(known), name


def test_help_explains_every_flag(capsys):
    parser = Parser()
    for action in parser._actions:
        assert action.help, action.option_strings
    with pytest.raises(SystemExit) as raised:
        parse_settings(["--help"])
    assert raised.value.code == 0
    assert "--hidden_dim" in capsys.readouterr().out


# The official flags


def test_every_official_flag_sets_settings_that_exist():
    known = Parser().settings
    for flag in OFFICIAL_FLAGS:
        assert set(flag.settings) <= set(known), flag.flag
        assert flag.settings or flag.note, flag.flag
    assert all(set(pair) <= set(known) for pair in EXCLUSIVE)


@pytest.mark.parametrize(
    "words, settings",
    [
        ("--basis_type FourierBasis", {"basis_type": "fourier"}),
        ("--basis_type SplineBasis", {"basis_type": "spline"}),
        ("--basis_type BSplineBasis", {"basis_type": "spline"}),
        (
            "--basis_type WaveletBasis --wavelet_type MexicanHat",
            {"basis_type": "wavelet", "wavelet_type": "mexican_hat"},
        ),
        ("--basis_type RationalBasis --rational_order 5 4", {"basis_type": "rational", "rational_order": [5, 4]}),
        ("--wavelet_type Morlet", {"wavelet_type": "morlet"}),
        ("--grid 5 --order 2 --grid_range -2 2", {"grid_size": 5, "spline_order": 2, "grid_range": [-2.0, 2.0]}),
        ("--base_fn ZeroModule --hidden_dim 8", {"base_fn": "zero", "karat_rank": 8}),
        ("--base_fn nn.SiLU", {"base_fn": "silu"}),
        ("--base_fn torch.nn.Identity", {"base_fn": "linear"}),
        ("--modular_attn", {"modular_mode": "phi1_w2", "karat_depth": None}),
        ("--modular_attn --modular_mode w1_phi2", {"modular_mode": "w1_phi2"}),
        ("--modular_mode w1_phi2", {"modular_mode": "w1_phi2"}),
        ("--modular_attn --depth 2 --modular_mode phi1_w2", {"modular_mode": "phi1_w2", "karat_depth": 2}),
        ("--depth 2", {"modular_mode": "none", "karat_depth": 2}),
        ("--depth 1", {"modular_mode": "none", "karat_depth": 1}),
        ("--grid 3", {"modular_mode": None}),
        ("--universal --project_l1", {"sharing": "universal", "project_l1": True}),
        ("--mixed_head", {"num_karat_heads": 0}),
        ("--mixed_head --num_attention 2", {"num_karat_heads": 2}),
        ("--basis_not_trainable --base_not_trainable", {"train_basis": False, "train_base": False}),
        ("--drop 0.1 --drop-path 0.2", {"hidden_dropout_prob": 0.1, "drop_path_rate": 0.2}),
        ("--input-size 32", {"image_size": [32]}),
        ("--opt sgd --momentum 0.8", {"optim": "sgd", "momentum": 0.8}),
        ("--opt-betas 0.8 0.9 --opt-eps 1e-7", {"adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-7}),
        ("--sched step --decay-epochs 3 --decay-rate 0.5", {"sched": "step", "decay_epochs": 3, "decay_rate": 0.5}),
        ("--lr 1e-3 --min-lr 0 --warmup-lr 0 --warmup-epochs 2", {"base_lr": 1e-3, "min_lr": 0, "warmup_epochs": 2}),
        ("--eval --resume x", {"do_train": False, "resume_from_checkpoint": "x"}),
        ("--finetune x", {"finetune": "x"}),
        ("--device cpu --seed 3 --report_to none --run_name a", {"use_cpu": True, "seed": 3, "run_name": "a"}),
        ("--num_workers 2 --no-pin-mem", {"dataloader_num_workers": 2, "dataloader_pin_memory": False}),
        ("--data-set CIFAR10 --data-path y", {"data_set": "CIFAR10", "data_path": "y"}),
        ("--smoothing 0.1 --clip-grad 2 --weight-decay 0.1", {"label_smoothing_factor": 0.1, "max_grad_norm": 2}),
    ],
)
def test_official_flags_become_settings(words, settings):
    record = parse(*words.split()).record
    assert {key: record[key] for key in settings} == settings


def test_underscores_and_dashes_are_both_accepted():
    assert parse("--batch_size", "8", "--drop_path", "0.1").record["per_device_train_batch_size"] == 8


@pytest.mark.parametrize(
    "words, message",
    [
        ("--base_fn nn.Foo", "nn.SiLU"),
        ("--opt lambb", "did you mean `lamb"),
        ("--num_attention 2", "--mixed_head"),
        ("--mixed_head --num_attention 0", "--num_attention 0"),
        ("--device tpu", "cpu or cuda"),
    ],
)
def test_bad_official_values(words, message):
    with pytest.raises(InputError, match=message):
        parse(*words.split())


def test_nothing_typed_is_evaluated(tmp_path):
    marker = tmp_path / "evaluated"
    code = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    for flag in ("--basis_type", "--wavelet_type"):
        parse(flag, code)
    for value in (code, f"nn.{code}"):
        with pytest.raises(InputError, match="no such base function"):
            parse("--base_fn", value)
    assert not marker.exists()


def test_the_augmentation_of_the_official_command_line():
    words = "--mixup 0.8 --cutmix 1 --aa rand-m9-mstd0.5-inc1 --reprob 0.25 --repeated-aug --cutmix-minmax 0.2 0.8"
    data = parse(*words.split()).data
    assert (data.mixup, data.cutmix, data.auto_augment) == (0.8, 1.0, "rand-m9-mstd0.5-inc1")
    assert (data.random_erasing, data.repeated_aug, data.cutmix_minmax) == (0.25, True, [0.2, 0.8])
    data = parse("--aa", "none", "--no-repeated-aug").data
    assert (data.auto_augment, data.repeated_aug) == (None, False)


def test_learning_rate_scales_with_the_batch_only_from_base_lr():
    training = parse(
        "--lr", "1e-3", "--attn_lr", "2e-3", "--batch-size", "128", "--gradient_accumulation_steps", "2"
    ).training
    assert (training.learning_rate, training.attn_learning_rate) == (pytest.approx(5e-4), pytest.approx(1e-3))
    assert (training.base_lr, training.attn_lr) == (1e-3, 2e-3)  # As they were written.
    assert "256 / 512" in training.describe_learning_rate()
    assert parse("--lr", "1e-3", "--unscale-lr").training.learning_rate == 1e-3
    assert parse("--learning_rate", "1e-3", "--attn_lr", "2e-3").training.attn_learning_rate == 2e-3
    # The paper's: 5e-4 for 512 images.
    assert parse("--batch-size", "32").training.learning_rate == pytest.approx(3.125e-5)


def test_table_has_a_row_for_each_flag():
    rows = official_flags.markdown_table().splitlines()
    assert len(rows) == len(OFFICIAL_FLAGS) + 2
    assert "| `--hidden_dim` | `karat_rank` |  |" in rows


def test_an_evaluation_writes_only_where_the_command_says(recipe):
    path = recipe("output_dir: outputs/run\n")
    assert parse_settings([path, *MODEL]).record["output_dir"] == "outputs/run"
    assert parse_settings([path, *MODEL, "--eval"]).record["output_dir"] is None
    assert parse_settings([path, *MODEL, "--eval", "--output_dir", "here"]).record["output_dir"] == "here"


# Optimisers, schedules, trackers


def test_optimisers_of_timm_by_their_official_names():
    assert parse("--opt", "AdamW").training.optimizer_name == "adamw_torch"
    assert parse("--opt", "lion").training.optimizer_name == "timm_lion"
    assert parse("--optim", "timm_lamb").training.timm_optimizer == "lamb"
    assert refused("--opt", "lambb").startswith("There is no optimiser lambb (did you mean `lamb")
    assert "There is no optimiser timm_adahessian" in refused("--optim", "timm_adahessian")
    assert refused("--optim", "adamm").startswith("`optim` is 'adamm'")


def test_schedules_that_do_not_exist():
    assert "--lr_scheduler_type reduce_lr_on_plateau" in refused("--sched", "plateau")
    assert "expected one of cosine, linear, poly, tanh, step, multistep, constant" in refused("--sched", "cosin")
    assert "which step does not fall" in refused("--sched", "step", "--cooldown-epochs", "10")


def test_trackers(monkeypatch):
    import transformers.integrations.integration_utils as integrations

    monkeypatch.setattr(integrations, "is_wandb_available", lambda: False)
    monkeypatch.setattr(integrations, "is_tensorboard_available", lambda: True)
    assert parse().training.report_to == []
    assert parse("--report_to", "tensorboard").training.report_to == []
    assert parse("--report_to", "none", "--run_name", "first").training.report_to == []
    assert parse("--report_to", "tensorboard", "--run_name", "first").training.report_to == ["tensorboard"]
    message = refused("--run_name", "first", "--report_to", "wandb")
    assert "to wandb, which is not installed: pip install wandb" in message
    assert parse("--run_name", "first").training.report_to == ["tensorboard"]
    monkeypatch.setattr(integrations, "is_wandb_available", lambda: True)
    assert parse("--run_name", "first").training.report_to == ["wandb"]


@pytest.mark.parametrize("cores, processes, workers", [(8, 1, 7), (8, 2, 3), (1, 1, 1), (2, 2, 1), (64, 1, 16)])
def test_one_data_worker_for_each_core_but_one(monkeypatch, tmp_path, cores, processes, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    args = RunArguments(output_dir=str(tmp_path), use_cpu=True)
    assert (args.dataloader_num_workers, args.dataloader_persistent_workers) == (workers, True)
    args = RunArguments(output_dir=str(tmp_path), use_cpu=True, dataloader_num_workers=0)
    assert (args.dataloader_num_workers, args.dataloader_persistent_workers) == (0, False)
