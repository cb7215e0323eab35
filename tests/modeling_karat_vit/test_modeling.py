# SPDX-License-Identifier: Apache-2.0
"""The models as citizens of Transformers: outputs, backends, masks, losses, checkpointing, dtypes, Trainer."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments, ViTConfig, set_seed
from transformers.models.vit.modeling_vit import ViTLayer

from modeling_karat_vit import KArAtViTConfig, KArAtViTForImageClassification, KArAtViTModel, karat_operator
from modeling_karat_vit import modeling_karat_vit as modeling
from modeling_karat_vit.karat_operator import KArAtOperator
from modeling_karat_vit.modeling_karat_vit import KArAtViTAttention


BACKENDS = ("eager", "karat_portable", "sdpa")
TOKENS = 7
MIXTURES = {
    "all": {},
    "mixed_heads": {"num_karat_heads": 1},
    "some_blocks": {"karat_layers": [1]},
    "mixed_heads_some_blocks_universal": {"num_karat_heads": 1, "karat_layers": [0], "sharing": "universal"},
}
mixtures = pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES.keys())
backends = pytest.mark.parametrize("backend", BACKENDS)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def backward(model, **inputs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return gradients(model)


def assert_same_gradients(actual, expected, tolerance: float = 1e-5):
    assert actual.keys() == expected.keys()
    # Keys' biases have no gradient under softmax but rounding: compare with the largest gradient there is.
    largest = max(gradient.norm() for gradient in expected.values())
    for name in expected:
        error = (actual[name] - expected[name]).norm()
        assert error <= tolerance * expected[name].norm() + 1e-6 * tolerance * largest + 1e-12, name


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The names of the attention functions that ran, in order."""
    ran = []

    def spy(owner, name):
        original = getattr(owner, name)

        def wrapper(*args, **kwargs):
            ran.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapper)

    spy(karat_operator, "eager_karat_attention")
    spy(karat_operator, "portable_karat_attention")
    spy(modeling, "eager_softmax_attention")
    sdpa = modeling.ALL_ATTENTION_FUNCTIONS["sdpa"]

    def sdpa_spy(*args, **kwargs):
        ran.append("sdpa")
        return sdpa(*args, **kwargs)

    monkeypatch.setitem(modeling.ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", sdpa_spy)
    return ran


# ---------------------------------------------------------------------------------------------------------- outputs


@mixtures
@backends
def test_hidden_states_and_attentions_are_recorded(make_model, pixels, messages, mixture, backend):
    model = make_model(**mixture)
    model.set_attn_implementation(backend)
    plain = model(pixels)
    assert plain.hidden_states is None and plain.attentions is None and plain.attention_scores is None
    for _ in range(2):
        outputs = model(pixels, output_attentions=True, output_hidden_states=True, output_attention_scores=True)
        assert [tuple(x.shape) for x in outputs.hidden_states] == [(4, TOKENS, 16)] * 3
        assert [tuple(x.shape) for x in outputs.attentions] == [(4, 2, TOKENS, TOKENS)] * 2
        assert [tuple(x.shape) for x in outputs.attention_scores] == [(4, 2, TOKENS, TOKENS)] * 2
        assert relative_error(outputs.logits, plain.logits) < 1e-5
    said = [message for message in messages() if "eager" in message]
    assert len(said) == (0 if backend == "eager" else 1)
    # The switch concerned those calls alone.
    assert model.config._attn_implementation == backend
    assert torch.equal(model(pixels).logits, plain.logits)


@backends
@pytest.mark.parametrize("cls", [KArAtViTModel, KArAtViTForImageClassification])
def test_outputs_are_recorded_when_the_configuration_asks(make_config, pixels, cls, backend):
    config = make_config(
        output_attentions=True, output_hidden_states=True, output_attention_scores=True, attn_implementation=backend
    )
    outputs = cls(config)(pixels)
    assert len(outputs.hidden_states) == 3 and len(outputs.attentions) == 2 and len(outputs.attention_scores) == 2
    outputs = cls(config)(pixels, output_attentions=False, output_attention_scores=False, output_hidden_states=False)
    assert outputs.hidden_states is None and outputs.attentions is None and outputs.attention_scores is None


@mixtures
def test_attentions_are_the_activated_scores(make_model, pixels, calls, mixture):
    model = make_model(**mixture)
    outputs = model(pixels, output_attentions=True, output_attention_scores=True)
    assert set(calls) <= {"eager_karat_attention", "eager_softmax_attention"}
    for index, (layer, maps, scores) in enumerate(
        zip(model.vit.layers, outputs.attentions, outputs.attention_scores, strict=True)
    ):
        heads = mixture.get("num_karat_heads", 2) if model.config.is_karat_layer(index) else 0
        if heads:
            operator = model.vit.operator if model.vit.operator is not None else layer.attention.operator
            expected = operator.activate(scores[:, :heads], operator.tensors(torch.float32))
            assert torch.allclose(maps[:, :heads], expected, atol=1e-6)
            assert not torch.allclose(maps[:, :heads].sum(-1), torch.ones(()), atol=1e-2)
        assert torch.allclose(maps[:, heads:], scores[:, heads:].softmax(-1), atol=1e-6)


def test_the_last_hidden_state_is_the_normalised_last_one(make_model, pixels):
    model = make_model(KArAtViTModel)
    outputs = model(pixels, output_hidden_states=True)
    assert torch.equal(model.layernorm(outputs.hidden_states[-1]), outputs.last_hidden_state)
    assert outputs.pooler_output.shape == (4, 16)
    assert make_model(KArAtViTModel).__class__(model.config, add_pooling_layer=False)(pixels).pooler_output is None


@pytest.mark.parametrize("cls", [KArAtViTModel, KArAtViTForImageClassification])
@pytest.mark.parametrize("by_configuration", [False, True])
def test_tuples_instead_of_an_output_class(make_config, pixels, cls, by_configuration):
    config = make_config()
    if by_configuration:
        config.return_dict = False
    model = cls(config).eval()
    options = {"output_attentions": True, "output_hidden_states": True}
    values = model(pixels, **options, **({} if by_configuration else {"return_dict": False}))
    expected = model(pixels, **options, return_dict=True).to_tuple()
    assert isinstance(values, tuple) and len(values) == len(expected)
    for value, other in zip(values, expected):
        if isinstance(value, tuple):
            assert len(value) == len(other) and all(torch.equal(a, b) for a, b in zip(value, other))
        else:
            assert torch.equal(value, other)


def test_gradients_reach_hidden_states_and_attentions(make_model, pixels):
    model = make_model()
    outputs = model(pixels, output_attentions=True, output_hidden_states=True, output_attention_scores=True)
    recorded = (*outputs.hidden_states, *outputs.attentions, *outputs.attention_scores)
    for tensor in recorded:
        tensor.retain_grad()
    outputs.logits.sum().backward()
    assert all(tensor.grad is not None for tensor in recorded)


def test_images_of_a_batch_do_not_mix(make_model, pixels):
    model = make_model(dtype=torch.float64, num_karat_heads=1)
    together = model(pixels.double()).logits
    apart = torch.cat([model(image[None].double()).logits for image in pixels])
    assert torch.allclose(together, apart, atol=1e-12)
    assert torch.equal(together, model(pixels.double()).logits)


def test_models_pickle_and_copy(make_model, pixels, sharing):
    model = make_model(sharing=sharing)
    expected = model(pixels)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(other(pixels).logits, expected.logits)
        assert len(other(pixels, output_attentions=True).attentions) == 2


def test_no_labels_gives_the_hidden_state(make_model, pixels):
    model = make_model(num_labels=0)
    assert isinstance(model.classifier, nn.Identity) and model(pixels).logits.shape == (4, 16)


# --------------------------------------------------------------------------------------------------------- backends


EXPECTED_CALLS = {
    "eager": {"eager_karat_attention", "eager_softmax_attention"},
    "karat_portable": {"portable_karat_attention", "sdpa"},
    "sdpa": {"portable_karat_attention", "sdpa"},
}


@mixtures
@backends
def test_each_name_runs_its_functions(make_model, pixels, calls, mixture, backend):
    model = make_model(**mixture)
    model.set_attn_implementation(backend)
    model(pixels)
    karat, softmax = sorted(EXPECTED_CALLS[backend], key=lambda name: "karat" not in name)
    blocks = len(mixture.get("karat_layers", [0, 1]))
    assert calls.count(karat) == blocks
    assert calls.count(softmax) == (2 - blocks) + (blocks if "num_karat_heads" in mixture else 0)
    assert len(calls) == calls.count(karat) + calls.count(softmax)


@pytest.mark.parametrize("cuda, fastest", [(False, "karat_portable"), (True, "karat_triton")])
def test_the_fastest_is_the_default(monkeypatch, make_config, cuda, fastest):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    model = KArAtViTForImageClassification(make_config())
    assert model.config._attn_implementation == model.vit.config._attn_implementation == fastest


@backends
def test_a_backend_can_be_chosen_in_every_way(make_config, make_model, pixels, calls, backend, tmp_path):
    make_model().save_pretrained(tmp_path)
    chosen = make_model()
    chosen.set_attn_implementation(backend)
    for model in (
        KArAtViTForImageClassification(make_config(attn_implementation=backend)),
        KArAtViTForImageClassification._from_config(make_config(), attn_implementation=backend),
        KArAtViTForImageClassification.from_pretrained(tmp_path, attn_implementation=backend),
        chosen,
    ):
        assert model.config._attn_implementation == backend
        calls.clear()
        model(pixels)
        assert set(calls) < EXPECTED_CALLS[backend]
    # Which backend ran is no property of the checkpoint.
    chosen.save_pretrained(tmp_path)
    assert KArAtViTForImageClassification.from_pretrained(tmp_path).config._attn_implementation == "karat_portable"


def test_an_unknown_karat_backend_raises_and_lists_those_that_exist(make_config, make_model, tmp_path):
    name = "karat_tritno"
    make_model().save_pretrained(tmp_path)
    for choose in (
        lambda: KArAtViTModel(make_config(attn_implementation=name)),
        lambda: make_model().set_attn_implementation(name),
        lambda: KArAtViTForImageClassification.from_pretrained(tmp_path, attn_implementation=name),
    ):
        with pytest.raises(ValueError, match=f"{name}.*'karat_portable'.*'eager'"):
            choose()


def test_an_unknown_backend_raises(make_model):
    with pytest.raises(ValueError, match="sdpb"):
        make_model().set_attn_implementation("sdpb")


@mixtures
def test_backends_give_the_same_logits_and_gradients(make_model, pixels, mixture, basis):
    labels = torch.tensor([0, 1, 2, 3])
    results = {}
    model = make_model(dtype=torch.float64, **basis, **mixture)
    for backend in BACKENDS:
        model.set_attn_implementation(backend)
        results[backend] = backward(model, pixel_values=pixels.double(), labels=labels)
        results[backend]["logits"] = model(pixels.double()).logits.detach()
    for backend in BACKENDS[1:]:
        assert_same_gradients(results[backend], results["eager"], 1e-10)


@pytest.mark.system
def test_flex_attention_computes_softmax_heads(make_model, pixels):
    model = make_model(num_karat_heads=1)
    expected = model(pixels).logits
    model.set_attn_implementation("flex_attention")
    with torch.no_grad():
        assert relative_error(model(pixels).logits, expected) < 1e-5


def test_a_block_without_karat_heads_is_transformers_vit_block(make_model, sizes, pixels):
    model = make_model(karat_layers=[1], hidden_dropout_prob=0.1)
    layer = model.vit.layers[0]
    assert layer.attention.operator is None
    config = ViTConfig(**sizes, hidden_dropout_prob=0.1)
    hidden = torch.randn(4, TOKENS, 16)
    for backend in BACKENDS:
        config._attn_implementation = "sdpa" if backend == "karat_portable" else backend
        reference = ViTLayer(config)
        reference.load_state_dict(layer.state_dict())
        model.set_attn_implementation(backend)
        assert torch.allclose(layer.eval()(hidden), reference.eval()(hidden), atol=1e-6)
        # Dropout as well: the same random numbers in the same places.
        torch.manual_seed(3)
        actual = layer.train()(hidden)
        torch.manual_seed(3)
        assert torch.allclose(actual, reference.train()(hidden), atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ masks


def masks() -> dict[str, torch.Tensor]:
    keep = torch.ones(4, TOKENS, dtype=torch.bool)
    keep[0, 3] = keep[2, 1] = keep[2, 6] = False
    generator = torch.Generator().manual_seed(5)
    per_query = torch.rand(4, 1, TOKENS, TOKENS, generator=generator) > 0.3
    per_head = torch.rand(4, 2, TOKENS, TOKENS, generator=generator) > 0.3
    per_query[..., 0] = per_head[..., 0] = True
    lowest = torch.finfo(torch.float64).min
    return {
        "keys": keep,
        "keys_integer": keep.long(),
        "keys_4d": keep[:, None, None, :],
        "keys_4d_for_all_images": keep[2:3, None, None, :],
        "per_query": per_query,
        "per_query_for_all_images": per_query[:1],
        "per_head": per_head,
        "additive": torch.zeros(per_query.shape, dtype=torch.float64).masked_fill(~per_query, lowest),
        "additive_infinite": torch.zeros(per_head.shape, dtype=torch.float64).masked_fill(~per_head, -math.inf),
    }


@mixtures
@pytest.mark.parametrize("mask", masks().values(), ids=masks().keys())
def test_masks_act_alike_on_every_backend(make_model, pixels, messages, mixture, mask):
    model = make_model(dtype=torch.float64, **mixture)
    results = {}
    for backend in BACKENDS:
        model.set_attn_implementation(backend)
        results[backend] = backward(
            model, pixel_values=pixels.double(), labels=torch.tensor([0, 1, 2, 3]), attention_mask=mask
        )
        results[backend]["logits"] = model(pixels.double(), attention_mask=mask).logits.detach()
    for backend in BACKENDS[1:]:
        assert_same_gradients(results[backend], results["eager"], 1e-10)
    assert relative_error(results["eager"]["logits"], model(pixels.double()).logits) > 1e-4
    per_query = mask.dim() == 4 and mask.shape[2] > 1
    assert len([message for message in messages() if "mask per query" in message]) == per_query


@mixtures
@backends
def test_masked_keys_take_no_part(make_model, pixels, mixture, backend):
    model = make_model(dtype=torch.float64, num_hidden_layers=1, **{**mixture, "karat_layers": None})
    model.set_attn_implementation(backend)
    mask = masks()["keys"]
    other = pixels.double().clone()
    other[0, :, :4, 8:] = 100.0  # patch 2 of the first image, which is key 3
    other[2, :, :4, :4] = -100.0
    other[2, :, 4:, 8:] = 7.0
    expected = model(pixels.double(), attention_mask=mask).logits
    assert torch.allclose(model(other, attention_mask=mask).logits, expected, atol=1e-12)
    assert not torch.allclose(model(other).logits, expected, atol=1e-3)
    maps = model(pixels.double(), attention_mask=mask, output_attentions=True).attentions[0]
    assert (maps[0, :, :, 3] == 0).all() and (maps[1, :, :, 3] != 0).any()


@backends
def test_a_mask_of_ones_changes_nothing(make_model, pixels, backend):
    model = make_model(num_karat_heads=1)
    model.set_attn_implementation(backend)
    expected = model(pixels).logits
    for mask in (torch.ones(4, TOKENS), torch.ones(4, 1, TOKENS, TOKENS), torch.ones(1, 1, 1, TOKENS).bool()):
        mask = mask.bool() if mask.dim() == 4 else mask
        assert relative_error(model(pixels, attention_mask=mask).logits, expected) < 1e-5


@pytest.mark.parametrize(
    "shape", [(4, 6), (3, 7), (4, 7, 7), (4, 1, 7, 6), (4, 3, 7, 7), (2, 1, 7, 7), (4, 1, 3, 7), (7,)]
)
def test_a_mask_of_another_shape_raises(make_model, pixels, shape):
    with pytest.raises(ValueError, match=r"attention_mask.*expected"):
        make_model()(pixels, attention_mask=torch.ones(shape, dtype=torch.bool))


# ------------------------------------------------------------------------------------------------- dropout and depth


def test_attention_dropout_acts_on_softmax_heads_only_and_says_so_once(make_model, pixels, messages):
    model = make_model(attention_probs_dropout_prob=0.5)
    make_model(attention_probs_dropout_prob=0.5)
    assert len([m for m in messages() if "attention_probs_dropout_prob" in m]) == 1
    for backend in BACKENDS:
        model.set_attn_implementation(backend)
        assert torch.equal(model.train()(pixels).logits, model.eval()(pixels).logits)
    mixed = make_model(attention_probs_dropout_prob=0.5, num_karat_heads=1, num_hidden_layers=1)
    seen = []
    mixed.vit.layers[0].attention.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for backend in BACKENDS:
        mixed.set_attn_implementation(backend)
        seen.clear()
        mixed.train()(pixels), mixed.eval()(pixels)
        assert torch.equal(seen[0][..., :8], seen[1][..., :8])
        assert not torch.allclose(seen[0][..., 8:], seen[1][..., 8:])


def test_drop_path_rises_with_depth_and_keeps_the_expectation(make_model):
    model = make_model(drop_path_rate=0.3, num_hidden_layers=4)
    assert [layer.drop_path_rate for layer in model.vit.layers] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert make_model(drop_path_rate=0.3, num_hidden_layers=1).vit.layers[0].drop_path_rate == 0.0
    layer = model.vit.layers[-1]
    branch = torch.ones(20000, 2, 3)
    assert torch.equal(layer.eval().drop_path(branch), branch)
    layer.train()
    torch.manual_seed(0)
    dropped = layer.drop_path(branch)
    per_image = dropped.flatten(1)
    assert ((per_image == 0).all(1) | torch.isclose(per_image, torch.tensor(1 / 0.7)).all(1)).all()
    assert (per_image == 0).all(1).float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.02)


def test_drop_path_rates_survive_loading_and_casting(make_model, tmp_path):
    make_model(drop_path_rate=0.3, num_hidden_layers=4).save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        model = KArAtViTForImageClassification.from_pretrained(tmp_path, dtype=dtype)
        assert not any("drop_path" in name for name in model.state_dict())
        rates = [layer.drop_path_rate.item() for layer in model.vit.layers]
        assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3], rel=1e-2)
        torch.manual_seed(0)
        branch = model.vit.layers[1].train().drop_path(torch.ones(20000, 1, 1, dtype=dtype))
        assert branch.dtype == dtype
        assert (branch == 0).float().mean().item() == pytest.approx(0.1, abs=0.01)


