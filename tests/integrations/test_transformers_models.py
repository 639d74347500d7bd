"""GPT-2, BERT, T5 and Llama give the same bits with their activations on disk."""

import pytest
import torch

from dataeff.offload import ActivationOffload

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("default")  # the libraries' own warnings are theirs

TOKENS, VOCAB = 32, 96


def gpt2():
    config = transformers.GPT2Config(
        n_layer=2, n_embd=64, n_head=4, vocab_size=VOCAB, n_positions=TOKENS,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def bert():
    config = transformers.BertConfig(
        num_hidden_layers=2, hidden_size=64, num_attention_heads=4, intermediate_size=128,
        vocab_size=VOCAB, max_position_embeddings=TOKENS,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


def t5():
    config = transformers.T5Config(
        num_layers=2, d_model=64, d_kv=16, num_heads=4, d_ff=128, vocab_size=VOCAB,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def llama():
    config = transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=64, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=128, vocab_size=VOCAB, max_position_embeddings=TOKENS,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


@pytest.fixture(params=[gpt2, bert, t5, llama], ids=lambda make: make.__name__)
def model(request):
    torch.manual_seed(0)
    return request.param().train()  # with dropout: the generator's state matters too


def batch(i=0):
    ids = torch.arange(8 * TOKENS).view(8, TOKENS) * (i + 3) % VOCAB
    return {"input_ids": ids, "attention_mask": (ids % 11 != 1).long(), "labels": ids}


class Plain:
    """No offload."""

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def drain(self):
        pass


class Drained(ActivationOffload):
    """Between forward and backward every byte leaves, so that backward reads all of it."""

    def drain(self):
        self._cache.drain()


def once(model, ctx):
    with ctx:
        loss = model(**batch()).loss
        ctx.drain()
        loss.backward()


def accumulation(model, ctx):
    for i in range(3):
        with ctx:
            loss = model(**batch(i)).loss / 3
            ctx.drain()
            loss.backward()


def accumulation_in_one_block(model, ctx):
    with ctx:
        for i in range(3):
            (model(**batch(i)).loss / 3).backward()


def retained(model, ctx):
    with ctx:
        loss = model(**batch()).loss
        ctx.drain()
        loss.backward(retain_graph=True)
        loss.backward()


def under_autocast(model, ctx):
    with ctx:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch()).loss
        ctx.drain()
        loss.backward()


def scaled(model, ctx):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with ctx:
        with torch.autocast("cpu", torch.float16):
            loss = model(**batch()).loss
        ctx.drain()
        scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


def _checkpointed(model, ctx, use_reentrant):
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    embeddings = model.get_input_embeddings()
    # The reentrant form needs an input that requires gradients.
    hook = embeddings.register_forward_hook(lambda module, args, out: out.requires_grad_())
    try:
        once(model, ctx)
    finally:
        hook.remove()
        model.gradient_checkpointing_disable()


def checkpointed(model, ctx):
    _checkpointed(model, ctx, use_reentrant=False)


def checkpointed_reentrant(model, ctx):
    _checkpointed(model, ctx, use_reentrant=True)


STEPS = [
    once,
    accumulation,
    accumulation_in_one_block,
    retained,
    under_autocast,
    scaled,
    checkpointed,
    checkpointed_reentrant,
]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_gradients_are_bit_identical(model, step, tmp_path):
    def gradients(ctx):
        model.zero_grad(set_to_none=True)
        torch.manual_seed(1)
        step(model, ctx)
        return {name: p.grad for name, p in model.named_parameters()}

    expected = gradients(Plain())
    assert any(g is not None and g.abs().sum() > 0 for g in expected.values())
    offload = Drained(model, tmp_path, min_bytes=0)
    for _ in range(2):  # the second step follows the order recorded in the first
        got = gradients(offload)
        for name, gradient in expected.items():
            assert (gradient is None) == (got[name] is None), name
            assert gradient is None or torch.equal(gradient, got[name]), name
    report = offload.report()
    assert report.bytes_written > 0 and report.saved_bytes == 0
    if step is not accumulation_in_one_block:  # there, what backward wants first is forwarded
        assert report.bytes_read > 0
    offload.close()
