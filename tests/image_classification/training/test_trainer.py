# SPDX-License-Identifier: Apache-2.0
"""The Trainer: gradients under accumulation, parameter groups, schedules, and resuming that loses nothing."""

import itertools
import json
import math
import multiprocessing
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file
from timm.scheduler import create_scheduler_v2
from transformers import EvalPrediction, Trainer, TrainerCallback

from image_classification import main as script
from image_classification.errors import InputError
from image_classification.runs import checkpoints
from image_classification.settings.arguments import RunArguments
from image_classification.training.accuracy import TopKAccuracy
from image_classification.training.divergence import SKIPPED_STEPS, DivergenceGuard
from image_classification.training.metrics import ComputeMetrics, check_best, preprocess
from image_classification.training.optimization import parameter_groups, schedule
from image_classification.training.trainer import ImageClassificationTrainer
from tests import models as tiny


def make_model(kind, **fields):
    return tiny.make_model(kind, **{"num_hidden_layers": 1, "num_labels": 3, **fields})


def run_arguments(folder, **settings):
    defaults = {"output_dir": str(folder), "use_cpu": True, "disable_tqdm": True, "eval_strategy": "no"}
    defaults["dataloader_num_workers"] = 0
    return RunArguments(**{**defaults, "learning_rate": 0.1, "warmup_epochs": 0.0, **settings})


def test_at_most_seven_private_methods_are_overridden():
    """On purpose: no helper has the name of a method of Transformers, be it of another release."""
    own = {name: value for name, value in vars(ImageClassificationTrainer).items() if not name.endswith("__")}
    overridden = {name for name in own if name.startswith("_") and hasattr(Trainer, name)}
    loading = {"_load_from_checkpoint", "_load_optimizer_and_scheduler", "_load_best_model"}
    assert overridden == {"_run_epoch", "_maybe_log_save_evaluate", "_save_checkpoint", "_save"} | loading
    assert ImageClassificationTrainer.__base__ is Trainer and all(own[name].__doc__ for name in overridden)


class Gradients(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def gradients(folder, kind, soft, images, **settings):
    torch.manual_seed(1)
    pixels = torch.randn(images, 3, 8, 8)
    labels = torch.randn(images, 3).softmax(-1) if soft else torch.randint(3, (images,))
    rows = [{"pixel_values": p, "labels": label} for p, label in zip(pixels, labels)]
    callback = Gradients()
    settings = {"max_grad_norm": 0.0, **settings}
    args = run_arguments(folder, num_train_epochs=1, save_strategy="no", optim="sgd", **settings)
    model = make_model(kind)
    trainer = ImageClassificationTrainer(model=model, args=args, train_dataset=rows, callbacks=[callback])
    trainer.train()
    return callback.steps


@pytest.mark.parametrize(
    "kind, soft, smoothing, images",
    [("karat", False, 0.1, 10), ("karat", True, 0.0, 12), ("softmax", False, 0.0, 12), ("softmax", True, 0.1, 10)],
)
def test_accumulated_gradients_are_those_of_one_batch(tmp_path, kind, soft, smoothing, images):
    """Also where the last of the accumulated batches is smaller (10 images: 4, 4, 2)."""
    common = {"kind": kind, "soft": soft, "images": images, "label_smoothing_factor": smoothing}
    (whole,) = gradients(tmp_path, **common, per_device_train_batch_size=12)
    (parts,) = gradients(tmp_path, **common, per_device_train_batch_size=4, gradient_accumulation_steps=3)
    assert whole.keys() == parts.keys() and any(grad.abs().max() > 1e-3 for grad in whole.values())
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-6)


def test_loss_is_pytorchs(tmp_path):
    trainer = ImageClassificationTrainer(
        model=make_model("karat").train(), args=run_arguments(tmp_path, label_smoothing_factor=0.1)
    )
    logits, labels = torch.randn(6, 3), torch.randint(3, (6,))
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(trainer.cross_entropy({"logits": logits}, labels, torch.tensor(6)), expected)
    # Evaluation does not smooth, although Transformers counts the images there too.
    trainer.model.eval()
    plain = torch.nn.functional.cross_entropy(logits, labels)
    for count in (None, torch.tensor(6)):
        torch.testing.assert_close(trainer.cross_entropy({"logits": logits}, labels, count), plain)