# --------------------------------------------------------------------------------------------------------- torch.func


@pytest.mark.system
@pytest.mark.parametrize("backend", ["eager", "karat_portable", "karat_triton"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_gradients_of_single_images_by_vmap(make_model, pixels, backend, form, masked):
    model = make_model(dtype=torch.float64, num_hidden_layers=1, num_karat_heads=1 + masked, **form)
    model.set_attn_implementation(backend)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    masks = torch.rand(4, TOKENS, generator=torch.Generator().manual_seed(3)) > 0.3 if masked else None
    labels = torch.tensor([0, 1, 2, 3])

    def loss(parameters, image, label, mask):
        mask = None if mask is None else mask[None]
        inputs = {"attention_mask": mask, "labels": label[None]}
        return torch.func.functional_call(model, parameters, (image[None],), inputs).loss

    axes = (None, 0, 0, 0 if masked else None)
    found = torch.func.vmap(torch.func.grad(loss), axes)(parameters, pixels.double(), labels, masks)
    model.set_attn_implementation("eager")
    for index in range(len(pixels)):
        mask = masks[index : index + 1] if masked else None
        inputs = {"pixel_values": pixels[index : index + 1].double(), "labels": labels[index : index + 1]}
        expected = backward(model, attention_mask=mask, **inputs)
        for name, gradients in found.items():
            wanted = expected.get(name, torch.zeros_like(gradients[index]))
            torch.testing.assert_close(gradients[index], wanted, rtol=1e-8, atol=1e-10, msg=name)


def test_second_derivatives_by_torch_func(make_model, pixels):
    def product(backend):
        model = make_model(dtype=torch.float64, num_hidden_layers=1)
        model.set_attn_implementation(backend)
        image = pixels[:1].double()

        def loss(image):
            return model(image).logits.square().sum()

        return torch.func.jvp(torch.func.grad(loss), (image,), (torch.ones_like(image),))[1]

    torch.testing.assert_close(product("karat_portable"), product("eager"), rtol=1e-8, atol=1e-10)


# ------------------------------------------------------------------------------------------- embeddings and bad input


def test_masked_patches_are_replaced_by_the_mask_token(make_config, pixels):
    model = KArAtViTModel(make_config(), use_mask_token=True).eval()
    masked = torch.zeros(4, 6, dtype=torch.bool)
    masked[1, 2] = True
    with torch.no_grad():
        model.embeddings.mask_token.fill_(3.0)
    other = pixels.clone()
    other[1, :, :4, 8:] = 0.0  # what lies under the mask does not matter
    expected = model(pixels, bool_masked_pos=masked).last_hidden_state
    assert torch.allclose(model(other, bool_masked_pos=masked).last_hidden_state, expected, atol=1e-6)
    assert not torch.allclose(model(pixels).last_hidden_state[1], expected[1], atol=1e-3)
    with pytest.raises(ValueError, match="use_mask_token=True"):
        KArAtViTModel(make_config())(pixels, bool_masked_pos=masked)


@pytest.mark.parametrize(
    ("image_size", "patch_size", "grid"),
    [(16, 4, (4, 4)), ([8, 16], [4, 2], (2, 8)), ([12, 9], (4, 3), (3, 3)), ((10, 11), 4, (2, 2))],
)
def test_any_image_and_patch_shape(make_model, image_size, patch_size, grid):
    model = make_model(image_size=image_size, patch_size=patch_size)
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    outputs = model(torch.randn(2, 3, height, width), output_attentions=True)
    tokens = grid[0] * grid[1] + 1
    assert outputs.attentions[0].shape == (2, 2, tokens, tokens)
    larger = torch.randn(2, 3, 2 * height, 3 * width)
    assert model(larger, interpolate_pos_encoding=True).logits.shape == (2, 5)


BAD_PIXELS = {
    "height": (torch.randn(2, 3, 12, 12), r"12\*12.*8\*12.*interpolate_pos_encoding"),
    "transposed": (torch.randn(2, 3, 12, 8), r"12\*8.*8\*12"),
    "channels": (torch.randn(2, 1, 8, 12), "1 channels.*takes 3"),
    "channels_last": (torch.randn(2, 8, 12, 3), "8 channels.*takes 3"),
    "no_batch": (torch.randn(3, 8, 12), r"\(3, 8, 12\).*\(batch, channels, height, width\)"),
    "array": (torch.zeros(2, 3, 8, 12).numpy(), "ndarray.*tensor.*return_tensors"),
    "list": ([torch.zeros(3, 8, 12)], "list.*tensor.*return_tensors"),
    "bytes": (torch.zeros(2, 3, 8, 12, dtype=torch.uint8), "torch.uint8.*image processor"),
    "nan": (torch.randn(3, 3, 8, 12).index_fill(0, torch.tensor([1]), math.nan), r"NaN or infinite.*\[1\]"),
    "infinity": (torch.randn(3, 3, 8, 12).index_fill(0, torch.tensor([0, 2]), math.inf), r"NaN or infinite.*\[0, 2\]"),
}


@pytest.mark.parametrize(("images", "message"), BAD_PIXELS.values(), ids=BAD_PIXELS.keys())
def test_what_is_no_image_of_the_model_raises(make_model, images, message):
    with pytest.raises(ValueError, match=message):
        make_model()(images)


def test_missing_pixels_raise(make_model):
    with pytest.raises(ValueError, match="pixel_values"):
        make_model()()


def test_images_smaller_than_a_patch_raise(make_model):
    with pytest.raises(ValueError, match="smaller than a patch"):
        make_model()(torch.randn(1, 3, 2, 12), interpolate_pos_encoding=True)


def test_another_configuration_class_raises(sizes):
    with pytest.raises(ValueError, match=r"KArAtViTConfig, not a ViTConfig.*from_dict"):
        KArAtViTModel(ViTConfig(**sizes))
    assert KArAtViTConfig.from_dict(ViTConfig(**sizes).to_dict()).hidden_size == 16


# ------------------------------------------------------------------------------------- initialisation and freezing


def test_initialisation_is_deterministic_under_a_seed(make_config, form):
    states = []
    for seed in (0, 0, 1):
        set_seed(seed)
        states.append(KArAtViTForImageClassification(make_config(**form)).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0] if "operator" in name)
    assert all(torch.isfinite(tensor).all() for tensor in states[0].values())


def test_the_inherited_parameters_start_as_in_vit(make_config):
    set_seed(0)
    model = KArAtViTModel(make_config(hidden_size=64, initializer_range=0.01))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.01, rel=0.1) and (module.bias == 0).all()
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all() and (module.bias == 0).all()
    assert model.embeddings.position_embeddings.std().item() == pytest.approx(0.01, rel=0.2)


