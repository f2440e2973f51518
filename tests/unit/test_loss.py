"""The loss module: compared with the model's own loss, golden mRoPE positions, tensors kept for the backward pass."""

from pathlib import Path

import pytest
import torch
from asking import adapted, asking_dishes, labels_of, model_inputs, pictures_of
from torch.nn import functional as F

from kfood_dist.data.batch.collate import StreamingCollator
from kfood_dist.data.picture.patches import Patches
from kfood_dist.data.plan.plan import MicroBatch
from kfood_dist.model.objective.answer import AnswerLoss, MeanAnswerLoss
from kfood_dist.model.parts import recompute_activations
from kfood_dist.train.validate import without_dropout


@pytest.fixture(scope="module")
def vision(tiny_model: Path) -> Patches:
    return pictures_of(tiny_model)


@pytest.fixture(scope="module")
def collator(tiny_model: Path, tiny_shards: Path, vision: Patches) -> StreamingCollator:
    return asking_dishes(tiny_model, tiny_shards)


def build(tiny_model: Path, vision: Patches, quantization: str = "none", precision: str = "fp32") -> AnswerLoss:
    torch.manual_seed(0)
    model = adapted(tiny_model, quantization, precision, dropout=0.0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return AnswerLoss(model, vision)


def test_the_sum_equals_the_models_own_logits_and_labels(tiny_model: Path, vision: Patches, collator) -> None:
    module, batch = build(tiny_model, vision), collator[MicroBatch(0, 0, (0, 1, 2, 3), 0)]
    loss, each, correct = module(batch)
    logits = module.model(**model_inputs(batch, vision)).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert module.weight(batch) == batch.num_label_tokens
    assert each.shape == correct.shape == (4,)


def test_the_loss_of_a_sample_is_the_same_in_a_batch_and_alone(tiny_model: Path, vision: Patches, collator) -> None:
    module = build(tiny_model, vision)
    loss, losses, _ = module(collator[MicroBatch(0, 0, (0, 1, 2, 3), 0)])
    alone = [module(collator[MicroBatch(0, 0, (i,), i)])[0].item() for i in range(4)]
    assert losses.tolist() == pytest.approx(alone, rel=1e-5)
    assert losses.sum().item() == pytest.approx(loss.item(), rel=1e-6)
    assert not losses.requires_grad


def test_the_sum_does_not_depend_on_padding(tiny_model: Path, vision: Patches, collator) -> None:
    module = build(tiny_model, vision)
    together = module(collator[MicroBatch(0, 0, (0, 1, 2, 3), 0)])[0]
    alone = sum(module(collator[MicroBatch(0, 0, (i,), i)])[0].item() for i in range(4))
    assert together.item() == pytest.approx(alone, rel=1e-5)


def test_the_gradients_equal_those_of_the_model_with_a_mask_and_its_own_positions(tiny_model, vision, collator) -> None:
    """The module passes positions and no attention mask. Rows have different lengths. In float32, up to 1e-5."""
    batch = collator[MicroBatch(0, 0, (0, 1, 2, 3), 0)]
    assert not batch.attention_mask.all()
    gradients = []
    for own in (False, True):
        module = build(tiny_model, vision).train()
        if own:
            logits = module.model(**model_inputs(batch, vision)).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum")
        else:
            loss, _, _ = module(batch)
        loss.backward()
        gradients.append([p.grad for p in module.parameters() if p.requires_grad])
    for mine, expected in zip(*gradients, strict=True):
        assert torch.allclose(mine, expected, rtol=1e-4, atol=1e-5 * expected.abs().max())


def test_a_filler_has_zero_loss_and_zero_gradients(tiny_model: Path, vision: Patches, collator) -> None:
    module = build(tiny_model, vision)
    loss, _, correct = module(collator[MicroBatch(0, 0, (), 5)])
    loss.backward()
    assert loss.item() == 0 and not correct.any()
    gradients = [p.grad for p in module.parameters() if p.requires_grad]
    assert all(g is not None and not g.any() for g in gradients)


def test_mrope_positions_equal_the_golden_ones(tiny_model: Path, vision: Patches, collator) -> None:
    """Text positions increase on all three axes. The picture's 8 × 8 tokens share a time and span height and width."""
    batch = collator[MicroBatch(0, 0, (0,), 0)]
    model = build(tiny_model, vision).model.get_base_model().model
    positions = model.compute_3d_position_ids(
        input_ids=batch.input_ids,
        image_grid_thw=batch.shapes["image_grid_thw"],
        video_grid_thw=None,
        inputs_embeds=None,
        attention_mask=batch.attention_mask,
        past_key_values=None,
        mm_token_type_ids=batch.is_image,
    )
    start = int(batch.is_image[0].argmax())
    rest = batch.input_ids.shape[1] - start - 64
    ahead = list(range(start))
    behind = [start + 8 + i for i in range(rest)]
    time = ahead + [start] * 64 + behind
    height = ahead + [start + i // 8 for i in range(64)] + behind
    width = ahead + [start + i % 8 for i in range(64)] + behind
    assert positions[:, 0].tolist() == [time, height, width]


def test_without_token_types_positions_would_be_wrong(tiny_model: Path, vision: Patches, collator) -> None:
    """transformers silently uses one-dimensional positions if the token types are missing."""
    module, batch = build(tiny_model, vision), collator[MicroBatch(0, 0, (0,), 0)]
    inputs = model_inputs(batch, vision)
    right = module.model(**inputs).logits
    inputs.pop("mm_token_type_ids")
    assert not torch.allclose(module.model(**inputs).logits, right, atol=1e-3)


def test_the_frozen_tower_keeps_no_tensors_for_the_backward_pass(tiny_model: Path, vision: Patches, collator) -> None:
    module = build(tiny_model, vision).train()
    recompute_activations(module.model.get_base_model().model.language_model)
    tower = module.model.get_base_model().model.visual
    inside, kept = [False], [0]
    tower.register_forward_pre_hook(lambda *_: inside.__setitem__(0, True))
    tower.register_forward_hook(lambda *_: inside.__setitem__(0, False))

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[0] += inside[0]
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _, _ = module(collator[MicroBatch(0, 0, (0, 1), 0)])
    loss.backward()
    assert kept == [0]
    assert all(p.grad is None for p in tower.parameters())


def test_checkpointing_of_the_language_model_does_not_change_the_gradients(tiny_model, vision, collator) -> None:
    batch = collator[MicroBatch(0, 0, (0, 1), 0)]
    gradients = []
    for recompute in (False, True):
        module = build(tiny_model, vision)
        if recompute:
            recompute_activations(module.model.get_base_model().model.language_model)
            embedding = module.model.get_base_model().get_input_embeddings()
            assert not embedding._forward_hooks, "the inputs must not require gradients needlessly"
        module.train()(batch)[0].backward()
        gradients.append([p.grad for p in module.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_sample_is_right_only_if_every_label_token_is(tiny_model: Path, vision: Patches, collator) -> None:
    """The labels are set to the model's own output. Then one token of the second answer is changed."""
    module, batch = build(tiny_model, vision), collator[MicroBatch(0, 0, (0, 1, 2), 0)]
    with torch.no_grad():
        output = module.model(**model_inputs(batch, vision)).logits[:, :-1].argmax(-1)
        asked = batch.labels[:, 1:] != -100
        batch.targets[:] = output[asked]
        assert module(batch)[2].tolist() == [True, True, True]
        batch.targets[int((batch.target_rows == 1).float().argmax())] += 1
        assert module(batch)[2].tolist() == [True, False, True]


def test_the_mean_objective_weights_every_answer_equally(tiny_model: Path, vision: Patches, collator) -> None:
    """Compare with transformers' own loss of each sample, which is the mean over its label tokens."""
    module = MeanAnswerLoss(build(tiny_model, vision).model, vision)
    batch = collator[MicroBatch(0, 0, (0, 1, 2, 3), 0)]
    loss, each, _ = module(batch)
    alone = [collator[MicroBatch(0, 0, (i,), i)] for i in range(4)]
    own = [module.model(**model_inputs(one, vision), labels=one.labels).loss.item() for one in alone]
    assert len({one.num_label_tokens for one in alone}) > 1, "answers of equal length would prove nothing"
    assert each.tolist() == pytest.approx(own, rel=1e-5)
    assert loss.item() == pytest.approx(sum(own), rel=1e-5)
    assert (module.weight(batch), module.weight(collator[MicroBatch(0, 0, (), 5)])) == (4, 0)


def test_the_teacher_forced_match_equals_that_of_greedy_generation(tiny_model, tiny_shards, vision, collator) -> None:
    """The tiny model learns six pictures until some answers are right. Then each is compared with `generate`."""
    module = build(tiny_model, vision)
    batch = collator[MicroBatch(0, 0, tuple(range(6)), 0)]
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=2e-3)
    for _ in range(60):
        loss, _, right = module(batch)
        if 2 <= right.sum() < 6:
            break
        (loss / batch.num_label_tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert 2 <= right.sum() < 6
    asking = asking_dishes(tiny_model, tiny_shards, for_generation=True)
    question = asking[MicroBatch(0, 0, tuple(range(6)), 0)]
    with torch.no_grad():
        out = module.model.generate(**model_inputs(question, vision), max_new_tokens=40, do_sample=False)
    answers = [collator.template.decode(row[question.input_ids.shape[1] :]) for row in out]
    names = labels_of(collator.shards)[:6]
    assert [a == n for a, n in zip(answers, names, strict=True)] == right.tolist()


def test_validation_between_steps_does_not_repack_4_bit_weights(tiny_model: Path, vision: Patches, collator) -> None:
    """In evaluation mode bitsandbytes repacks them for inference on some CPUs, and later training is wrong."""
    module, batch = build(tiny_model, vision, "nf4", "bf16").train(), collator[MicroBatch(0, 0, (0, 1), 0)]
    before = raw_bytes(module)
    loss = module(batch)[0].item()
    with torch.no_grad(), without_dropout(module):
        module(batch)
    after = raw_bytes(module)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert module(batch)[0].item() == loss


def raw_bytes(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the frozen weights as bytes. As bfloat16, packed 4-bit codes may be NaN, which is not equal to itself."""
    frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
    return {name: p.detach().contiguous().view(torch.uint8).clone() for name, p in frozen.items()}


def test_resting_dropout_switches_only_dropout_off_and_on_again() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5)).train()
    with without_dropout(module):
        assert module.training and module[0].training and not module[1].training
    assert module[1].training


def test_only_positions_with_a_label_reach_the_head(tiny_model: Path, vision: Patches, collator) -> None:
    module, batch = build(tiny_model, vision), collator[MicroBatch(0, 0, (0, 1, 2), 0)]
    rows = []
    module.model.get_base_model().lm_head.register_forward_pre_hook(lambda _, given: rows.append(given[0].shape[:-1]))
    module(batch)
    assert rows == [(batch.num_label_tokens,)]
