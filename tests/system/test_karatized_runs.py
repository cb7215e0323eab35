# SPDX-License-Identifier: Apache-2.0
"""A karatized run on the Hub is all that a stranger needs, and all that the commands here need."""

import json

import pytest
from transformers import SiglipImageProcessor

import predict
from analysis.models import load_checkpoint
from image_classification.main import main
from tests.backbones import make, save_as_timm
from tests.images import make_image_folder


@pytest.mark.parametrize("name", ["siglip", "convit_tiny.fb"])
def test_a_karatized_run_from_the_hub(name, hub, tmp_path, monkeypatch, capsys, stranger):
    """From a model of the Hub to a run pushed there, which is loaded, evaluated, looked at and trained by its name."""
    monkeypatch.setattr("image_classification.publishing.publisher.WAITS", (0.05, 0.05))
    source, folder = tmp_path / name, tmp_path / "karat"
    if name == "siglip":
        make("siglip_classifier").save_pretrained(source)
        SiglipImageProcessor(size={"height": 8, "width": 8}).save_pretrained(source)
    else:
        save_as_timm(make("convit_classifier"), source)
    hub.add(f"me/{name}", {path.name: path.read_bytes() for path in source.iterdir()})
    data = make_image_folder(tmp_path / "images", (("train", 2), ("validation", 2)))
    quick = f"--data_path {data} --use_cpu --cpu_threads 1 --disable_tqdm --dataloader_num_workers 0".split()
    train = [*quick, *"--num_train_epochs 1 --warmup_epochs 0 --per_device_train_batch_size 6".split()]
    train += ["--model", f"me/{name}", "--karatize", "--grid_size", "1", "--karat_rank", "3"]
    assert main([*train, "--output_dir", str(folder), "--push_to_hub", "--hub_strategy", "end"]) == 0
    logged = json.loads((folder / "all_results.json").read_text())
    card = (folder / "README.md").read_text()
    assert f"base_model: me/{name}" in card
    capsys.readouterr()
    names, guesses = stranger("me/karat", folder / "sample.png")
    assert any(name.endswith("karat.gamma") for name in names)
    assert predict.main([str(folder / "sample.png"), "--model", "me/karat", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert all(f"{100 * guess['score']:.2f} %" in shown for guess in guesses)
    results = tmp_path / "results"
    assert main([*quick, "--eval", "--resume", "me/karat", "--output_dir", str(results)]) == 0
    found = json.loads((results / "eval_results.json").read_text())
    assert found["eval_loss"] == pytest.approx(logged["eval_loss"], abs=1e-6)
    assert load_checkpoint("me/karat").head_kinds(1) == ["karat", "karat"]
    again = [*quick, *"--num_train_epochs 1 --warmup_epochs 0 --finetune me/karat --output_dir".split()]
    assert main([*again, str(tmp_path / "again")]) == 0
