"""Export a model that nanoNorm trained as a folder for Hugging Face transformers.

    python export.py out-gpt2-cpr hf-gpt2-cpr

    from transformers import pipeline
    print(pipeline('text-generation', 'hf-gpt2-cpr')('Once'))

OUT_DIR is the out_dir of a run or the path of a checkpoint. The folder HF_DIR holds the config, the
weights in safetensors, and the tokenizer. GPT2LMHeadModel.from_pretrained reads it, and train.py
and sample.py take it as --init_from. Biases that the model lacks are exported as zeros.
"""

import os
from pathlib import Path

import torch

from data.tokenizers import add_bpe_file, tokenizer_of
from model import GELU_APPROXIMATE, is_conv1d
from runtime import checkpoint
from runtime.errors import Arguments, border, fail
from runtime.files import replacing


def model_of(gpt, end):
    """Return a transformers.GPT2LMHeadModel with the weights of `gpt`, a GPT.

    end: the id of the end-of-text token, or None.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    own = gpt.config
    activation = {approximate: name for name, approximate in reversed(GELU_APPROXIMATE.items())}
    config = GPT2Config(
        vocab_size=own.vocab_size,
        n_positions=own.block_size,
        n_embd=own.n_embd,
        n_layer=own.n_layer,
        n_head=own.n_head,
        activation_function=activation[own.gelu_approximate],
        bos_token_id=end,
        eos_token_id=end,
        resid_pdrop=own.dropout,
        embd_pdrop=own.dropout,
        attn_pdrop=own.dropout,
    )
    theirs, weights = GPT2LMHeadModel(config), gpt.state_dict()
    state = {}
    for name, tensor in theirs.state_dict().items():
        if name not in weights and name.endswith('.bias'):
            state[name] = torch.zeros_like(tensor)
        else:
            state[name] = weights[name].t() if is_conv1d(name) else weights[name]
    theirs.load_state_dict(state)
    # the pipeline generates 256 tokens by default, which may exceed the model's positions
    theirs.generation_config.max_new_tokens = min(256, own.block_size // 2)
    return theirs


def tokenizer_for_transformers(tokens, block_size):
    """Return a PreTrainedTokenizerFast equivalent to `tokens`, a CharTokenizer or GPT2Tokenizer."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    special = {}
    if tokens.meta['tokenizer'] == 'char':
        ids = {c: i for i, c in enumerate(tokens.itos)}
        converted = Tokenizer(models.BPE(vocab=ids, merges=[]))
        converted.pre_tokenizer = pre_tokenizers.Split(Regex(r'[\s\S]'), behavior='isolated')
        converted.decoder = decoders.Fuse()
    else:
        name = '<|endoftext|>'
        special = {'bos_token': name, 'eos_token': name, 'unk_token': name}
        converter = TikTokenConverter(pattern=tokens.pattern, extra_special_tokens=[name])
        ranks = tokens.encoding._mergeable_ranks  # in memory already: no need to read a file
        converter.load_tiktoken_bpe = lambda _: ranks
        converted = converter.converted()
    return PreTrainedTokenizerFast(
        tokenizer_object=converted,
        model_max_length=block_size,
        clean_up_tokenization_spaces=False,
        **special,
    )


def main():
    arguments = Arguments(__doc__)
    arguments.add_argument('out_dir', metavar='OUT_DIR')
    arguments.add_argument('hf_dir', metavar='HF_DIR', type=Path, help='must not exist yet')
    add_bpe_file(arguments)
    args = arguments.parse_args()
    for folder in (args.hf_dir, Path(f'{args.hf_dir}.tmp')):
        if folder.exists():
            fail(f'{folder} is there already; name another folder, or remove it')
    path = args.out_dir
    if not checkpoint.is_at(path):
        path = os.path.join(args.out_dir, 'ckpt.pt')
    gpt, saved = checkpoint.load_model(path)
    tokens = tokenizer_of(path, saved, args.bpe_file)
    try:
        with replacing(args.hf_dir) as temporary:
            model_of(gpt, tokens.end).save_pretrained(temporary)
            tokenizer_for_transformers(tokens, gpt.config.block_size).save_pretrained(temporary)
    except ImportError as e:
        fail(f'{e.name} is not installed; run: pip install transformers')
    except Exception as e:  # disk errors: safetensors raises its own types
        fail(f'cannot write {args.hf_dir} ({e}); make room, or choose another folder')
    print(f'{args.hf_dir}: {sum(f.stat().st_size for f in args.hf_dir.iterdir()) / 1e6:.1f} MB')


if __name__ == '__main__':
    with border():
        main()
