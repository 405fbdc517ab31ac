import subprocess
import sys
from datetime import timedelta

import torch
from torch import distributed

from posterity._branches import follow, momentum_copy, projection_head
from posterity._processes import all_rows, n_processes

SECOND = """
import sys
from datetime import timedelta
import torch
from torch import distributed
from posterity._processes import all_rows
store = distributed.FileStore(sys.argv[2], 2)
distributed.init_process_group("gloo", store=store, rank=1, world_size=2, timeout=timedelta(seconds=60))
z = torch.load(sys.argv[1])[5:].requires_grad_()
joint, labels = all_rows(z, torch.arange(2) + 5)
(joint.square().sum() ** 2).backward()
torch.save({"joint": joint.detach(), "labels": labels, "gradient": z.grad}, sys.argv[3])
distributed.destroy_process_group()
"""


def test_two_processes_see_the_joint_batch_and_average_to_its_gradient(tmp_path):
    z = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    files = [str(tmp_path / name) for name in ("data", "store", "found")]
    torch.save(z, files[0])
    other = subprocess.Popen([sys.executable, "-c", SECOND, *files])
    try:
        store = distributed.FileStore(files[1], 2)
        distributed.init_process_group(
            "gloo", store=store, rank=0, world_size=2, timeout=timedelta(seconds=60)
        )
        ours = z[:5].clone().requires_grad_()
        joint, labels = all_rows(ours, torch.arange(5))
        (joint.square().sum() ** 2).backward()
        assert other.wait(60) == 0
    finally:
        other.kill()
        if distributed.is_initialized():
            distributed.destroy_process_group()
    found = torch.load(files[2])
    whole = z.clone().requires_grad_()
    (whole.square().sum() ** 2).backward()
    for rows, classes in ((joint, labels), (found["joint"], found["labels"])):
        assert torch.equal(rows.detach(), z) and torch.equal(classes, torch.arange(7))
    torch.testing.assert_close(torch.cat([ours.grad, found["gradient"]]) / 2, whole.grad)


def test_one_process_has_its_own_rows():
    x = torch.ones(2, 3)
    assert n_processes() == 1 and all_rows(x)[0] is x


def test_a_copy_follows_with_momentum_and_takes_no_gradient():
    head = projection_head((4, 6, 3), last_norm=True)
    with torch.no_grad():
        head(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)))
    target = momentum_copy(head)
    assert not any(p.requires_grad for p in target.parameters())
    before = [p.clone() for p in target.parameters()]
    with torch.no_grad():
        for p in head.parameters():
            p.add_(1)
        head(torch.ones(8, 4))
    follow(target, head, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, target.parameters(), strict=True))
    assert torch.equal(target[1].running_mean, head[1].running_mean)
    follow(target, head, 0.75)
    for start, now in zip(before, target.parameters(), strict=True):
        torch.testing.assert_close(now, start + 0.25)
    follow(target, head, 0)
    for now, source in zip(target.parameters(), head.parameters(), strict=True):
        torch.testing.assert_close(now, source)


def test_a_head_is_linear_norm_relu_linear_without_biases():
    head = projection_head((4, 6, 3))
    assert [type(layer).__name__ for layer in head] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert head[0].bias is None and head[3].bias is None
    assert type(projection_head((4, 3), last_norm=True)[-1]).__name__ == "BatchNorm1d"
    assert not list(projection_head((4, 3), last_norm=True)[-1].parameters())