def test_parameter_groups(tmp_path):
    model = make_model("karat")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, run_arguments(tmp_path, attn_lr=0.5))
    of = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    karat = model.karat_parameter_names()
    assert set(of) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all((rate == 0.5) == (name in karat) for name, (rate, _) in of.items())
    assert of["classifier.weight"] == (0.1, 0.05) and of["classifier.bias"] == (0.1, 0.0)
    assert of["vit.embeddings.cls_token"][1] == of["vit.embeddings.position_embeddings"][1] == 0.0
    assert len(parameter_groups(model, run_arguments(tmp_path))) == 2
    with pytest.raises(InputError, match="attn_lr"):
        parameter_groups(make_model("softmax"), run_arguments(tmp_path, attn_lr=0.5))


@pytest.mark.parametrize(
    "settings, expected", [({}, {0.05, 0.0}), ({"attn_weight_decay": 0.2}, {0.2}), ({"attn_weight_decay": 0.0}, {0.0})]
)
def test_karat_parameters_have_a_weight_decay_of_their_own(tmp_path, settings, expected):
    model = make_model("karat")
    groups = parameter_groups(model, run_arguments(tmp_path, **settings))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    of = {names[id(parameter)]: group["weight_decay"] for group in groups for parameter in group["params"]}
    karat = model.karat_parameter_names() & of.keys()
    assert karat and {of[name] for name in karat} <= expected
    assert of["classifier.weight"] == 0.05 and of["classifier.bias"] == 0.0
    with pytest.raises(InputError, match="attn_weight_decay"):
        parameter_groups(make_model("softmax"), run_arguments(tmp_path, attn_weight_decay=0.0))


@pytest.mark.parametrize("sharing", ["blockwise", "universal"])
def test_layer_decay(tmp_path, sharing):
    model = make_model("karat", num_hidden_layers=3, sharing=sharing)
    args = run_arguments(tmp_path, layer_decay=0.5, attn_lr=0.01, sched="cosine", min_lr=1e-3, num_train_epochs=1)
    trainer = ImageClassificationTrainer(model=model, args=args, train_dataset=rows_of(640))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = trainer.create_optimizer().param_groups
    of = {names[id(parameter)]: group["lr"] for group in groups for parameter in group["params"]}
    assert of["classifier.weight"] == of["vit.layernorm.weight"] == 0.1
    assert [of[f"vit.layers.{block}.mlp.fc1.weight"] for block in range(3)] == pytest.approx([0.0125, 0.025, 0.05])
    assert of["vit.embeddings.cls_token"] == pytest.approx(0.00625)
    rates = {0.005} if sharing == "universal" else {0.00125, 0.0025, 0.005}
    found = {of[name] for name in model.karat_parameter_names() & of.keys()}
    assert sorted(found) == pytest.approx(sorted(rates))
    # The floor is scaled like the rate, as in timm.
    scheduler = trainer.create_scheduler(10)
    for _ in range(10):
        trainer.optimizer.step()
        scheduler.step()
    assert {round(group["lr"] / group["lr_scale"], 9) for group in groups} == {1e-3}


@pytest.mark.parametrize(
    "optim, kind, expected",
    [
        ("adamw_torch", "AdamW", {"eps": 1e-6}),
        ("sgd", "SGD", {"momentum": 0.8, "nesterov": True}),
        ("rmsprop", "RMSprop", {"momentum": 0.8}),
        ("timm_lamb", "Lamb", {"eps": 1e-6, "betas": (0.9, 0.999)}),
        ("timm_lion", "Lion", {"betas": (0.9, 0.99)}),
        ("timm_momentum", "SGD", {"momentum": 0.8, "nesterov": False}),
    ],
)
def test_optimisers(tmp_path, optim, kind, expected):
    args = run_arguments(tmp_path, optim=optim, momentum=0.8, attn_lr=0.01)
    optimizer = ImageClassificationTrainer(model=make_model("karat"), args=args).create_optimizer()
    assert type(optimizer).__name__ == kind and expected.items() <= optimizer.defaults.items()
    assert {(group["lr"], group["weight_decay"]) for group in optimizer.param_groups} == {
        (0.1, 0.05),
        (0.1, 0.0),
        (0.01, 0.05),
    }


