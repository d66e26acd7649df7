"""A student under plain Hugging Face generate: many turns in one call, each sampled from its own seed.

from student import Student
student = Student(*train.load_model("runs/student", "cpu", torch.float32), n=8, temperature=0.4, top_p=0.8)
student.answer([Turn(messages)], keys=[0], stop=["<end_code>"])[0].texts
"""

import dataclasses

import numpy as np
import torch
from transformers import DynamicCache, LogitsProcessor, StoppingCriteria
from transformers.cache_utils import DynamicLayer

from chat import render
from client import cut_at_stop


@dataclasses.dataclass
class Answer:
    """n candidate texts for one turn. completion_tokens: over all of them."""

    texts: list
    prompt_tokens: int
    completion_tokens: int


class Student:
    """A Hugging Face model that answers many turns at once.

    model, tokenizer: as from train.load_model. n: candidates a turn. temperature 0 is greedy.
    batch: turns in one generate call, n sequences each; halved when memory runs out.
    """

    def __init__(self, model, tokenizer, *, n=1, temperature=0.0, top_p=1.0, max_tokens=1024, batch=None, seed=0):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.n, self.temperature, self.top_p, self.max_tokens = n, temperature, top_p, max_tokens
        self.seed = seed
        self.batch = batch or self._batch_that_fits()
        self.stop_ids = sorted({tokenizer.eos_token_id, *_as_list(model.generation_config.eos_token_id)} - {None})
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.stop_ids[0]

    def answer(self, turns, keys, stop=()):
        """turns: list of Turn. keys: the seed of each turn's sampling. Returns an Answer with n texts for each.

        A turn too long for the model's context gets None. The sampled answers depend on the key
        alone, not on what else is in the batch (exact in float32).
        """
        prompts = [self._encode(turn) for turn in turns]
        room = getattr(self.model.config, "max_position_embeddings", None) or 10**9
        fitting = [i for i, ids in enumerate(prompts) if len(ids) + 1 < room]
        fitting.sort(key=lambda i: len(prompts[i]))  # neighbours of like length share a batch: little padding
        answered = [None] * len(turns)
        start = 0
        while start < len(fitting):
            chunk = fitting[start : start + self.batch]
            try:
                answers = self._generate([prompts[i] for i in chunk], [keys[i] for i in chunk], stop, room)
            except torch.OutOfMemoryError:
                if len(chunk) == 1:
                    raise
                torch.cuda.empty_cache()
                self.batch = len(chunk) // 2
                continue
            for i, answer in zip(chunk, answers, strict=True):
                answered[i] = answer
            start += len(chunk)
        return answered

    def _encode(self, turn):
        text = render(self.tokenizer, turn.messages, reply=True)  # as training rendered it
        return self.tokenizer(text + turn.opening, add_special_tokens=False)["input_ids"]

    def _batch_that_fits(self, context=4096, most=256):
        """Turns whose key-value cache and logits fill 80 % of the free memory, at `context` tokens a turn."""
        if self.model.device.type != "cuda":
            return 64
        config = self.model.config
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        cache = 2 * config.num_hidden_layers * heads * head * self.model.dtype.itemsize  # bytes a token
        sequence = cache * context + 6 * 4 * config.vocab_size  # sampling keeps about six float32 copies of the logits
        return min(most, max(1, int(0.8 * torch.cuda.mem_get_info()[0] / (sequence * self.n))))

    @torch.inference_mode()
    def _generate(self, prompts, keys, stop, room):
        """One generate call. prompts: B lists of token ids. Returns B Answers of n texts."""
        length = max(map(len, prompts))
        ids = torch.full((len(prompts), length), self.pad_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # left-padded: generation goes on at the right edge
            ids[row, length - len(prompt) :] = torch.tensor(prompt)
            mask[row, length - len(prompt) :] = 1
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        new = min(self.max_tokens, room - length)
        processors = []
        if self.temperature > 0:
            draws = np.stack([np.random.default_rng(key).random((self.n, new)) for key in keys])  # (B, n, new)
            draws = torch.tensor(draws.reshape(-1, new), dtype=torch.float32, device=ids.device)
            processors = [SampleByInverse(draws, length, self.temperature, self.top_p)]
        cache = roomy_cache(self.model.config, new)
        if self.n > 1:
            self._prefill(cache, ids, mask)
            ids, mask = ids.repeat_interleave(self.n, 0), mask.repeat_interleave(self.n, 0)  # (B*n, L)
        out = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            do_sample=False,
            max_new_tokens=new,
            logits_processor=processors,
            stopping_criteria=[StopAtStrings(self.tokenizer, stop, length)] if stop else [],
            eos_token_id=self.stop_ids,
            pad_token_id=self.pad_id,
            **_NEUTRAL,
        )[:, length:]  # (B*n, new tokens)
        texts = [cut_at_stop(text, stop) for text in self.tokenizer.batch_decode(out, skip_special_tokens=True)]
        new_tokens = (out != self.pad_id).sum(1).view(-1, self.n).sum(1).tolist()  # (B,)
        return [
            Answer(texts[i * self.n : (i + 1) * self.n], len(prompt), new_tokens[i]) for i, prompt in enumerate(prompts)
        ]

    def _prefill(self, cache, ids, mask):
        """Compute keys and values of all prompt tokens but the last once, and repeat them for the n samples.

        generate computes the last token itself: it needs at least one to start from.
        """
        if ids.shape[1] == 1:
            return
        positions = (mask.cumsum(1) - 1).clamp(min=0)  # left padding must not shift the positions
        self.model(
            input_ids=ids[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=positions[:, :-1],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache.batch_repeat_interleave(self.n)


class RoomyLayer(DynamicLayer):
    """A layer of the key-value cache with room for the new tokens.

    DynamicLayer copies itself to append a token; with many sequences on a CPU that took most of the time.
    """

    def __init__(self, room):
        super().__init__()
        self.room = room
        self.stores = None  # keys and values, (rows, heads, capacity, head size) each; self.keys is a view of the first

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, new = self.get_seq_length(), key_states.shape[-2]
        if self.stores is None or start + new > self.stores[0].shape[-2]:
            old = (self.keys, self.values) if start else (key_states[..., :0, :], value_states[..., :0, :])
            self._allocate(old, start + new + self.room, 1)
        for store, states in zip(self.stores, (key_states, value_states), strict=True):
            store[..., start : start + new, :] = states
        self.keys, self.values = (store[..., : start + new, :] for store in self.stores)
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats):
        length = self.get_seq_length()
        if length:
            self._allocate((self.keys, self.values), length + 1 + self.room, repeats)
            self.keys, self.values = (store[..., :length, :] for store in self.stores)

    def _allocate(self, old, capacity, repeats):
        """New stores that start with the old states, each row `repeats` times."""
        rows, heads, length, size = old[0].shape
        self.stores = [states.new_empty(rows * repeats, heads, capacity, size) for states in old]
        for store, states in zip(self.stores, old, strict=True):
            store.view(rows, repeats, heads, capacity, size)[..., :length, :] = states[:, None]


def roomy_cache(config, room):
    """A DynamicCache whose full-attention layers hold `room` new tokens without copying; others stay as they are."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


# A checkpoint's generation_config.json may bring sampling settings along; decoding here is what is asked for.
_NEUTRAL = {"temperature": None, "top_p": None, "top_k": None, "repetition_penalty": None, "num_beams": 1}


class SampleByInverse(LogitsProcessor):
    """Temperature and nucleus sampling from uniform numbers that were drawn beforehand.

    draws: (rows, new tokens) in [0, 1). Tokens are sorted by probability, the smallest set that reaches
    top_p is kept, and the draw is looked up in its cumulated probabilities. The chosen token is the only
    one left finite, so that generate's argmax takes it: no generator is shared between episodes.
    """

    def __init__(self, draws, start, temperature, top_p):
        self.draws, self.start, self.temperature, self.top_p = draws, start, temperature, top_p

    def __call__(self, input_ids, scores):
        draw = self.draws[:, input_ids.shape[1] - self.start, None]  # (rows, 1)
        p, order = (scores.float() / self.temperature).softmax(-1).sort(descending=True, stable=True)
        cumulated = p.cumsum(-1)  # (rows, vocabulary)
        kept = ((cumulated - p) < self.top_p).sum(-1, keepdim=True)
        mass = cumulated.gather(-1, kept - 1)
        rank = torch.searchsorted(cumulated, draw * mass, right=True).clamp(max=kept - 1)
        return torch.full_like(scores, -torch.inf).scatter_(-1, order.gather(-1, rank), 0.0)


class StopAtStrings(StoppingCriteria):
    """Ends a sequence when its new text holds one of the strings, however the tokens fall."""

    def __init__(self, tokenizer, strings, start):
        self.tokenizer, self.strings, self.start = tokenizer, strings, start
        self.window = max(len(s.encode()) for s in strings) + 4  # tokens; each brings at least one byte
        self.done = None

    def __call__(self, input_ids, scores, **kwargs):
        if self.done is None:
            self.done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        tail = input_ids[:, max(self.start, input_ids.shape[1] - self.window) :]
        rows = (~self.done).nonzero()[:, 0]
        texts = self.tokenizer.batch_decode(tail[rows])
        found = [any(string in text for string in self.strings) for text in texts]
        self.done[rows] = torch.tensor(found, device=self.done.device)
        return self.done


def _as_list(value):
    return value if isinstance(value, list) else [value]
