import re

import pytest
import timm
import torch
from detr_inputs import SMALL, FixedFeatures
from torch import nn

from dat.detection import DINO, DeformableDETR, HungarianMatcher, SetCriterion, official

KEYS = ("pred_logits", "pred_boxes")
TWO_STAGE = {"box_refine": True, "two_stage": True}
# Every ingredient, on the model that has it off.
ENRICHED = {**TWO_STAGE, "mixed_selection": True, "look_forward_twice": True, "denoising": 4}
MODELS = {
    "dino": (DINO, {"denoising": 4}),
    "own heads": (DINO, {"denoising": 60, "share_heads": False}),
    "one head": (DINO, {"denoising": 4, "share_encoder_heads": True}),
    "two-stage": (DeformableDETR, ENRICHED),
}


def some_maps(batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = ((16, 8, 12), (32, 4, 6), (48, 2, 3))
    return [torch.randn(batch, *size, generator=generator) for size in sizes]


def small_model(kind=DINO, backbone=None, seed=0, **options):
    torch.manual_seed(seed)
    model = kind(backbone or FixedFeatures(some_maps()), 5, **(SMALL | options))
    # Weights that start at zero would hide mistakes.
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return model


def some_targets(*counts):
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "labels": torch.randint(5, (n,), generator=generator),
            "boxes": torch.rand(n, 4, generator=generator) * 0.4 + 0.2,
        }
        for n in counts
    ]


def a_mask():
    mask = torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[1, :, 64:] = True
    return mask


def losses_of(outputs, targets):
    return SetCriterion(5, HungarianMatcher())(outputs, targets)


@pytest.mark.parametrize("name", MODELS)
def test_predictions_and_main_losses_do_not_depend_on_denoising(name):
    kind, options = MODELS[name]
    model, images, targets = small_model(kind, **options), torch.zeros(2, 3, 64, 96), some_targets(3, 1)
    plain, wanted = model(images, a_mask()), None
    for _ in range(2):
        outputs = model(images, a_mask(), targets)
        for ours, theirs in zip((outputs, *outputs["aux_outputs"]), (plain, *plain["aux_outputs"]), strict=True):
            for key in KEYS:
                torch.testing.assert_close(ours[key], theirs[key], atol=1e-5, rtol=1e-5)
        losses = losses_of(outputs, targets)
        wanted = losses_of(plain, targets)
        for loss, value in wanted.items():
            torch.testing.assert_close(losses[loss], value)
        main = sum(losses[loss] for loss in wanted)
        (gradient,) = torch.autograd.grad(main, model.label_enc.weight, retain_graph=True)
        assert not gradient.any()
    names = ("loss_ce", "loss_bbox", "loss_giou")
    assert losses.keys() - wanted.keys() == {f"{name}_dn{end}" for name in names for end in ("", "_0")}
    (gradient,) = torch.autograd.grad(losses["loss_ce_dn"], model.label_enc.weight)
    assert gradient.any()


def test_arguments_of_denoising_replace_the_models():
    kind, options = MODELS["dino"]
    model, targets = small_model(kind, **options), some_targets(3, 1)
    made = model.make_denoising(targets, number=12, label_noise=0.0, box_noise=0.0)
    assert made["labels"].shape[1] > model.make_denoising(targets)["labels"].shape[1]
    assert made["labels"][0, :3].equal(targets[0]["labels"])
    torch.testing.assert_close(made["boxes"][0, :3], targets[0]["boxes"])


