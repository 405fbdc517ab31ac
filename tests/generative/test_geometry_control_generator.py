"""Geometry control: the small ControlNet, pipelines of diffusers, and the filter by held-out folds."""

import copy
import hashlib
import math

import pytest
import torch

import posterity.generative.tiny_control_net as tiny_module
from posterity.generative import (
    FilterResult,
    GeometryControl,
    Pose,
    TinyControlNet,
    consistency_filter,
    edge_map,
    pose_error,
    primitive,
    render,
    rotation,
    sample_poses,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def state(*modules):
    return [value.clone() for module in modules for value in module.state_dict().values()]


# --- the small model


@pytest.fixture(scope="module")
def tiny():
    return TinyControlNet.pretrained()


def noisy(model, n=3):
    x = torch.randn(n, 12, 16, 16, generator=seeded())
    t = torch.randint(1000, (n,), generator=seeded())
    context = model.words(model.tokens(["a red car", "", "chair"])).detach()
    edges = (torch.rand(n, 1, 32, 32, generator=seeded()) < 0.1).float()
    return x, t, context, edges


def test_a_new_copy_changes_nothing_bit_for_bit(tiny):
    model = TinyControlNet(tiny.unet, tiny._copy(tiny.unet).eval(), tiny.words, tiny.scheduler)
    x, t, context, edges = noisy(model)
    with torch.no_grad():
        assert torch.equal(model.predict(x, t, context, edges), model.predict(x, t, context, None))
        assert not torch.equal(tiny.predict(x, t, context, edges), tiny.predict(x, t, context, None))


def test_training_the_copy_leaves_the_locked_weights_alone(tiny, monkeypatch):
    monkeypatch.setattr(tiny_module, "TRAIN_BATCH", 2)
    model = TinyControlNet(tiny.unet, tiny._copy(tiny.unet), tiny.words, tiny.scheduler)
    locked, own = state(model.unet, model.words), state(model.controlnet)
    views = tiny_module._views(1, seeded())
    model._stage([model.controlnet], views, 2, seeded(), controlled=True)
    assert all(torch.equal(a, b) for a, b in zip(locked, state(model.unet, model.words), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(own, state(model.controlnet), strict=True))
    assert not any(p.requires_grad for module in model._modules.values() for p in module.parameters())


def test_images_follow_the_edges_and_not_where_there_are_none(tiny):
    """Inside and outside of an outline differ more where the model was told of the outline."""
    pose = sample_poses(12, generator=seeded(5))
    seen = render(primitive("box", generator=seeded(5)), pose, size=32)
    edges = edge_map(seen.image)

    def contrast(images):  # between the two sides of the outline, over the spread
        near = torch.nn.functional.max_pool2d(seen.mask.float(), 5, 1, 2).bool() & ~seen.mask
        inner = seen.mask & ~(-torch.nn.functional.max_pool2d(-seen.mask.float(), 5, 1, 2)).bool()
        gap = [
            (x[:, a].mean(1) - x[:, b].mean(1)).norm()
            for x, a, b in zip(images, near[:, 0], inner[:, 0], strict=True)
        ]
        return float(torch.stack(gap).mean())

    made = tiny(edges, ["box"] * 12, [""] * 12, seeded())
    free = tiny(torch.zeros_like(edges), ["box"] * 12, [""] * 12, seeded())
    assert contrast(made) > 1.3 * contrast(free)


def test_guidance_of_one_is_no_guidance_and_a_generator_decides(tiny):
    edges = noisy(tiny)[3][:2]
    model = copy.copy(tiny)
    model.n_steps = 2
    one, again = (model(edges, ["car", "cone"], ["", ""], seeded()) for _ in range(2))
    assert torch.equal(one, again) and one.shape == (2, 3, 32, 32)
    assert not torch.equal(one, model(edges, ["car", "cone"], ["", ""], seeded(1)))
    model.guidance_scale = 3.0
    guided = model(edges, ["car", ""], ["", ""], seeded())
    assert not torch.equal(guided[0], one[0])
    model.guidance_scale = 1.0
    alone = model(edges, ["car", ""], ["", ""], seeded())
    torch.testing.assert_close(guided[1], alone[1])  # a prompt that is its negative is guided nowhere


def test_words_are_found_in_prompts(tiny):
    words = ["", *tiny_module.KINDS, *tiny_module.COLOURS]
    found = tiny.tokens(["An image of a Red car, by a lake", "nothing known", "car " * 9])
    assert [[words[k] for k in row] for row in found.tolist()] == [
        ["red", "car", "", ""],
        [""] * 4,
        ["car"] * 4,
    ]


def test_the_painted_views_have_their_surfaces_where_the_render_has():
    """Points go back to the object: every one seen lies on the plane of its face."""
    mesh, pose = primitive("car", generator=seeded(1)), sample_poses(3, generator=seeded())
    views, seen = tiny_module._seen("car", mesh, pose), render(mesh, pose, size=32)
    corner = mesh.vertices[mesh.faces[seen.faces.clamp_min(0)[:, 0]]]  # (n, h, w, 3, 3)
    normal = torch.linalg.cross(corner[..., 1, :] - corner[..., 0, :], corner[..., 2, :] - corner[..., 0, :])
    normal = torch.nn.functional.normalize(normal, dim=-1)
    off = ((views.points.movedim(1, 3) - corner[..., 0, :]) * normal).sum(-1)
    assert off[seen.mask[:, 0]].abs().max() < 1e-4
    images, texts = tiny_module._painted(views, seeded())
    assert images.shape == (3, 3, 32, 32) and images.min() >= 0 and images.max() <= 1
    assert all(text == "" or text.split()[-1] == "car" for text in texts)


def test_training_is_decided_by_its_generator_and_rounds_to_what_the_file_holds(monkeypatch, tmp_path):
    monkeypatch.setattr(tiny_module, "MESHES", 1)
    monkeypatch.setattr(tiny_module, "VIEWS", 2)
    monkeypatch.setattr(tiny_module, "TRAIN_BATCH", 2)
    before = torch.get_rng_state()
    one, again = (TinyControlNet.train(2, seeded()) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    held = state(*one._modules.values())
    assert all(torch.equal(a, b) for a, b in zip(held, state(*again._modules.values()), strict=True))
    for p in [p for module in one._modules.values() for p in module.parameters()]:
        assert torch.equal(p, p.half().float()) and not p.requires_grad
    one._save(tmp_path / "made.safetensors")
    read = TinyControlNet._untrained(7)
    digest = hashlib.sha256((tmp_path / "made.safetensors").read_bytes()).hexdigest()
    tiny_module.read_weights(tmp_path / "made.safetensors", digest, read._modules)
    assert all(torch.equal(a, b) for a, b in zip(held, state(*read._modules.values()), strict=True))


def test_damaged_or_missing_weights_are_refused(as_a_user, monkeypatch, tmp_path):
    monkeypatch.setattr(tiny_module, "CONTROL_SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"must have SHA-256 000000000000, got .* damaged"):
        TinyControlNet.pretrained()
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors is not in"):
        tiny_module.read_weights(tmp_path / "none.safetensors", "0", {})
    write, read = tiny_module.write_weights, tiny_module.read_weights
    write(tmp_path / "other.safetensors", {"net": torch.nn.Linear(2, 1)})
    digest = hashlib.sha256((tmp_path / "other.safetensors").read_bytes()).hexdigest()
    with pytest.raises(ValueError, match="must fit the networks"):
        read(tmp_path / "other.safetensors", digest, {"net": torch.nn.Linear(2, 1, bias=False)})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.zeros(1, 1, 16, 16), ["car"], [""], None), r"\(n, 1, 32, 32\), got \(1, 1, 16, 16\)"),
        (lambda m: m(torch.zeros(1, 1, 32, 32).long(), ["car"], [""], None), "edges must be a floating-point"),
        (lambda m: m(torch.zeros(2, 1, 32, 32), ["car"], ["", ""], None), "prompts must be 2 texts, got 1"),
        (lambda m: m(torch.zeros(1, 1, 32, 32), "c", [""], None), "prompts must be 1 texts, got 'c'"),
        (lambda m: TinyControlNet.train(1), "n_steps must be an integer of at least 2"),
        (lambda m: TinyControlNet(m.unet, m.controlnet, m.words, m.scheduler, n_steps=0), "n_steps must be"),
        (lambda m: TinyControlNet(m.unet, m.controlnet, m.words, m.scheduler, guidance_scale=-1.0), "guidance_scale"),
    ],
)  # fmt: skip
def test_the_small_model_refuses_what_does_not_fit(as_a_user, tiny, call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny)


