"""A student under plain Hugging Face generate: many turns in one call, each sampled from its own seed.

from student import Student
student = Student(*train.load_model("runs/student", "cpu", torch.float32), n=8, temperature=0.4, top_p=0.8)
student.answer([Turn(messages)], keys=[0], stop=["<end_code>"])[0].texts
"""

import dataclasses

import numpy as np
import torch
from transformers import LogitsProcessor, StoppingCriteria

from chat import render
from client import cut_at_stop
from common import InputError
from kv_cache import ATTENTION, Cache
from prefixes import Prefixes, pad, read

SEGMENT = 32  # tokens of one generate call
PREFIX_BYTES = 2 << 30  # of keys and values that are kept from step to step, beside those of the last call


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
        self.n, self.temperature, self.max_tokens, self.seed = n, temperature, max_tokens, seed
        self.nucleus = {"temperature": temperature, "top_p": top_p}
        self.batch = batch or self._batch_that_fits()
        self.prefixes = Prefixes(PREFIX_BYTES)
        if n > 1 and model.config._attn_implementation == "sdpa":
            model.set_attn_implementation(ATTENTION)
        self.stop_ids = sorted({tokenizer.eos_token_id, *_as_list(model.generation_config.eos_token_id)} - {None})
        self.stop_tensor = torch.tensor(self.stop_ids, device=model.device)
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.stop_ids[0]

    def answer(self, turns, keys, stop=()):
        """turns: list of Turn. keys: the seed of each turn's sampling. Returns an Answer with n texts for each.

        A turn too long for the model's context gets None; one too large for the device's memory raises InputError.
        The sampled answers depend on the key alone, not on what else is in the batch (exact in float32).
        """
        prompts = [self._encode(turn) for turn in turns]
        room = getattr(self.model.config, "max_position_embeddings", None) or 10**9
        fitting = [i for i, ids in enumerate(prompts) if len(ids) + 1 < room]
        fitting.sort(key=lambda i: len(prompts[i]))  # neighbours of like length share a batch: little padding
        answered = [None] * len(turns)
        start = 0
        while start < len(fitting):
            chunk = fitting[start : start + self.batch]
            kept = bool(self.prefixes.batches)  # asked before: the attempt itself keeps its prompts
            try:
                answers = self._generate([prompts[i] for i in chunk], [keys[i] for i in chunk], stop, room)
            except torch.OutOfMemoryError:
                answers = None  # only from here on are the tensors of that attempt gone
            if answers is None:
                if len(chunk) == 1 and not kept:
                    tokens = len(prompts[chunk[0]]) + self.max_tokens
                    raise InputError(f"{tokens:,} tokens, {self.n} times, do not fit into the device's memory")
                self.prefixes.clear()
                torch.cuda.empty_cache()
                self.batch = max(1, len(chunk) // 2)
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
        turn = sequence * self.n + cache * context  # the last step's prompts are kept
        return min(most, max(1, int(0.8 * torch.cuda.mem_get_info()[0] / turn)))

    @torch.inference_mode()
    def _generate(self, prompts, keys, stop, room):
        """prompts: B lists of token ids. Returns B Answers of n texts.

        generate is called for SEGMENT new tokens at a time: sequences that have ended leave between the calls, and the
        others don't drag them along until the longest one is done.
        """
        ids, mask = pad(prompts, self.pad_id, self.model.device)
        length = ids.shape[1]
        new = min(self.max_tokens, room - length)
        draws = self._draws(keys, new)
        cache = Cache(self.model.config, SEGMENT)
        self._prefill(cache, prompts, ids, mask)
        if self.n > 1:
            ids, mask = ids.repeat_interleave(self.n, 0), mask.repeat_interleave(self.n, 0)  # (B*n, L)
        written = ids.new_full((len(ids), new), self.pad_id)  # the answers
        rows = torch.arange(len(ids), device=ids.device)  # the answers that have not ended
        while len(rows):
            stopping = StopAtStrings(self.tokenizer, stop, length) if stop else None
            start = ids.shape[1] - length
            ids = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=cache,
                do_sample=False,
                max_new_tokens=min(SEGMENT, new - start),
                logits_processor=[] if draws is None else [SampleByInverse(draws[rows], length, **self.nucleus)],
                stopping_criteria=[stopping] if stopping else [],
                eos_token_id=self.stop_ids,
                pad_token_id=self.pad_id,
                **_NEUTRAL,
            )
            grown = ids[:, length + start :]
            written[rows, start : start + grown.shape[1]] = grown
            ended = torch.isin(grown, self.stop_tensor).any(1)
            if stopping:
                ended |= stopping.done
            if ids.shape[1] == length + new:
                break
            going = (~ended).nonzero()[:, 0]
            rows, ids, mask = rows[going], ids[going], mask[going]
            mask = torch.cat([mask, mask.new_ones(grown[going].shape)], 1)
            if len(going) < len(ended):
                cache.keep(going)
        texts = [cut_at_stop(text, stop) for text in self.tokenizer.batch_decode(written, skip_special_tokens=True)]
        new_tokens = (written != self.pad_id).sum(1).view(-1, self.n).sum(1).tolist()  # (B,)
        return [
            Answer(texts[i * self.n : (i + 1) * self.n], len(prompt), new_tokens[i]) for i, prompt in enumerate(prompts)
        ]

    def _draws(self, keys, new):
        """(B*n, new) uniform numbers, each row from its own key; None where nothing is drawn."""
        if self.temperature == 0:
            return None
        draws = np.stack([np.random.default_rng(key).random((self.n, new)) for key in keys])  # (B, n, new)
        return torch.tensor(draws.reshape(-1, new), dtype=torch.float32, device=self.model.device)

    def _prefill(self, cache, prompts, ids, mask):
        """Compute keys and values of all prompt tokens but the last, once for the n samples to share.

        generate computes the last token itself: it needs at least one to start from.
        """
        if ids.shape[1] == 1:
            return
        if cache.is_shareable:
            cache.fill(self.prefixes.prefill(self.model, prompts))
        else:
            read(self.model, ids[:, :-1], mask[:, :-1], cache)
        if self.n > 1:
            cache.share(self.n)


