"""model.py: GPT against nanoGPT and transformers; and the peaks that its MFU is relative to."""

import copy
import json
import math
from functools import partial

import huggingface_hub
import pytest
import torch
from torch.nn import functional as F

from model import GPT, GPTConfig
from runtime.device import peak_flops

TINY = dict(block_size=16, vocab_size=37, n_layer=2, n_head=2, n_embd=8)


def tiny(seed=0, init_std=0.02, **changes):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{**TINY, **changes}), init_std).eval()


def tokens(*shape):
    return torch.randint(TINY['vocab_size'], shape, generator=torch.Generator().manual_seed(1))


def nanogpt_shapes(c):
    """Return {name: shape} of nanoGPT's state dict for the config c."""
    C, shapes = c.n_embd, {}

    def layer(name, *shape):
        shapes[f'{name}.weight'] = shape
        if c.bias:
            shapes[f'{name}.bias'] = shape[:1]

    shapes['transformer.wte.weight'] = (c.vocab_size, C)
    shapes['transformer.wpe.weight'] = (c.block_size, C)
    for i in range(c.n_layer):
        layer(f'transformer.h.{i}.ln_1', C)
        layer(f'transformer.h.{i}.attn.c_attn', 3 * C, C)
        layer(f'transformer.h.{i}.attn.c_proj', C, C)
        layer(f'transformer.h.{i}.ln_2', C)
        layer(f'transformer.h.{i}.mlp.c_fc', 4 * C, C)
        layer(f'transformer.h.{i}.mlp.c_proj', C, 4 * C)
    layer('transformer.ln_f', C)
    shapes['lm_head.weight'] = (c.vocab_size, C)
    return shapes


@pytest.mark.parametrize(
    'name, tera',
    [
        ('NVIDIA A100-SXM4-80GB', 312),
        ('NVIDIA H100 80GB HBM3', 989),
        ('NVIDIA H100 PCIe', 756),
        ('NVIDIA GH200 480GB', 989),
        ('Tesla T4', 65),
        ('NVIDIA GeForce RTX 4090', 165.2),
        ('NVIDIA RTX A1000', None),  # not an A100
        ('NVIDIA T400', None),
    ],
)
def test_the_peak_is_that_of_the_device_with_the_name(name, tera):
    assert peak_flops(name) == (tera and tera * 1e12)


@pytest.mark.parametrize('bias', [True, False])
def test_state_dict_has_nanogpts_names_and_shapes_in_its_order(bias):
    model = tiny(bias=bias)
    shapes = [(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()]
    assert shapes == list(nanogpt_shapes(model.config).items())


def test_gpt2_has_124_million_parameters():
    with torch.device('meta'):
        model = GPT(GPTConfig(vocab_size=50257))
    assert model.get_num_params(non_embedding=False) == 124_439_808
    assert model.get_num_params() == 124_439_808 - 1024 * 768


def test_token_embeddings_and_output_layer_are_one_parameter():
    model = tiny()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert 'lm_head.weight' not in dict(model.named_parameters())


@pytest.mark.parametrize('init_std', [0.02, 0.06])  # 0.02 is GPT-2's
def test_initial_weights_have_the_standard_deviation_asked_for(init_std):
    model = tiny(init_std=init_std, n_embd=128, n_layer=8, vocab_size=256)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            expected = init_std / math.sqrt(2 * 8) if name.endswith('c_proj.weight') else init_std
            assert p.std().item() == pytest.approx(expected, rel=0.05), name
            assert abs(p.mean().item()) < 0.05 * expected, name
        else:
            constant = 1.0 if name.endswith('weight') else 0.0
            assert torch.equal(p, torch.full_like(p, constant)), name


def test_first_loss_is_that_of_guessing():
    _, loss = tiny(n_embd=64)(tokens(8, 16), tokens(8, 16).flip(0))
    assert loss.item() == pytest.approx(math.log(TINY['vocab_size']), abs=0.1)


def test_loss_is_the_mean_over_targets_that_count():
    model, idx, targets = tiny(), tokens(3, 16), tokens(3, 16).flip(0)
    targets[:, ::3] = -1
    logits, loss = model(idx, targets)
    assert logits.shape == (3, 16, TINY['vocab_size'])
    losses = [
        F.cross_entropy(logits[b, t], targets[b, t])
        for b in range(3)
        for t in range(16)
        if targets[b, t] >= 0
    ]
    assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_without_targets_only_the_last_position_is_computed():
    model, idx = tiny(), tokens(3, 16)
    logits, loss = model(idx)
    assert loss is None and logits.shape == (3, 1, TINY['vocab_size'])
    torch.testing.assert_close(logits[:, 0], model(idx, idx)[0][:, -1])


def test_a_token_changes_nothing_before_it():
    model, idx = tiny(), tokens(2, 16)
    changed = idx.clone()
    changed[:, 9] = (changed[:, 9] + 1) % TINY['vocab_size']
    before, after = model(idx, idx)[0], model(changed, idx)[0]
    torch.testing.assert_close(before[:, :9], after[:, :9])
    change = (before[:, 9:] - after[:, 9:]).abs().amax(-1)
    assert change.min() > 1e-6  # every later position changes


def test_dropout_acts_in_training_only():
    model, idx = tiny(dropout=0.5), tokens(2, 16)
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])