FREEZING = {
    "zero_base": ({}, {"scale_base"}),
    "base": ({"base_fn": "silu"}, set()),
    "base_frozen": ({"base_fn": "silu", "train_base": False}, {"scale_base"}),
    "basis_frozen": ({"base_fn": "silu", "train_basis": False}, {"scale_basis", "cos_coef", "sin_coef"}),
    "both_frozen": ({"train_base": False, "train_basis": False}, {"scale_base", "scale_basis", "cos_coef", "sin_coef"}),
}


@pytest.mark.parametrize(("changes", "expected"), FREEZING.values(), ids=FREEZING.keys())
def test_freezing_holds_on_construction_and_after_loading(make_config, pixels, tmp_path, sharing, changes, expected):
    built = KArAtViTForImageClassification(make_config(sharing=sharing, **changes))
    built.save_pretrained(tmp_path)
    loaded = KArAtViTForImageClassification.from_pretrained(tmp_path)
    base = KArAtViTModel.from_pretrained(tmp_path)
    for model in (built, loaded, base, copy.deepcopy(loaded)):
        frozen = {name.rpartition(".")[2] for name, p in model.named_parameters() if not p.requires_grad}
        assert frozen == expected
    # Every other parameter gets a gradient: distributed training needs that.
    loaded(pixels, labels=torch.tensor([0, 1, 2, 3])).loss.backward()
    assert {n for n, p in loaded.named_parameters() if p.grad is None} == {
        n for n, p in loaded.named_parameters() if not p.requires_grad
    }
    # Frozen parameters count.
    assert built.num_parameters() == sum(p.numel() for p in built.parameters())
    assert built.num_parameters(only_trainable=True) < built.num_parameters() or not expected