def command(folder, *flags):
    """A small run of three epochs of three steps."""
    words = "--model karat_digits --data_set digits --max_train_samples 48 --max_eval_samples 20 --image_size 8".split()
    words += ["--patch_size", "4", "--eval_crop_ratio", "1", "--num_train_epochs", "3", "--seed", "3", *flags]
    return [*words, "--output_dir", str(folder)]


@pytest.mark.system
def test_timm_optimiser_trains_and_resumes(tmp_path, small):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    flags = [*small, "--opt", "lamb", "--layer_decay", "0.8", "--sched", "tanh", "--cooldown-epochs", "1"]
    flags += ["--save_total_limit", "0"]
    assert script.main(command(whole, *flags)) == 0
    # As a run that was killed after its second epoch left it.
    shutil.copytree(whole, stopped, ignore=shutil.ignore_patterns("checkpoint-9", "model.safetensors"))
    record = json.loads((stopped / "run.json").read_text())
    (stopped / "run.json").write_text(json.dumps(record | {"finished": None}))
    shutil.copy(whole / "checkpoint-6" / "model.safetensors", stopped / "checkpoint-6")
    assert script.main(command(stopped, *flags)) == 0
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, stopped))
    assert all(torch.equal(first[name], second[name]) for name in first)


def rates(folder, steps, rate=0.1, per_epoch=10, warmup=0, **settings):
    curve = schedule(run_arguments(folder, **settings), rate, warmup, steps, per_epoch)
    return [rate * curve(step) for step in range(steps + 1)]


@pytest.mark.parametrize("sched", ["cosine", "tanh", "poly", "step", "constant"])
@pytest.mark.parametrize("cooldown", [0, 2])
def test_schedules_are_timms(tmp_path, sched, cooldown):
    """Timm counts the cosine-like schedules from the end of the warm-up with `warmup_prefix`, the steps without."""
    if cooldown and sched in ("step", "constant"):
        return
    epochs, warmup, per_epoch = 10, 2, 10
    settings = {"decay_rate": 0.5, "min_lr": 0.02, "warmup_lr": 0.01, "decay_epochs": 3}
    falls = sched in ("cosine", "tanh", "poly")
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    timm, _ = create_scheduler_v2(
        optimizer,
        sched,
        num_epochs=epochs - cooldown - (warmup if falls else 0),
        warmup_epochs=warmup,
        warmup_prefix=falls,
        step_on_epochs=False,
        updates_per_epoch=per_epoch,
        **settings,
    )
    expected = []
    for step in range(epochs * per_epoch + 1):
        timm.step_update(step)
        expected.append(optimizer.param_groups[0]["lr"])
    settings |= {"cooldown_epochs": cooldown, "sched": sched}
    assert rates(tmp_path, epochs * per_epoch, warmup=warmup * per_epoch, **settings) == pytest.approx(expected)


def test_multistep_drops_at_its_epochs(tmp_path):
    """Where timm drops one update earlier."""
    found = rates(tmp_path, 100, sched="multistep", decay_rate=0.5, decay_milestones=[4, 7])
    assert found == pytest.approx([0.1] * 40 + [0.05] * 30 + [0.025] * 31)


def test_schedules(tmp_path):
    linear = rates(tmp_path, 100, sched="linear", min_lr=0.0)
    assert linear[50] == pytest.approx(0.05) and linear[100] == pytest.approx(0, abs=1e-12)
    cooled = rates(tmp_path, 100, sched="linear", min_lr=0.01, cooldown_epochs=3)
    assert set(cooled[70:]) == {0.01} and cooled[69] > 0.01 and cooled[35] == pytest.approx(0.055)
    # A rate below the floor stays where it is.
    assert max(rates(tmp_path, 10, rate=1e-6, sched="cosine", min_lr=1e-5)) == pytest.approx(1e-6)