def test_state_dict_round_trip():
    model, other, idx = tiny(), tiny(seed=1), tokens(2, 16)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(idx)[0], other(idx)[0])


def test_causal_masks_in_old_checkpoints_are_ignored():
    model = tiny()
    state = copy.deepcopy(model.state_dict())
    for i in range(2):
        state[f'transformer.h.{i}.attn.bias'] = torch.ones(1, 1, 16, 16).tril()
        state[f'transformer.h.{i}.attn.masked_bias'] = torch.tensor(-1e4)
    tiny(seed=1).load_state_dict(state)
    state['transformer.h.0.mlp.bias'] = torch.zeros(1)
    with pytest.raises(RuntimeError, match='transformer.h.0.mlp.bias'):
        model.load_state_dict(state)


def test_cropped_model_computes_the_same_on_short_sequences():
    model, idx = tiny(), tokens(2, 7)
    config, whole = model.config, model(idx)[0]
    model.crop_block_size(7)
    assert torch.equal(model(idx)[0], whole)
    assert model.config.block_size == 7 and model.transformer.wpe.weight.shape[0] == 7
    assert config.block_size == 16  # the caller's config is unchanged
    with pytest.raises(ValueError, match='a sequence of 8 tokens is longer than block_size=7'):
        model(tokens(2, 8))
    with pytest.raises(ValueError, match='block_size=8'):
        model.crop_block_size(8)


def test_mfu_counts_palms_flops():
    model = tiny()
    per_token = 6 * model.get_num_params() + 12 * 2 * 2 * 4 * 16  # 6 N + 12 L H Q T
    mfu = model.estimate_mfu(fwdbwd_per_iter=5, dt=0.25, peak_flops=1e9)
    assert mfu == pytest.approx(per_token * 16 * 5 / 0.25 / 1e9)


def test_sampling_is_reproducible_with_the_seed():
    model, idx = tiny(), tokens(2, 3)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(model.generate(idx, 30))
    assert runs[0].shape == (2, 33) and torch.equal(runs[0][:, :3], idx)
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_temperature_zero_takes_the_likeliest_token_past_the_block_size():
    model, idx = tiny(), tokens(2, 3)
    out = model.generate(idx, 20, temperature=0)
    for n in range(3, 23):
        assert torch.equal(out[:, n], model(out[:, max(0, n - 16) : n])[0][:, -1].argmax(-1))
    assert torch.equal(out, model.generate(idx, 20, top_k=1))


