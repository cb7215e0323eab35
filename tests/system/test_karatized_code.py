# SPDX-License-Identifier: Apache-2.0
"""A saved karatized model is all that a stranger needs, whatever its family."""

import json

import pytest
import torch

from modeling_karat_vit import karatize
from tests.backbones import MAKERS, OPERATOR, features, images_for, make


# Run by the interpreter without the package, once for all the folders: the argument is the folder of them.
STRANGER = """
import importlib.util, json, sys
from pathlib import Path

import torch
import transformers
from transformers.dynamic_module_utils import get_class_from_dynamic_module

assert importlib.util.find_spec("modeling_karat_vit") is None, "the package must not be found here"
trusted = {"trust_remote_code": True}
checked = []
for folder in sorted(Path(sys.argv[1]).iterdir()):
    folder, expected = str(folder), torch.load(folder / "expected.pt")
    auto = getattr(transformers, expected["auto"])
    if expected["auto"] == "AutoBackbone":  # Transformers' asks the Hub, even for a folder.
        config = transformers.AutoConfig.from_pretrained(folder, **trusted)
        auto = get_class_from_dynamic_module(config.auto_map["AutoBackbone"], folder)
    model, info = auto.from_pretrained(folder, output_loading_info=True, **trusted)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    assert not any(info.values()), (folder, info)
    with torch.no_grad():
        outputs = model.eval()(pixel_values=expected["images"])
    found = outputs["feature_maps"][-1] if "feature_maps" in outputs else outputs[
        "logits" if "logits" in outputs else "last_hidden_state"
    ]
    assert torch.equal(found, expected["features"]), folder
    try:
        transformers.AutoModel.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        assert "trust_remote_code" in str(error) or "karat" in str(error), error
    else:
        raise AssertionError(f"{folder} was loaded without its code, as plain softmax")
    checked.append(Path(folder).name)
print(json.dumps(checked))
"""


@pytest.fixture
def folders(tmp_path):
    """A folder for each model, with gammas that are not zero."""
    root = tmp_path / "saved"
    for name in MAKERS:
        model = karatize(make(name), **OPERATOR)
        images = images_for(model)
        with torch.no_grad():
            for parameter_name in model.karat_parameter_names():
                if parameter_name.endswith("gamma"):
                    model.get_parameter(parameter_name).fill_(0.5)
            expected = features(model, images)
        model.save_pretrained(root / name)
        torch.save({"auto": model.auto_name, "images": images, "features": expected}, root / name / "expected.pt")
    return root


def test_a_stranger_loads_every_family(folders, fresh_interpreter):
    printed = fresh_interpreter(STRANGER, folders, hide=["modeling_karat_vit", "image_classification"])
    assert json.loads(printed.splitlines()[-1]) == sorted(MAKERS)
