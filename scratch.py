"""Base students from scratch: a tokenizer, a Qwen2 model with a few hand-made heads, and what it is pretrained on.

    tokenizer = make_tokenizer(texts)
    model = new_model("M", tokenizer)

`miniature.py base` trains it, in under a minute: first to copy, then on documents. Copying is the skill that
everything else hangs on: names and numbers that were never seen before have to be taken from a passage or a
question into a query, a thought, code. Two to four layers do not come to it by themselves in that time.
"""

import json
import math

import tokenizers
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

import world

# Three layers of the Qwen2 architecture, head size 32: (hidden size, distances of the heads of layer 0).
# Without embeddings: S 0.33 million parameters, M 0.59, L 1.33.
SIZES = {"S": (96, (1, 2, 0)), "M": (128, (1, 2, 3, 0)), "L": (192, (1, 2, 3, 0, 4, 5))}
HEAD_SIZE = 32
VOCABULARY = 900
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# A name must be the same tokens wherever it stands, so no merge is learned that joins a sign or space to the capital
# after it. Digits are single tokens in Qwen2's tokenizer already. The result is an ordinary Qwen2 tokenizer: another
# kind would be replaced by it, with its way to split, when AutoTokenizer loads it for a Qwen2 model.
OWN_TOKENS = r"\s(?=[A-Z])|[^\s_'A-Za-z](?=[A-Za-z])"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(texts):
    """Byte-level BPE fitted to texts: an ordinary Qwen2 tokenizer, with a ChatML template."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    splits = [tokenizers.Regex(regex) for regex in (PRETOKENIZE_REGEX, OWN_TOKENS)]
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            *(tokenizers.pre_tokenizers.Split(split, "isolated") for split in splits),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    model = json.loads(bpe.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE, padding_side="left",
    )  # fmt: skip


def new_model(size, tokenizer):
    """Random weights, but for the attention of layer 0, made by hand: each head looks a fixed distance back.

    Copying needs heads that know what came before, and in minutes of training they do not form on their own. Qwen2
    has biases on queries and keys, and rotary positions turn a constant query and key into a function of distance
    alone: with c e^(i f d) for the key and c for the query, the score is the sum of c^2 cos(f (distance - d)) over
    the frequencies f, with its peak at distance d. One head looks at its own token (distance 0): without it, copying
    did not form in the warm-up's time.
    """
    width, distances = SIZES[size]
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=3,
            num_attention_heads=len(distances), num_key_value_heads=len(distances), max_position_embeddings=2048,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4}, initializer_range=0.03,
            tie_word_embeddings=True, bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    half = HEAD_SIZE // 2
    fast = torch.arange(6)  # the highest of the 16 frequencies: they make the peak sharp
    angles = 1e4 ** (-fast / half)
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        for head, distance in enumerate(distances):
            start = head * HEAD_SIZE
            attention.q_proj.bias[start + fast] = PEAK
            attention.k_proj.bias[start + fast] = PEAK * torch.cos(angles * distance)
            attention.k_proj.bias[start + half + fast] = PEAK * torch.sin(angles * distance)
    return model


PEAK = 7.0  # a distance of one token off the peak then scores 5.9 less after the division by sqrt(32)


def copy_rows(rng, tokenizer, count):
    """Random tokens, or digits, told twice; the loss is on the repetition. Most are short: from those it is learned."""
    words, digits = range(len(SPECIAL), len(tokenizer)), tokenizer.convert_tokens_to_ids(list("0123456789"))
    rows = []
    for _ in range(count):
        length = round(math.exp(rng.uniform(math.log(4), math.log(40))))
        ids = rng.choices(digits if rng.random() < 0.1 else words, k=length)
        rows.append({"input_ids": ids + ids, "loss_mask": [0] * (length + 1) + [1] * (length - 1)})
    return rows


def document_rows(rng, tokenizer, facts, count, length=256):
    """Pretraining: passages and statements of this world; reading, and following relations, in another world; numbers.

    What it learns about language is the same for all methods: that a relation has a synonym, that "A's mentor's
    birthplace" is to be had from two pages. The other world has other facts, so none of this world's answers is told.
    """
    titles = list(facts)
    weights = [1 / (rank + 10) for rank in range(len(titles))]  # Zipf: some pages are read often, most hardly ever
    rng.shuffle(titles)
    other = world.World(f"other {rng.random()}")

    def page(title, source):
        return f"{title}\n{world.sentence(title, source[title])}"

    def statement(title, source):
        relation = rng.choice(list(source[title]))
        return f"{title}'s {relation} is {source[title][relation]}."

    def chain():
        """Pages that lead from one to the next, in any order, and what follows from them."""
        entity, pages, relations, steps = rng.choice(list(other.facts)), [], [], []
        for _ in range(rng.choice([2, 3])):
            relation, value = rng.choice(list(other.facts[entity].items()))
            pages.append(page(entity, other.facts))
            relations.append(relation)
            steps.append(f"{entity}'s {relation} is {value}.")
            if value not in other.facts:
                break
            entity = value
        said = [world.SYNONYMS[r] if r in world.SYNONYMS and rng.random() < 0.3 else r for r in relations]
        first = steps[0].split("'s ")[0]
        rng.shuffle(pages)
        whole = world.possessive(first, said)
        return "\n\n".join([*pages, f"{whole}: {world.possessive(first, relations)}. {' '.join(steps)}"])

    def document():
        draw = rng.random()
        title = rng.choices(titles, weights)[0]
        if draw < 0.1:
            return page(title, facts)
        if draw < 0.15:
            return statement(title, facts)
        if draw < 0.5:
            return chain()
        if draw < 0.65:
            first, second = rng.sample(list(other.facts), 2)
            known = [statement(rng.choice([first, first, second]), other.facts) for _ in range(3)]
            return "\n\n".join([page(first, other.facts), page(second, other.facts), *known])
        names = rng.sample(WORDS, rng.randint(2, 4))
        numbers = {name: str(rng.randint(1, 10 ** rng.randint(2, 6))) for name in names}
        told = ", ".join(f"{name} {number}" for name, number in numbers.items())
        return told + ".\n" + "\n".join(f"{name} = {number}" for name, number in numbers.items())

    rows, ids = [], []
    while len(rows) < count:
        ids += [*tokenizer(document())["input_ids"], tokenizer.pad_token_id]
        while len(ids) >= length:
            rows.append({"input_ids": ids[:length], "loss_mask": [1] * length})
            ids = ids[length:]
    return rows[:count]


WORDS = "grows buys loses pays earns finds works fills puts charges takes gives owns spends saves a b c m N".split()