def test_top_k_draws_all_of_the_k_likeliest_tokens_and_no_other():
    model, idx = tiny(), tokens(1, 5).expand(2000, 5)
    drawn = next(model.stream(idx, 1, temperature=2.0, top_k=4))
    likeliest = model(idx[:1])[0].flatten().topk(4).indices
    assert set(drawn.flatten().tolist()) == set(likeliest.tolist())


def test_temperature_divides_the_logits():
    model, idx = tiny(n_embd=64), tokens(1, 5).expand(20000, 5)
    model.lm_head.weight.data *= 10  # far from uniform
    drawn = next(model.stream(idx, 1, temperature=0.5)).flatten()
    expected = (model(idx[:1])[0].flatten() / 0.5).softmax(0)
    torch.testing.assert_close(drawn.bincount(minlength=37) / 20000, expected, atol=0.015, rtol=0)


def test_stream_yields_each_token_before_the_next_is_computed():
    model, calls = tiny(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    stream = model.stream(tokens(2, 3), 5)
    assert next(stream).shape == (2, 1) and len(calls) == 1
    next(stream)
    assert len(calls) == 2


def test_generating_leaves_gradients_enabled_and_needs_none():
    stream = tiny().stream(tokens(1, 3), 5)
    assert not next(stream).requires_grad and torch.is_grad_enabled()


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(n_embd=10, n_head=4), 'n_embd=10 is not divisible by n_head=4.*set n_embd=12'),
        (dict(n_layer=0), 'n_layer=0 must be at least 1'),
        (dict(n_head=-1), 'n_head=-1'),
        (dict(n_embd=0), 'n_embd=0'),
        (dict(vocab_size=0), 'vocab_size=0'),
        (dict(block_size=0), 'block_size=0'),
        (dict(dropout=-0.1), 'dropout=-0.1'),
        (dict(dropout=1.0), 'dropout=1.0'),
        (dict(gelu_approximate='erf'), "gelu_approximate='erf'"),
    ],
)
def test_impossible_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**changes)


def test_model_args_are_nanogpts_unless_the_gelu_is_not():
    config = GPTConfig(**TINY)
    assert config.model_args() == {**TINY, 'dropout': 0.0, 'bias': True}
    for gelu in ('none', 'tanh'):
        config = GPTConfig(**TINY, gelu_approximate=gelu)
        assert GPTConfig(**config.model_args()) == config


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(temperature=-1.0), 'temperature=-1.0'),
        (dict(temperature=math.nan), 'temperature=nan'),
        (dict(top_k=0), 'top_k=0'),
    ],
)
def test_impossible_sampling_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny().generate(tokens(1, 3), 1, **arguments)


def test_nothing_to_continue_is_refused():
    with pytest.raises(ValueError, match='at least one token'):
        tiny().generate(tokens(1, 0), 1)


# Loading GPT-2 weights in transformers' format


@pytest.fixture
def hub(tmp_path):
    """Return a random GPT-2 of transformers and save(), which saves it and returns the folder."""
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=37, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    reference = transformers.GPT2LMHeadModel(config).eval()
    for p in reference.parameters():
        p.data += 0.3 * torch.randn_like(p)  # initial weights would hide a wrong GELU or LayerNorm

    def save(**arguments):
        reference.save_pretrained(tmp_path, **arguments)
        return tmp_path

    return reference, save


def edit_config(folder, **changes):
    path = folder / 'config.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def assert_same_logits(reference, model):
    idx = tokens(3, 16)
    with torch.no_grad():
        theirs, ours = reference(idx).logits, model.eval()(idx, idx)[0]
    assert theirs.abs().max() > 1  # so that 1e-4 is a small error
    assert (theirs - ours).abs().max() < 1e-4


@pytest.mark.parametrize('activation', ['gelu_new', 'gelu'])
def test_pretrained_logits_are_those_of_transformers(hub, activation):
    reference, save = hub
    folder = save()
    edit_config(folder, activation_function=activation)
    reference = type(reference).from_pretrained(folder).eval()
    model = GPT.from_pretrained(str(folder))
    assert_same_logits(reference, model)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.lm_head.weight.dtype == torch.float32


