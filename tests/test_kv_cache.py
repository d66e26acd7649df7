"""The cache against transformers' own: the same logits with shared prompts, padding, grouped heads, leaving."""

import pytest
import torch
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

from kv_cache import ATTENTION, Cache, Layer


@pytest.fixture(scope="module")
def model():
    """Four query heads on two key-value heads, in float64 so that nothing hides behind rounding."""
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
                         initializer_range=0.5)  # fmt: skip
    return Qwen2ForCausalLM(config).double().eval()


def padded(lengths, generator):
    ids = torch.randint(0, 50, (len(lengths), max(lengths)), generator=generator)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, max(lengths) - length :] = 1
    return ids, mask


@torch.inference_mode()
def forward(model, ids, mask, cache, start):
    """Logits of ids[:, start:], what lies before being in the cache."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, start:]
    return model(input_ids=ids[:, start:], attention_mask=mask, position_ids=positions, past_key_values=cache).logits


@pytest.mark.parametrize("lengths", [[9], [9, 9, 9], [9, 4, 7]])
@pytest.mark.parametrize("leaving", [False, True])
def test_shared_prompts_give_the_logits_of_whole_sequences(model, lengths, leaving):
    generator, n, room = torch.Generator().manual_seed(1), 4, 3  # three new tokens fit; the fourth makes it grow
    ids, mask = padded(lengths, generator)
    cache = Cache(model.config, room)
    model.set_attn_implementation(ATTENTION)
    forward(model, ids, mask, cache, 0)
    cache.share(n)
    ids, mask = ids.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)
    for step in range(8):
        ids = torch.cat([ids, torch.randint(0, 50, (len(ids), 1), generator=generator)], 1)
        mask = torch.cat([mask, mask.new_ones(len(ids), 1)], 1)
        ours = forward(model, ids, mask, cache, ids.shape[1] - 1)
        model.set_attn_implementation("sdpa")
        theirs = forward(model, ids, mask, DynamicCache(config=model.config), 0)[:, -1:]
        model.set_attn_implementation(ATTENTION)
        assert torch.allclose(ours, theirs, atol=1e-10), step
        if leaving and step in (1, 4, 6):  # some of a prompt's samples, then all of the first prompt's
            first = 3 if step == 4 and len(lengths) > 1 else 0
            kept = torch.tensor([row for row in range(first, len(ids)) if row % 3 != 1])
            ids, mask = ids[kept], mask[kept]
            cache.keep(kept)
    if leaving and len(lengths) > 1:
        assert len(cache.layers[0].prompt[0]) < len(lengths), "an ended prompt keeps its place in memory"


def test_without_sharing_it_is_a_dynamic_cache(model):
    generator = torch.Generator().manual_seed(2)
    ids, mask = padded([5, 8], generator)
    model.set_attn_implementation("sdpa")
    ours, theirs = Cache(model.config, 2), DynamicCache(config=model.config)
    start = 0
    for _ in range(6):
        assert torch.equal(forward(model, ids, mask, ours, start), forward(model, ids, mask, theirs, start))
        start = ids.shape[1]
        assert ours.get_seq_length() == theirs.get_seq_length() == start
        ids = torch.cat([ids, torch.randint(0, 50, (2, 1), generator=generator)], 1)
        mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
    assert torch.equal(ours.layers[2].values, theirs.layers[2].values)


def test_appending_copies_nothing_while_there_is_room():
    layer = Layer(room=10)
    for _ in range(10):
        layer.update(torch.ones(2, 1, 1, 4), torch.ones(2, 1, 1, 4))
    place = layer.stores[0].data_ptr()
    assert layer.keys.shape == (2, 1, 10, 4)
    layer.update(torch.ones(2, 1, 1, 4), torch.ones(2, 1, 1, 4))
    assert layer.stores[0].data_ptr() == place


def test_layers_of_another_kind_are_repeated_not_shared():
    config = Qwen2Config(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, use_sliding_window=True, sliding_window=4,
                         max_window_layers=1)  # fmt: skip
    torch.manual_seed(0)
    model, cache = Qwen2ForCausalLM(config).double().eval(), Cache(config, 8)
    assert not cache.is_shareable
    ids, mask = padded([7, 7], torch.Generator().manual_seed(3))
    forward(model, ids, mask, cache, 0)
    cache.share(3)
    ids, mask = ids.repeat_interleave(3, 0), mask.repeat_interleave(3, 0)
    ids, mask = torch.cat([ids, ids[:, :1]], 1), torch.cat([mask, mask[:, :1]], 1)
    whole = forward(model, ids, mask, DynamicCache(config=config), 0)[:, -1:]
    assert torch.allclose(forward(model, ids, mask, cache, 7), whole, atol=1e-10)