@pytest.mark.parametrize("name", MODELS)
def test_groups_do_not_see_each_other_but_the_matched_queries(name):
    kind, options = MODELS[name]
    model, images, targets = small_model(kind, **options), torch.zeros(2, 3, 64, 96), some_targets(3, 1)
    made = model.make_denoising(targets)
    size = made["labels"].shape[1] // made["num_groups"]
    before = model(images, a_mask(), denoising=made)["dn_outputs"]["pred_logits"]
    labels = made["labels"].clone()
    labels[0, 1] = (labels[0, 1] + 1) % 5
    after = model(images, a_mask(), denoising={**made, "labels": labels})["dn_outputs"]["pred_logits"]
    changed = (before - after).abs().amax(-1) > 1e-6
    assert changed[0, :size].all()
    torch.testing.assert_close(after[0, size:], before[0, size:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after[1], before[1], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        model.query_embed.weight.add_(1)
    moved = model(images, a_mask(), denoising=made)["dn_outputs"]["pred_logits"]
    assert ((moved - before).abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_ignores_targets(name):
    kind, options = MODELS[name]
    model = small_model(kind, **options, one_to_many_queries=3).eval()
    images, state = torch.zeros(2, 3, 64, 96), torch.get_rng_state()
    outputs, plain = model(images, a_mask(), some_targets(3, 1)), model(images, a_mask())
    assert torch.get_rng_state().equal(state)
    assert outputs.keys() == plain.keys() == {*KEYS, "aux_outputs", "enc_outputs"}
    assert all(outputs[key].equal(plain[key]) for key in KEYS)
    assert outputs["pred_boxes"].shape == (2, 9, 4)


@pytest.mark.parametrize("name", MODELS)
def test_gradient_reaches_every_parameter(name):
    kind, options = MODELS[name]
    backbone = timm.create_model("test_resnet", features_only=True, out_indices=(2, 3, 4))
    model, targets = small_model(kind, backbone, **options), some_targets(3, 1)
    criterion = SetCriterion(5, HungarianMatcher())
    criterion.total(criterion(model(torch.randn(2, 3, 64, 96), a_mask(), targets), targets)).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        # Blocks of this backbone start as identities.
        assert parameter.grad.any() or parameter_name.startswith("backbone"), parameter_name


def test_a_batch_without_targets_trains_all_parameters_too():
    """Processes of DistributedDataParallel wait for the gradients of every parameter."""
    model, targets = small_model(denoising=4), some_targets(0, 0)
    outputs = model(torch.zeros(2, 3, 64, 96), a_mask(), targets)
    assert outputs["dn_outputs"]["pred_logits"].shape == (2, 0, 5)
    losses = losses_of(outputs, targets)
    assert not any("_dn" in name for name in losses)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_looking_forward_twice_changes_gradients_alone(name):
    kind, options = MODELS[name]
    results = []
    for twice in (False, True):
        model = small_model(kind, **(options | {"denoising": 0, "look_forward_twice": twice}))
        outputs = model(torch.zeros(2, 3, 64, 96), a_mask())
        losses_of(outputs, some_targets(3, 1))["loss_bbox"].backward()
        results.append((outputs["pred_boxes"], model.decoder[0].linear1.weight.grad, model.enc_output.weight.grad))
    (boxes, gradient, _), (other_boxes, other_gradient, proposals) = results
    assert boxes.equal(other_boxes)
    assert (gradient - other_gradient).abs().max() > 1e-4 * gradient.abs().max()
    # The encoder's boxes are not differentiated.
    assert proposals is None or not proposals.any()


@pytest.mark.parametrize("name", MODELS)
def test_content_of_mixed_queries_is_the_same_in_every_image(name):
    kind, options = MODELS[name]
    model = small_model(kind, **options).eval()
    contents = []
    model.decoder[0].register_forward_pre_hook(lambda module, inputs: contents.append(inputs[0]))
    model(torch.zeros(2, 3, 64, 96), a_mask())
    assert contents[0].equal(model.query_embed.weight.expand(2, -1, -1))


def test_proposals_are_the_best_of_all_classes():
    model = small_model(num_queries=200).eval()
    with torch.no_grad():
        everything = model(torch.zeros(2, 3, 64, 96), a_mask())["enc_outputs"]["pred_logits"].amax(-1)
        model.num_queries = 9
        found = model(torch.zeros(2, 3, 64, 96), a_mask())["enc_outputs"]
    scores = found["pred_logits"].amax(-1)
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    torch.testing.assert_close(scores, everything.sort(1, descending=True).values[:, :9])
    # There are 96 + 24 + 6 + 2 positions.
    assert everything.shape == (2, 128)


@pytest.mark.parametrize("options", [{"share_heads": False}, {"share_encoder_heads": True}])
def test_equal_heads_predict_the_same_shared_or_not(options):
    """On five levels, four of which are maps of the backbone."""
    maps = FixedFeatures([torch.randn(2, 8, 16, 24), *some_maps()])
    separate, model = small_model(backbone=maps, num_levels=5), small_model(backbone=maps, num_levels=5, **options)
    if "share_encoder_heads" in options:
        separate.enc_out_class_embed.load_state_dict(separate.class_embed[0].state_dict())
        separate.enc_out_bbox_embed.load_state_dict(separate.bbox_embed[0].state_dict())
    state = separate.state_dict()
    own = {name: state[re.sub(r"^(class|bbox)_embed.\d", r"\1_embed.0", name)] for name in model.state_dict()}
    model.load_state_dict(own)
    images, targets = torch.zeros(2, 3, 64, 96), some_targets(3, 1)
    made = model.make_denoising(targets)
    ours, theirs = (x(images, a_mask(), denoising=made) for x in (model, separate))
    for key in KEYS:
        assert ours[key].equal(theirs[key])
        assert ours["dn_outputs"][key].equal(theirs["dn_outputs"][key])
        assert ours["enc_outputs"][key].equal(theirs["enc_outputs"][key])


def test_the_encoder_learns_the_true_classes():
    outputs, targets = small_model()(torch.zeros(2, 3, 64, 96), a_mask()), some_targets(3, 1)
    losses = losses_of(outputs, targets)
    own = {key: outputs["enc_outputs"][key] for key in KEYS}
    for name, loss in losses_of(own, targets).items():
        torch.testing.assert_close(losses[f"{name}_enc"], loss)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padded", [False, True])
def test_batched_equals_single(name, padded):
    kind, options = MODELS[name]
    backbone = timm.create_model("test_resnet", features_only=True, out_indices=(2, 3, 4))
    model = small_model(kind, backbone, **options).eval()
    images, mask = torch.randn(2, 3, 64, 96), a_mask() if padded else None
    batched = model(images, mask)
    for i in range(2):
        single = model(images[i : i + 1], None if mask is None else mask[i : i + 1])
        for key in KEYS:
            torch.testing.assert_close(batched[key][i : i + 1], single[key], atol=1e-4, rtol=1e-4)


def test_gradient_checkpointing_changes_nothing():
    model, targets, gradients = small_model(denoising=4), some_targets(3, 1), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(2)
        sum(losses_of(model(torch.zeros(2, 3, 64, 96), a_mask(), targets), targets).values()).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_bfloat16_autocast():
    model, targets = small_model(denoising=4), some_targets(3, 1)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(torch.zeros(2, 3, 64, 96), a_mask(), targets)
    assert outputs["pred_boxes"].dtype == outputs["dn_outputs"]["pred_boxes"].dtype == torch.float32
    losses = losses_of(outputs, targets)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize(
    ("kind", "options"),
    [(DINO, {}), (DeformableDETR, TWO_STAGE), (DeformableDETR, {"box_refine": True}), (DeformableDETR, {})],
    ids=["dino", "two-stage", "refine", "plain"],
)
def test_one_to_many_queries_train_beside_the_others(kind, options):
    """Hybrid matching: the other queries do not see them, and their loss is that of repeated targets."""
    images, targets = torch.zeros(2, 3, 64, 96), some_targets(3, 1)
    model = small_model(kind, **options, one_to_many_queries=20)
    outputs = model(images, a_mask(), targets)
    many = outputs["one_to_many_outputs"]
    assert many["pred_boxes"].shape == (2, 20, 4)
    assert len(many["aux_outputs"]) == 1
    model.one_to_many_queries = 0
    for key in KEYS:
        torch.testing.assert_close(outputs[key], model(images, a_mask())[key], atol=1e-5, rtol=1e-5)
    criterion = SetCriterion(5, HungarianMatcher(), one_to_many=4)
    losses = criterion(outputs, targets)
    repeated = [{"labels": t["labels"].repeat(4), "boxes": t["boxes"].repeat(4, 1)} for t in targets]
    for name, loss in criterion(many, repeated).items():
        stem = name.removesuffix("_0")
        torch.testing.assert_close(losses[f"{stem}_o2m{name.removeprefix(stem)}"], loss)


def test_small_images_have_fewer_proposals_than_queries():
    model, targets = small_model(num_queries=120, one_to_many_queries=50), some_targets(3, 1)
    outputs = model(torch.zeros(2, 3, 64, 96), a_mask(), targets)
    assert outputs["pred_boxes"].shape == (2, 120, 4)
    assert outputs["one_to_many_outputs"]["pred_boxes"].shape == (2, 8, 4)
    model.num_queries = 150
    assert "one_to_many_outputs" not in model(torch.zeros(2, 3, 64, 96), a_mask())


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (DINO, {"share_heads": False, "share_encoder_heads": True}, "share_encoder_heads=True needs share_heads=True"),
        (DeformableDETR, {"denoising": 100, "box_refine": True}, "denoising=100 needs two_stage=True"),
        (DeformableDETR, {"mixed_selection": True}, "mixed_selection=True needs two_stage=True"),
        (DeformableDETR, {"look_forward_twice": True}, "look_forward_twice=True needs box_refine=True"),
    ],
)
def test_arguments_that_do_not_fit(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(FixedFeatures(some_maps()), 5, **(SMALL | options))


def test_training_with_denoising_starts_from_weights_without_it(tmp_path):
    state, model = small_model(denoising=0, seed=1).state_dict(), small_model(denoising=4)
    labels = model.label_enc.weight.clone()
    torch.save(state, tmp_path / "plain.pth")
    assert official.load(model, tmp_path / "plain.pth")
    assert model.label_enc.weight.equal(labels)
    assert all(model.state_dict()[name].equal(tensor) for name, tensor in state.items())


def test_official_weights_fit_a_model_without_denoising():
    state = small_model(denoising=4).state_dict()
    model = small_model(denoising=0)
    model.load_state_dict(official.convert(state, model), strict=True)
