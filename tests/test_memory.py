"""Memory: training under a simulated allocator that runs out. (tests/test_evaluate.py has evaluation's part.)

make test ROOM=memory
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
def make_trainer(tmp_path_factory, tiny_tokenizer):
    """Returns () -> (Trainer of a new adapter, the steps of an epoch). The first step is taken: it allocates the
    optimiser's moments."""
    folder = tmp_path_factory.mktemp("memory")
    options = {"num_hidden_layers": 4, "intermediate_size": 192, "max_position_embeddings": 4096}
    model = make_model(folder / "model", tiny_tokenizer, **options)
    rng = random.Random(0)
    data = write_jsonl(folder / "data", [{"messages": conversation(rng, rng.randint(2, 5))} for _ in range(16)])
    options = {"precision": "fp32", "rank": 4, "dropout": 0.0, "micro_tokens": 4096}
    config = train.Config(data=[data], model=model, out="", epochs=1, **options)
    conversations, _, _ = train.read_conversations(models.load_tokenizer(model), config)

    def make_trainer():
        trainer, (first, *steps) = train.Trainer(config, torch.device("cpu")), train.plan_steps(conversations, config)
        run_steps(trainer, [first])
        return trainer, steps

    return make_trainer


def run_steps(trainer, steps):
    """Returns the losses and gradient norms of the steps."""
    taken = []
    for step in steps:
        taken.append((trainer.accumulate(step, seed=0), trainer.gradient.norm().item()))
        trainer.optimizer.step()
    return taken


def test_under_falling_limits_training_takes_the_steps_of_an_unlimited_run(make_trainer):
    trainer, steps = make_trainer()
    with Allocator() as unlimited:
        expected = run_steps(trainer, steps)
    cuts = []
    for share in (0.5, 0.12):
        trainer, _ = make_trainer()
        with Allocator(share * unlimited.peak) as scarce:
            taken = run_steps(trainer, steps)
        assert scarce.failures and scarce.peak <= scarce.limit
        for ours, theirs in zip(taken, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)
        cuts.append((trainer.micro_tokens, trainer.model.is_activation_checkpointing))
    assert cuts[1][0] <= cuts[0][0] < 4096
    assert cuts[1][1], "the least memory is enough only if activations are recomputed"


def test_a_micro_batch_that_did_not_fit_is_freed_before_the_next_attempt(make_trainer, monkeypatch):
    trainer, steps = make_trainer()
    alive = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append(allocator.now))
    gc.collect()
    monkeypatch.setattr(gc, "collect", lambda: None)
    gc.disable()  # only reference counting frees tensors, as in the long stretches between two collections
    try:
        with Allocator() as allocator:
            run_steps(trainer, steps)
            kept, allocator.limit = allocator.now, 0.12 * allocator.peak
            run_steps(trainer, steps)
    finally:
        gc.enable()
    assert alive and max(alive) <= kept + SMALL, (kept, alive)


def test_an_example_that_never_fits_is_refused(make_trainer):
    trainer, steps = make_trainer()
    with Allocator(100_000), pytest.raises(InputError, match="does not fit into memory; try a lower --max-length"):
        trainer.accumulate(steps[0], seed=0)
