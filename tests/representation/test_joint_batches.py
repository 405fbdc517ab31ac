"""Two processes with a part of the batch each: value, gradient and state of one process with the whole batch."""

import subprocess
import sys
from datetime import timedelta

import pytest
import torch
from torch import distributed, nn

from posterity.representation import (
    CIRCE,
    ClusterDiscrimination,
    ContrastiveCriterion,
    ContrastiveRegularizer,
    DeepGeoCCA,
    DINOvMFLoss,
    NTXentLoss,
    PsCoLoss,
    RDMLoss,
    SFRIKLoss,
    SPDEncoder,
    VICRegLoss,
)

N, DIM = 8, 4
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 2, 0])


def covariances(z):
    """Return (n, 3, 3) positive definite matrices of rows."""
    a = torch.stack([z[:, :3], z.roll(1, 1)[:, :3], z.roll(2, 1)[:, :3]], 1)
    return a @ a.mT + torch.eye(3, dtype=z.dtype)


def circe():
    rng = torch.Generator().manual_seed(3)
    return CIRCE(sigma2_x=1.0).double().fit(*torch.rand(2, 12, 1, dtype=torch.float64, generator=rng))


# name: the loss, how it is called on the rows of a process, whether it compares rows (the split may be uneven)
pairs = lambda loss, z1, z2, rows: loss(z1, z2)  # noqa: E731
CASES = {
    "NT-Xent": (lambda: NTXentLoss(0.2), pairs, True),
    "DCL": (lambda: NTXentLoss(0.2, decoupled=True), pairs, True),
    "VICReg": (VICRegLoss, pairs, True),
    "VICReg-exp": (lambda: VICRegLoss(variant="exp"), pairs, True),
    "VICReg-ctr": (lambda: VICRegLoss(variant="ctr"), pairs, True),
    "criterion of samples": (ContrastiveCriterion, pairs, True),
    "criterion of dimensions": (lambda: ContrastiveCriterion("dimensions", normalize="both"), pairs, True),
    "SFRIK": (SFRIKLoss, pairs, True),
    "SFRIK by moments": (lambda: SFRIKLoss((1.0, 40.0), route="moment"), pairs, True),
    "RDM, filter online": (RDMLoss, pairs, True),
    "RDM, filter at the target": (lambda: RDMLoss("power", sigma=-1, location="target"), pairs, True),
    "RDM with a momentum branch": (
        RDMLoss,
        lambda loss, z1, z2, rows: loss(z1, z2, z2.detach() + 1, z1.detach() - 1),
        True,
    ),
    "DINO-vMF": (
        lambda: DINOvMFLoss(DIM).double(),
        lambda loss, z1, z2, rows: loss([z1, z2], [z2.detach() * 3, z1.detach() * 3]),
        False,
    ),
    "PsCo": (
        lambda: PsCoLoss(DIM, queue_size=11, n_shots=2).double(),
        lambda loss, z1, z2, rows: loss(z1, z2),
        True,
    ),
    "contrastive regularisation": (
        ContrastiveRegularizer,
        lambda loss, z1, z2, rows: loss(z1, LABELS[rows], z1 + 1, z2),
        False,
    ),
    "cluster discrimination": (
        lambda: ClusterDiscrimination(DIM, 3, class_rate=1.0).double(),
        lambda loss, z1, z2, rows: loss(z1, LABELS[rows]) + loss(z2, LABELS[rows]),
        False,
    ),
    "CIRCE": (circe, lambda loss, z1, z2, rows: loss(z1, z2[:, :1].detach(), z2[:, 1:2].detach()), True),
    "DeepGeoCCA": (
        lambda: DeepGeoCCA(SPDEncoder(3, c_out=2), SPDEncoder(3, c_out=2), n_components=1).double(),
        lambda loss, z1, z2, rows: loss.loss(covariances(z1), covariances(z2)),
        True,
    ),
}  # fmt: skip


def found(rank: int | None) -> dict:
    """Return value, gradients of both views and state after the call, of the rows of a process or of all."""
    out = {}
    for name, (make, call, uneven) in CASES.items():
        half = 5 if uneven else N // 2
        rows = slice(None) if rank is None else slice(0, half) if rank == 0 else slice(half, N)
        rng = torch.Generator().manual_seed(0)
        views = [
            torch.randn(N, DIM, dtype=torch.float64, generator=rng)[rows].requires_grad_() for _ in range(2)
        ]
        torch.manual_seed(1)
        loss = make()
        value = call(loss, *views, rows)
        gradients = [g if g is not None else torch.zeros_like(z)
                     for z, g in zip(views, torch.autograd.grad(value, views, allow_unused=True), strict=True)]  # fmt: skip
        state = {k: v.detach() for k, v in loss.state_dict().items()} if isinstance(loss, nn.Module) else {}
        out[name] = {"value": value.detach(), "gradients": gradients, "state": state}
    return out


def joined(rank: int, path: str) -> dict:
    store = distributed.FileStore(path, 2)
    distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    try:
        return found(rank)
    finally:
        distributed.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("joint")
    store, saved = str(folder / "store"), str(folder / "saved")
    other = subprocess.Popen([sys.executable, __file__, store, saved])
    try:
        first = joined(0, store)
        assert other.wait(60) == 0
    finally:
        other.kill()
    return found(None), first, torch.load(saved)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_get_what_one_gets_of_the_whole_batch(both, name):
    whole, *parts = (each[name] for each in both)
    torch.testing.assert_close(
        sum(part["value"] for part in parts) / 2, whole["value"], rtol=1e-10, atol=1e-12
    )
    for k in range(2):
        averaged = torch.cat([part["gradients"][k] for part in parts]) / 2
        torch.testing.assert_close(averaged, whole["gradients"][k], rtol=1e-9, atol=1e-12)
    for part in parts:
        for key, buffer in whole["state"].items():
            torch.testing.assert_close(part["state"][key], buffer, rtol=1e-10, atol=1e-12)


if __name__ == "__main__":
    torch.save(joined(1, sys.argv[1]), sys.argv[2])
