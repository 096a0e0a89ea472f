"""Losses against closed forms, quality of known pairs, and a cache key that notices everything."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from families import random_prefix, random_text, tiny_backbone, tiny_config
from fedsp.auxiliary import KeptLayers, SharedCell
from fedsp.backbone import Backbone
from fedsp.distillation import Distillation, cache_key
from fedsp.prompt_pool import PromptPool
from fedsp.schedules import LinearWarmup
from fedsp.stages import Stage
from oracles import closed_forms

FACTS: dict[str, Any] = {"recipe": ["SharedCell", {"start": 0}], "public": "abc", "seed": 0}


def sgd(lr: float = 0.1) -> Any:
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


def spec(**options: Any) -> Distillation:
    return Distillation(Stage(steps=3, optimizer=sgd()), **options)


@pytest.fixture
def teacher() -> Backbone:
    return tiny_backbone("gpt2")


@pytest.fixture
def student(teacher: Backbone) -> Backbone:
    return SharedCell().build(teacher).backbone


@pytest.fixture
def batch() -> dict[str, Tensor]:
    ids, mask = random_text(rows=2)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


# --- the loss -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weights",
    [
        {"hidden": 1.0},
        {"logit": 1.0},
        {"lm": 1.0},
        {"hidden": 0.5, "logit": 2.0, "lm": 0.25},
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_loss_is_the_weighted_sum_of_its_closed_forms(
    teacher: Backbone,
    student: Backbone,
    batch: dict[str, Tensor],
    weights: dict[str, float],
    temperature: float,
) -> None:
    options = {f"{name}_weight": weights.get(name, 0.0) for name in ("hidden", "logit", "lm")}
    loss = spec(kd_temperature=temperature, **options).loss(
        teacher, student, batch, torch.Generator()
    )
    terms = closed_forms(teacher, student, batch, temperature)
    expected = sum(weight * terms[name] for name, weight in weights.items())
    assert loss.shape == ()
    assert torch.allclose(loss, torch.as_tensor(expected), rtol=1e-4)


def test_padding_plays_no_part(
    teacher: Backbone, student: Backbone, batch: dict[str, Tensor]
) -> None:
    """Another token at padded places, and more of them, leave the loss as it is."""
    settings = spec(logit_weight=1.0, lm_weight=1.0)
    loss = settings.loss(teacher, student, batch, torch.Generator())
    wide = {
        "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 5), value=7),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 5)),
        "labels": torch.nn.functional.pad(batch["labels"], (0, 5), value=-100),
    }
    wide["input_ids"][wide["attention_mask"] == 0] = 9
    assert torch.allclose(settings.loss(teacher, student, wide, torch.Generator()), loss, rtol=1e-5)


def test_the_teacher_gets_no_gradient_and_the_student_does(batch: dict[str, Tensor]) -> None:
    """Even where the teacher's parameters would take one."""
    teacher, student = tiny_backbone("gpt2"), tiny_backbone("gpt2", seed=1)
    for parameter in (*teacher.parameters(), *student.parameters()):
        parameter.requires_grad_(True)
    settings = spec(logit_weight=1.0, lm_weight=1.0)
    settings.loss(teacher, student, batch, torch.Generator()).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_of_many_label_positions_a_random_subset_from_the_generator_counts(
    teacher: Backbone, student: Backbone, batch: dict[str, Tensor]
) -> None:
    """With one position the loss is one token's; over many draws every token comes."""
    single = spec(hidden_weight=0.0, lm_weight=1.0, max_logit_tokens=1)
    hidden = student.hidden_states(batch["input_ids"], batch["attention_mask"])
    logits = student.logits(hidden)[:, :-1].flatten(0, 1)
    tokens = torch.nn.functional.cross_entropy(
        logits, batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="none"
    )
    possible = tokens[tokens != 0].detach()
    generator = torch.Generator().manual_seed(3)
    global_state = torch.get_rng_state()

    def draw(generator: torch.Generator) -> float:
        with torch.no_grad():
            return float(single.loss(teacher, student, batch, generator))

    drawn = [draw(generator) for _ in range(150)]
    assert torch.equal(torch.get_rng_state(), global_state)
    nearest = (torch.tensor(drawn)[:, None] - possible).abs().min(dim=1)
    assert nearest.values.max() < 1e-5
    assert nearest.indices.unique().numel() == possible.numel()
    again = torch.Generator().manual_seed(3)
    assert [draw(again) for _ in range(5)] == drawn[:5]


