"""Define GPT-2 (Radford et al. 2019) and load its weights from Hugging Face transformers.

Classes, modules and parameters have nanoGPT's names, so the two programs can exchange state dicts.
Shapes in comments: B sequences, T tokens each, C = n_embd channels, V = vocab_size.
"""

import json
import math
import os
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

from cpr import AdamCPR, AdamH, AdamW, AdamWN


@dataclass
class GPTConfig:
    """Hold the sizes of a GPT. Raises ValueError if no GPT can have them."""

    block_size: int = 1024  # longest sequence, in tokens
    vocab_size: int = 50304  # GPT-2's 50257 rounded up to a multiple of 64, for fast products
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in Linear and LayerNorm, as GPT-2; False is a little better and faster
    gelu_approximate: str = 'none'  # nn.GELU's argument: nanoGPT has 'none', GPT-2 has 'tanh'

    def __post_init__(self):
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name}={getattr(self, name)} must be at least 1')
        if self.n_embd % self.n_head:
            multiple = self.n_head * math.ceil(self.n_embd / self.n_head)
            raise ValueError(
                f'n_embd={self.n_embd} is not divisible by n_head={self.n_head}: each head takes '
                f'an equal share of the channels; set n_embd={multiple}'
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout={self.dropout} must be at least 0 and less than 1')
        if self.gelu_approximate not in ('none', 'tanh'):
            raise ValueError(f"gelu_approximate='{self.gelu_approximate}' must be 'none' or 'tanh'")

    def model_args(self):
        """Return the dict that a checkpoint keeps.

        nanoGPT's GPTConfig accepts it, unless the model needs GPT-2's GELU.
        """
        args = asdict(self)
        if self.gelu_approximate == 'none':
            del args['gelu_approximate']
        return args


class LayerNorm(nn.Module):
    """Normalize the last dimension, of `ndim` channels. The signature is nanoGPT's."""

    def __init__(self, ndim, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        # queries, keys, values
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.register_load_state_dict_pre_hook(_drop_causal_mask)

    def forward(self, x):  # (B, T, C) -> (B, T, C)
        B, T, C = x.shape
        heads = (B, T, self.n_head, C // self.n_head)
        q, k, v = (y.view(heads).transpose(1, 2) for y in self.c_attn(x).split(C, dim=2))
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.resid_dropout(self.c_proj(y))


def _drop_causal_mask(module, state_dict, prefix, *_):
    """Drop the causal masks that older programs save as buffers of the attention."""
    for buffer in ('bias', 'masked_bias'):
        state_dict.pop(prefix + buffer, None)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(config.gelu_approximate)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):  # (B, T, C) -> (B, T, C)
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, config.bias)
        self.mlp = MLP(config)

    def forward(self, x):  # (B, T, C) -> (B, T, C)
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config, init_std=0.02):
        """Make a GPT with random weights of standard deviation init_std; GPT-2 has 0.02."""
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                'wte': nn.Embedding(config.vocab_size, config.n_embd),
                'wpe': nn.Embedding(config.block_size, config.n_embd),
                'drop': nn.Dropout(config.dropout),
                'h': nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                'ln_f': LayerNorm(config.n_embd, config.bias),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # tied (Press & Wolf 2017)

        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=init_std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        # each block adds two projections to the residual stream; this keeps their sum's variance
        for name, p in self.named_parameters():
            if name.endswith('c_proj.weight'):
                nn.init.normal_(p, std=init_std / math.sqrt(2 * config.n_layer))

    def forward(self, idx, targets=None):
        """Compute the logits and, with targets, the loss.

        idx: (B, T) token ids. Raises ValueError if T > block_size.
        targets: (B, T) ids of the tokens that follow, -1 to ignore a position; or None.
        Returns ((B, T, V) logits, mean cross entropy in nats a token) with targets. Without them
        it returns ((B, 1, V) logits of the last position, None), which generation needs.
        """
        T = idx.shape[1]
        if T > self.config.block_size:
            limit = self.config.block_size
            raise ValueError(f'a sequence of {T} tokens is longer than block_size={limit}')
        positions = torch.arange(T, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(positions))
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, [-1]]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def get_num_params(self, non_embedding=True):
        """Count the parameters, without the position embeddings unless non_embedding=False.

        The token embeddings always count, because they are also the weights of the last layer.
        """
        n = sum(p.numel() for p in self.parameters())
        return n - self.transformer.wpe.weight.numel() if non_embedding else n

    def estimate_mfu(self, fwdbwd_per_iter, dt, peak_flops):
        """Return the model FLOPs utilization: the share of peak_flops that an iteration uses.

        fwdbwd_per_iter: sequences of block_size tokens that go forward and backward.
        dt: duration of the iteration in seconds. peak_flops: FLOP/s.
        A token costs 6 N + 12 L H Q T FLOPs (PaLM, arXiv 2204.02311, Appendix B).
        """
        N, L, T = self.get_num_params(), self.config.n_layer, self.config.block_size
        H, Q = self.config.n_head, self.config.n_embd // self.config.n_head
        flops_per_iter = (6 * N + 12 * L * H * Q * T) * T * fwdbwd_per_iter
        return flops_per_iter / dt / peak_flops

    def crop_block_size(self, block_size):
        """Shorten the longest sequence, for example to fine-tune GPT-2 (1024) in less memory.

        Raises ValueError if block_size is larger than the model's.
        """
        if block_size > self.config.block_size:
            raise ValueError(
                f'block_size={block_size} is more than the {self.config.block_size} the model has; '
                'it can only be cropped'
            )
        self.config = replace(self.config, block_size=block_size)
        wpe = self.transformer.wpe
        wpe.weight = nn.Parameter(wpe.weight.detach()[:block_size].clone())
        wpe.num_embeddings = block_size

    def weights(self, vectors=False):
        """Return {name: parameter} of the matrices, embeddings included.

        vectors: include LayerNorm's weights. Biases stay out: they start at zero, and have no
        ratio to their start.
        """
        named = ((name, p) for name, p in self.named_parameters() if name.endswith('.weight'))
        return {name: p for name, p in named if vectors or p.dim() >= 2}

    def configure_optimizer(self, settings, wn_ratio):
        """Return the optimizer that `settings`, train.py's, ask for.

        wn_ratio: AdamWN's target, of the matrices and, with wn_vectors, of LayerNorm's weights.
        Raises ValueError if a setting is out of range.
        """
        s = SimpleNamespace(**settings)
        common = dict(lr=s.learning_rate, betas=(s.beta1, s.beta2), impl=s.impl)
        common['max_grad_norm'] = s.grad_clip or math.inf  # 0.0: GradScaler would skip, uncounted
        if s.order != 'auto' and s.optimizer in ('adamcpr', 'adamwn'):
            common['order'] = s.order
        if s.optimizer == 'adamw':
            return AdamW(self, weight_decay=s.weight_decay, **common)
        if s.optimizer == 'adamwn':
            adamwn = AdamWN(self, rate=s.wn_rate, ratio=wn_ratio, scope=s.wn_scope, **common)
            if s.wn_vectors:
                steered = {*self.weights(vectors=True).values()}
                vectors = adamwn.param_groups[1]
                vectors['regularize'] = [p in steered for p in vectors['params']]
            return adamwn
        if s.optimizer == 'adamh':
            return AdamH(self, step_scale=s.adamh_step_scale, **common)
        return AdamCPR(
            self,
            kappa_init_method=s.kappa_init_method,
            kappa_init_param=s.kappa_init_param,
            reg_function=s.reg_function,
            kappa_update=s.kappa_update,
            reg_step_size=s.reg_step_size,
            reg_ema_decay=s.reg_ema_decay,
            reg_embedding=s.reg_embedding,
            reg_by_lr=s.reg_by_lr,
            **common,
        )

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """Sample the tokens that continue idx and yield each position, (B, 1), as it is drawn.

        idx: (B, T) token ids, T >= 1. The model sees the last block_size of them.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample from the k likeliest tokens only.
        Raises ValueError, at the first token, if an argument is out of range.
        """
        if not temperature >= 0:
            raise ValueError(f'temperature={temperature} must be at least 0')
        if top_k is not None and top_k < 1:
            raise ValueError(f'top_k={top_k} must be at least 1')
        if idx.shape[1] == 0:
            raise ValueError('there is nothing to continue: idx must hold at least one token')
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -self.config.block_size :])
            logits = logits[:, -1].float()  # (B, V)
            if temperature == 0:
                token = logits.argmax(dim=-1, keepdim=True)
            else:
                logits /= temperature
                if top_k is not None:
                    least = logits.topk(min(top_k, logits.shape[-1])).values[:, [-1]]
                    logits[logits < least] = -math.inf
                token = torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)
            idx = torch.cat((idx, token), dim=1)
            yield token

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """Return idx (B, T) continued by stream(): (B, T + max_new_tokens)."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, temperature, top_k)], dim=1)

    @classmethod
    def from_pretrained(cls, name_or_folder, override_args=None):
        """Return a float32 GPT with the weights of a GPT-2 in transformers' format.

        name_or_folder: 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', another GPT-2 on the hub, or
            a local folder with config.json and model.safetensors (one file or several) or
            pytorch_model.bin.
        override_args: {'dropout': float} or None.
        Its logits equal those of transformers.GPT2LMHeadModel. Raises ValueError if the model
        cannot be loaded or this class cannot compute it.
        """
        override_args = override_args or {}
        if override_args.keys() - {'dropout'}:
            names = ', '.join(override_args)
            raise ValueError(f'only dropout can be overridden in a pretrained model, not {names}')
        config = _config_of(_load(_find(name_or_folder, 'config.json')), name_or_folder)
        model = cls(replace(config, **override_args))

        weights = _read_weights(name_or_folder)
        weights = {name.removeprefix('transformer.'): w for name, w in weights.items()}
        state = {}
        for name, tensor in model.state_dict().items():
            key = 'wte.weight' if name == 'lm_head.weight' else name.removeprefix('transformer.')
            if key not in weights:
                problem = f'is not a complete GPT-2: it lacks the weights {key}'
                raise ValueError(f'{name_or_folder} {problem}')
            state[name] = weights[key].t() if is_conv1d(key) else weights[key]
            if state[name].shape != tensor.shape:
                shape = tuple(weights[key].shape)
                problem = f'contradicts its config.json: {key} is of shape {shape}'
                raise ValueError(f'{name_or_folder} {problem}')
        model.load_state_dict(state)
        return model


# nn.GELU's argument for transformers' names of GPT-2's activations
GELU_APPROXIMATE = {'gelu_new': 'tanh', 'gelu_pytorch_tanh': 'tanh', 'gelu': 'none'}


def is_conv1d(name):
    """Return whether transformers keeps the parameter in a Conv1D, the transpose of a Linear."""
    return name.endswith(('c_attn.weight', 'c_fc.weight', 'c_proj.weight'))


def _config_of(hf, name):
    """Return the GPTConfig for `hf`, the dict of a config.json.

    Raises ValueError if it asks for something that GPT does not compute.
    """
    model_type = hf.get('model_type')
    if model_type != 'gpt2':
        raise ValueError(f'{name} is no GPT-2: its config.json says model_type={model_type!r}')
    n_embd = hf.get('n_embd', 768)
    computed = {  # transformers' default first
        'activation_function': tuple(GELU_APPROXIMATE),
        'n_inner': (None, 4 * n_embd),
        'layer_norm_epsilon': (1e-5,),
        'scale_attn_weights': (True,),
        'scale_attn_by_inverse_layer_idx': (False,),
        'add_cross_attention': (False,),
        'tie_word_embeddings': (True,),
    }
    for key, values in computed.items():
        if hf.get(key, values[0]) not in values:
            possible = ' or '.join(map(repr, values))
            raise ValueError(
                f'{name} is a GPT-2 that cannot be loaded: its config.json says {key}={hf[key]!r}, '
                f'and only {possible} is possible here'
            )
    return GPTConfig(
        block_size=hf.get('n_positions', 1024),
        vocab_size=hf.get('vocab_size', 50257),
        n_layer=hf.get('n_layer', 12),
        n_head=hf.get('n_head', 12),
        n_embd=n_embd,
        gelu_approximate=GELU_APPROXIMATE[hf.get('activation_function', 'gelu_new')],
    )


def _read_weights(name):
    """Return {parameter name: tensor} of a folder or hub model, in any of transformers' formats."""
    path = _find(name, 'model.safetensors', 'model.safetensors.index.json', 'pytorch_model.bin')
    if not path.endswith('.index.json'):
        return _load(path)
    weights = {}
    for part in sorted(set(_load(path)['weight_map'].values())):
        weights |= _load(_find(name, part))
    return weights


