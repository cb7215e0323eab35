# SPDX-License-Identifier: Apache-2.0
"""The recorded step is the Trainer's own: uncaptured here, on a CPU; recorded_step_cases.py captures it on a GPU."""

import copy
import json
import math

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from image_classification.errors import InputError
from image_classification.models.building import add_drop_path
from image_classification.settings.arguments import RunArguments
from image_classification.training import recorded_step
from image_classification.training import trainer as trainer_module
from image_classification.training.ema import WeightAverage
from image_classification.training.recorded_step import RecordedStep, obstacle, parts_to_compile, table_of_rates
from image_classification.training.trainer import ImageClassificationTrainer
from tests import models as tiny
from tests.backbones import make


def make_model(kind, drop_path_rate=0.0):
    if kind == "karat":
        return tiny.make_model("karat", num_labels=3, drop_path_rate=drop_path_rate)
    model = tiny.make_model("softmax", num_labels=3)
    if drop_path_rate:
        add_drop_path(model, drop_path_rate)
    return model


def make_rows(images, soft):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(images, 3, 8, 8, generator=generator)
    labels = torch.randn(images, 3, generator=generator).softmax(-1)
    return [
        {"pixel_values": p, "labels": label if soft else label.argmax()}
        for p, label in zip(pixels, labels, strict=True)
    ]


def make_trainer(
    folder, record, monkeypatch, kind="karat", images=10, soft=True, drop_path_rate=0.0, model=None, **settings
):
    defaults = {"use_cpu": True, "disable_tqdm": True, "eval_strategy": "epoch", "dataloader_num_workers": 0}
    # A rate of which fp32 has all digits: the recorded step keeps its rates in fp32.
    defaults |= {"learning_rate": 2**-6, "sched": "constant", "warmup_epochs": 0.0, "logging_steps": 1}
    defaults |= {"per_device_train_batch_size": 4, "num_train_epochs": 2, "logging_strategy": "steps"}
    defaults |= {"record_step": record, "metric_for_best_model": None, "save_total_limit": None}
    rows = make_rows(images, soft)
    trainer = ImageClassificationTrainer(
        model=make_model(kind, drop_path_rate) if model is None else model,
        args=RunArguments(**{**defaults, "output_dir": str(folder), **settings}),
        train_dataset=rows,
        eval_dataset=make_rows(6, False),
    )
    # The CPU is no obstacle to the function, only to capturing it.
    monkeypatch.setattr(trainer_module, "obstacle", lambda trainer: None)
    return trainer


def logs(trainer):
    # What is no matter of time.
    kept = ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_ema_loss", "train_loss", "epoch", "step")
    return [{key: entry[key] for key in kept if key in entry} for entry in trainer.state.log_history]


WAYS = {
    "softmax": {"kind": "softmax"},
    "karat": {"kind": "karat"},
    "classes": {"soft": False, "label_smoothing_factor": 0.1},
    "accumulated": {"gradient_accumulation_steps": 2, "model_ema": True, "model_ema_decay": 0.5},
    "average": {"model_ema": True, "model_ema_decay": 0.5},
    "drop path": {"drop_path_rate": 0.5},
    "softmax drop path": {"kind": "softmax", "drop_path_rate": 0.5},
    "unclipped": {"max_grad_norm": 0.0},
    "clipped": {"max_grad_norm": 0.01},
    "sgd": {"optim": "sgd"},
    "groups": {"attn_lr": 2**-8, "layer_decay": 0.5},
    "stopped": {"max_steps": 4},
}


@pytest.mark.parametrize("way", WAYS)
def test_recorded_is_the_trainers_own_step(way, tmp_path, monkeypatch):
    """Bit for bit, weights, average and logs; with a last batch that is smaller, and evaluations between."""
    trainers = {}
    for record in (False, True):
        trainer = make_trainer(tmp_path / str(record), record, monkeypatch, save_strategy="no", **WAYS[way])
        trainer.train()
        trainers[record] = trainer
    start = make_model(WAYS[way].get("kind", "karat")).state_dict()
    theirs, ours = (trainers[record].model.state_dict() for record in (False, True))
    assert any(not torch.equal(start[name], theirs[name]) for name in theirs)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    if (average := trainers[False].average) is not None:
        for name, tensor in average.tensors.items():
            assert torch.equal(trainers[True].average.tensors[name], tensor), name
    assert logs(trainers[True]) == logs(trainers[False]) and len(logs(trainers[True])) >= 4