def test_all_tokens_are_learned_from_where_that_is_wanted(
    teacher: Backbone, student: Backbone, batch: dict[str, Tensor]
) -> None:
    """Oracle: the loss that transformers' own model gives with every real token as a label."""
    real = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    expected = student.model(
        batch["input_ids"], attention_mask=batch["attention_mask"], labels=real, use_cache=False
    ).loss
    settings = spec(hidden_weight=0.0, lm_weight=1.0, all_tokens=True, max_logit_tokens=10_000)
    got = settings.loss(teacher, student, batch, torch.Generator())
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_few_label_positions_are_all_taken_without_a_draw(
    teacher: Backbone, student: Backbone, batch: dict[str, Tensor]
) -> None:
    generator = torch.Generator().manual_seed(3)
    state = generator.get_state()
    num_labels = int((batch["labels"][:, 1:] != -100).sum())
    settings = spec(lm_weight=1.0, max_logit_tokens=num_labels)
    settings.loss(teacher, student, batch, generator)
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_weight": -1.0}, "`gradient_weight` >= 0 and one"),
        ({"hidden_weight": 0.0}, "one above 0"),
        ({"gradient_weight": 1.0}, "`model.initial_distillation.gradient_weight` needs prompts"),
        (
            {"max_logit_tokens": 0},
            "`model.initial_distillation.max_logit_tokens` must be at least 1",
        ),
        ({"kd_temperature": 0.0}, "`model.initial_distillation.kd_temperature` must be above 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spec(**options)


# --- behind a prompt ----------------------------------------------------------------------------


def test_a_prompt_of_a_texts_keys_and_values_is_as_good_as_the_text(
    teacher: Backbone, student: Backbone
) -> None:
    """The loss behind K/V of a text equals that of text and batch in one piece, each its own way.

    The student here has all layers, so that the teacher's keys and values are its own.
    """
    twin = SharedCell(cell_size=4).build(teacher).backbone
    ids, _ = random_text(rows=1, length=16)
    whole = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.where(torch.arange(16) < 6, -100, ids),
    }
    rest = {name: tensor[:, 5:] for name, tensor in whole.items()}
    settings = spec(hidden_weight=0.0, lm_weight=1.0)
    prefix = teacher.keys_values(ids[:, :5])
    got = settings.loss(teacher, twin, rest, torch.Generator(), prefix, [[0], [1], [2], [3]])
    expected = settings.loss(teacher, twin, whole, torch.Generator())
    assert torch.allclose(got, expected, rtol=1e-4)
    assert not torch.allclose(
        settings.loss(teacher, twin, rest, torch.Generator()), expected, rtol=1e-3
    )


def test_a_student_reads_the_slots_of_its_own_layers(batch: dict[str, Tensor]) -> None:
    teacher = tiny_backbone("gpt2")
    student = KeptLayers(layers=[1, 3]).build(teacher)
    prefix = random_prefix(teacher)
    changed = prefix.clone()
    changed[[0, 2]] += 1
    settings = spec(hidden_weight=0.0, lm_weight=1.0)
    losses = [
        settings.loss(teacher, student.backbone, batch, torch.Generator(), it, student.slots)
        for it in (prefix, changed)
    ]
    assert torch.equal(*losses)


