# SPDX-License-Identifier: Apache-2.0
"""The average of the weights: against its closed formula, in evaluation, in checkpoints, and as a run's result."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from image_classification import main as script
from image_classification.errors import InputError
from image_classification.training.ema import FILE, WeightAverage
from image_classification.training.metrics import ComputeMetrics, preprocess
from image_classification.training.trainer import ImageClassificationTrainer

from .test_trainer import make_model, rows_of, run_arguments


class Weights(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})


def make_trainer(folder, callbacks=(), **settings):
    settings = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "optim": "sgd", "model_ema": True, **settings}
    model = make_model("karat")
    model.vit.embeddings.cls_token.requires_grad_(False)
    return ImageClassificationTrainer(
        model=model,
        args=run_arguments(folder, **settings),
        train_dataset=rows_of(10),
        eval_dataset=rows_of(7),
        compute_metrics=ComputeMetrics(3),
        preprocess_logits_for_metrics=preprocess,
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize("device", [None, "cpu"])
def test_average_is_the_closed_formula(tmp_path, device):
    record, decay = Weights(), 0.8
    trainer = make_trainer(tmp_path, [record], model_ema_decay=decay, model_ema_device=device, save_strategy="no")
    start = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    assert len(record.steps) == 6
    assert trainer.average.tensors.keys() == {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert "vit.embeddings.cls_token" not in trainer.average.tensors
    for name, average in trainer.average.tensors.items():
        expected = decay**6 * start[name].double()
        for step, weights in enumerate(record.steps, start=1):
            expected += (1 - decay) * decay ** (6 - step) * weights[name].double()
        torch.testing.assert_close(average.double(), expected, rtol=1e-5, atol=1e-7)


def test_evaluation_shows_both_and_changes_nothing(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="no", model_ema_decay=0.5)
    trainer.train()
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    metrics = trainer.evaluate()
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())
    assert trainer.state.log_history[-1]["eval_ema_loss"] == metrics["eval_ema_loss"]

    alone = make_trainer(tmp_path, model_ema=False)
    alone.model.load_state_dict(before)
    assert alone.evaluate()["eval_loss"] == metrics["eval_loss"]
    trainer.average.copy_to(alone.model)
    expected = alone.evaluate()
    assert metrics["eval_loss"] != metrics["eval_ema_loss"]
    assert {name: metrics[f"eval_ema_{name}"] for name in ("loss", "accuracy")} == {
        name: expected[f"eval_{name}"] for name in ("loss", "accuracy")
    }


def test_half_precision_is_averaged_in_full(tmp_path):
    model = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
    average = WeightAverage(model, 0.999)
    start = model.weight.detach().float().clone()
    with torch.no_grad():
        model.weight.add_(1)
    for _ in range(100):
        average.update()
    expected = model.weight.detach().float() + 0.999**100 * (start - model.weight.detach().float())
    torch.testing.assert_close(average.tensors["weight"], expected, rtol=1e-4, atol=1e-5)
    own = model.weight.detach().clone()
    with average.applied(model):
        assert torch.equal(model.weight, average.tensors["weight"].bfloat16())
    assert torch.equal(model.weight, own)


def test_foreign_average_is_refused(tmp_path):
    model, path = make_model("karat"), tmp_path / FILE
    average = WeightAverage(model, 0.9)
    with pytest.raises(InputError, match="written without `model_ema`"):
        average.load(path, model)
    save_file(average.whole(model), path)
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if name != "classifier.bias"}, path)
    with pytest.raises(InputError, match=r"classifier\.bias"):
        average.load(path, model)
    save_file(tensors | {"classifier.bias": torch.zeros(4)}, path)
    with pytest.raises(InputError, match=r"classifier\.bias"):
        average.load(path, model)


@pytest.mark.parametrize("better", ["ema", "model"])
@pytest.mark.parametrize("by", ["accuracy", "loss"])
def test_the_better_weights_are_kept(tmp_path, better, by):
    trainer = make_trainer(tmp_path)
    trainer.make_average()
    with torch.no_grad():
        for tensor in trainer.average.tensors.values():
            tensor.add_(1)
    good, bad = {"accuracy": 0.9, "loss": 0.1}, {"accuracy": 0.9, "loss": 0.2}
    if by == "accuracy":
        bad = {"accuracy": 0.8, "loss": 0.01}
    ema, plain = (good, bad) if better == "ema" else (bad, good)
    metrics = {f"eval_{key}": value for key, value in plain.items()}
    metrics |= {f"eval_ema_{key}": value for key, value in ema.items()}
    before = trainer.model.classifier.weight.detach().clone()
    kept, metrics = trainer.keep_better_weights(metrics)
    assert kept == better and torch.equal(trainer.model.classifier.weight, before + (better == "ema"))
    assert (metrics["eval_accuracy"], metrics["eval_loss"]) == (0.9, 0.1)
    assert (metrics["eval_model_loss"], metrics["eval_ema_loss"]) == (plain["loss"], ema["loss"])


@pytest.mark.system
def test_run_ends_with_the_better_weights(tmp_path, small, capsys):
    """An average that hardly left the start, then one of a run that a wild rate leads astray from good weights."""
    small = small[small.index("--per_device_train_batch_size") :]  # The preset's own sizes.
    base = [*small, "--data_set", "digits", "--max_train_samples", "64", "--model_ema"]
    base += ["--max_eval_samples", "40", "--num_train_epochs", "12", "--seed", "3"]
    base += ["--train_crop_scale", "0.9", "1", "--horizontal_flip", "0", "--color_jitter", "0"]
    kept = set()
    for name, flags in {
        "slow": ["--model", "karat_digits", "--learning_rate", "3e-3", "--model_ema_decay", "0.999"],
        "wild": ["--finetune", str(tmp_path / "slow"), "--learning_rate", "0.3", "--model_ema_decay", "1"],
    }.items():
        folder = tmp_path / name
        assert script.main([*base, *flags, "--output_dir", str(folder)]) == 0
        out = capsys.readouterr().out
        results = json.loads((folder / "all_results.json").read_text())
        run = json.loads((folder / "run.json").read_text())["finished"]
        weights = run["weights"]
        written, last = load_file(folder / "model.safetensors"), folder / "checkpoint-48"
        average = load_file(last / FILE)
        expected = load_file(last / "model.safetensors") | (average if weights == "ema" else {})
        assert all(torch.equal(written[key], expected[key]) for key in written)
        other = {"ema": "model", "model": "ema"}[weights]
        assert results["eval_accuracy"] == results[f"eval_{weights}_accuracy"] >= results[f"eval_{other}_accuracy"]
        said = "Written are the " + {"ema": "averaged", "model": "plain"}[weights]
        assert said in out and said in (folder / "README.md").read_text()
        kept.add(weights)
    assert kept == {"ema", "model"}

    # A checkpoint is evaluated with its average beside it; the run's folder has only the weights that were written.
    words = ["--do_train", "false", "--data_set", "digits", "--use_cpu", "--max_eval_samples", "40", "--seed", "3"]
    words += ["--disable_tqdm", "--dataloader_num_workers", "0", "--model_ema", "--resume_from_checkpoint"]
    assert script.main([*words, str(last)]) == 0
    assert f"averaged weights' accuracy {100 * results['eval_ema_accuracy']:.2f} %" in capsys.readouterr().out
    assert script.main([*words, str(folder)]) == 0
    out = capsys.readouterr().out
    assert f"accuracy {100 * results['eval_accuracy']:.2f} %" in out and "averaged" not in out
