"""Sample text from a model that nanoNorm or another GPT-2 trainer made, token by token.

    python sample.py --out_dir=out-char --start='def ' --num_samples=3
    python sample.py --init_from=gpt2-xl --start=FILE:prompt.txt

The text goes to standard output.
"""

import signal

import torch

from configurator import check, configure
from data.tokenizers import GPT2Tokenizer, check_vocabulary, read_text, tokenizer_of
from model import GPT
from runtime import checkpoint
from runtime.device import setup
from runtime.errors import border, fail

init_from = 'resume'  # out_dir's newest checkpoint; or a checkpoint's path, 'gpt2', ... or a folder
out_dir = 'out'  # where 'resume' finds the checkpoint
start = '\n'  # the prompt, or FILE:prompt.txt; '<|endoftext|>' is GPT-2's token
num_samples = 10  # how many continuations of the prompt
max_new_tokens = 500  # in each
temperature = 0.8  # lower favours the likely tokens; 0.0 always takes the likeliest
top_k = 200  # draw from the top_k likeliest tokens only
bpe_file = ''  # GPT-2's vocabulary, if neither the data set nor tiktoken has it
seed = 1337  # the same seed draws the same text
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps'; 'auto' takes the fastest there is
dtype = 'auto'  # 'float32', 'bfloat16' or 'float16'; 'auto' takes the device's fastest
compile = False  # torch.compile: takes minutes, pays off for many samples
with border():
    settings, _ = configure(globals())
    check(settings, {'>= 1': 'num_samples max_new_tokens top_k', '>= 0': 'temperature'})


def whole_characters(ids, decode):
    """Yield the text of `ids` in pieces, each as soon as it is certain.

    If a token ends inside a character's UTF-8 bytes, decode() ends in U+FFFD. That character is
    held back until later tokens complete it or show that it cannot be completed.
    """
    pending = []  # the ids since a token last ended at a character's end
    shown = 0  # how many characters of their text were yielded
    for i in ids:
        pending.append(i)
        text = decode(pending)
        certain = text.removesuffix('\ufffd')
        yield certain[shown:]
        shown = len(certain)
        if certain == text:
            pending, shown = [], 0
    yield decode(pending)[shown:]


def prompt_of(start):
    """Return the text of the setting `start`. Fails if it is empty or its file cannot be read."""
    prompt = read_text(start.removeprefix('FILE:')) if start.startswith('FILE:') else start
    if not prompt:
        fail('start is empty: there is nothing to continue; give some text, or leave it out')
    return prompt


def load():
    """Return the model and the tokenizer that the settings name."""
    if init_from == 'resume' or init_from.endswith('.pt') or checkpoint.is_at(init_from):
        path = checkpoint.of_run(out_dir) if init_from == 'resume' else init_from
        model, saved = checkpoint.load_model(path)
        return model, tokenizer_of(path, saved, bpe_file)
    try:
        model = GPT.from_pretrained(init_from)
    except ValueError as e:
        fail(e)
    remedy = "of the models on the hub those with GPT-2's tokenizer can be sampled"
    check_vocabulary(model.config.vocab_size, GPT2Tokenizer.meta, remedy)
    return model, GPT2Tokenizer(bpe_file)


with border():
    if temperature < 1e-10:  # logits divided by it would overflow
        temperature = 0.0
    prompt = prompt_of(start)
    rt = setup(device, dtype, seed)
    model, tokens = load()
    try:
        ids = tokens.encode(prompt)
    except ValueError as e:
        fail(f'start cannot be the prompt: {e}')

    for number in (signal.SIGINT, signal.SIGPIPE):  # Ctrl-C and `| head` end it without a message
        signal.signal(number, signal.SIG_DFL)
    model.eval().to(rt.device)
    if compile:
        model.compile()
    x = torch.tensor([ids], device=rt.device)
    with rt.autocast():
        for _ in range(num_samples):
            print(prompt, end='', flush=True)
            drawn = (token.item() for token in model.stream(x, max_new_tokens, temperature, top_k))
            for text in whole_characters(drawn, tokens.decode):
                print(text, end='', flush=True)
            print('\n---------------')
