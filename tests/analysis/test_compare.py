# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from analysis import compare, style
from analysis.models import load_checkpoint
from analysis.recording import record
from modeling_karat_vit import KArAtViTConfig

from .conftest import SIZES, karat_model, rows_of, save


PRESETS = Path(__file__).parents[2] / "configuration"
# GFLOPs of activation and total in the paper's table, which rounds here and cuts off there.
PAPER = {
    "vit_tiny_patch16_224": (0.005, 1.262),
    "vit_tiny_patch16_224_karat": (0.168, 1.425),
    "vit_tiny_patch16_224_karat_universal": (0.168, 1.425),
    "vit_small_patch16_224": (0.008, 4.614),
    "vit_small_patch16_224_karat": (0.335, 4.941),
    "vit_small_patch16_224_karat_universal": (0.335, 4.941),
    "vit_base_patch16_224": (0.016, 17.595),
    "vit_base_patch16_224_karat": (0.268, 17.847),
    "vit_base_patch16_224_karat_universal": (0.268, 17.847),
}


@pytest.mark.parametrize("preset", PAPER)
def test_the_papers_count_is_the_papers_table(preset):
    activation, total = compare.paper_count(AutoConfig.from_pretrained(PRESETS / preset))
    assert activation / 1e9 == pytest.approx(PAPER[preset][0], abs=0.001)
    assert total / 1e9 == pytest.approx(PAPER[preset][1], abs=0.001)


def test_mixed_heads_and_other_operators_in_the_papers_count():
    def activation(**fields):
        return compare.paper_count(KArAtViTConfig(**{**SIZES, "karat_rank": 4, "grid_size": 2, **fields}))[0]

    of_one_head = 10**2 * 4 * (3 * 2 + 1)
    assert activation() == 4 * of_one_head
    assert activation(num_karat_heads=1) == 2 * of_one_head + 2 * 10**2 * 3
    assert activation(karat_layers=[0]) == 2 * of_one_head + 2 * 10**2 * 3
    for fields in ({"basis_type": "spline"}, {"modular_mode": "w1_phi2"}, {"project_l1": True}):
        assert compare.paper_count(KArAtViTConfig(**SIZES, **fields)) is None


def test_elementwise_operations_are_counted():
    x = torch.randn(3, 5)
    with torch.no_grad(), compare.Elementwise() as counted:
        y = torch.cos(x) + 2 * x  # 3 x 15
        y = (y @ torch.ones(5, 2)).softmax(-1)  # 6
        torch.nn.functional.layer_norm(y, (2,))  # 6
        y.clone().view(6)
    assert counted.count == 45 + 12
    query, key = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 7, 8)
    with torch.no_grad(), compare.Elementwise() as counted:
        torch.nn.functional.scaled_dot_product_attention(query, key, key)
    assert counted.count >= 2 * 3 * 4 * 7


def test_the_peak_is_of_what_lives_at_once():
    with compare.PeakMemory() as memory:
        a = torch.zeros(1000)  # 4000 bytes
        b = a + 1  # 8000
        del a
        c = b * 2  # 8000 again
        c.add_(1).view(10, 100)
        del b, c
        torch.zeros(10)
    assert memory.peak == 8000
    assert memory.now <= 40


def test_real_counts_of_a_known_model(karat, softmax):
    """Matrix products by hand; the portable KArAt path multiplies 2G features, and W with V before."""
    n, hidden, mlp, heads, d, rank, features = 10, 24, 16, 2, 12, 4, 6
    common = 9 * 16 * 3 * hidden + hidden * 3 + 2 * n * hidden * (4 * hidden + 2 * mlp)
    scores = heads * n * n * d
    products, elementwise = compare.real_count(load_checkpoint(softmax))
    assert products == common + 2 * 2 * scores
    # At least softmax, the two residual sums, two norms and the activation of the MLP.
    assert elementwise >= 2 * (heads * n * n + 4 * n * hidden + n * mlp)
    products, more = compare.real_count(load_checkpoint(karat))
    of_karat = heads * (n * n * rank * features + n * rank * d + n * rank * d)
    assert products == common + 2 * (scores + of_karat)
    assert more > elementwise


@pytest.mark.system
def test_a_row_of_the_table(karat, run_folder):
    checkpoint = load_checkpoint(karat)
    before = {name: tensor.clone() for name, tensor in checkpoint.model.state_dict().items()}
    row = compare.compute(checkpoint, "ours", batch_size=4)
    assert row["parameters"] == checkpoint.model.num_parameters()
    assert row["karat_parameters"] == 2 * 2 * 4 * 10 * (2 * 3 + 3)
    assert row["training_memory"] > 4 * 4 * row["parameters"]  # weights, gradients and AdamW's two
    assert row["training_speed"] > 0
    assert row["inference_speed"] > 0
    assert row["batch_size"] == 4
    assert "accuracy" not in row
    assert all(torch.equal(tensor, before[name]) for name, tensor in checkpoint.model.state_dict().items())
    # The maps can still be had.
    assert record(checkpoint, torch.randn(1, 3, 12, 12), [0])[0].maps.shape == (1, 2, 10, 10)
    larger = compare.training_memory(checkpoint, 64)
    assert larger > row["training_memory"]


def test_the_accuracy_is_the_runs(run_folder):
    results = json.loads((Path(run_folder) / "all_results.json").read_text())
    assert compare.accuracy(run_folder) == {
        "accuracy": results["eval_accuracy"],
        "top5_accuracy": results["eval_top5_accuracy"],
    }
    history = json.loads((Path(run_folder) / "history.json").read_text())
    assert compare.accuracy(f"{run_folder}/checkpoint-1")["accuracy"] == history[0]["eval_accuracy"]


def test_the_table_and_the_bars():
    rows = [
        {"name": "a", "attention": "KArAt", "parameters": 2_500_000, "accuracy": 0.5, "karat_parameters": 40},
        {"name": "b", "attention": "softmax", "parameters": 1_250_000, "karat_parameters": 0},
    ]
    assert compare.markdown(rows) == (
        "| model | attention | top-1 (%) | parameters (M) | of these KArAt's (k) |\n"
        "| --- | --- | ---: | ---: | ---: |\n"
        "| a | KArAt | 50.00 | 2.500 | 0.040 |\n"
        "| b | softmax | - | 1.250 | 0.000 |\n"
    )
    with style.context():
        axes = compare.draw(rows, "parameters", style.figure().subplots())
    assert [bar.get_width() for bar in axes.patches] == [2_500_000, 1_250_000]
    assert [text.get_text() for text in axes.texts] == ["2.500", "1.250"]


def test_the_command(run_folder, karat, softmax, tmp_path, analyse):
    other = save(karat_model(basis_type="rational"), tmp_path / "rational")
    out = analyse("compare", "--model", run_folder, softmax, other, "--no-measure", "--names", "a", "b", "c")
    assert sorted(path.name for path in out.iterdir()) == [f"compare.{end}" for end in ("csv", "md", "png", "svg")]
    rows = rows_of(out / "compare.csv")
    assert [row["name"] for row in rows] == ["a", "b", "c"]
    assert rows[2]["paper_total"] == ""
    assert float(rows[0]["accuracy"]) == compare.accuracy(run_folder)["accuracy"]
    assert np.isclose(float(rows[1]["paper_total"]), compare.paper_count(load_checkpoint(softmax).model.config)[1])
    assert (out / "compare.md").read_text().count("\n| ") == 4
