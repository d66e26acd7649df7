"""The key-value cache of a student: room for new tokens, a prompt held once for its n samples, sequences that leave.

    cache = Cache(model.config, room=32)
    model(input_ids=prompts, past_key_values=cache, use_cache=True)     # (P, L)
    cache.share(8)                                                      # now (8 P, L), the prompts stored once
    model.generate(input_ids=ids, past_key_values=cache, ...)           # with attention ATTENTION
    cache.keep(rows)                                                    # sequences that have ended make room

transformers' DynamicCache copies itself to append a token and repeats a prompt for each of its samples. With many
samples, reading the cache is what decoding costs: on a CPU this one made eight samples of the miniature's student
several times faster. Attention over a shared prompt is one matrix product for all its samples; the scores over
prompt and new tokens are put side by side before the softmax, so that nothing is approximated.
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "shared_prompt"  # the name under which models find `attend`


class Cache(DynamicCache):
    """A DynamicCache of Layers. Layers of another kind (sliding windows) stay as they are; prompts are repeated then.

    room: new tokens that are stored without copying what is there.
    """

    def __init__(self, config, room):
        super().__init__(config=config)
        self.layers = [Layer(room) if type(layer) is DynamicLayer else layer for layer in self.layers]
        self.is_shareable = all(type(layer) is Layer for layer in self.layers)

    def share(self, n):
        """Each sequence becomes n, which share what is stored so far. Sequence i's are i*n to i*n + n - 1."""
        if not self.is_shareable:
            return self.batch_repeat_interleave(n)
        prompts = self.layers[0].keys.shape[0]
        slots = torch.arange(prompts * n, device=self.layers[0].keys.device)
        for layer in self.layers:
            layer.prompt, layer.slots, layer.n = (layer.keys, layer.values), slots, n
            layer.keys = layer.values = layer.stores = None

    def fill(self, states):
        """Begin with these keys and values, two (R, heads, T, head size) for each layer."""
        for layer, (keys, values) in zip(self.layers, states, strict=True):
            layer.fill(keys, values)

    def keep(self, rows):
        """Only these sequences go on. rows: (kept,) indices, ascending."""
        for layer in self.layers:
            layer.keep(rows) if type(layer) is Layer else layer.batch_select_indices(rows)


class Layer(DynamicLayer):
    """Keys and values of R sequences: a prompt part shared by n of them (if there is one), and what is new to each.

    keys, values: (R, heads, T, head size), the new part, views of stores that have room for more.
    prompt: None or keys and values (P, heads, L, head size). slots: (R,) with slots // n the prompt of each sequence.
    """

    def __init__(self, room):
        super().__init__()
        self.room, self.stores, self.prompt, self.slots, self.n = room, None, None, None, 1

    def get_seq_length(self):
        return (self.prompt[0].shape[-2] if self.prompt else 0) + self._new_length()

    def _new_length(self):
        return 0 if self.stores is None else self.keys.shape[-2]

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self._new_length(), self._new_length() + key_states.shape[-2]
        if self.stores is None or end > self.stores[0].shape[-2]:
            old = (self.keys, self.values) if start else None
            self.stores = [states.new_empty(*states.shape[:2], end + self.room, states.shape[3])
                           for states in (key_states, value_states)]  # fmt: skip
            for store, states in zip(self.stores, old or (), strict=False):
                store[..., :start, :] = states
        for store, states in zip(self.stores, (key_states, value_states), strict=True):
            store[..., start:end, :] = states
        self.keys, self.values = (store[..., :end, :] for store in self.stores)
        self.keys.layer = self  # how `attend` finds the prompt part
        return self.keys, self.values

    def fill(self, keys, values):
        self.lazy_initialization(keys, values)
        self.stores = [keys, values]  # full: the next token finds no room, so that these stay as they are
        self.keys, self.values = keys, values

    def keep(self, rows):
        if self.stores is not None:
            length = self._new_length()
            self.stores = [store[rows] for store in self.stores]
            self.keys, self.values = (store[..., :length, :] for store in self.stores)
        if self.prompt:
            alive, place = (self.slots[rows] // self.n).unique(return_inverse=True)
            self.slots = place * self.n + self.slots[rows] % self.n
            if len(alive) < len(self.prompt[0]):
                self.prompt = tuple(states[alive] for states in self.prompt)

    def batch_repeat_interleave(self, repeats):
        rows = torch.arange(len(self.keys), device=self.keys.device).repeat_interleave(repeats)
        self.keep(rows)


def attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """transformers' attention interface: sdpa, but for sequences whose prompt is shared.

    query: (R, heads, 1, head size). key, value: (R, key-value heads, T, head size). attention_mask: None or
    (R, 1, 1, L + T), True where attended. Returns (R, 1, heads, head size) and None.
    """
    layer = getattr(key, "layer", None)
    if layer is None or layer.prompt is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    prompt_keys, prompt_values = layer.prompt
    prompts, kv_heads, length, size = prompt_keys.shape
    n, slots, rows = layer.n, layer.slots, len(query)
    groups = query.shape[1] // kv_heads
    query = query.view(rows, kv_heads, groups, size)

    def by_prompt(x):  # (R, kv_heads, groups, ...) -> (P, kv_heads, n * groups, ...); ended sequences are zeros
        grid = x if rows == prompts * n else x.new_zeros(prompts * n, *x.shape[1:]).index_copy_(0, slots, x)
        return grid.view(prompts, n, *x.shape[1:]).transpose(1, 2).flatten(2, 3)

    def by_row(x):  # and back
        grid = x.unflatten(2, (n, groups)).transpose(1, 2).flatten(0, 1)
        return grid if rows == prompts * n else grid[slots]

    scores = torch.cat([by_row(by_prompt(query) @ prompt_keys.mT), query @ key.mT], -1)  # (R, kv_heads, groups, L + T)
    scores = scores * (size**-0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    out = by_row(by_prompt(weights[..., :length]) @ prompt_values) + weights[..., length:] @ value
    return out.reshape(rows, 1, -1, size), None


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