@pytest.mark.parametrize(
    "settings, last",
    [({"sched": "step", "decay_epochs": 1.0}, 0.001), ({"sched": None, "lr_scheduler_type": "linear"}, 0.0)],
)
def test_schedule_runs_in_training(tmp_path, settings, last):
    rows = [{"pixel_values": torch.zeros(3, 8, 8), "labels": torch.tensor(index % 3)} for index in range(8)]
    args = run_arguments(tmp_path, num_train_epochs=2, save_strategy="no", per_device_train_batch_size=4, **settings)
    trainer = ImageClassificationTrainer(model=make_model("karat"), args=args, train_dataset=rows)
    trainer.train()
    # After two epochs of two steps the step schedule has dropped twice.
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(last, abs=1e-9)


def test_reduce_on_plateau(tmp_path, small):
    """What `--sched plateau` points to: the rate falls where the held-out loss stays."""
    flags = [*small, "--lr_scheduler_type", "reduce_lr_on_plateau", "--metric_for_best_model", "loss"]
    flags += ["--lr_scheduler_kwargs", '{"patience": 0, "threshold": 1e9, "factor": 0.5}', "--learning_rate", "1e-2"]
    assert script.main(command(tmp_path / "run", *flags)) == 0
    rows = json.loads((tmp_path / "run" / "history.json").read_text())
    assert [row["learning_rate"] for row in rows] == pytest.approx([0.01, 0.005, 0.0025])


def rows_of(images, value=None):
    torch.manual_seed(2)
    pixels = torch.randn(images, 3, 8, 8) if value is None else torch.full((images, 3, 8, 8), value)
    return [{"pixel_values": p, "labels": torch.tensor(index % 3)} for index, p in enumerate(pixels)]


@pytest.mark.system
@pytest.mark.parametrize("kind", ["karat", "softmax"])
@pytest.mark.parametrize(
    "settings, tolerance",
    [
        ({"gradient_checkpointing": True}, 1e-6),
        ({"torch_compile": True, "torch_compile_backend": "aot_eager"}, 1e-5),
        ({"bf16": True}, 0.03),
    ],
    ids=["checkpointing", "compile", "bf16"],
)
def test_ways_to_train_agree(tmp_path, kind, settings, tolerance):
    def train(**settings):
        args = run_arguments(tmp_path, num_train_epochs=2, save_strategy="no", optim="sgd", model_ema=True, **settings)
        trainer = ImageClassificationTrainer(
            model=make_model(kind), args=args, train_dataset=rows_of(10), eval_dataset=rows_of(3)
        )
        return trainer.train().training_loss, trainer.evaluate()["eval_ema_loss"], trainer.model.state_dict()

    *expected, weights = train()
    *losses, found = train(**settings)
    assert losses == pytest.approx(expected, rel=tolerance)
    assert found.keys() == weights.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, weights[name], rtol=tolerance, atol=tolerance)


