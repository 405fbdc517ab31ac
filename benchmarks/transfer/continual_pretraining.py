"""A masked step against a plain one, one with the contrast too, and importance by a backward pass against ablation.

Run from the repository root: ``python -m benchmarks.transfer.continual_pretraining``.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import RobertaConfig, RobertaForMaskedLM

from benchmarks.timing import race
from posterity.transfer import ContinualPretrainer, find_units, unit_importance, unit_scales


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the loss of every token by itself: of a batch, always the same work."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(logits.flatten(0, 1), batch["input_ids"].flatten())


def ablated(model: nn.Module, units: list, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return how much the loss rises without each unit, one forward pass each."""
    found = {}
    with torch.no_grad():
        whole = loss_of(model, batch)
        for each in units:
            ones, rises = torch.ones(each.n_units), []
            for i in range(each.n_units):
                scale = ones.clone()
                scale[i] = 0
                with unit_scales([each], {each.name: scale}):
                    rises.append(loss_of(model, batch) - whole)
            found[each.name] = torch.stack(rises)
    return found


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=2_000, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
        max_position_embeddings=64,
    )  # fmt: skip
    ids = torch.randint(5, 2_000, (32, 48))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def trainer(**options: object) -> ContinualPretrainer:
        made = ContinualPretrainer(
            RobertaForMaskedLM(config), objective=loss_of, importance_batches=1, **options
        )  # type: ignore[arg-type]
        made.observe(batch)  # opens the domain
        return made

    plain, masked, whole = trainer(kinds=()), trainer(contrast=0.0), trainer()
    race("32 texts of 48 tokens, 2 layers of 64: a masked step against a plain one",
         lambda: masked.observe(batch), lambda: plain.observe(batch), target=0.97, rounds=31)  # fmt: skip
    race("the same with the contrast", lambda: whole.observe(batch), lambda: plain.observe(batch), target=0.25, rounds=11)  # fmt: skip

    model = RobertaForMaskedLM(config).eval()
    units, few = find_units(model), {name: x[:2] for name, x in batch.items()}
    n = sum(each.n_units for each in units)
    race(f"importance of {n} units, against ablating one at a time",
         lambda: unit_importance(model, units, [few], loss_of), lambda: ablated(model, units, few), target=100,
         rounds=1)  # fmt: skip


if __name__ == "__main__":
    main()