def as_peft_saves_modules(model):
    """What PEFT's `modules_to_save` does: train a copy of a module of a frozen model."""
    model.vit.layers = nn.ModuleDict({"default": copy.deepcopy(model.requires_grad_(False).vit.layers)})
    model.vit.layers.requires_grad_(True)
    model.vit.layers = model.vit.layers["default"]
    return model


def one_by_one(model):
    for parameter in model.requires_grad_(False).parameters():
        parameter.requires_grad = True
    return model


UNFREEZING = {
    "module": lambda model: model.requires_grad_(False).requires_grad_(True),
    "parameters": one_by_one,
    "peft": as_peft_saves_modules,
    "copy": lambda model: copy.deepcopy(model).requires_grad_(True),
    "pickle": lambda model: pickle.loads(pickle.dumps(model)).requires_grad_(True),
    "dtype": lambda model: model.to(torch.float64).float().requires_grad_(True),
    "resize": lambda model: model.resize((4, 4)).resize((8, 12)).requires_grad_(True),
}


@pytest.mark.parametrize("unfreeze", UNFREEZING.values(), ids=UNFREEZING.keys())
@pytest.mark.parametrize("changes", [{}, {"train_basis": False}, {"sharing": "universal"}], ids=str)
def test_ddp_does_not_wait_for_the_scales_of_a_zero_base(make_model, pixels, tmp_path, unfreeze, changes):
    make_model(**changes).save_pretrained(tmp_path)
    model = unfreeze(KArAtViTForImageClassification.from_pretrained(tmp_path))
    scales = {name for name, _ in model.named_parameters() if name.endswith("scale_base")}
    assert scales and {name for name in scales if model.get_parameter(name).requires_grad} == set()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):  # the second step is the one that would stop
            wrapped(pixels, labels=torch.tensor([0, 1, 2, 3])).loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad), name