def test_diverged_loss_stops_the_run(tmp_path):
    args = run_arguments(tmp_path, num_train_epochs=1)
    model = make_model("softmax")  # KArAt's refuses such pixels by itself.
    trainer = ImageClassificationTrainer(model=model, args=args, train_dataset=rows_of(4, math.nan))
    with pytest.raises(InputError, match=r"the loss is nan at step 1, and the first gradient .* `classifier"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize(
    "kind, settings, rate, said",
    [
        ("karat", {"eval_strategy": "epoch"}, 1e38, "nan"),
        ("softmax", {"eval_strategy": "epoch", "model_ema": True, "model_ema_decay": 0.5}, math.inf, "not finite"),
        ("softmax", {"eval_strategy": "no", "save_strategy": "no"}, 1e38, "nan"),
        ("karat", {"eval_strategy": "no"}, math.inf, "not finite"),
        ("softmax", {"eval_strategy": "no"}, 1e38, "nan"),
        ("karat", {"eval_strategy": "no", "num_train_epochs": 2}, 1e38, "nan"),
    ],
)
def test_divergence_in_the_last_step_is_not_saved(tmp_path, kind, settings, rate, said):
    """One step in an epoch, whose loss and gradients are finite, and after which the weights give or are NaN."""
    settings = {"num_train_epochs": 1, "sched": "constant", "optim": "sgd", **settings}
    args = run_arguments(tmp_path, **settings)
    args.learning_rate = rate  # Beyond what the settings let through, so that one step is enough.
    trainer = ImageClassificationTrainer(
        model=make_model(kind),
        args=args,
        train_dataset=rows_of(8),
        eval_dataset=rows_of(3),
        compute_metrics=ComputeMetrics(3),
        preprocess_logits_for_metrics=preprocess,
    )
    with pytest.raises(InputError, match=f"The run has diverged: .*{said}") as raised:
        trainer.train()
        trainer.evaluate()
    assert not checkpoints.checkpoints(tmp_path)
    # Saved before anything has shown it, and set aside then.
    assert ("checkpoint-1.damaged" in str(raised.value)) == (tmp_path / "checkpoint-1.damaged").is_dir()


@pytest.mark.parametrize("average", [False, True])
def test_evaluation_that_is_not_finite_is_an_error(tmp_path, average):
    """Of a run whose weights are finite still; and of a model alone."""

    def make_trainer(value=None, **settings):
        return ImageClassificationTrainer(
            model=make_model("softmax"),
            args=run_arguments(tmp_path, num_train_epochs=1, model_ema=average, **settings),
            train_dataset=rows_of(8),
            eval_dataset=rows_of(3, value),
            compute_metrics=ComputeMetrics(3),
            preprocess_logits_for_metrics=preprocess,
        )

    with pytest.raises(InputError, match=r"The run has diverged: `eval_loss` is nan after step 1\. .*lower rate"):
        make_trainer(math.nan, eval_strategy="epoch").train()
    assert not list(tmp_path.glob("checkpoint-*"))
    with pytest.raises(InputError, match="`eval_loss` is nan: what the model computes"):
        make_trainer(math.nan).evaluate()
    trainer = make_trainer()
    if average:
        trainer.make_average()
        next(iter(trainer.average.tensors.values())).fill_(math.nan)
        with pytest.raises(InputError, match="`eval_ema_loss` is nan"):
            trainer.evaluate()
    else:
        assert math.isfinite(trainer.evaluate()["eval_loss"])


@pytest.mark.parametrize("clip, where", [(0.0, "layers.0.mlp.fc1"), (1.0, "layers.0.attention.o_proj")])
def test_broken_gradient_is_named(tmp_path, where, clip):
    """A NaN that enters the backward pass at one module, in the third step, where the loss is still finite."""
    model = make_model("softmax")
    calls = []

    def spoil(module, gradients):
        calls.append(module)
        return tuple(gradient * (math.nan if len(calls) == 5 else 1) for gradient in gradients)

    module = model.get_submodule(f"vit.{where}")
    module.register_full_backward_pre_hook(spoil)
    args = run_arguments(
        tmp_path,
        num_train_epochs=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_grad_norm=clip,
        logging_strategy="no",
        save_strategy="steps",
        save_steps=1,
    )
    trainer = ImageClassificationTrainer(model=model, args=args, train_dataset=rows_of(16))
    with pytest.raises(InputError, match=rf"the loss is \d\.\d+ at step 3, .* `vit\.{where}\.(weight|bias)`"):
        trainer.train()
    # Not every gradient is broken: clipping would have made them so.
    assert (tmp_path / "checkpoint-2").is_dir() and not (tmp_path / "checkpoint-3").exists()


@pytest.mark.system
def test_evaluation_of_another_data_set(tmp_path):
    """Also with data workers that persist, which end with the data set that they read."""
    few, many, seen, workers = rows_of(4), rows_of(6), [], []

    class Evaluations(TrainerCallback):
        def on_train_begin(self, *_, **__):
            for data in (None, many, None, few):
                trainer.evaluate(data)

        def on_prediction_step(self, *_, eval_dataloader, **__):
            seen.append(len(eval_dataloader.dataset))
            workers.append(len(multiprocessing.active_children()))

    args = run_arguments(tmp_path, dataloader_num_workers=1, max_steps=1, save_strategy="no")
    assert args.dataloader_persistent_workers
    trainer = ImageClassificationTrainer(
        model=make_model("softmax"), args=args, train_dataset=few, eval_dataset=few, callbacks=[Evaluations()]
    )
    trainer.train()
    assert [images for images, _ in itertools.groupby(seen)] == [4, 6, 4]
    assert set(workers) == {1} and not multiprocessing.active_children()
    # What came before the first step is not counted as training.
    assert trainer.state.log_history[-1]["train_images_per_second"] > 0


def test_fp16_skips_a_step_that_overflows_and_goes_on(tmp_path):
    """The weights are as if it had not been; the scale is half, also for who resumes; no divergence is reported."""

    def make_trainer(spoilt=0):
        model, calls = make_model("softmax"), []

        def spoil(module, gradients):
            calls.append(module)
            return tuple(gradient * (math.inf if len(calls) == spoilt else 1) for gradient in gradients)

        model.vit.layers[0].mlp.fc1.register_full_backward_pre_hook(spoil)
        args = run_arguments(
            tmp_path,
            num_train_epochs=1,
            per_device_train_batch_size=2,
            save_strategy="steps",
            save_steps=1,
            save_total_limit=0,
            model_ema=True,
            model_ema_decay=0.5,
            sched="constant",
            logging_strategy="steps",
            logging_steps=1,
        )
        trainer = ImageClassificationTrainer(model=model, args=args, train_dataset=rows_of(8))
        # What accelerate does with `fp16` on a GPU; it leaves it out on the CPU, where PyTorch has all of it.
        trainer.accelerator.native_amp, trainer.accelerator.state._mixed_precision = True, "fp16"
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        return trainer

    def weights(step):
        return load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")

    whole = make_trainer(spoilt=2)
    assert whole.accelerator.scaler.get_scale() == 2**8
    whole.train()
    assert whole.state.global_step == 4 and whole.accelerator.scaler.get_scale() == 2**7
    one, two, three = map(weights, (1, 2, 3))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not all(torch.equal(three[key], two[key]) for key in one)
    for path in tmp_path.rglob("*.json"):
        # Not even the gradient's norm of that step, for which JSON has no word.
        json.loads(path.read_text(), parse_constant=pytest.fail)
    resumed = make_trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.accelerator.scaler.get_scale() == 2**7
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor)


