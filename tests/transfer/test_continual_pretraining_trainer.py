"""The trainer of DAS: plain training where nothing is important, units that are held where all is, and its manners."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from posterity.claims.transfer.continual_pretraining import _fits, _texts
from posterity.transfer import ContinualPretrainer, find_units, mask_tokens

WORDS, MASK = 20, 4


class Model(nn.Module):
    """Words, a layer of torch, words: logits and hidden states."""

    def __init__(self, dropout=0.1):
        super().__init__()
        self.words = nn.Embedding(WORDS, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout, batch_first=True)

    def forward(self, input_ids, attention_mask):
        hidden = self.layer(self.words(input_ids), src_key_padding_mask=attention_mask == 0)
        return hidden @ self.words.weight.T, hidden


def made(dropout=0.1, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Model(dropout)


def batches(n=3, rows=4, length=6, seed=0):
    draws = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(5, WORDS, (rows, length), generator=draws)} for _ in range(n)]


def trainer_of(model, **options):
    return ContinualPretrainer(model, **{"mask_token_id": MASK, "lr": 0.01, "generator": torch.Generator().manual_seed(3), "importance_batches": 3, **options})  # fmt: skip


def filled(trainer, value):
    return {each.name: torch.full((each.n_units,), value) for each in trainer.units}


def loss_of(model, batch):
    logits = model(batch["input_ids"], batch["attention_mask"])[0]
    return F.cross_entropy(logits.flatten(0, 1), batch["input_ids"].flatten())


def test_an_objective_of_one_number_counts_with_dimensions_and_without():
    plain, found = (
        trainer_of(made(), objective=each, contrast=0.0).fit_domain(batches(), n_steps=2)
        for each in (loss_of, lambda *args: loss_of(*args).reshape(1))
    )
    assert list(plain) == list(found)


def test_without_importance_and_contrast_steps_are_those_of_plain_training_to_the_bit():
    model = made(dropout=0.0)
    plain = copy.deepcopy(model).train()
    trainer = trainer_of(model, objective=loss_of, contrast=0.0)
    trainer.domain_importances_ = [filled(trainer, 0.0)]
    losses = trainer.fit_domain(batches(), n_steps=7)
    adam = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.0)
    for k in range(7):
        ids = batches()[k % 3]["input_ids"]
        loss = loss_of(plain, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        adam.zero_grad()
        loss.backward()
        adam.step()
        assert losses[k] == float(loss.detach())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


def test_units_of_importance_one_stay_to_the_bit_under_momentum_and_decay():
    model = made()
    before = copy.deepcopy(model.state_dict())
    trainer = trainer_of(model, weight_decay=0.5)
    trainer.domain_importances_ = [filled(trainer, 1.0)]
    trainer.fit_domain(batches(), n_steps=3)
    held = {id(p) for units in trainer.units for p in units.rows + units.columns}
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (id(p) in held), name
    assert not torch.equal(model.layer.self_attn.out_proj.bias, before["layer.self_attn.out_proj.bias"])


def test_a_step_of_sgd_is_shorter_by_the_mask():
    ends = []
    start = made(dropout=0.0)
    for value in (0.0, 0.75):
        model = copy.deepcopy(start)
        trainer = trainer_of(
            model, objective=loss_of, contrast=0.0, optimizer=lambda p: torch.optim.SGD(p, lr=0.1)
        )
        trainer.domain_importances_ = [filled(trainer, value)]
        trainer.fit_domain(batches(), n_steps=1)
        ends.append(model.layer.linear1.weight.detach() - start.layer.linear1.weight.detach())
    torch.testing.assert_close(ends[1], 0.25 * ends[0], rtol=1e-3, atol=1e-6)


def test_importance_grows_with_each_domain_and_is_the_largest_of_all():
    trainer = trainer_of(made())
    seen = []
    for k in range(3):
        trainer.fit_domain(batches(seed=k), n_steps=2)
        seen.append(trainer.importance_)
    assert trainer.n_domains_ == 3
    assert len(trainer.domain_importances_) == 4
    name = trainer.units[1].name
    for early, late in zip(seen, seen[1:], strict=False):
        assert (late[name] >= early[name]).all()
    largest = torch.stack([each[name] for each in trainer.domain_importances_]).max(0).values
    assert torch.equal(seen[-1][name], largest)


@pytest.mark.parametrize("objective", ["mlm", "causal"])
def test_it_learns_and_keeps_the_mode_and_the_global_state(objective):
    model = made().eval()
    state = torch.random.get_rng_state()
    same = [{"input_ids": torch.arange(5, 11).repeat(4, 1)}]
    losses = trainer_of(model, objective=objective, contrast=0.0).fit_domain(same, n_steps=60)
    assert sum(losses[-15:]) < 0.75 * sum(losses[:15])
    assert torch.equal(state, torch.random.get_rng_state())
    assert not any(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_padding_is_neither_predicted_nor_seen():
    ends = []
    for padding in (0, 9):
        batch = {"input_ids": batches(1)[0]["input_ids"].clone(), "attention_mask": torch.ones(4, 6).long()}
        batch["input_ids"][:, 4:], batch["attention_mask"][:, 4:] = padding, 0
        for objective in ("mlm", "causal"):
            ends.append(trainer_of(made(), objective=objective).fit_domain([batch], n_steps=2))
    for one, other in zip(ends[:2], ends[2:], strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_marked_tokens_are_never_hidden():
    seen = []

    class Spy(Model):
        def forward(self, input_ids, attention_mask):
            seen.append(input_ids.clone())
            return super().forward(input_ids, attention_mask)

    batch = {"input_ids": torch.full((4, 6), 7), "special_tokens_mask": torch.ones(4, 6).long()}
    batch["special_tokens_mask"][:, 2] = 0
    trainer_of(Spy(), contrast=0.0, kinds=()).fit_domain([batch], n_steps=20)
    changed = torch.stack([x for x in seen if x.shape == (4, 6)]) != 7
    assert changed[..., 2].any()
    assert not changed[..., [0, 1, 3, 4, 5]].any()


def test_a_saved_trainer_goes_on_to_the_bit():
    rows = batches(6)
    first = trainer_of(made())
    for k in range(4):
        first.observe(rows[k]["input_ids"], task=k // 2)
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    saved.seek(0)
    second = trainer_of(made(seed=9), generator=torch.Generator())
    second.load_state_dict(torch.load(saved))
    ends = [[t.observe(rows[k]["input_ids"], task=k // 2) for k in (3, 4, 5)] for t in (first, second)]
    assert ends[0] == ends[1]
    assert first.n_domains_ == second.n_domains_ == 2
    assert all(
        torch.equal(p, q) for p, q in zip(first.model.parameters(), second.model.parameters(), strict=True)
    )
    assert torch.equal(first.importance_["layer.heads"], second.importance_["layer.heads"])


def test_a_new_task_closes_the_one_before_and_none_goes_on():
    trainer = trainer_of(made())
    ids = batches(1)[0]["input_ids"]
    for task in ("a", None, "a", "b", None):
        trainer.observe(ids, task=task)
    assert trainer.n_domains_ == 1
    trainer.fit_domain(batches(), n_steps=1)
    assert trainer.n_domains_ == 3


def test_an_iterator_is_kept_and_gone_through_again():
    assert len(trainer_of(made()).fit_domain(iter(batches()), n_steps=5)) == 5


def test_batches_of_inference_mode_and_a_frozen_part_are_no_hindrance():
    model = made()
    model.layer.linear1.weight.requires_grad_(False)
    before = model.layer.linear1.weight.clone()
    with torch.inference_mode():
        trainer_of(model).fit_domain(batches(), n_steps=2)
    assert torch.equal(model.layer.linear1.weight, before)


def test_a_model_of_transformers_is_trained_by_its_own_outputs():
    from transformers import GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaForMaskedLM

    roberta = RobertaForMaskedLM(RobertaConfig(vocab_size=WORDS, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=16))  # fmt: skip
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_embd=8, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0))  # fmt: skip
    same = [{"input_ids": torch.arange(5, 11).repeat(4, 1)}]
    for model, objective in ((roberta, "mlm"), (gpt, "causal")):
        trainer = trainer_of(model, objective=objective, lr=0.05)
        losses = trainer.fit_domain(same, n_steps=10)
        assert sum(losses[-5:]) < sum(losses[:5])
        assert len(trainer.domain_importances_) == 2


def test_the_objective_of_hidden_tokens_is_their_cross_entropy():
    model = made(dropout=0.0)
    trainer = trainer_of(model, kinds=())
    twin, ids = copy.deepcopy(model).eval(), batches(1)[0]["input_ids"]
    draws = torch.Generator().manual_seed(3)
    torch.randint(2**31, (), generator=draws)  # of the step's dropout
    inputs, labels = mask_tokens(ids, mask_token_id=MASK, vocab_size=WORDS, generator=draws)
    logits = twin(inputs, torch.ones_like(ids))[0]
    by_hand = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    (loss,) = trainer.fit_domain([{"input_ids": ids}], n_steps=1)
    assert loss == pytest.approx(float(by_hand.detach()), rel=1e-5)


GOOD = batches()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ContinualPretrainer(None, mask_token_id=MASK), "model must be a torch module"),
        (lambda: ContinualPretrainer(Model()), "mask_token_id must be given"),
        (lambda: ContinualPretrainer(Model(), objective="clm"), "objective must be 'mlm', 'causal' or callable"),
        (lambda: ContinualPretrainer(Model().half(), mask_token_id=MASK), "got torch.float16"),
        (lambda: trainer_of(Model(), lr=0.0), "lr must be greater than 0"),
        (lambda: trainer_of(Model(), contrast=-1.0), "contrast must be at least 0"),
        (lambda: trainer_of(Model(), temperature=0.0), "temperature must be greater than 0"),
        (lambda: trainer_of(Model(), importance_batches=0), "importance_batches must be an integer of at least 1"),
        (lambda: trainer_of(Model(), mask_token_id=WORDS).fit_domain(GOOD, n_steps=1), r"mask_token_id must be in 0\.\.19"),
        (lambda: trainer_of(nn.Linear(2, 2)), "Linear has none"),
        (lambda: trainer_of(Model()).fit_domain([], n_steps=1), "batches must give at least one batch"),
        (lambda: trainer_of(Model()).fit_domain(GOOD, n_steps=1, importance_data=[]), "importance_data must give"),
        (lambda: trainer_of(Model()).fit_domain(GOOD[0], n_steps=1), "batches must be an iterable of batches, got dict"),
        (lambda: trainer_of(Model()).fit_domain(GOOD, n_steps=0), "n_steps must be an integer"),
        (lambda: trainer_of(Model(0.0)).fit_domain(GOOD, n_steps=1), "model must have dropout"),
        (lambda: trainer_of(Model()).fit_domain([{"input_ids": torch.ones(2, 3)}], n_steps=1), "input_ids must be integers"),
        (lambda: trainer_of(Model()).observe(torch.full((2, 3), WORDS)), r"input_ids must be in 0\.\.19"),
        (lambda: trainer_of(Model()).observe(torch.ones(1, 3).long()), "at least 2 rows for the contrast"),
        (lambda: trainer_of(Model(), objective="causal").observe(torch.ones(2, 1).long()), "at least 2 tokens a row"),
        (lambda: trainer_of(Model()).observe(None), "input_ids must be integers, got NoneType"),
        (lambda: trainer_of(Model()).load_state_dict({}), "state must be what state_dict"),
        (lambda: trainer_of(Model(), optimizer=lambda p: None).observe(torch.ones(2, 3).long()), "optimizer must return"),
        (lambda: _texts("nowhere.txt"), "nowhere.txt is none"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_claim_takes_a_folder_of_texts_and_refuses_short_ones(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(" ".join(f"{name}{k}" for k in range(200)), encoding="utf-8")
    assert [text[:2] for text in _texts(str(tmp_path))] == ["a0", "b0"]
    assert len(_texts(f"{tmp_path}/b.txt, {tmp_path}/a.txt")) == 2
    _fits(str(tmp_path), 10)
    with pytest.raises(ValueError, match="corpora must have 640 words each for length=32, number 1 has 200"):
        _fits(str(tmp_path), 32)


def test_units_are_found_once_in_the_trainer():
    model = made()
    assert [each.name for each in trainer_of(model).units] == [each.name for each in find_units(model)]