def test_scales_of_a_base_function_can_be_unfrozen(make_model, pixels):
    model = make_model(base_fn="silu", train_base=False).requires_grad_(True)
    found = backward(model, pixel_values=pixels, labels=torch.tensor([0, 1, 2, 3]))
    assert all((gradient != 0).any() for name, gradient in found.items() if name.endswith("scale_base"))


def test_every_parameter_gets_a_gradient(make_model, pixels, shared_form):
    model = make_model(base_fn="gelu", **shared_form)
    backward(model, pixel_values=pixels, labels=torch.tensor([0, 1, 2, 3]))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


# ------------------------------------------------------------------------------------------ gradient checkpointing


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("mixture", [{}, {"num_karat_heads": 1, "karat_layers": [1]}], ids=["all", "mixed"])
def test_gradient_checkpointing_gives_the_same_gradients(make_model, pixels, sharing, use_reentrant, mixture):
    model = make_model(sharing=sharing, **mixture).train()
    mask = masks()["keys"]
    inputs = {"pixel_values": pixels, "labels": torch.tensor([0, 1, 2, 3]), "attention_mask": mask}
    expected = backward(model, **inputs)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert model.is_gradient_checkpointing
    runs = []
    handle = model.vit.layers[0].layernorm_before.register_forward_hook(lambda *_: runs.append(0))
    actual = backward(model, **inputs)
    handle.remove()
    assert len(runs) == 2, "the block was not recomputed"
    outputs = model(pixels, output_attentions=True, output_hidden_states=True)
    assert len(outputs.attentions) == 2 and len(outputs.hidden_states) == 3
    outputs.logits.sum().backward()
    # Reentrant checkpointing gives a gradient only to blocks whose input has one; the embeddings provide it.
    assert_same_gradients(actual, expected)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


