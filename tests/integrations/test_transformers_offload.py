"""The callback in a real Trainer: the same weights, and bytes on disk."""

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("default")  # the libraries' own warnings are theirs


def train(tmp_path, callbacks, prepare=lambda model: None):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2,
        n_embd=64,
        n_head=4,
        vocab_size=128,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config)
    prepare(model)
    rows = [
        {"input_ids": (ids := torch.arange(64) * (i + 3) % 128), "labels": ids} for i in range(16)
    ]
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, use_cpu=True,
        gradient_accumulation_steps=2, report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    transformers.Trainer(model, args, train_dataset=rows, callbacks=callbacks).train()
    return model.state_dict()


def test_trainer_gives_the_same_weights(tmp_path):
    from dataeff.integrations.transformers import OffloadCallback

    expected = train(tmp_path, [])
    callback = OffloadCallback(spill=[tmp_path], min_bytes=0)
    got = train(tmp_path, [callback])
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    report = callback.offload.report()
    assert report.bytes_written > 0 and report.saved_bytes == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_failing_step_leaves_no_hook(tmp_path, where, error):
    from dataeff.integrations.transformers import OffloadCallback

    def fail(*arguments):
        raise error

    def prepare(model):
        if where == "forward":
            model.lm_head.register_forward_hook(fail)
        else:
            model.transformer.h[0].mlp.c_fc.weight.register_hook(fail)

    with pytest.raises(error), OffloadCallback(spill=[tmp_path], min_bytes=0) as callback:
        train(tmp_path, [callback], prepare)
    before = callback.offload.report().num_packed
    assert before > 0
    torch.ones(64, 64, requires_grad=True).exp().sum().backward()
    assert callback.offload.report().num_packed == before
    with callback:  # and it may train again
        train(tmp_path, [callback])
    assert callback.offload.report().num_steps == 3
