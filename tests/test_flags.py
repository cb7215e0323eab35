# SPDX-License-Identifier: Apache-2.0
"""One dialect of flags: every command takes them with `-` and with `_`."""

import argparse

import pytest

import analysis.__main__ as analyses
import benchmarks.__main__ as benchmarks
import predict
from image_classification.flags import Parser
from image_classification.settings.parser import parse_settings
from results import screen


@pytest.mark.parametrize("flag", ["--num-images", "--num_images"])
def test_both_spellings_mean_the_same(flag):
    parser = Parser()
    parser.add_argument("--num-images", type=int)
    parser.add_argument("--name", nargs="+")
    parser.add_argument("paths", nargs="*")
    args = parser.parse_args([flag, "3", "--name=a_b", "--", "--c_d", "e_f"])
    assert (args.num_images, args.name, args.paths) == (3, ["a_b"], ["--c_d", "e_f"])
    assert parser.parse_args([f"{flag}=4"]).num_images == 4
    with pytest.raises(SystemExit):
        parser.parse_args(["--num", "3"])


@pytest.mark.parametrize(
    ("command", "words", "name", "value"),
    [
        (predict.predict, ["x.png", "--model", "m", "--top_k", "3"], "top_k", 3),
        (benchmarks.main, ["--data_path", "there"], "data_path", "there"),
        (screen.main, ["--data", "d", "--per_gpu", "2"], "per_gpu", 2),
        (lambda words: analyses.analyse("spectrum", words), ["--model", "m", "--num_images=7"], "num_images", 7),
        (lambda words: analyses.analyse("landscape", words), ["--model", "m", "--data_set", "d"], "data_set", "d"),
    ],
    ids=["predict", "benchmarks", "screen", "spectrum", "landscape"],
)
def test_every_command_takes_both(command, words, name, value, monkeypatch):
    parsed = []

    def parse_args(self, args=None, namespace=None):
        parsed.append(argparse.ArgumentParser.parse_args(self, args, namespace))
        raise SystemExit

    monkeypatch.setattr(Parser, "parse_args", parse_args)
    monkeypatch.setattr("sys.argv", ["", *words])
    with pytest.raises(SystemExit):
        command() if command is benchmarks.main else command(words)
    assert str(getattr(parsed[0], name)) == str(value)


def test_training_takes_both(tmp_path):
    folder = str(tmp_path / "o")
    dashes = parse_settings(["--output-dir", folder, "--num-train-epochs", "2", "--use-cpu", "--data-set", "digits"])
    lines = parse_settings(["--output_dir", folder, "--num_train_epochs", "2", "--use_cpu", "--data_set", "digits"])
    assert dashes.record == lines.record
