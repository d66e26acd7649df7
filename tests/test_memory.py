"""Memory: evaluation and training under a simulated allocator that runs out, and the sizes of real models on one GPU.

    make test ROOM=memory

bench.gpu.Allocator counts the bytes of live tensors and raises torch.OutOfMemoryError above a limit. The first half
runs tiny models for real, on the CPU. The second half runs models of real size on PyTorch's meta device, where tensors
have no contents: what is allocated is what a GPU would allocate, but for what its kernels need inside.
"""

import functools
import gc
import math
import random

import pytest
import torch

import train
from agent_distill import Prompts, agent_episode
from bench.gpu import GIB, Allocator, evaluation_memory
from common import InputError, models
from common.models import load_model
from conftest import conversation, make_model, write_jsonl
from evaluate import Student, run_lockstep
from sandbox import Sandbox

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


# Evaluation


def answer_questions(student, questions=9, watch=lambda: None):
    """Real episodes in lockstep. Returns {question: (stop, all its messages)}; watch is called before each step."""
    answer = student.answer
    student.answer = lambda *turns: watch() or answer(*turns)
    prompts, place = Prompts(), functools.partial(Sandbox, isolation="off")
    episode = functools.partial(agent_episode, prompts=prompts, open_sandbox=place, system="Be brief.", max_steps=3)
    episodes = ((i, episode(f"Question {i}: {'why ' * (i % 7)}")) for i in range(questions))
    ended = run_lockstep(episodes, student, ["<end_code>"], workers=2)
    return {key: (result.stop, result.messages) for key, result, _ in ended}


def make_student(model, n, **options):
    """With a vanishing temperature all samples are the greedy text, which no batch and no seed changes."""
    return Student(*model, n=n, temperature=1e-6, max_tokens=8, **{"batch": 8} | options)


def test_under_falling_limits_every_episode_ends_as_without_a_limit(folder):
    model, n = load_model(folder), 8
    with Allocator() as unlimited:
        expected = answer_questions(make_student(model, n))
    assert len(expected) == 9 == len({str(messages) for _, messages in expected.values()})
    with Allocator(0.8 * unlimited.peak) as scarce:
        student, sizes = make_student(model, n), []

        def watch():
            sizes.append(student.batch)
            scarce.limit = max(0.25 * unlimited.peak, 0.85 * scarce.limit)

        assert answer_questions(student, watch=watch) == expected
    assert scarce.failures >= 2 and sizes[0] == 8 and min(sizes) <= 2, sizes


def test_the_batch_shrinks_and_grows_again(folder):
    model, sizes = load_model(folder), []
    with Allocator() as unlimited:
        expected = answer_questions(make_student(model, 1), 20)
    with Allocator(0.6 * unlimited.peak) as allocator:
        student = make_student(model, 1)

        def watch():
            sizes.append(student.batch)
            if student.batch < 8:  # another process frees its memory
                allocator.limit = math.inf

        assert answer_questions(student, 20, watch) == expected
    assert sizes[0] == sizes[-1] == 8 and min(sizes) == 4, sizes


@pytest.mark.parametrize("n", [1, 8])
def test_keys_and_values_are_freed_with_their_last_user(folder, n, no_gc):
    model = load_model(folder)
    with Allocator() as allocator:
        student, at_step = make_student(model, n), []
        answer_questions(student, 12, lambda: at_step.append(allocator.now))
        assert allocator.peak > 100 * SMALL and max(at_step) <= SMALL, "a reference cycle keeps tensors alive"


def test_what_did_not_fit_is_freed_before_the_next_attempt(folder, no_gc, monkeypatch):
    model, alive = load_model(folder), []
    monkeypatch.setattr(gc, "collect", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append(allocator.now))
    with Allocator() as allocator:
        answer_questions(make_student(model, 8), 8)
        allocator.limit = 0.3 * allocator.peak
        answer_questions(make_student(model, 8), 8)
    assert alive and max(alive) <= SMALL, alive


def test_a_turn_that_never_fits_ends_the_run_in_one_line(folder):
    student = make_student(load_model(folder), 1)
    with Allocator(30_000), pytest.raises(InputError, match="8 tokens, 1 times, do not fit into the memory of cpu"):
        answer_questions(student)


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
        trainer.update(1e-3, 1.0)
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


# Models of real size on a simulated GPU


@pytest.mark.parametrize(("shape", "n", "card"), [("1.5b", 1, 24), ("7b", 8, 24)])
def test_the_batch_that_is_chosen_fits_and_is_no_third_of_what_would(shape, n, card):
    memory = (card - 1) * GIB
    batch, weights, peaks = evaluation_memory(shape, n, memory, prompts=(3050, 4096))
    most = max(map(max, peaks))
    assert most < memory
    assert batch == 256 or most - weights > (memory - weights) / 3