def test_rates_follow_the_schedule(tmp_path, monkeypatch):
    settings = {"sched": "cosine", "warmup_epochs": 1.0, "save_strategy": "no", "num_train_epochs": 3}
    both = [make_trainer(tmp_path / str(record), record, monkeypatch, **settings) for record in (False, True)]
    for trainer in both:
        trainer.train()
    theirs, ours = ([entry["learning_rate"] for entry in logs(trainer) if "loss" in entry] for trainer in both)
    assert ours == theirs and len(set(ours)) > 4
    for name, tensor in both[0].model.state_dict().items():
        torch.testing.assert_close(both[1].model.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_what_gets_no_gradient_is_left_alone(accumulated, tmp_path, monkeypatch):
    """As the optimiser leaves it, which would decay it by a gradient of 0."""
    weights = []
    for record in (False, True):
        model = make_model("softmax")
        model.unused = torch.nn.Parameter(torch.ones(2, 2))
        settings = {"save_strategy": "no", "eval_strategy": "no", "gradient_accumulation_steps": accumulated}
        trainer = make_trainer(tmp_path / str(record), record, monkeypatch, model=model, weight_decay=0.5, **settings)
        trainer.train()
        weights.append(model.state_dict())
    assert torch.equal(weights[1]["unused"], torch.ones(2, 2))
    assert all(torch.equal(weights[1][name], tensor) for name, tensor in weights[0].items())


def test_what_the_trainer_counts_is_counted(tmp_path, monkeypatch):
    settings = {"save_strategy": "no", "eval_strategy": "no", "include_num_input_tokens_seen": "all"}
    trainers = [make_trainer(tmp_path / str(record), record, monkeypatch, **settings) for record in (False, True)]
    for trainer in trainers:
        trainer.train()
    theirs, ours = (trainer.state for trainer in trainers)
    assert ours.num_input_tokens_seen == theirs.num_input_tokens_seen > 0
    assert ours.total_flos == theirs.total_flos > 0


def test_a_run_of_which_no_step_is_left(tmp_path, monkeypatch):
    """It ends as it is; and one that shall have fewer steps than it has taken is refused."""
    make_trainer(tmp_path / "run", True, monkeypatch, save_strategy="epoch").train()
    last = str(tmp_path / "run" / "checkpoint-6")
    trainer = make_trainer(tmp_path / "again", True, monkeypatch, save_strategy="no", max_steps=6)
    trainer.train(resume_from_checkpoint=last)
    assert trainer.state.global_step == 6
    trainer = make_trainer(tmp_path / "fewer", True, monkeypatch, save_strategy="no", max_steps=4)
    with pytest.raises(InputError, match=r"step 6.*max_steps"):
        trainer.train(resume_from_checkpoint=last)


def test_a_checkpoint_that_is_due_keeps_the_last_step(tmp_path, monkeypatch):
    """Written when the run goes on, before a step: norm and rate are those of the step before."""
    make_trainer(tmp_path / "run", True, monkeypatch, save_strategy="steps", save_steps=2).train()
    path = tmp_path / "run" / "checkpoint-4" / "progress.json"
    before = json.loads(path.read_text())
    path.write_text(json.dumps(before | {"due": ["save"]}))
    trainer = make_trainer(tmp_path / "again", True, monkeypatch, save_strategy="no")
    trainer.train(resume_from_checkpoint=str(path.parent))
    after = json.loads((tmp_path / "again" / "checkpoint-4" / "progress.json").read_text())
    assert before["grad_norm"] > 0
    assert [after[name] for name in ("grad_norm", "learning_rate")] == [before["grad_norm"], before["learning_rate"]]


# At the end of an epoch and within one; the order drawn from the generator that the model draws from, too.
@pytest.mark.parametrize("step, seedable", [(3, True), (4, True), (3, False)])
def test_resuming_is_exact_either_way(step, seedable, tmp_path, monkeypatch):
    settings = {"save_strategy": "steps", "save_steps": 1, "model_ema": True, "model_ema_decay": 0.5}
    settings |= {"drop_path_rate": 0.5, "accelerator_config": {"use_seedable_sampler": seedable}}
    whole = make_trainer(tmp_path / "whole", True, monkeypatch, **settings)
    whole.train()
    for record in (True, False):
        trainer = make_trainer(tmp_path / f"again{record}", record, monkeypatch, **settings)
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        for name, tensor in whole.model.state_dict().items():
            assert torch.equal(trainer.model.state_dict()[name], tensor), (record, name)
        for name, tensor in whole.average.tensors.items():
            assert torch.equal(trainer.average.tensors[name], tensor), (record, name)
    state = torch.load(tmp_path / "whole" / "checkpoint-3" / "optimizer.pt", weights_only=True)
    # A checkpoint does not tell how its steps were taken.
    assert all(isinstance(group["lr"], float) for group in state["param_groups"])


class Poison(TrainerCallback):
    """Makes a weight NaN, by which the next step diverges."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                model.classifier.weight.fill_(math.nan)


@pytest.mark.parametrize("step", [1, 5])  # Within the run, and in its last step.
def test_divergence_names_the_step(step, tmp_path, monkeypatch):
    messages = []
    for record in (False, True):
        trainer = make_trainer(tmp_path / str(record), record, monkeypatch, save_strategy="epoch")
        trainer.add_callback(Poison(step))
        with pytest.raises(InputError) as caught:
            trainer.train()
        messages.append(str(caught.value).replace(str(tmp_path / str(record)), ""))
        saved = [int(path.name.rpartition("-")[2]) for path in (tmp_path / str(record)).glob("checkpoint-*")]
        assert all(number <= step for number in saved)
    assert f"step {step + 1}" in messages[0]
    assert messages[1].partition("of the backward pass")[0] == messages[0].partition("of the backward pass")[0]


def make_step(model, scaler=None, average=None):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

    def loss(outputs, labels, items):
        return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / items

    rates = table_of_rates(LambdaLR(optimizer, lambda step: 1 / (1 + step)), 9)
    options = {"max_norm": 1.0, "running_loss": torch.zeros(()), "scaler": scaler, "average": average}
    return RecordedStep(model, [], dict(model.named_parameters()), loss, optimizer, rates, 0, 0, **options)


def test_a_skipped_step_changes_nothing_but_the_scale():
    """fp16's overflow is seen on the device: optimiser, schedule and average stay where they are."""
    torch.manual_seed(0)
    model = make_model("softmax")
    average = WeightAverage(model, 0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
    step = make_step(model, scaler, average)
    batch = {"pixel_values": torch.randn(4, 3, 8, 8), "labels": torch.tensor([0, 1, 2, 0])}
    step.run([batch], 4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    averaged = {name: tensor.clone() for name, tensor in average.tensors.items()}
    assert step.position_now() == 1 and not step.divergence()
    with torch.no_grad():
        scaler._scale.fill_(math.inf)
    step.run([batch], 4)
    assert step.position_now() == 1 and not step.divergence()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in average.tensors.items())
    with torch.no_grad():
        scaler._scale.fill_(4.0)
    for _ in range(2):
        step.run([batch], 4)
    assert step.position_now() == 3 and scaler.get_scale() == 8.0
    assert any(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        scaler._scale.fill_(math.inf)
    for _ in range(25):
        step.run([batch], 4)
        scaler._scale.fill_(math.inf)
    assert step.divergence()[0] == 4 + 25  # As many skipped in a row.


def test_a_second_training_goes_on_with_the_scale():
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for _ in range(2):
        make_step(make_model("softmax"), scaler)
        assert scaler.get_scale() == 4.0
        scaler._scale.fill_(4.0)


def test_a_batch_of_no_images_of_its_own_is_not_replayed():
    """Of a process that has none left: its one image has a class that is ignored, where others have probabilities."""
    step = make_step(make_model("softmax"))
    images, targets = torch.randn(1, 3, 8, 8), torch.tensor([[0.0, 0.5, 0.5]])
    step.graphs, step.images, step.labels = {}, images, targets  # Replaying would fail.
    step.run([{"pixel_values": images, "labels": torch.tensor([-100])}], 3)
    assert step.position_now() == 1 and torch.equal(step.labels, targets)


@pytest.mark.parametrize("kind", ["softmax", "karat"])
def test_parts_are_found_within_what_wraps_a_model(kind):
    """As PEFT does."""
    model = make_model(kind)
    wrapper = torch.nn.ModuleDict({"base_model": model})
    wrapper.config = model.config
    vit = model.base_model
    assert parts_to_compile(wrapper) == [*vit.layers, vit.embeddings]


def test_what_is_not_recorded_says_why(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, True, monkeypatch)
    monkeypatch.setattr(trainer_module, "obstacle", obstacle)
    with pytest.raises(InputError, match=r"record_step.*cpu"):
        trainer.train()


class Hooking(TrainerCallback):
    def on_init_end(self, args, state, control, model=None, **kwargs):
        model.classifier.weight.register_hook(lambda gradient: None)


class Watching(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        pass


@pytest.mark.parametrize(
    "settings, named",
    [
        ({}, None),
        ({"gradient_checkpointing": True}, "gradient_checkpointing"),
        ({"debug": "underflow_overflow"}, "underflow_overflow"),
        ({"optim": "adamw_torch"}, "adamw_torch"),
        ({"callbacks": [Watching()]}, "Watching"),
        ({"callbacks": [Hooking()]}, "WANDB_WATCH"),
        ({"model": "deit_classifier"}, "type deit"),
    ],
)
def test_obstacles_are_named(settings, named, tmp_path, monkeypatch):
    """Of what would otherwise fail while it is recorded, or not be heard of."""
    callbacks, found = settings.get("callbacks", ()), []
    settings = {key: value for key, value in settings.items() if key != "callbacks"}
    if "model" in settings:
        settings["model"] = make(settings["model"])
    trainer = make_trainer(tmp_path, None, monkeypatch, save_strategy="no", max_steps=1, **settings)
    for callback in callbacks:
        trainer.add_callback(callback)
        callback.on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)

    def asked(trainer):
        class OnAGpu(type(trainer.args)):
            device, n_gpu = torch.device("cuda"), 1

        arguments = copy.copy(trainer.args)
        arguments.__class__ = OnAGpu
        monkeypatch.setattr(trainer, "args", arguments)
        found.append(obstacle(trainer))
        monkeypatch.undo()
        return "on this CPU"

    monkeypatch.setattr(recorded_step, "has_compiler", lambda: True)
    monkeypatch.setattr(trainer_module, "obstacle", asked)
    trainer.train()
    assert found == [None] if named is None else named in found[0]