# A checkpoint's generation_config.json may bring sampling settings along; decoding here is what is asked for.
_NEUTRAL = {"temperature": None, "top_p": None, "top_k": None, "repetition_penalty": None, "num_beams": 1}


class SampleByInverse(LogitsProcessor):
    """Temperature and nucleus sampling from uniform numbers that were drawn beforehand.

    draws: (rows, new tokens) in [0, 1). Tokens are sorted by probability, the smallest set that reaches
    top_p is kept, and the draw is looked up in its cumulated probabilities. The chosen token is the only
    one left finite, so that generate's argmax takes it: no generator is shared between episodes.
    """

    HEAD = 256  # the likeliest tokens; they nearly always hold top_p, and are found sooner than all are sorted

    def __init__(self, draws, start, temperature, top_p):
        self.draws, self.start, self.temperature, self.top_p = draws, start, temperature, top_p

    def __call__(self, input_ids, scores):
        draw = self.draws[:, input_ids.shape[1] - self.start, None]  # (rows, 1)
        p = (scores.float() / self.temperature).softmax(-1)  # (rows, vocabulary)
        head, tokens = p.topk(min(self.HEAD, p.shape[-1]))
        chosen = self._look_up(head, tokens, draw)
        wide = head.sum(-1) < self.top_p
        if wide.any():
            chosen[wide] = self._look_up(*p[wide].sort(descending=True, stable=True), draw[wide])
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen, 0.0)

    def _look_up(self, p, tokens, draw):
        """p, tokens: (rows, k), likeliest first. Returns the drawn tokens, (rows, 1)."""
        cumulated = p.cumsum(-1)
        kept = ((cumulated - p) < self.top_p).sum(-1, keepdim=True)
        mass = cumulated.gather(-1, kept - 1)
        return tokens.gather(-1, torch.searchsorted(cumulated, draw * mass, right=True).clamp(max=kept - 1))


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
