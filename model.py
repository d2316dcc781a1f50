"""GPT-2: the model (Radford et al. 2019), and loading GPT-2 weights in the format of Hugging Face transformers.

Classes, modules and parameters carry nanoGPT's names, so that state dicts of the two programs are interchangeable.
Shapes in comments: B sequences, T tokens each, C = n_embd channels, V = vocab_size.
"""

import json
import math
import os
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F


@dataclass
class GPTConfig:
    """The sizes of a GPT; ValueError where no GPT can have them."""

    block_size: int = 1024  # longest sequence, in tokens
    vocab_size: int = (
        50304  # GPT-2's 50257 rounded up to a multiple of 64, which matrix products like
    )
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in Linear and LayerNorm, as GPT-2; False is a little better and faster
    gelu_approximate: str = (
        'none'  # nn.GELU's: nanoGPT trains with the exact GELU, GPT-2 was trained with 'tanh'
    )

    def __post_init__(self):
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name}={getattr(self, name)} must be at least 1')
        if self.n_embd % self.n_head:
            raise ValueError(
                f'n_embd={self.n_embd} is not divisible by n_head={self.n_head}: each head takes an equal '
                f'share of the channels; set n_embd={self.n_head * math.ceil(self.n_embd / self.n_head)}'
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout={self.dropout} must be at least 0 and less than 1')
        if self.gelu_approximate not in ('none', 'tanh'):
            raise ValueError(f"gelu_approximate='{self.gelu_approximate}' must be 'none' or 'tanh'")

    def model_args(self):
        """The dict that a checkpoint keeps. nanoGPT's GPTConfig takes it too, unless the model needs GPT-2's GELU."""
        args = asdict(self)
        if self.gelu_approximate == 'none':
            del args['gelu_approximate']
        return args


class LayerNorm(nn.Module):
    """nn.LayerNorm over the last dimension of `ndim` channels, under nanoGPT's signature."""

    def __init__(self, ndim, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(
            config.n_embd, 3 * config.n_embd, bias=config.bias
        )  # queries, keys, values
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.register_load_state_dict_pre_hook(_drop_causal_mask)

    def forward(self, x):  # (B, T, C) -> (B, T, C)
        B, T, C = x.shape
        q, k, v = (
            y.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
            for y in self.c_attn(x).split(C, dim=2)
        )
        y = F.scaled_dot_product_attention(
            q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True
        )
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.resid_dropout(self.c_proj(y))


def _drop_causal_mask(module, state_dict, prefix, *_):
    """Checkpoints of older programs hold the causal mask as buffers of the attention; nothing here needs it."""
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
    def __init__(self, config):
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

        self.apply(self._init_weights)
        # each block adds two projections to the residual stream: GPT-2 keeps the variance of their sum
        for name, p in self.named_parameters():
            if name.endswith('c_proj.weight'):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))

    @staticmethod
    def _init_weights(module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, idx, targets=None):
        """Logits and, where there are targets, the loss.

        idx: (B, T) token ids, T <= block_size (ValueError where it is longer).
        targets: (B, T) ids of the tokens that follow, -1 where none counts; or None.
        Returns ((B, T, V) logits, mean cross entropy in nats a token) with targets, and without them
        ((B, 1, V) logits of the last position, None): generation needs no more.
        """
        T = idx.shape[1]
        if T > self.config.block_size:
            raise ValueError(
                f'a sequence of {T} tokens is longer than block_size={self.config.block_size}'
            )
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
        """Number of parameters; without the position embeddings unless non_embedding=False.

        The token embeddings count always: tied, they are the weights of the last layer.
        """
        n = sum(p.numel() for p in self.parameters())
        return n - self.transformer.wpe.weight.numel() if non_embedding else n

    def estimate_mfu(self, fwdbwd_per_iter, dt, peak_flops):
        """Model FLOPs utilization: the share of peak_flops (FLOP/s) that an iteration of dt seconds makes use of.

        fwdbwd_per_iter: sequences of block_size tokens that the iteration takes forward and backward.
        A token costs 6 N + 12 L H Q T FLOPs (PaLM, arXiv 2204.02311, Appendix B).
        """
        N, L, T = self.get_num_params(), self.config.n_layer, self.config.block_size
        H, Q = self.config.n_head, self.config.n_embd // self.config.n_head
        flops_per_iter = (6 * N + 12 * L * H * Q * T) * T * fwdbwd_per_iter
        return flops_per_iter / dt / peak_flops

    def crop_block_size(self, block_size):
        """Shorten the longest sequence, e.g. to fine-tune GPT-2 (1024) on less memory. ValueError where it grows."""
        if block_size > self.config.block_size:
            raise ValueError(
                f'block_size={block_size} is more than the {self.config.block_size} the model has; '
                f'it can only be cropped'
            )
        self.config = replace(self.config, block_size=block_size)
        wpe = self.transformer.wpe
        wpe.weight = nn.Parameter(wpe.weight.detach()[:block_size].clone())
        wpe.num_embeddings = block_size

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """Yield the tokens that continue idx, one position at a time, each (B, 1), as they are sampled.

        idx: (B, T) token ids, T >= 1; the last block_size of them are what the model sees.
        temperature: divides the logits; 0 takes the likeliest token. top_k: samples from the k likeliest tokens only.
        ValueError, at the first token asked for, where an argument is none of these.
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
        """idx (B, T) and the max_new_tokens tokens that stream() continues it with: (B, T + max_new_tokens)."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, temperature, top_k)], dim=1)

    @classmethod
    def from_pretrained(cls, name_or_folder, override_args=None):
        """GPT with the weights of a GPT-2 in transformers' format, in float32.

        name_or_folder: 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', any other GPT-2 on the hub, or a local folder
        with config.json and model.safetensors (in one or several files) or pytorch_model.bin.
        override_args: {'dropout': float} or None. Its logits are those of transformers.GPT2LMHeadModel.
        ValueError where the model cannot be had or is not one that this class can be.
        """
        override_args = override_args or {}
        if override_args.keys() - {'dropout'}:
            raise ValueError(
                f'only dropout can be overridden in a pretrained model, not {", ".join(override_args)}'
            )
        config = _config_of(_load(_find(name_or_folder, 'config.json')), name_or_folder)
        model = cls(replace(config, **override_args))

        weights = {
            name.removeprefix('transformer.'): w
            for name, w in _read_weights(name_or_folder).items()
        }
        own = model.state_dict()
        state = {}
        for name in own:
            theirs = 'wte.weight' if name == 'lm_head.weight' else name.removeprefix('transformer.')
            if theirs not in weights:
                raise ValueError(
                    f'{name_or_folder} is not a complete GPT-2: it lacks the weights {theirs}'
                )
            state[name] = weights[theirs].t() if is_conv1d(theirs) else weights[theirs]
            if state[name].shape != own[name].shape:
                raise ValueError(
                    f'{name_or_folder} contradicts its config.json: {theirs} is of shape '
                    f'{tuple(weights[theirs].shape)}'
                )
        model.load_state_dict(state)
        return model