# ------------------------------------------------------------------------------------------------------------ losses


PROBLEMS = {
    "single_label": ("single_label_classification", torch.tensor([0, 1, 2, 4])),
    "multi_label": ("multi_label_classification", torch.tensor([[0.0, 1, 1, 0, 0]] * 3 + [[1.0, 0, 0, 1, 0]])),
    "regression": ("regression", torch.arange(20.0).view(4, 5) / 10),
}
problems = pytest.mark.parametrize(("problem_type", "labels"), PROBLEMS.values(), ids=PROBLEMS.keys())


@problems
def test_losses_by_problem_type(make_model, pixels, problem_type, labels):
    model = make_model(problem_type=problem_type)
    outputs = model(pixels, labels=labels)
    expected = {
        "single_label_classification": nn.functional.cross_entropy,
        "multi_label_classification": nn.functional.binary_cross_entropy_with_logits,
        "regression": nn.functional.mse_loss,
    }[problem_type](outputs.logits, labels)
    assert torch.allclose(outputs.loss, expected)
    assert torch.isfinite(outputs.loss)


def test_the_problem_type_is_inferred_from_the_labels(make_model, pixels):
    for changes, labels, expected in (
        ({"num_labels": 1}, torch.rand(4), "regression"),
        ({}, torch.tensor([0, 1, 2, 3]), "single_label_classification"),
        ({}, torch.rand(4, 5).round(), "multi_label_classification"),
    ):
        model = make_model(**changes)
        assert torch.isfinite(model(pixels, labels=labels).loss)
        assert model.config.problem_type == expected


