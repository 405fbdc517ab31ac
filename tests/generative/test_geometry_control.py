"""Geometry control: meshes, viewpoints and renders against ray casting, and the line from shapes to images."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import logm
from scipy.spatial.transform import Rotation

from posterity.generative import (
    GeometryControl,
    Mesh,
    Pose,
    edge_map,
    load_obj,
    pose_error,
    primitive,
    prompts,
    render,
    rotation,
    sample_poses,
)

KINDS = ["box", "wedge", "cylinder", "cone", "torus", "chair", "car", "plane", "mug"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def double(value):
    return type(value)(*(part.double() if part.is_floating_point() else part for part in value))


def poses(n, seed=0, **options):
    return double(sample_poses(n, generator=seeded(seed), **options))


def centre(pose):
    a, e, d = pose.azimuth, pose.elevation, pose.distance
    return d[:, None] * torch.stack([e.cos() * a.sin(), -e.cos() * a.cos(), e.sin()], 1)


# --- meshes


@pytest.mark.parametrize("kind", KINDS)
def test_a_primitive_is_in_the_unit_sphere_about_the_middle_of_its_box(kind):
    mesh = primitive(kind, generator=seeded(1))
    torch.testing.assert_close(mesh.vertices.norm(dim=1).max(), torch.tensor(1.0))
    torch.testing.assert_close(mesh.vertices.amin(0), -mesh.vertices.amax(0))
    corners = mesh.vertices[mesh.faces]
    area = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]).norm(dim=1)
    assert area.min() > 0, "no face is degenerate"
    assert len(mesh.faces) <= 400 and mesh.faces.unique().numel() > 5


@pytest.mark.parametrize("kind", KINDS)
def test_proportions_are_drawn_by_the_generator(kind):
    one, again, other = (primitive(kind, generator=seeded(k)) for k in (0, 0, 1))
    assert torch.equal(one.vertices, again.vertices) and torch.equal(one.faces, other.faces)
    assert not torch.allclose(one.vertices, other.vertices, atol=1e-3)


@pytest.mark.parametrize("kind", ["box", "wedge", "cylinder", "cone", "torus"])
def test_simple_primitives_are_closed(kind):
    """Every edge belongs to two faces, which run through it in opposite directions."""
    faces = primitive(kind).faces
    edges = torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    mesh = primitive(kind, generator=seeded())
    # the seam of a torus has the same places twice: by place, not by row
    place = torch.unique(mesh.vertices.mul(1e4).round(), dim=0, return_inverse=True)[1]
    found = {}
    for a, b in place[edges].tolist():
        if a != b:
            found[(min(a, b), max(a, b))] = found.get((min(a, b), max(a, b)), 0) + 1
    assert set(found.values()) == {2}


def test_obj_files_are_read_with_fans_negative_indices_and_foreign_lines(tmp_path):
    path = tmp_path / "pyramid.obj"
    path.write_text(
        "# a pyramid\nmtllib none.mtl\nv 10 0 0\nv 12 0 0 1.0\nv 12 2 0 # a corner\nv 10 2 0\nvn 0 0 1\n\n"
        "vt 0 0\ng base\nf 1/1/1 2/1/1 3//1 4\nv 11 1 2\nf -1 1 2\ns off\nf 5 2 3\n"
    )
    mesh = load_obj(path)
    assert mesh.faces.tolist() == [[0, 1, 2], [0, 2, 3], [4, 0, 1], [4, 1, 2]]
    expected = (torch.tensor([[-1.0, -1, -1], [1, -1, -1], [1, 1, -1], [-1, 1, -1], [0, 0, 1]])) / math.sqrt(
        3
    )
    torch.testing.assert_close(mesh.vertices, expected)


# --- viewpoints


def test_rotations_are_those_of_the_three_axes_in_turn():
    pose = poses(50, theta=(-3, 3), elevation=(-1.5, 1.5))
    found = rotation(pose)
    for k in range(50):
        a, e, t = (float(part[k]) for part in pose[:3])
        by_hand = (
            Rotation.from_euler("z", t)
            * Rotation.from_euler("x", e - math.pi / 2)
            * Rotation.from_euler("z", -a)
        )
        np.testing.assert_allclose(found[k].numpy(), by_hand.as_matrix(), atol=1e-14)
    torch.testing.assert_close(found @ found.mT, torch.eye(3).double().expand(50, 3, 3))
    torch.testing.assert_close(torch.linalg.det(found), torch.ones(50).double())


def test_the_origin_is_straight_ahead_at_its_distance():
    pose = poses(20, theta=(-2, 2))
    ahead = -(rotation(pose) @ centre(pose)[:, :, None])[..., 0]
    torch.testing.assert_close(ahead, torch.stack([0 * pose.distance, 0 * pose.distance, -pose.distance], 1))


def test_pose_error_is_the_length_of_the_logarithm():
    a, b = poses(30, 0, theta=(-3, 3)), poses(30, 1, theta=(-3, 3))
    found = pose_error(a, b)
    between = (rotation(a).mT @ rotation(b)).numpy()
    expected = [np.linalg.norm(logm(each)) / math.sqrt(2) for each in between]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-8)
    torch.testing.assert_close(pose_error(rotation(b), a), found)


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-4, 1.0, math.pi - 1e-4, math.pi - 1e-9, math.pi])
def test_pose_error_keeps_its_digits_at_both_ends(angle):
    axis = torch.nn.functional.normalize(torch.randn(20, 3, generator=seeded(), dtype=torch.float64), dim=1)
    turned = torch.tensor(Rotation.from_rotvec(angle * axis.numpy()).as_matrix())
    found = pose_error(torch.eye(3, dtype=torch.float64).expand(20, 3, 3), turned)
    torch.testing.assert_close(found, torch.full_like(found, angle), rtol=0, atol=1e-14)


def test_pose_error_obeys_the_triangle_inequality():
    a, b, c = (poses(500, seed, theta=(-3, 3), elevation=(-1.5, 1.5)) for seed in range(3))
    assert (pose_error(a, c) <= pose_error(a, b) + pose_error(b, c) + 1e-12).all()
    assert torch.equal(pose_error(a, b), pose_error(b, a)) or torch.allclose(
        pose_error(a, b), pose_error(b, a)
    )


def test_viewpoints_are_even_between_their_ends():
    pose = sample_poses(4000, generator=seeded())
    ends = [(0, 2 * math.pi), (-math.pi / 12, math.pi / 2.5), (-math.pi / 36, math.pi / 36), (3.5, 5.5)]
    for part, (low, high) in zip(pose, ends, strict=True):
        assert part.min() >= low and part.max() <= high
        counts = torch.histc(part, 10, low, high)
        assert ((counts - 400).square() / 400).sum() < 30  # chi-square of 9: one in 2,000 is above
    assert abs(torch.corrcoef(torch.stack(pose)).fill_diagonal_(0)).max() < 0.08


# --- the renderer


def ray_cast(mesh, pose, height, width, fov):
    """Face and depth of every pixel by meeting every ray with every triangle (Moeller and Trumbore), and how far
    the hit is from an edge, in barycentric units."""
    focal = height / 2 / math.tan(math.radians(fov) / 2)
    v, u = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    ray = torch.stack([(u - width / 2) / focal, -(v - height / 2) / focal, -torch.ones_like(u)], -1).double()
    turn = rotation(pose)[0]
    ray, start = ray.flatten(0, 1) @ turn, centre(pose)[0]
    a, b, c = mesh.vertices[mesh.faces].unbind(1)
    one, two = b - a, c - a
    p = torch.linalg.cross(ray[:, None].expand(-1, len(a), -1), two[None].expand(len(ray), -1, -1))
    det = (one * p).sum(-1)
    s = start - a
    x = (s * p).sum(-1) / det
    q = torch.linalg.cross(s, one)
    y = (ray[:, None] * q).sum(-1) / det
    t = (two * q).sum(-1) / det
    margin = torch.stack([x, y, 1 - x - y]).amin(0)
    t = torch.where((margin >= 0) & (t > 0), t, torch.inf)
    depth, face = t.min(1)
    near_edge = ((margin.abs() < 1e-4) & torch.isfinite(margin)).any(1)
    face = torch.where(torch.isfinite(depth), face, -1)
    return face.view(height, width), depth.view(height, width), near_edge.view(height, width)


@pytest.mark.parametrize(("size", "fov"), [((24, 40), 40.0), ((32, 32), 75.0)])
def test_renders_are_those_of_ray_casting_on_random_triangles(size, fov):
    vertices = 1.4 * torch.rand(60, 3, generator=seeded(), dtype=torch.float64) - 0.7
    mesh = Mesh(vertices, torch.arange(60).view(20, 3))
    pose = poses(3, theta=(-1, 1), distance=(2.0, 2.5))
    seen = render(mesh, pose, size=size, fov=fov)
    for k in range(3):
        face, depth, doubtful = ray_cast(mesh, Pose(*(part[k : k + 1] for part in pose)), *size, fov)
        assert doubtful.float().mean() < 0.05 and (face >= 0).float().mean() > 0.04
        assert torch.equal(seen.faces[k, 0][~doubtful], face[~doubtful])
        solid = ~doubtful & (face >= 0)
        torch.testing.assert_close(seen.depth[k, 0][solid], depth[solid], rtol=0, atol=1e-5)


def test_closed_meshes_have_no_holes_along_their_edges():
    """In float32, at a size where many pixel centres are next to edges, the inside of a box is all covered."""
    mesh = primitive("box")
    pose = Pose(torch.tensor([0.0, math.pi / 4]), torch.zeros(2), torch.zeros(2), torch.full((2,), 3.0))
    rows = render(mesh, pose, size=128).mask[:, 0]
    for mask in rows:
        inside = mask.any(1)
        first, last = mask.int().argmax(1), 127 - mask.flip(1).int().argmax(1)
        assert torch.equal(mask.sum(1)[inside], (last - first + 1)[inside])


def sphere(n=48):
    theta = math.pi * torch.arange(n + 1, dtype=torch.float64) / n
    phi = 2 * math.pi * torch.arange(2 * n, dtype=torch.float64) / (2 * n)
    t, p = torch.meshgrid(theta, phi, indexing="ij")
    vertices = torch.stack([t.sin() * p.cos(), t.sin() * p.sin(), t.cos()], -1).flatten(0, 1)
    k, j = torch.meshgrid(torch.arange(n), torch.arange(2 * n), indexing="ij")
    a, b = k * 2 * n + j, k * 2 * n + (j + 1) % (2 * n)
    faces = torch.cat([torch.stack([a, b, b + 2 * n], -1), torch.stack([a, b + 2 * n, a + 2 * n], -1)])
    return Mesh(vertices, faces.flatten(0, 1))


def test_a_sphere_has_the_area_of_its_cone_of_sight():
    pose = poses(4)
    seen = render(sphere(), pose, size=128)
    focal = 64 / math.tan(math.radians(20))
    expected = math.pi * (focal * (1 / pose.distance).asin().tan()).square()
    torch.testing.assert_close(seen.mask.sum((1, 2, 3)).double(), expected, rtol=0.02, atol=0)
    nearest = seen.depth.flatten(1).amin(1)
    torch.testing.assert_close(nearest, pose.distance - 1, rtol=0, atol=0.01)
    middle = seen.normals[:, :, 63:65, 63:65]
    assert (middle[:, 2] > 0.99).all(), "the middle of a sphere faces the camera"


@pytest.mark.parametrize("kind", ["car", "mug"])
def test_turning_the_mesh_turns_the_viewpoint_back(kind):
    mesh, pose, angle = double(primitive(kind, generator=seeded())), poses(3), 0.7
    c, s = math.cos(angle), math.sin(angle)
    turn = torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]], dtype=torch.float64)
    turned = mesh._replace(vertices=mesh.vertices @ turn.mT)
    one = render(turned, pose)
    two = render(mesh, pose._replace(azimuth=pose.azimuth - angle))
    three = render(mesh, pose._replace(azimuth=pose.azimuth - angle + 2 * math.pi))
    for other in (two, three):
        assert (one.faces != other.faces).float().mean() < 1e-3
        same = one.faces == other.faces
        torch.testing.assert_close(one.depth[same], other.depth[same])


@pytest.mark.parametrize("kind", KINDS)
def test_mask_is_finite_depth_and_normals_face_the_camera(kind):
    pose = sample_poses(5, generator=seeded())
    seen = render(primitive(kind, generator=seeded()), pose, size=(32, 48))
    assert torch.equal(seen.mask, torch.isfinite(seen.depth)) and torch.equal(seen.mask, seen.faces >= 0)
    length = seen.normals.norm(dim=1, keepdim=True)
    torch.testing.assert_close(length, seen.mask.float())
    u, v = torch.arange(48) + 0.5 - 24, 16 - torch.arange(32) - 0.5
    focal = 16 / math.tan(math.radians(20))
    ray = torch.stack([u.expand(32, -1) / focal, v[:, None].expand(-1, 48) / focal, -torch.ones(32, 48)])
    assert ((seen.normals * ray).sum(1)[seen.mask[:, 0]] <= 1e-6).all()
    assert (seen.image[~seen.mask.expand(-1, 3, -1, -1)] == 1).all()


def test_images_do_not_depend_on_the_order_of_faces_nor_on_chunks():
    mesh, pose = primitive("chair", generator=seeded()), sample_poses(7, generator=seeded())
    albedo = torch.rand(len(mesh.faces), 3, generator=seeded())
    order = torch.randperm(len(mesh.faces), generator=seeded())
    one = render(mesh, pose, albedo=albedo)
    other = render(mesh._replace(faces=mesh.faces[order]), pose, albedo=albedo[order], chunk_size=2)
    assert torch.equal(one.image, other.image) and torch.equal(one.depth, other.depth)
    assert torch.equal(one.faces[one.mask], order[other.faces[other.mask]])
    for a, b in zip(one, render(mesh, pose, albedo=albedo, chunk_size=1), strict=True):
        assert torch.equal(a, b)


def test_the_shade_is_lamberts():
    square = torch.tensor([[-1.0, 0, -1], [1, 0, -1], [1, 0, 1], [-1, 0, 1]])
    mesh = Mesh(square, torch.tensor([[0, 1, 2], [2, 0, 3]]))  # wound differently
    front = Pose(torch.zeros(1), torch.zeros(1), torch.zeros(1), torch.tensor([4.0]))
    albedo = torch.tensor([[1.0, 0.5, 0.0], [0.2, 0.4, 0.6]])
    seen = render(mesh, front, light=(0.0, 3.0, 4.0), ambient=0.25, albedo=albedo, size=32)
    for face in (0, 1):  # n = (0, 0, 1), n . l = 0.8
        here = seen.image[0][:, seen.faces[0, 0] == face]
        torch.testing.assert_close(here, (albedo[face] * (0.25 + 0.75 * 0.8))[:, None].expand_as(here))
    torch.testing.assert_close(
        render(mesh, front, light=(0.0, 0.0, -1.0), size=32).image.min(), torch.tensor(0.75 * 0.35)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_meshes_are_rendered_in_float32(as_a_user, dtype):
    mesh = primitive("car", generator=seeded())
    narrow, pose = mesh._replace(vertices=mesh.vertices.to(dtype)), sample_poses(3, generator=seeded())
    found, expected = render(narrow, pose), render(narrow._replace(vertices=narrow.vertices.float()), pose)
    assert found.image.dtype == dtype and torch.equal(found.faces, expected.faces)
    assert torch.equal(found.image, expected.image.to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(render(mesh, pose).image, render(mesh, pose, chunk_size=1).image)
        again = pose_error(pose, pose._replace(azimuth=pose.azimuth + 0.1))
    torch.testing.assert_close(again, pose_error(pose, pose._replace(azimuth=pose.azimuth + 0.1)))
    low = type(pose)(*(part.to(dtype) for part in pose))
    wide_ = type(pose)(*(part.float() for part in low))
    assert rotation(low).dtype == dtype and torch.equal(rotation(low), rotation(wide_).to(dtype))
    assert torch.equal(edge_map(found.image), edge_map(found.image.float()).to(dtype))


# --- edges and prompts


def test_a_step_of_two_tones_has_one_line_and_a_constant_changes_nothing():
    image = torch.full((1, 3, 12, 16), 0.1)
    image[..., 7:] = 0.7
    found = edge_map(image)
    assert torch.equal(found[0, 0].sum(1), torch.ones(12)) and found[0, 0].sum(0).nonzero().numel() == 1
    assert torch.equal(edge_map(image + 0.2), found)
    assert edge_map(torch.full((2, 3, 9, 9), 0.4)).sum() == 0


def test_weak_lines_stay_where_they_touch_a_strong_one():
    image = torch.zeros(1, 1, 20, 20)
    image[..., 10:] = torch.linspace(0.15, 0.9, 20)[:, None]  # a step that grows downwards
    assert edge_map(image).sum() >= 19
    assert edge_map(image[..., :1, :]).sum() == 0  # alone, the weak part is none


def test_prompts_name_the_class_and_are_decided_by_the_generator():
    one, negative = prompts("teapot", 50, generator=seeded())
    assert all("teapot" in text and text.startswith("An image of ") for text in one)
    assert (
        one == prompts("teapot", 50, generator=seeded())[0] != prompts("teapot", 50, generator=seeded(1))[0]
    )
    assert len(set(one)) > 40 and len(negative) == 50 and "worst quality" in negative[0]
    assert prompts("cup", 1, extra="", writer=lambda name: f"{name} of tea")[0] == ["An image of cup of tea"]
    before = torch.get_rng_state()
    prompts("cup", 3, generator=seeded())
    assert torch.equal(before, torch.get_rng_state())


# --- the line


def outlines(edges, positive, negative, rng):
    assert len(edges) == len(positive) == len(negative)
    return torch.rand(len(edges), 3, *edges.shape[2:], generator=rng) * edges


def test_annotations_are_those_of_the_render():
    mesh = primitive("car", generator=seeded())
    pose = sample_poses(5, generator=seeded())
    made = GeometryControl(outlines, size=(32, 48)).generate(
        mesh, "car", 5, pose=pose, batch_size=2, generator=seeded()
    )
    seen = render(mesh, pose, size=(32, 48))
    assert torch.equal(made.mask, seen.mask) and torch.equal(made.depth, seen.depth)
    assert torch.equal(made.edges, edge_map(seen.image)) and made.class_name == "car"
    assert torch.equal(made.images > 0, (made.edges > 0).expand(-1, 3, -1, -1))
    for box, mask in zip(made.boxes.tolist(), seen.mask[:, 0], strict=True):
        rows, columns = mask.nonzero().unbind(1)
        assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert len(made.prompts) == 5 and all(torch.equal(a, b) for a, b in zip(made.pose, pose, strict=True))


def test_everything_is_decided_by_the_generator():
    control, mesh = GeometryControl(outlines, size=16), primitive("cone")
    one, again, other = (control.generate(mesh, "cone", 3, generator=seeded(k)) for k in (0, 0, 1))
    assert torch.equal(one.images, again.images) and one.prompts == again.prompts
    assert not torch.equal(one.pose.azimuth, other.pose.azimuth)
    torch.manual_seed(0)
    free = control.generate(mesh, "cone", 3)
    torch.manual_seed(0)
    assert torch.equal(control.generate(mesh, "cone", 3).images, free.images)


# --- bad input

FRONT = Pose(torch.zeros(1), torch.zeros(1), torch.zeros(1), torch.tensor([4.0]))
BOX = primitive("box")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"faces": torch.tensor([[0, 1, 8]])}, "faces must be in 0..7, got values from 0 to 8"),
        ({"faces": torch.tensor([[0, 1, -1]])}, "got values from -1 to 1"),
        ({"faces": torch.zeros(0, 3).long()}, "got none"),
        ({"faces": torch.zeros(2, 3)}, "int64, got torch.float32"),
        ({"faces": torch.zeros(2, 4).long()}, r"shape \(f, 3\), got \(2, 4\)"),
        ({"vertices": torch.zeros(8, 3)}, "must have an extent"),
        ({"vertices": torch.full((8, 3), math.nan)}, "finite, got NaN"),
        ({"vertices": torch.zeros(8, 3).long()}, "floating-point"),
        ({"vertices": torch.zeros(8, 2)}, r"shape \(v, 3\)"),
        ({"vertices": 50 * BOX.vertices}, "must lie before the cameras"),
    ],
)
def test_refuses_a_bad_mesh_by_name(as_a_user, change, message):
    with pytest.raises(ValueError, match=message):
        render(BOX._replace(**change), FRONT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 7}, "size must be an integer of at least 8, got 7"),
        ({"size": (8, 8, 8)}, "height and width"),
        ({"fov": 170.0}, r"fov must be in \(0, 170\), got 170"),
        ({"fov": 0.0}, "fov must be in"),
        ({"ambient": 1.5}, "ambient must be in"),
        ({"light": (0.0, 0.0, 0.0)}, "light must have a direction"),
        ({"light": 3}, "light must be three numbers"),
        ({"albedo": torch.ones(5, 3)}, r"albedo must have shape \(12, 3\)"),
        ({"albedo": 2 * torch.ones(12, 3)}, r"albedo must be in \[0, 1\]"),
        ({"chunk_size": 0}, "chunk_size must be an integer of at least 1"),
        (
            {"pose": FRONT._replace(distance=torch.tensor([1.05]))},
            "distance must be greater than 1.05, got 1.05",
        ),
        ({"pose": FRONT._replace(distance=torch.ones(2))}, "parts of one length"),
        ({"pose": FRONT._replace(azimuth=torch.tensor([math.inf]))}, "pose.azimuth must be finite"),
        ({"pose": None}, "pose must be a Pose, got NoneType"),
    ],
)
def test_refuses_a_bad_view_by_name(as_a_user, options, message):
    with pytest.raises(ValueError, match=message):
        render(BOX, **{"pose": FRONT, **options})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: primitive("sphere"), "kind must be one of"),
        (lambda: sample_poses(3, distance=(1.0, 2.0)), r"the lowest distance must be in \(1.05"),
        (lambda: sample_poses(3, azimuth=(2.0, 1.0)), "the highest azimuth must be in"),
        (lambda: sample_poses(3, theta=0.1), "theta must be two numbers"),
        (lambda: rotation(FRONT._replace(theta=torch.zeros(2))), "one length"),
        (lambda: pose_error(torch.eye(3), torch.eye(3)), r"rotations of shape \(n, 3, 3\)"),
        (lambda: pose_error(FRONT, torch.eye(3).expand(2, 3, 3)), "one length, got 1 and 2"),
        (lambda: prompts("", 3), "class_name must be a name, got ''"),
        (lambda: prompts("car", 1, writer=lambda name: ""), "writer must return text"),
        (lambda: prompts("car", 1, writer="car"), "writer must be a function"),
        (lambda: GeometryControl(None), "generator must be a function"),
        (lambda: GeometryControl(outlines, size=4), "size must be an integer of at least 8"),
        (lambda: GeometryControl(outlines).generate(BOX, " ", 1), "class_name must be a name"),
        (lambda: GeometryControl(outlines).generate(BOX, "box", 2, pose=FRONT), "pose must have n = 2 views, got 1"),
        (lambda: GeometryControl(lambda e, *_: e).generate(BOX, "box", 1), r"got \(1, 1, 64, 64\)"),
        (lambda: GeometryControl(lambda e, *_: 2 * e.expand(-1, 3, -1, -1)).generate(BOX, "box", 1),
         r"images in \[0, 1\], got values in \[0, 2\]"),
        (lambda: GeometryControl(lambda *_: None).generate(BOX, "box", 1), "floating-point tensor, got NoneType"),
        (lambda: GeometryControl.from_diffusers(None, "none", size=100), "multiple of 8, got 100"),
        (lambda: GeometryControl.from_diffusers(None, "none", n_steps=0), "n_steps must be"),
    ],
)  # fmt: skip
def test_refuses_the_rest_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v 0 0 0\nv 1 0 0\n", "has 2 vertices and none"),
        ("v 0 0 0\nv 1 0 zero\n", "line 2 .*'v 1 0 zero'"),
        ("v 0 0\n", "line 1"),
        ("v 0 0 0\nv 1 0 0\nf 1 2\n", "line 3 .* three corners"),
        ("v 0 0 0\nv 1 0 0\nf 1 2 0\n", "line 3 .*there is no vertex 0"),
        ("v 0 0 0\nv 1 0 0\nf 1 2 -3\n", "line 3 .*there is no vertex -3"),
        ("v 0 0 0\nv 1 0 0\nf 1 2 3\n", "got values from 0 to 2"),
        ("v 1 1 1\nv 1 1 1\nf 1 2 1\n", "must have an extent"),
        ("v nan 1 1\nv 1 1 1\nf 1 2 1\n", "finite"),
    ],
)
def test_refuses_bad_obj_files_by_line(as_a_user, tmp_path, text, message):
    path = tmp_path / "bad.obj"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_obj(path)