# --- pipelines of diffusers


@pytest.fixture(scope="module")
def pipeline():
    """A Stable Diffusion of random weights, and a ControlNet of it."""
    import diffusers
    import transformers

    torch.manual_seed(0)
    model = TinyPieces(diffusers, transformers)
    return model.pipe, model.control


class TinyPieces:
    def __init__(self, diffusers, transformers):
        from posterity.generative import TinyTextToImage

        small = TinyTextToImage.pretrained()
        unet = diffusers.UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 8), layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=4,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=2, cross_attention_dim=64,
        )  # fmt: skip
        vae = diffusers.AutoencoderKL(
            block_out_channels=(4, 4, 4, 4), norm_num_groups=2, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
        self.pipe = diffusers.StableDiffusionPipeline(
            vae=vae, text_encoder=small.text_encoder, tokenizer=small.tokenizer, unet=unet,
            scheduler=diffusers.PNDMScheduler(1000, skip_prk_steps=True), safety_checker=None, feature_extractor=None,
        )  # fmt: skip
        self.control = diffusers.ControlNetModel.from_unet(
            unet, conditioning_embedding_out_channels=(4, 4, 4, 4)
        )


def test_a_pipeline_is_given_the_edges_and_the_official_settings(pipeline, monkeypatch):
    pipe, control = pipeline
    line = GeometryControl.from_diffusers(pipe, control, n_steps=2, size=64)
    given = {}

    class Spy:
        unet, controlnet = pipe.unet, control

        def __call__(self, **options):
            given.update(options, training=pipe.unet.training or control.training)
            return type("Output", (), {"images": torch.zeros(len(options["prompt"]), 3, 64, 64)})

    ours = line.generator.pipe
    assert type(ours).__name__ == "StableDiffusionControlNetPipeline" and ours.controlnet is control
    assert (
        type(ours.scheduler).__name__ == "DDIMScheduler" and type(pipe.scheduler).__name__ == "PNDMScheduler"
    )
    monkeypatch.setattr(line.generator, "pipe", Spy())
    pipe.unet.train()
    made = line.generate(primitive("mug"), "mug", 3, batch_size=2, generator=seeded())
    assert pipe.unet.training and not given["training"]
    assert given["eta"] == 1 and given["guidance_scale"] == 9 and given["controlnet_conditioning_scale"] == 1
    assert given["num_inference_steps"] == 2 and given["prompt"] == made.prompts[2:]
    assert torch.equal(given["image"], made.edges[2:].expand(-1, 3, -1, -1))


def test_a_real_pipeline_runs_and_its_unet_stays_as_it_was(pipeline, capfd):
    pipe, control = pipeline
    before = state(pipe.unet)
    line = GeometryControl.from_diffusers(pipe, control, n_steps=1, size=64)
    one, again = (line.generate(primitive("mug"), "mug", 1, generator=seeded()).images for _ in range(2))
    assert one.shape == (1, 3, 64, 64) and torch.equal(one, again)
    assert all(torch.equal(a, b) for a, b in zip(before, state(pipe.unet), strict=True))


def test_folders_are_read_and_missing_ones_refused_by_name(as_a_user, pipeline, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pipe, control = pipeline
    control.save_pretrained(tmp_path / "control")
    for where, what in (
        ({"controlnet": tmp_path / "none"}, "controlnet"),
        ({"model": tmp_path / "none"}, "model"),
    ):
        with pytest.raises(ValueError, match=f"{what} must be a folder or a name of diffusers"):
            GeometryControl.from_diffusers(**{"model": pipe, "controlnet": tmp_path / "control", **where})
    line = GeometryControl.from_diffusers(pipe, tmp_path / "control", size=64)
    assert line.size == (64, 64) and all(
        torch.equal(a, b) for a, b in zip(state(control), state(line.generator.pipe.controlnet), strict=True)
    )
    with pytest.raises(ValueError, match="model must be a name, a folder or a pipeline, got int"):
        GeometryControl.from_diffusers(3, control)


# --- the filter


def labelled(n=23, seed=0):
    pose = sample_poses(n, generator=seeded(seed))
    return pose.azimuth[:, None, None, None].expand(n, 1, 2, 2).clone(), pose


def exact(images, pose):
    """A network that reads the azimuth off the image, for a camera at elevation and theta 0."""
    return lambda x: torch.stack([x[:, 0, 0, 0], 0 * x[:, 0, 0, 0], 0 * x[:, 0, 0, 0]], 1)


@pytest.mark.parametrize(("n", "n_folds"), [(23, 5), (6, 6), (10, 2)])
def test_every_image_is_scored_once_by_a_model_that_never_saw_it(n, n_folds):
    images, pose = labelled(n)
    scored, trained = [], []

    def fit(seen, labels):
        assert torch.equal(seen[:, 0, 0, 0], labels.azimuth) and torch.is_grad_enabled()
        trained.append(len(seen))

        def read(x):
            scored.extend(x[:, 0, 0, 0].tolist())
            assert not torch.isin(x[:, 0, 0, 0], seen[:, 0, 0, 0]).any()
            return rotation(labels._replace(**{k: v[:1].expand(len(x)) for k, v in labels._asdict().items()}))

        return read

    found = consistency_filter(images, pose, fit, n_folds=n_folds, generator=seeded())
    assert sorted(scored) == sorted(pose.azimuth.tolist()) and len(trained) == n_folds
    sizes = torch.bincount(found.fold).tolist()
    assert sizes[:-1] == [n // n_folds] * (n_folds - 1) and sum(sizes) == n
    assert trained == [n - size for size in sizes]


def test_the_loss_is_the_angle_to_the_label_and_the_largest_go():
    images, pose = labelled()
    found = consistency_filter(images, pose, exact, keep=0.7, generator=seeded())
    flat = pose._replace(elevation=0 * pose.elevation, theta=0 * pose.theta)
    torch.testing.assert_close(found.loss, pose_error(flat, pose))
    assert isinstance(found, FilterResult) and found.keep.sum() == 16  # round(0.7 * 23)
    assert found.loss[found.keep].max() <= found.loss[~found.keep].min()
    assert consistency_filter(images, pose, exact, keep=1.0).keep.all()
    assert consistency_filter(images, pose, exact, keep=1e-9).keep.sum() == 1


def test_permuted_images_have_permuted_results():
    images, pose = labelled()

    def fit(seen, labels):  # knows its training set only as a set
        shift = labels.azimuth.double().sum().float() / 7
        return lambda x: exact(None, None)(x) + shift

    found = consistency_filter(images, pose, fit, generator=seeded())
    order = torch.randperm(23, generator=seeded(1))
    again = consistency_filter(
        images[order], Pose(*(part[order] for part in pose)), fit, fold=found.fold[order]
    )
    torch.testing.assert_close(again.loss, found.loss[order])
    assert torch.equal(again.keep, found.keep[order]) and torch.equal(again.fold, found.fold[order])


def test_folds_are_decided_by_the_generator():
    images, pose = labelled()
    before = torch.get_rng_state()
    one, again, other = (consistency_filter(images, pose, exact, generator=seeded(k)).fold for k in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(before, torch.get_rng_state())


def test_fit_may_train_under_inference_mode():
    with torch.inference_mode():
        images, pose = labelled()

        def fit(seen, labels):
            line = torch.nn.Linear(4, 3)
            line(seen.flatten(1)).square().mean().backward()
            assert line.weight.grad is not None
            return lambda x: line(x.flatten(1))

        assert consistency_filter(images, pose, fit).loss.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_labels_are_compared_in_float32(as_a_user, dtype):
    images, pose = labelled()
    low = Pose(*(part.to(dtype) for part in pose))
    found = consistency_filter(images.to(dtype), low, exact, generator=seeded())
    wide = Pose(*(part.float() for part in low))
    expected = consistency_filter(images.to(dtype).float(), wide, exact, generator=seeded())
    assert found.loss.dtype == torch.float32
    torch.testing.assert_close(found.loss, expected.loss, rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_folds": 1}, "n_folds must be an integer of at least 2, got 1"),
        ({"n_folds": 24}, "n_folds must be at most the number of images, 23, got 24"),
        ({"keep": 0.0}, r"keep must be in \(0, 1\], got 0.0"),
        ({"keep": 1.1}, "keep must be in"),
        ({"images": torch.zeros(23, 3)}, r"images must have shape \(n, c, h, w\)"),
        ({"images": torch.zeros(22, 1, 2, 2)}, "one view an image, got 23 for 22"),
        ({"pose": torch.zeros(23, 3)}, "pose must be a Pose, got Tensor"),
        ({"fit": None}, "fit must be a function"),
        ({"fit": lambda images, pose: None}, "fit must return a function of images, got NoneType"),
        ({"fit": lambda images, pose: lambda x: x}, r"angles \(\d, 3\) of \d images, got \(\d, 1, 2, 2\)"),
        ({"fit": lambda images, pose: lambda x: math.nan * torch.ones(len(x), 3)}, "must be finite"),
        ({"fold": torch.zeros(23).long()}, r"fold must hold each of 0..4, got \[0\]"),
        ({"fold": torch.zeros(23)}, "fold must be 23 integers"),
    ],
)
def test_the_filter_refuses_by_name(as_a_user, options, message):
    images, pose = labelled()
    with pytest.raises(ValueError, match=message):
        consistency_filter(**{"images": images, "pose": pose, "fit": exact, **options})