class Images(torch.utils.data.Dataset):
    def __init__(self, labels, count: int = 8):
        generator = torch.Generator().manual_seed(7)
        self.pixels = torch.randn(count, 3, 8, 12, generator=generator)
        self.labels = labels

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return {"pixel_values": self.pixels[index], "labels": self.labels[index % len(self.labels)]}


class OneEpochOfGradients(Trainer):
    """Keeps the gradients of the only optimiser step."""

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        optimizer.register_step_pre_hook(lambda *_: setattr(self, "seen", gradients(self.model)))
        return optimizer


@problems
def test_trainer_accumulates_to_the_gradients_of_one_batch(make_model, tmp_path, problem_type, labels):
    seen = []
    for batch, steps in ((8, 1), (2, 4)):
        arguments = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            num_train_epochs=1,
            max_grad_norm=0.0,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = OneEpochOfGradients(make_model(problem_type=problem_type), arguments, train_dataset=Images(labels))
        assert not trainer.model_accepts_loss_kwargs
        trainer.train()
        assert trainer.state.global_step == 1
        seen.append(trainer.seen)
    assert_same_gradients(seen[1], seen[0])


def test_trainer_saves_and_resumes_with_every_weight(make_model, tmp_path, messages, sharing):
    labels = torch.tensor([0, 1, 2, 4])

    def trainer(model, steps):
        arguments = TrainingArguments(
            str(tmp_path / "run"),
            per_device_train_batch_size=4,
            max_steps=steps,
            learning_rate=1e-2,
            save_steps=2,
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=3,
        )
        return Trainer(model, arguments, train_dataset=Images(labels))

    first = trainer(make_model(sharing=sharing), 4)
    first.train()
    saved = {path.name for path in (tmp_path / "run" / "checkpoint-2").iterdir()}
    assert {"config.json", "model.safetensors", "modeling_karat_vit.py", "configuration_karat_vit.py"} <= saved
    assert {"basis.py", "karat_operator.py", "portable.py", "conversion.py"} <= saved
    # Resuming from the middle ends where the first run ended, from whatever weights the new model starts.
    second = trainer(make_model(sharing=sharing, seed=9), 4)
    second.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    expected = first.model.state_dict()
    for name, tensor in second.model.state_dict().items():
        assert torch.allclose(tensor, expected[name], atol=1e-6), name
    assert not [message for message in messages() if "missing" in message.lower()]
    loaded = KArAtViTForImageClassification.from_pretrained(tmp_path / "run" / "checkpoint-4")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


