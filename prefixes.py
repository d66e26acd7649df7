"""What prompts have in common is computed once: the system prompt of all, and at every step of an episode the steps
before it.

    prefixes = Prefixes(limit=2 << 30)
    states = prefixes.prefill(model, prompts)      # keys and values of every prompt; only what is new is computed

A prompt's tokens are compared, not its text: the longest beginning that any earlier prompt shares with it is taken
from there. Imported by student.py; not run by itself.
"""

import bisect
import collections
import itertools

import numpy as np
import torch

from kv_cache import Cache

Found = collections.namedtuple("Found", "states row length common")
NOTHING = Found(None, 0, 0, 0)


class Prefixes:
    """Keys and values of the prompts of earlier calls.

    limit: bytes that are kept beside those of the last call; the oldest prompts go first.
    """

    def __init__(self, limit):
        self.limit = limit
        self.clear()

    def clear(self):
        self.batches = []  # of each call: the prompts' keys, and their states
        self.order = []  # (prompt's key, batch, row), sorted: neighbours have most in common

    def prefill(self, model, prompts):
        """Keys and values of all tokens of the prompts but the last, which generate computes itself.

        prompts: P lists of token ids, the longest of length L. Returns, for each layer, two tensors (P, heads, L - 1,
        head size), padded on the left, and keeps them for later calls.
        """
        prompts = [prompt[:-1] for prompt in prompts]
        keys = [np.array(prompt, ">u4").tobytes() for prompt in prompts]  # in the order of the lists of tokens
        shared = _common(min(keys), max(keys))  # of all: the keys between are no less alike
        found = [self.find(key) for key in keys]
        if len(prompts) > 1 and shared > max(one.common for one in found):
            self.prefill(model, [[*prompts[0][:shared], 0]])
            found = [self.find(key) for key in keys]
        missing = [len(prompt) - one.common for prompt, one in zip(prompts, found, strict=True)]
        states, longest = None, max(map(len, prompts))
        # Prompts that miss about as much are computed together: first steps, say, and later ones.
        by_size = sorted(range(len(prompts)), key=lambda i: missing[i].bit_length())
        for _, group in itertools.groupby(by_size, key=lambda i: missing[i].bit_length()):
            rows = list(group)
            if not any(prompts[i] for i in rows):
                continue
            part = _compute(model, *([column[i] for i in rows] for column in (prompts, found, missing)))
            if len(rows) == len(prompts):
                states = part
                break
            states = states or [[_empty(x, len(prompts), longest) for x in layer] for layer in part]
            for ours, computed in zip(states, part, strict=True):
                for whole, x in zip(ours, computed, strict=True):
                    whole[rows, :, longest - x.shape[2] :] = x
        self._keep(keys, states)
        return states

    def find(self, key):
        """The earlier prompt that has the longest beginning in common with this one, or NOTHING."""
        place = bisect.bisect(self.order, (key,))
        best = NOTHING
        for neighbour, batch, row in self.order[max(place - 1, 0) : place + 1]:
            common = _common(key, neighbour)
            if common > best.common:
                best = Found(self.batches[batch][1], row, len(neighbour) // 4, common)
        return best

    def _keep(self, keys, states):
        sizes = [sum(x.nbytes for layer in states for x in layer) for _, states in self.batches]
        while sum(sizes) > self.limit:
            sizes.pop(0), self.batches.pop(0)
        self.batches.append((keys, states))
        self.order = sorted(
            (key, batch, row) for batch, (keys, _) in enumerate(self.batches) for row, key in enumerate(keys)
        )


def _common(key, other):
    """How many tokens two prompts begin with in common."""
    both = min(len(key), len(other)) // 4
    differ = np.flatnonzero(np.frombuffer(key, np.uint32, both) != np.frombuffer(other, np.uint32, both))
    return int(differ[0]) if differ.size else both


def pad(prompts, filler, device):
    """(ids, mask), both (P, L), padded on the left: generation goes on at the right edge."""
    length = max(map(len, prompts))
    ids = torch.full((len(prompts), length), filler)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def read(model, ids, mask, cache):
    """Give the cache keys and values of the tokens that it does not hold yet."""
    start = cache.get_seq_length()
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # left padding must not shift the positions
    model(
        input_ids=ids[:, start:],
        attention_mask=mask,
        position_ids=positions[:, start:],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )


def _empty(like, rows, length):
    return like.new_zeros(rows, like.shape[1], length, like.shape[3])


def _compute(model, prompts, found, missing):
    """The states of prompts of which about as much is missing: the last max(missing) tokens of each are computed."""
    longest, new = max(map(len, prompts)), max(missing)
    past = longest - new  # columns that are taken from earlier prompts
    cache = Cache(model.config, room=new)
    if past:
        cache.fill(_past(found, [len(prompt) - new for prompt in prompts], past))
    if new:
        read(model, *pad(prompts, 0, model.device), cache)
    return [(layer.keys, layer.values) for layer in cache.layers]


def _past(found, lengths, columns):
    """For each layer keys and values (rows, heads, columns, head size): of each row, what was found of its first
    tokens, lengths[row] of them, on the right."""
    layers = []
    for number in range(len(next(one.states for one in found if one.states))):
        layer = []
        for kind in (0, 1):
            sources = [one.states and one.states[number][kind] for one in found]
            x = _empty(next(source for source in sources if source is not None), len(found), columns)
            for row, (one, source, length) in enumerate(zip(found, sources, lengths, strict=True)):
                if length > 0:
                    start = source.shape[2] - one.length
                    x[row, :, columns - length :] = source[one.row, :, start : start + length]
            layer.append(x)
        layers.append(layer)
    return layers
