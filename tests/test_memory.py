"""Memory: training under a simulated allocator that runs out. (tests/test_evaluate.py has evaluation's part.)

    make test ROOM=memory

Allocator counts the bytes of live tensors and raises torch.OutOfMemoryError above a limit.
"""

import gc
import random

import pytest
import torch

import train
from allocator import Allocator
from common import InputError, models
from conftest import conversation, make_model, write_jsonl

SMALL = 1024  # bytes: transformers keeps the numbers of the end tokens in a tensor


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    """A tiny model with more layers and a longer context than that of the other tests."""
    path = tmp_path_factory.mktemp("memory") / "model"
    options = {"num_hidden_layers": 4, "intermediate_size": 192, "max_position_embeddings": 4096}
    return make_model(path, tiny_tokenizer, **options)


@pytest.fixture
def no_gc():
    """Only reference counting frees tensors, as in the long stretches between two collections of a real run."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


# Training


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rng = random.Random(0)
    rows = [{"messages": conversation(rng, rng.randint(2, 5))} for _ in range(20)]
    return write_jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", rows)


def make_trainer(folder, data):
    """Returns (Trainer, the steps of an epoch)."""
    options = {"precision": "fp32", "rank": 4, "dropout": 0.0, "micro_tokens": 4096}
    config = train.Config(data=[data], model=folder, out="", epochs=1, **options)
    conversations, _, _ = train.read_conversations(models.load_tokenizer(folder), config)
    return train.Trainer(config, torch.device("cpu")), train.plan_steps(conversations, config)


def run_steps(trainer, steps):
    """Returns the losses and gradient norms of the steps."""
    taken = []
    for step in steps:
        taken.append((trainer.accumulate(step, seed=0), trainer.gradient.norm().item()))
        trainer.optimizer.step()
    return taken


def test_under_falling_limits_training_takes_the_steps_of_an_unlimited_run(folder, data):
    trainer, steps = make_trainer(folder, data)
    expected = run_steps(trainer, steps[:1])  # allocates the optimiser's moments, before the allocator counts
    with Allocator() as unlimited:
        expected += run_steps(trainer, steps[1:])
    cuts = []
    for share in (0.5, 0.12):
        trainer, _ = make_trainer(folder, data)
        losses = run_steps(trainer, steps[:1])
        with Allocator(share * unlimited.peak) as scarce:
            losses += run_steps(trainer, steps[1:])
        assert scarce.failures and scarce.peak <= scarce.limit
        for ours, theirs in zip(losses, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)
        cuts.append((trainer.micro_tokens, trainer.model.is_activation_checkpointing))
    assert cuts[1][0] <= cuts[0][0] < 4096
    assert cuts[1][1], "the least memory is enough only if activations are recomputed"


def test_a_micro_batch_that_did_not_fit_is_freed_before_the_next_attempt(folder, data, no_gc, monkeypatch):
    trainer, steps = make_trainer(folder, data)
    run_steps(trainer, steps[:1])
    alive = []
    monkeypatch.setattr(gc, "collect", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append(allocator.now))
    with Allocator() as allocator:
        run_steps(trainer, steps[1:])
        kept, allocator.limit = allocator.now, 0.12 * allocator.peak
        run_steps(trainer, steps[1:])
    assert alive and max(alive) <= kept + SMALL, (kept, alive)


def test_an_example_that_never_fits_is_refused(folder, data):
    trainer, steps = make_trainer(folder, data)
    with Allocator(100_000), pytest.raises(InputError, match="does not fit into memory; try a lower --max-length"):
        trainer.accumulate(steps[0], seed=0)
