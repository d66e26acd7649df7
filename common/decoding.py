"""How a student's answers are decoded: a key-value cache for several samples of each prompt, and nucleus sampling.

    model.set_attn_implementation("shared_prompt")
    states = torch.zeros(layers, 2, prompts, heads, length, size)
    model(input_ids=ids, past_key_values=Cache([Layer(state) for state in states]))     # the prompts are read
    cache = SharedPrompts(states, mask, n=8)
    model.generate(..., past_key_values=cache, logits_processor=[SampleNucleus(temperature=0.4, top_p=0.8)])

transformers' DynamicCache copies itself for every new token and repeats a prompt for each of its samples, and its top_p
sorts the whole vocabulary for every token. On a CPU, each of these takes longer than the model. Here a prompt is stored
once, new tokens are appended in place, and only the likeliest tokens are sorted.
"""

import dataclasses

import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention

from common import InputError


@dataclasses.dataclass
class Samples:
    """Which rows of the batch are samples of which prompt. The layers of a cache share it.

    n: samples of each prompt. bias: (prompts, 1, 1, length): 0 for tokens, a large negative number for padding.
    index: None if every prompt has n rows; otherwise (rows,): row r is sample index[r] % n of prompt index[r] // n.
    """

    n: int
    bias: torch.Tensor
    index: torch.Tensor | None = None

    def by_prompt(self, x):
        """(rows, heads, groups, ...) -> (prompts, heads, n * groups, ...), with zeros for the rows that have ended."""
        if self.index is not None:
            x = x.new_zeros(len(self.bias) * self.n, *x.shape[1:]).index_copy_(0, self.index, x)
        return x.unflatten(0, (-1, self.n)).transpose(1, 2).flatten(2, 3)

    def by_row(self, x):
        """The inverse of by_prompt."""
        x = x.unflatten(2, (self.n, -1)).transpose(1, 2).flatten(0, 1)
        return x if self.index is None else x[self.index]


class Layer(transformers.cache_utils.DynamicLayer):
    """The keys and values of one layer.

    new: (2, rows, heads, capacity, size); `length` tokens of it are filled. prompt: None while prompts are read (into
    `new`), then (2, prompts, heads, length of the prompts, size).
    """

    def __init__(self, new, prompt=None, samples=None):
        super().__init__()
        self.is_initialized = True
        self.new, self.length, self.prompt, self.samples = new, 0, prompt, samples

    def update(self, keys, values, *args, **kwargs):
        """Append keys and values. The model passes what is returned here on to `attend`."""
        start, self.length = self.length, self.length + keys.shape[-2]
        self.new[0, :, :, start : self.length] = keys
        self.new[1, :, :, start : self.length] = values
        return self, self

    def get_seq_length(self):
        return self.length + (0 if self.prompt is None else self.prompt.shape[-2])


class SharedPrompts(transformers.Cache):
    """The cache of n samples of each prompt. Sample s (from 0) continues prompt s // n.

    states: (layers, 2, prompts, heads, length, size), the keys and values of the prompts. mask: (prompts, length), 1
    for tokens, 0 for padding.
    """

    def __init__(self, states, mask, n):
        bias = (1 - mask[:, None, None].to(states.dtype)) * torch.finfo(states.dtype).min
        self.states, self.bias, self.running = states, bias.to(states.device), list(range(len(mask) * n))
        self.samples = Samples(n, self.bias)
        _, kinds, prompts, heads, _, size = states.shape
        new = states.new_empty(kinds, prompts * n, heads, 0, size)
        super().__init__(layers=[Layer(new, state, self.samples) for state in states])

    def keep(self, running, capacity):
        """Drop all samples but these (ascending numbers); each gets room for `capacity` more tokens."""
        n, places = self.samples.n, {sample: row for row, sample in enumerate(self.running)}
        rows, prompts = [places[sample] for sample in running], sorted({sample // n for sample in running})
        number = {prompt: i for i, prompt in enumerate(prompts)}
        index = [number[sample // n] * n + sample % n for sample in running]
        complete, fewer = len(running) == n * len(prompts), len(prompts) < len(self.samples.bias)
        self.samples.index = None if complete else torch.tensor(index, device=self.bias.device)
        self.samples.bias = self.bias[prompts]
        for layer, state in zip(self.layers, self.states, strict=True):
            old, (kinds, _, heads, _, size) = layer.new[:, rows, :, : layer.length], layer.new.shape
            layer.new = old.new_empty(kinds, len(rows), heads, layer.length + capacity, size)
            layer.new[:, :, :, : layer.length] = old
            layer.prompt = state[:, prompts] if fewer else layer.prompt
        self.running = running


def attend(module, query, key, value, attention_mask, scaling=None, **options):
    """Causal attention, as transformers' models call it. query: (rows, query heads, tokens, size); key: the Layer.

    Returns (rows, tokens, query heads, size) and None.
    """
    if any(options.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise InputError("this architecture's attention is not a plain softmax: serve the model and give its --url")
    layer, samples, (rows, heads, tokens, size) = key, key.samples, query.shape
    keys, values = layer.new[..., : layer.length, :]  # (rows, heads, tokens so far, size)
    groups = heads // keys.shape[1]
    if layer.prompt is None:  # prompts are read
        keys, values = (x.repeat_interleave(groups, 1) for x in (keys, values))
        out = scaled_dot_product_attention(query, keys, values, is_causal=tokens > 1, scale=scaling)
        return out.transpose(1, 2), None
    # Decoding, one token per row: the query heads that share a key head, and the samples that share a prompt, are the
    # rows of one matrix. The scores of prompt and new tokens are joined before the softmax.
    query = query.reshape(rows, -1, groups, size) * (size**-0.5 if scaling is None else scaling)
    prompt_scores = samples.by_prompt(query) @ layer.prompt[0].mT + samples.bias  # (prompts, heads, n * groups, length)
    scores = torch.cat([samples.by_row(prompt_scores), query @ keys.mT], -1)  # (rows, heads, groups, length + new)
    weights, length = scores.softmax(-1), layer.prompt.shape[-2]
    out = samples.by_row(samples.by_prompt(weights[..., :length]) @ layer.prompt[1]) + weights[..., length:] @ values
    return out.reshape(rows, 1, heads, size), None


transformers.AttentionInterface.register("shared_prompt", attend)


class SampleNucleus(transformers.LogitsProcessor):
    """Temperature and nucleus (top-p) sampling among the HEAD likeliest tokens. All scores but that of the drawn token
    become -inf, so generate is called with do_sample=False.

    For a model that is unsure of its words, whose HEAD likeliest tokens hold less than top_p, it is top-k sampling.
    """

    HEAD = 256

    def __init__(self, temperature, top_p):
        self.temperature, self.top_p = temperature, top_p

    def __call__(self, input_ids, scores):
        p, tokens = (scores / self.temperature).softmax(-1).topk(min(self.HEAD, scores.shape[-1]))  # (rows, HEAD)
        p = p.masked_fill(p.cumsum(-1) - p >= self.top_p, 0)  # kept: the smallest set that holds top_p
        drawn = tokens.gather(-1, p.multinomial(1))
        return torch.full_like(scores, -torch.inf).scatter_(-1, drawn, 0)