def test_pretrained_weights_in_several_files(hub):
    reference, save = hub
    folder = save(max_shard_size='30KB')
    assert not (folder / 'model.safetensors').exists()
    assert_same_logits(reference, GPT.from_pretrained(folder))
    (folder / 'model-00002-of-00005.safetensors').unlink()
    with pytest.raises(ValueError, match='has no model-00002-of-00005'):
        GPT.from_pretrained(folder)


def test_pretrained_weights_in_pytorch_model_bin_without_prefix_and_with_masks(hub):
    """The files of gpt2 on the hub have names without a prefix, and causal masks."""
    reference, save = hub
    folder = save()
    (folder / 'model.safetensors').unlink()
    state = {k.removeprefix('transformer.'): v for k, v in reference.state_dict().items()}
    del state['lm_head.weight']
    state['h.0.attn.bias'] = torch.ones(1, 1, 16, 16).tril()
    torch.save(state, folder / 'pytorch_model.bin')
    assert_same_logits(reference, GPT.from_pretrained(folder))


def test_pretrained_weights_in_half_precision_become_float32(hub):
    reference, save = hub
    reference.half()
    model = GPT.from_pretrained(save())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert_same_logits(reference.float(), model)


def test_only_dropout_can_be_overridden(hub):
    folder = hub[1]()
    assert GPT.from_pretrained(folder).config.dropout == 0.0
    model = GPT.from_pretrained(folder, {'dropout': 0.25})
    block = model.transformer.h[1]
    assert model.config.dropout == block.mlp.dropout.p == block.attn.dropout == 0.25
    with pytest.raises(ValueError, match='n_layer'):
        GPT.from_pretrained(folder, {'n_layer': 3})


@pytest.mark.parametrize(
    'changes',
    [
        dict(model_type='llama'),
        dict(activation_function='relu'),
        dict(n_inner=100),
        dict(layer_norm_epsilon=1e-6),
        dict(scale_attn_weights=False),
        dict(scale_attn_by_inverse_layer_idx=True),
        dict(add_cross_attention=True),
        dict(tie_word_embeddings=False),
    ],
)
def test_models_with_other_parts_are_refused(tmp_path, changes):
    (tmp_path / 'config.json').write_text(json.dumps({'model_type': 'gpt2', **changes}))
    ((name, value),) = changes.items()
    with pytest.raises(ValueError, match=f'config.json says {name}={value!r}'):
        GPT.from_pretrained(tmp_path)


def test_weights_that_are_missing_cut_off_or_of_another_shape_are_named(hub):
    reference, save = hub
    folder = save()
    edit_config(folder, n_layer=3)
    with pytest.raises(ValueError, match='lacks the weights h.2.ln_1.weight'):
        GPT.from_pretrained(folder)
    edit_config(folder, n_layer=2, vocab_size=38)
    with pytest.raises(ValueError, match='wte.weight'):
        GPT.from_pretrained(folder)
    edit_config(folder, vocab_size=37)
    weights = folder / 'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match='model.safetensors cannot be read'):
        GPT.from_pretrained(folder)
    weights.unlink()
    with pytest.raises(ValueError, match='has no model.safetensors or'):
        GPT.from_pretrained(folder)
    (folder / 'config.json').write_text('{')
    with pytest.raises(ValueError, match='config.json cannot be read'):
        GPT.from_pretrained(folder)
    (folder / 'config.json').unlink()
    with pytest.raises(ValueError, match='has no config.json'):
        GPT.from_pretrained(folder)


def test_models_the_hub_does_not_give_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match='neither a local folder nor a model that the hub gives'):
        GPT.from_pretrained('./no/such/folder')
    offline = partial(huggingface_hub.hf_hub_download, cache_dir=tmp_path, local_files_only=True)
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', offline)
    with pytest.raises(ValueError, match='HF_HOME'):
        GPT.from_pretrained('gpt2')
