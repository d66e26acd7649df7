"""What the tests with a real model share: SmolLM2-135M-Instruct, and an agent that is distilled into it.

The agent learns from 131 trajectories of the miniature's teacher. Nearly all of them answer questions about
numbers, because these are short: one step, about 110 tokens. (`make reproduce` asks 600 questions.)
"""

import shutil

import pytest

import agent_distill
import evaluate
import retriever
import train
from agent_distill import STOP
from common import report, write_jsonl
from common.client import cut_at_stop
from common.models import render
from conftest import ROOT, read_rows
from miniature import student, world
from miniature import teacher as miniature_teacher
from servers import background

PROMPTS = ROOT / "prompts"
MAX_TOKENS = 128  # new tokens per step


class Lesson:
    """A folder with a small world, its index, and what models said about its questions."""

    def __init__(self, folder):
        self.folder, self.prompts = folder, folder / "prompts"
        self.tests = {path.stem: str(path) for path in (folder / "world" / "test").glob("*.jsonl")}

    def rows(self, name):
        return read_rows(self.folder / f"{name}.jsonl")

    def collect(self, url, out, tasks, **options):
        """The trajectories of the model at url, which are also written to out.jsonl."""
        options = {"search": str(self.folder / "index"), "prompts": str(self.prompts), "concurrency": 2} | options
        options |= {"out": str(self.folder / f"{out}.jsonl"), "max_tokens": MAX_TOKENS, "quiet": True}
        agent_distill.collect(agent_distill.CollectConfig(tasks=tasks, url=url, **options))
        return self.rows(out)

    def answer(self, model, out, **options):
        """The transcripts of a student's greedy answers to the test questions about numbers, in their order."""
        options = {"search": str(self.folder / "index"), "max_tokens": MAX_TOKENS} | options
        options |= {} if "url" in options else {"precision": "fp32"}
        options |= {"model": str(model), "out": str(self.folder / out), "quiet": True}
        evaluate.run(evaluate.RunConfig(tasks=[self.tests["math"]], **options))
        return sorted(report.transcripts(self.folder / out), key=lambda row: int(row["id"].rpartition("-")[2]))


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """The folder of SmolLM2-135M-Instruct, in float32."""
    folder = tmp_path_factory.mktemp("smollm2")
    student.write(student.Config(out=str(folder)))
    return folder


@pytest.fixture(scope="session")
def lesson(tmp_path_factory):
    """A Lesson with the teacher's agent.jsonl, agent.train.jsonl, and cot.jsonl on the test questions.

    In its copy of the prompts, the student's short system prompt stands in the place of the teacher's, so that
    `collect` can ask the agent, which knows no other one.
    """
    folder = tmp_path_factory.mktemp("lesson")
    shutil.copytree(PROMPTS, folder / "prompts")
    shutil.copy(PROMPTS / "agent_student_system.txt", folder / "prompts" / "agent_system.txt")
    world.write(world.Config(out=str(folder / "world"), seed=3, train_questions=280, test_questions=16))
    retriever.build(str(folder / "world" / "passages.jsonl"), str(folder / "index"), quiet=True)
    lesson = Lesson(folder)
    rows = lesson.rows("world/train")
    facts = [row for row in rows if row["kind"] == "fact"][:8]
    write_jsonl(folder / "tasks.jsonl", facts + [row for row in rows if row["kind"] == "math"])
    with background(miniature_teacher.open_server(miniature_teacher.Config(world=str(folder / "world")))) as address:
        lesson.collect(f"{address}/v1", "agent", [str(folder / "tasks.jsonl")])
        lesson.collect(f"{address}/v1", "cot", [lesson.tests["hotpotqa"], lesson.tests["math"]], method="cot")
    trajectories, out = [str(folder / "agent.jsonl")], str(folder / "agent.train.jsonl")
    agent_distill.filter_trajectories(agent_distill.FilterConfig(trajectories=trajectories, out=out))
    return lesson


@pytest.fixture(scope="session")
def agent(smollm2, lesson):
    """The folder of the adapter that makes SmolLM2 an agent."""
    options = {"epochs": 2, "lr": 1e-3, "dropout": 0.0, "warmup_steps": 5, "quiet": True}
    data, out = str(lesson.folder / "agent.train.jsonl"), lesson.folder / "agent"
    train.fit(train.Config(data=[data], model=str(smollm2), out=str(out), **options))
    return out


@pytest.fixture(scope="session")
def answered(lesson, agent):
    """The agent's transcripts of 16 questions about numbers that it has not seen."""
    return lesson.answer(agent, "answered")


@pytest.fixture(scope="session")
def continuation():
    """A function: what plain generate writes after a conversation, greedily and alone in its batch.

    opening: the first words of the message that it writes.
    """

    def continuation(model, tokenizer, messages, opening="", max_tokens=MAX_TOKENS):
        ids = tokenizer(
            render(tokenizer, messages, reply=True) + opening, add_special_tokens=False, return_tensors="pt"
        )
        options = {"stop_strings": STOP, "tokenizer": tokenizer, "do_sample": False, "max_new_tokens": max_tokens}
        new = model.generate(**ids, **options)[0, ids["input_ids"].shape[1] :]
        return cut_at_stop(tokenizer.decode(new, skip_special_tokens=True), STOP)

    return continuation
