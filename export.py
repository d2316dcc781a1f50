"""Convert a checkpoint of nanoNorm: for Hugging Face transformers, to one file, or to a folder.

    python export.py out-gpt2-cpr hf-gpt2-cpr                    a model for transformers
    python export.py out/ckpt-000100 ckpt.pt --to=file           one file, as nanoGPT has it
    python export.py out/ckpt.pt out/ckpt-000100 --to=folder     a sharded folder

OUT_DIR is the out_dir of a run, whose newest checkpoint is taken, or the path of a checkpoint:
a file, or a folder that a run with sharded_checkpoint=True wrote. TARGET must not exist.

--to=hf writes a folder with the config, the weights in safetensors, and the tokenizer:

    from transformers import pipeline
    print(pipeline('text-generation', 'hf-gpt2-cpr')('Once'))

GPT2LMHeadModel.from_pretrained reads it, and so do train.py and sample.py by --init_from. Biases
that the model lacks are exported as zeros. --to=file and --to=folder keep everything that a run
needs to resume.
"""

import os

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


def write_hf(target, model, tokens):
    from transformers.utils import logging

    logging.disable_progress_bar()  # an error must have a line of its own
    with replacing(target) as folder:
        model_of(model, tokens.end).save_pretrained(folder)
        tokenizer_for_transformers(tokens, model.config.block_size).save_pretrained(folder)


def size(path):
    """Return the bytes of a file, or of the files in a folder."""
    files = os.scandir(path) if os.path.isdir(path) else [path]
    return sum(os.path.getsize(file) for file in files)


def main():
    arguments = Arguments(__doc__)
    arguments.add_argument('out_dir', metavar='OUT_DIR', help="a run's folder, or a checkpoint")
    arguments.add_argument('target', metavar='TARGET', help='must not exist yet')
    text = 'what to write; default: hf, for transformers'
    arguments.add_argument('--to', choices=('hf', 'file', 'folder'), default='hf', help=text)
    add_bpe_file(arguments)
    args = arguments.parse_args()
    target = os.path.normpath(args.target)
    for path in (target, f'{target}.tmp'):
        if os.path.lexists(path):
            fail(f'{path} is there already; choose another TARGET, or remove it')
    source = args.out_dir
    if not checkpoint.is_at(source):
        source = checkpoint.of_run(source)
    try:
        model, saved = checkpoint.load_model(source)
        if args.to == 'hf':
            write_hf(target, model, tokenizer_of(source, saved, args.bpe_file))
        elif args.to == 'file':
            checkpoint.save(target, {**saved, 'model': model.state_dict()})
        else:
            checkpoint.save_folder(target, saved, model)
    except ImportError as e:
        fail(f'{e}; run: pip install transformers tiktoken')
    except Exception as e:  # safetensors and distributed.checkpoint raise types of their own
        reason = (str(e).strip() or type(e).__name__).splitlines()[-1]
        fail(
            f'cannot convert {source} to {target} ({reason}); check that {source} is a checkpoint '
            f'and that there is room for {target}'
        )
    print(f'{target}: {size(target) / 1e6:.1f} MB')


if __name__ == '__main__':
    with border():
        main()
