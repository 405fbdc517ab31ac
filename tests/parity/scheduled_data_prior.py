"""The teacher along a path of weights, the loss with its gradients, and the two rates of forgetting and learning."""

import torch
from torch import nn

from posterity.transfer import ScheduledTeacher, knowledge_rates, prior_loss

AGAINST = "the authors' code (github.com/yonseivnl/sdp), in float64"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    for case in ("short", "long"):
        path = torch.from_numpy(stored[f"{case}_path"])
        model = nn.Linear(4, 3, bias=False).double()
        model.weight.data.copy_(path[0])
        mean, var = stored[f"{case}_prior"].tolist()
        teacher, found = ScheduledTeacher(model, mean=mean, var=var), []
        for weight in path[1:]:
            model.weight.data.copy_(weight)
            teacher.update(model)
            found.append(teacher.module.weight.detach().clone())
        yield f"{case} teacher", torch.stack(found), stored[f"{case}_teacher"], 1e-12
        head = nn.Linear(3, 5).double()
        head.weight.data.copy_(torch.from_numpy(stored[f"{case}_head"]))
        head.bias.data.copy_(torch.from_numpy(stored[f"{case}_bias"]))
        target, y = (torch.from_numpy(stored[f"{case}_{name}"]) for name in ("target", "labels"))
        for weight in (0.0, 0.3, 0.8):
            f = torch.from_numpy(stored[f"{case}_f"]).requires_grad_()
            loss = prior_loss(f, target, head, y, weight=weight)
            by_f, by_head = torch.autograd.grad(loss, [f, head.weight])
            name = f"{case}_{weight}"
            yield f"{case} loss, C = {weight}", loss, stored[f"{name}_loss"], 1e-10
            yield f"{case} gradient of features, C = {weight}", by_f, stored[f"{name}_grad"], 1e-10
            yield f"{case} gradient of the head, C = {weight}", by_head, stored[f"{name}_head_grad"], 1e-10
    for case in ("ten", "growing", "hundred", "good"):
        y, before, after = (
            torch.from_numpy(stored[f"{case}_{name}"].astype("int64")) for name in ("y", "before", "after")
        )
        n, n_before, n_after = stored[f"{case}_sizes"].tolist()
        rates = knowledge_rates(y, before, after, n_classes=n, n_before=n_before, n_after=n_after)
        # 1e-10 in their denominators moves the rates of a hundred classes by some 1e-6
        yield f"{case} rates", torch.tensor(rates[:2], dtype=torch.float64), stored[f"{case}_rates"], 1e-5