def test_the_gradient_error_is_zero_beside_itself_and_can_be_learned(
    teacher: Backbone, student: Backbone, batch: dict[str, Tensor]
) -> None:
    settings = spec(hidden_weight=0.0, gradient_weight=1.0, prompts=PromptPool())
    prefix = random_prefix(teacher)
    twin = SharedCell(cell_size=4).build(teacher).backbone
    assert (
        settings.loss(teacher, twin, batch, torch.Generator(), prefix, [[0], [1], [2], [3]]) < 1e-5
    )
    optimizer = torch.optim.Adam(student.model.parameters(), lr=3e-3)
    errors = []
    for _ in range(30):
        error = settings.loss(
            teacher, student, batch, torch.Generator(), prefix, [[0], [1], [2], [3]]
        )
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(float(error.detach()))
    assert 0 < errors[-1] < 0.7 * errors[0]


def test_prompts_are_drawn_between_those_of_the_pool() -> None:
    pool = [torch.zeros(2, 2, 1, 3, 4), torch.ones(2, 2, 1, 3, 4)]
    generator = torch.Generator().manual_seed(0)
    drawn = [PromptPool().draw(pool, generator) for _ in range(200)]
    values = torch.stack([prompt for prompt in drawn if prompt is not None])
    assert len(values) == 200
    assert (values == values[:, :1, :1, :1, :1, :1]).all()
    assert values.min() == 0
    assert values.max() == 1
    assert len(values[:, 0, 0, 0, 0, 0].unique()) > 50


def test_a_share_of_the_batches_has_no_prompt_and_noise_is_relative() -> None:
    generator = torch.Generator().manual_seed(0)
    pool = [torch.full((1, 2, 1, 50, 40), 3.0)]
    drawn = [PromptPool(share=0.25, noise=0.5).draw(pool, generator) for _ in range(400)]
    there = [prompt for prompt in drawn if prompt is not None]
    assert 70 < len(there) < 130
    assert float(there[0].std()) == pytest.approx(1.5, rel=0.05)
    assert float(there[0].mean()) == pytest.approx(3.0, abs=0.1)


@pytest.mark.parametrize(
    ("option", "value"), [("share", 0.0), ("share", 1.5), ("rounds", -1), ("noise", -0.1)]
)
def test_a_pool_that_means_nothing_is_refused(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"initial_distillation.prompts.{option}"):
        PromptPool(**{option: value})  # type: ignore[arg-type]


# --- the cache key ------------------------------------------------------------------------------


def key(teacher: Backbone, settings: Distillation | None = None, **facts: Any) -> str:
    return cache_key(teacher, settings or spec(), {**FACTS, **facts})


def test_equal_ingredients_make_equal_keys(teacher: Backbone) -> None:
    assert key(teacher) == key(tiny_backbone("gpt2"))
    assert len(key(teacher)) == 64


def test_a_change_of_any_single_number_of_the_teacher_changes_the_key() -> None:
    """Every element of the token embeddings, whose table is larger than any sample of it."""
    teacher = tiny_backbone(
        "gpt2", config=tiny_config("gpt2", num_layers=1, n_embd=8, vocab_size=40)
    )
    table = teacher.model.get_input_embeddings().weight.data.view(-1)
    original = key(teacher)
    keys = {original}
    for index in range(table.numel()):
        before = table[index].item()
        table[index] = before + 1.0
        keys.add(key(teacher))
        table[index] = before
    assert len(keys) == 1 + table.numel()
    for parameter in teacher.parameters():
        before = parameter.data.view(-1)[-1].item()
        parameter.data.view(-1)[-1] = before + 1.0
        assert key(teacher) != original
        parameter.data.view(-1)[-1] = before


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_weights_have_keys_too(dtype: Any) -> None:
    one, other = (tiny_backbone("gpt2", dtype=dtype) for _ in range(2))
    assert key(one) == key(other) != key(tiny_backbone("gpt2"))
    next(other.parameters()).data.view(-1)[5] += 1.0
    assert key(one) != key(other)