def test_fp16_needs_a_gpu(tmp_path):
    with pytest.raises(InputError, match=r"`fp16` .* --bf16"):
        run_arguments(tmp_path, fp16=True)


def test_guard_lets_fp16_find_its_scale():
    model = torch.nn.Linear(2, 2)
    guard = DivergenceGuard(model, scaled=True, where="Try bf16.")

    def step(number, gradient, loss=1.0):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        guard.watch(number, torch.tensor(loss), last=True)

    for number in range(1, SKIPPED_STEPS):
        step(number, math.inf)
    step(SKIPPED_STEPS, 1.0)
    for number in range(1, SKIPPED_STEPS):
        step(number, math.nan)
    with pytest.raises(InputError, match=f"step {SKIPPED_STEPS}, .* last of {SKIPPED_STEPS} such steps"):
        step(SKIPPED_STEPS, math.nan)
    with pytest.raises(InputError, match="the loss is inf at step 7, and all gradients are finite"):
        step(7, 1.0, loss=math.inf)


def test_metric():
    logits = torch.eye(7)[[0, 1, 2, 3]] + torch.linspace(0, 0.5, 7)
    labels = torch.tensor([0, 1, 6, 4])
    ranked, losses = preprocess(logits, labels)
    assert ranked.shape == (4, 5)
    scores = TopKAccuracy(7).compute(predictions=ranked.numpy(), references=labels)
    assert scores == {"accuracy": 0.5, "top5_accuracy": 1.0}
    assert TopKAccuracy(5).compute(predictions=[[0, 1, 2, 3, 4]], references=[1]) == {"accuracy": 0.0}
    prediction = EvalPrediction(predictions=(ranked.numpy(), losses.numpy()), label_ids=labels.numpy())
    expected = torch.nn.functional.cross_entropy(logits, labels).item()
    assert ComputeMetrics(7)(prediction) == {**scores, "loss": pytest.approx(expected)}