def _find(name, *files):
    """Return the path of the first of `files` that exists in a local folder or hub model.

    A hub model's file is downloaded. Raises ValueError if there is none or the hub refuses it.
    """
    wanted = ' or '.join(files)
    nothing = f'{name} is not a complete model in the format of transformers: it has no {wanted}'
    if os.path.isdir(name):
        for file in files:
            if os.path.isfile(os.path.join(name, file)):
                return os.path.join(name, file)
        raise ValueError(nothing)

    from huggingface_hub import hf_hub_download  # here: only models on the hub need it
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for file in files:
        try:
            return hf_hub_download(name, file)
        except LocalEntryNotFoundError:  # the hub cannot be reached; the cache may have the next
            nothing = (
                f'{name} is neither a local folder nor in the cache of the hub, and the hub cannot '
                'be reached; give a local folder with the model, or set HF_HOME to a cache that '
                'has it'
            )
        except EntryNotFoundError:
            pass
        except Exception as e:  # an unknown or private model, an impossible name, a proxy
            raise ValueError(
                f'{name} is neither a local folder nor a model that the hub gives '
                f'({type(e).__name__}); check the name'
            ) from e
    raise ValueError(nothing)


def _load(path):
    """Return the content of a .json, .safetensors or .bin file.

    Raises ValueError if the file cannot be read.
    """
    try:
        if path.endswith('.json'):
            with open(path, encoding='utf-8') as f:
                return json.load(f)
        if path.endswith('.safetensors'):
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as e:  # each of the three readers raises its own types
        reason = type(e).__name__
        raise ValueError(f'{path} cannot be read, it may be cut off ({reason}); get it anew') from e