# ----------------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@mixtures
def test_half_precision_weights(make_model, pixels, tmp_path, dtype, mixture):
    model = make_model(**mixture)
    expected = model(pixels).logits
    model.save_pretrained(tmp_path)
    half = KArAtViTForImageClassification.from_pretrained(tmp_path, dtype=dtype).train()
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    tolerance = 0.1 if dtype == torch.bfloat16 else 0.02
    for backend in BACKENDS:
        half.set_attn_implementation(backend)
        outputs = half(pixels, labels=torch.tensor([0, 1, 2, 3]))
        assert outputs.logits.dtype == dtype
        assert relative_error(outputs.logits.float(), expected) < tolerance
        outputs.loss.backward()
    assert all(torch.isfinite(gradient).all() for gradient in gradients(half).values())


@mixtures
def test_autocast(make_model, pixels, mixture):
    model = make_model(**mixture)
    expected = backward(model, pixel_values=pixels, labels=torch.tensor([0, 1, 2, 3]))
    logits = model(pixels).logits
    for backend in BACKENDS:
        model.set_attn_implementation(backend)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = backward(model, pixel_values=pixels, labels=torch.tensor([0, 1, 2, 3]))
            assert relative_error(model(pixels).logits.float(), logits) < 0.1
        total = math.sqrt(sum(g.norm() ** 2 for g in expected.values()))
        assert math.sqrt(sum((actual[n] - expected[n]).norm() ** 2 for n in expected)) < 0.1 * total


def test_pixels_are_cast_to_the_weights(make_model, pixels):
    assert make_model(dtype=torch.float64)(pixels).logits.dtype == torch.float64
    assert make_model()(pixels.half()).logits.dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------- structure


def test_the_universal_operator_is_registered_once(make_model):
    model = make_model(sharing="universal")
    operators = [name for name, module in model.named_modules() if isinstance(module, KArAtOperator)]
    assert operators == ["vit.operator"]
    assert all(layer.attention.operator is None for layer in model.vit.layers)
    assert len(list(model.vit.modules())) == len(set(model.vit.modules()))


def test_every_block_has_its_own_operator(make_model):
    model = make_model(karat_layers=[0], num_hidden_layers=3)
    assert [isinstance(layer.attention.operator, KArAtOperator) for layer in model.vit.layers] == [True, False, False]
    assert all(isinstance(layer.attention, KArAtViTAttention) for layer in model.vit.layers)


def test_karat_parameter_names_are_those_that_vit_does_not_have(make_model, sizes, sharing):
    from transformers import ViTForImageClassification

    model = make_model(sharing=sharing)
    vit = {name for name, _ in ViTForImageClassification(ViTConfig(**sizes)).named_parameters()}
    assert {name for name, _ in model.named_parameters()} - vit == model.karat_parameter_names()


def test_input_embeddings(make_model):
    model = make_model()
    assert model.get_input_embeddings() is model.vit.embeddings.patch_embeddings
    assert model.base_model is model.vit