def test_the_place_of_the_text_changes_the_key() -> None:
    assert key(tiny_backbone("llama")) != key(tiny_backbone("llama", position_offset=3))


BASE = Stage(steps=3, optimizer=sgd())
CHANGES: dict[str, Distillation] = {
    "hidden_weight": spec(hidden_weight=2.0),
    "logit_weight": spec(logit_weight=1.0),
    "lm_weight": spec(lm_weight=1.0),
    "kd_temperature": spec(kd_temperature=2.0),
    "max_logit_tokens": spec(max_logit_tokens=7),
    "steps": Distillation(replace(BASE, steps=4)),
    "learning rate": Distillation(replace(BASE, optimizer=sgd(0.2))),
    "optimizer class": Distillation(replace(BASE, optimizer=partial(torch.optim.Adagrad, lr=0.1))),
    "optimizer option": Distillation(
        replace(BASE, optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5))
    ),
    "schedule": Distillation(replace(BASE, lr_scheduler=LinearWarmup)),
    "schedule option": Distillation(
        replace(BASE, lr_scheduler=partial(LinearWarmup, final_fraction=0.5))
    ),
    "schedule of the momentum": Distillation(
        replace(
            BASE,
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
            lr_scheduler=lambda o, n: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, n),
        )
    ),
    "limits of the momentum": Distillation(
        replace(
            BASE,
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
            lr_scheduler=lambda o, n: torch.optim.lr_scheduler.OneCycleLR(
                o, 0.1, n, base_momentum=0.5
            ),
        )
    ),
    "gradient_clip_norm": Distillation(replace(BASE, gradient_clip_norm=0.5)),
    "no clipping": Distillation(replace(BASE, gradient_clip_norm=None)),
    "accumulate_grad_batches": Distillation(replace(BASE, accumulate_grad_batches=2)),
}


def test_each_setting_that_makes_the_artefact_changes_the_key(teacher: Backbone) -> None:
    keys = {name: key(teacher, settings) for name, settings in CHANGES.items()}
    keys["nothing"] = key(teacher)
    assert len(set(keys.values())) == len(keys)


@pytest.mark.parametrize(
    "facts",
    [
        {"recipe": ["SharedCell", vars(SharedCell(start=1))]},
        {"recipe": ["KeptLayers", vars(KeptLayers(num_layers=2))]},
        {"public": "other"},
        {"seed": 1},
    ],
)
def test_each_fact_changes_the_key(teacher: Backbone, facts: dict[str, Any]) -> None:
    assert key(teacher, **facts) != key(teacher)


@pytest.mark.parametrize("options", [{"cache_dir": "/elsewhere"}, {"strict_public_data": True}])
def test_what_does_not_make_the_artefact_leaves_the_key(
    teacher: Backbone, options: dict[str, Any]
) -> None:
    assert key(teacher, spec(**options)) == key(teacher)


def test_an_equal_optimizer_written_otherwise_leaves_the_key(teacher: Backbone) -> None:
    other = Distillation(replace(BASE, optimizer=partial(torch.optim.SGD, lr=0.1)))
    assert key(teacher, other) == key(teacher)


def test_a_batch_that_teaches_nothing_gives_a_zero_to_differentiate(
    teacher: Backbone, student: Backbone, batch: dict[str, Tensor]
) -> None:
    """As where a trimmed vocabulary knows none of its labels."""
    for parameter in student.parameters():
        parameter.requires_grad_(True)
    empty = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    settings = spec(hidden_weight=0.0, logit_weight=1.0)
    loss = settings.loss(teacher, student, empty, torch.Generator())
    loss.backward()
    assert loss.item() == 0.0
    for parameter in student.parameters():
        assert parameter.grad is None or not parameter.grad.any()
        parameter.requires_grad_(False)