# transformers' names of the two activations that GPT-2s have, as nn.GELU's argument
GELU_APPROXIMATE = {'gelu_new': 'tanh', 'gelu_pytorch_tanh': 'tanh', 'gelu': 'none'}


def is_conv1d(name):
    """Whether transformers has the parameter in a Conv1D, which multiplies from the right: a Linear's, transposed."""
    return name.endswith(('c_attn.weight', 'c_fc.weight', 'c_proj.weight'))


def _config_of(hf, name):
    """GPTConfig for `hf`, the dict of a config.json. ValueError where it asks for what GPT above does not compute."""
    if hf.get('model_type') != 'gpt2':
        raise ValueError(
            f'{name} is no GPT-2: its config.json says model_type={hf.get("model_type")!r}'
        )
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
            raise ValueError(
                f'{name} is a GPT-2 that cannot be loaded: its config.json says {key}={hf[key]!r}, '
                f'and only {" or ".join(map(repr, values))} is possible here'
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
    """{parameter name: tensor} of a folder or hub model, from whichever of transformers' files it has."""
    path = _find(name, 'model.safetensors', 'model.safetensors.index.json', 'pytorch_model.bin')
    if not path.endswith('.index.json'):
        return _load(path)
    weights = {}
    for part in sorted(set(_load(path)['weight_map'].values())):
        weights |= _load(_find(name, part))
    return weights


def _find(name, *files):
    """Path of the first of `files` that a local folder has, or a hub model, from which it is downloaded.

    ValueError where it has none of them, or the hub does not give it.
    """
    nothing = (
        f'{name} is not a whole model in the format of transformers: it has no {" or ".join(files)}'
    )
    if os.path.isdir(name):
        for file in files:
            if os.path.isfile(os.path.join(name, file)):
                return os.path.join(name, file)
        raise ValueError(nothing)

    from huggingface_hub import hf_hub_download  # here, since only this one way to a model needs it
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for file in files:
        try:
            return hf_hub_download(name, file)
        except (
            LocalEntryNotFoundError
        ):  # not in the cache, and the hub was not asked: the next file may be there
            nothing = (
                f'{name} is neither a local folder nor in the cache of the hub, and the hub cannot be reached; '
                f'give a local folder with the model, or set HF_HOME to a cache that has it'
            )
        except EntryNotFoundError:
            pass
        except Exception as e:  # an unknown or private model, a name that cannot be one, a proxy: the client has many
            raise ValueError(
                f'{name} is neither a local folder nor a model that the hub gives '
                f'({type(e).__name__}); check the name'
            ) from e
    raise ValueError(nothing)


def _load(path):
    """What a .json, .safetensors or .bin file holds. ValueError where it cannot be read."""
    try:
        if path.endswith('.json'):
            with open(path, encoding='utf-8') as f:
                return json.load(f)
        if path.endswith('.safetensors'):
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as e:  # each of the three readers has its own errors
        raise ValueError(
            f'{path} cannot be read, it may be cut off ({type(e).__name__}); get it anew'
        ) from e