@pytest.mark.parametrize(
    "metric, average, classes, known",
    [
        ("accuracy", False, 3, True),
        ("eval_loss", False, None, True),
        ("top5_accuracy", False, None, True),
        ("top5_accuracy", False, 6, True),
        ("top5_accuracy", False, 5, False),
        ("acuracy", False, None, False),
        ("eval_eval_loss", False, None, False),
        ("ema_accuracy", False, 9, False),
        ("eval_ema_top5_accuracy", True, 9, True),
        ("ema_top5_accuracy", True, 4, False),
        ("f1", True, 9, False),
        (None, False, None, True),
    ],
)
def test_metric_of_the_best_model_is_checked_before(tmp_path, metric, average, classes, known):
    if known:
        return check_best(metric, average, classes)
    with pytest.raises(InputError, match=f"`metric_for_best_model` is '{metric}'.*expected one of loss, accuracy"):
        check_best(metric, average, classes)


def test_misspelt_metric_is_found_before_the_data_is_read(tmp_path, small, capsys):
    words = [*small, "--model", "vit_tiny_patch16_224", "--data_path", str(tmp_path / "nowhere")]
    assert script.main([*words, "--output_dir", str(tmp_path / "o"), "--metric_for_best_model", "acuracy"]) == 2
    assert "did you mean `accuracy`" in capsys.readouterr().err and not (tmp_path / "o").exists()
    words = [*small, "--model", "karat_digits", "--data_set", "digits", "--output_dir", str(tmp_path / "o")]
    schedule = ["--lr_scheduler_kwargs", '{"a": 1}', "--lr_scheduler_type", "cosine"]
    few = ["--dataloader_drop_last", "--max_train_samples", "9"]
    nothing = ["--optim_args", "a=b", "--optim", "adagrad"]
    parts, modules = ["--cutmix_minmax", "0.5", "0.51"], ["--optim_target_modules", "all-linear"]
    metric, arguments = ["--metric_for_best_model", "ema_loss"], ["--optim_args", "x"]
    for flags in (metric, arguments, nothing, schedule, few, parts, modules):
        assert script.main([*words, *flags]) == 2
        err = capsys.readouterr().err
        assert flags[0].lstrip("-") in err and len(err.splitlines()) == 1
    assert not checkpoints.checkpoints(tmp_path / "o")


@pytest.mark.parametrize("drop_last", [False, True])
def test_evaluation_counts_every_image_once(tmp_path, drop_last):
    """Batches of 4, 4 and 3: the loss is the mean over the 11 images, not over the batches; training may drop some."""
    rows = rows_of(11)
    args = run_arguments(
        tmp_path, per_device_eval_batch_size=4, label_smoothing_factor=0.3, dataloader_drop_last=drop_last
    )
    trainer = ImageClassificationTrainer(
        model=make_model("karat"),
        args=args,
        eval_dataset=rows,
        compute_metrics=ComputeMetrics(3),
        preprocess_logits_for_metrics=preprocess,
    )
    metrics = trainer.evaluate()
    with torch.no_grad():
        logits = trainer.model(torch.stack([row["pixel_values"] for row in rows])).logits
    labels = torch.stack([row["labels"] for row in rows])
    assert metrics["eval_loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert metrics["eval_accuracy"] == pytest.approx((logits.argmax(-1) == labels).float().mean().item())


def test_speed_is_that_of_training_alone(tmp_path, monkeypatch):
    args = run_arguments(
        tmp_path, num_train_epochs=2, per_device_train_batch_size=4, eval_strategy="epoch", metric_for_best_model="loss"
    )
    trainer = ImageClassificationTrainer(
        model=make_model("softmax"), args=args, train_dataset=rows_of(10), eval_dataset=rows_of(2)
    )
    evaluate, seconds = Trainer.evaluate, 5.0

    def slow(self, *args, **kwargs):
        time.sleep(seconds / 10)
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "evaluate", slow)
    metrics = trainer.train().metrics
    logged = [entry["images_per_second"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2 and all(rate > 0 for rate in logged)
    # 20 images; the two evaluations' time is not in it.
    training = 20 / metrics["train_images_per_second"]
    assert training <= metrics["train_runtime"] - 2 * seconds / 10 + 0.05
    assert 0.01 < metrics["train_peak_memory_gib"] < 100 and "train_samples_per_second" not in metrics
